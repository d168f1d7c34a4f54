"""Names of lmms-eval's tasks in, loaded tasks out: checked before a weight is loaded.

The only place, with `model`, that imports lmms-eval. Its package has heavy requirements and changes global settings
when imported, so nothing here is imported at the top.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError
from align.versions import install_extra

# Our name for `lmms_eval_specific_kwargs`; tasks that know no such model take their defaults.
MODEL_NAME = "valley_align"
REFUSED = {
    "generate_until_multi_round": "asks in several rounds",
    "generate_until_agentic": "lets the model act",
    "generate_visual_cot": "wants the model to draw",
}


def require_lmms_eval() -> str:
    """The version of lmms-eval; quiets its log.

    Raises:
        UserError: it, or something that its core imports, is not installed.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError("lmms-eval is not installed", fix=_install())
    if not sys.stderr.isatty():
        # tqdm reads this when it is imported; ours are the only lines of progress in a log.
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        importlib.import_module("lmms_eval.evaluator")
        from loguru import logger
    except ImportError as error:
        raise UserError(f"lmms-eval cannot be imported: {error}", fix=_install()) from None
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level: <8} lmms-eval: {message}")
    return metadata.version("lmms_eval")


def _install() -> str:
    return f"{install_extra('lmms-eval')} (docs/evaluation.md says what suffices)"


def find_tasks(names: list[str], folder: Path | None) -> Any:
    """A TaskManager that knows all the names: of `folder`, where one is given, and of lmms-eval itself.

    Raises:
        UserError: a name is unknown, or stands both in the folder and in lmms-eval.
    """
    if folder is not None and not folder.is_dir():
        raise UserError("there is no such folder of tasks", where=str(folder), fix="check --lmms-eval-tasks")
    Manager = _manager_class()
    own = Manager("WARNING", str(folder), include_defaults=False, model_name=MODEL_NAME) if folder else None
    if own is not None and names and all(own.task_index.get(name, {}).get("type") == "task" for name in names):
        return own
    manager = Manager("WARNING", str(folder) if folder else None, model_name=MODEL_NAME)
    for name, entry in own.task_index.items() if own is not None else ():
        # Of two with one name lmms-eval would take its own.
        if manager.task_index[name].get("yaml_path") != entry.get("yaml_path"):
            raise UserError(f"lmms-eval has a task named {name!r} of its own", where=str(folder), fix="rename yours")
    for name in names:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, n=3)
            raise UserError(
                f"lmms-eval has no task {name!r}" + (f"; the nearest are {', '.join(near)}" if near else ""),
                fix="`align evaluate --lmms-eval list` names them all",
            )
    return manager


def load_task(manager: Any, name: str) -> None:
    """Load a task (or a group of them) with its dataset; the manager keeps it.

    Raises:
        UserError: it asks in a way that is not supported, needs a package, or its dataset cannot be had.
    """
    try:
        loaded = manager.load_task_or_group([name])
    except ImportError as error:
        raise UserError(f"the task needs a package: {error}", where=name, fix="install it") from None
    except Exception as error:
        if hasattr(error, "last_attempt"):
            raise UserError(
                f"the task's dataset cannot be had: {root_cause(error)}",
                where=name,
                fix=(
                    "lmms-eval's tasks fetch their datasets from the Hugging Face Hub once (HF_HOME keeps them; some"
                    " want `hf auth login`); on a machine without network copy that folder, or use tasks with a dataset"
                    " on disk"
                ),
            ) from error
        raise UserError(
            f"the task's own code fails: {root_cause(error)}",
            where=name,
            fix="some tasks want variables of the environment, such as HF_HOME, or OPENAI_API_KEY for a judge",
        ) from error
    for leaf in leaves(loaded):
        kind = getattr(leaf, "OUTPUT_TYPE", None)
        if kind in REFUSED:
            raise UserError(
                f"the task {REFUSED[kind]} ({kind}), which is not supported", where=name, fix="leave it out"
            )


def leaves(loaded: dict[Any, Any]) -> Iterator[Any]:
    """The tasks in what a manager has loaded, out of their groups."""
    for value in loaded.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value[1] if isinstance(value, tuple) else value


def root_cause(error: BaseException) -> str:
    """What went wrong behind tenacity's retries, in one line."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else error
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0]}" if text else type(cause).__name__


@contextmanager
def _by_libyaml() -> Iterator[None]:
    """lmms-eval reads three thousand files to know its tasks: 6 s with Python's parser, below one with libyaml's."""
    if not yaml.__with_libyaml__:
        yield
        return

    def full_load(stream: Any) -> Any:
        # The tags that lmms-eval adds to the slow loader, it adds while it reads.
        loader = type("Loader", (yaml.CFullLoader,), {"yaml_constructors": yaml.FullLoader.yaml_constructors})
        return yaml.load(stream, Loader=loader)

    by_python, yaml.full_load = yaml.full_load, full_load
    try:
        yield
    finally:
        yaml.full_load = by_python


def _manager_class() -> Any:
    from lmms_eval.tasks import TaskManager

    class Manager(TaskManager):
        """Loads each task once. Tasks that have messages of their own are asked with these,
        the others with a prompt."""

        def initialize_tasks(self, *arguments: Any, **options: Any) -> Any:
            with _by_libyaml():
                return super().initialize_tasks(*arguments, **options)

        def load_task_or_group(self, task_list: Any = None, task_type: str = "simple") -> dict[Any, Any]:
            names = (task_list,) if isinstance(task_list, str) else tuple(task_list)
            kept: dict[tuple[str, ...], dict[Any, Any]] = self.__dict__.setdefault("kept", {})
            if names not in kept:
                loaded = super().load_task_or_group(list(names), "simple")
                if all(_has_messages(leaf) for leaf in leaves(loaded)):
                    loaded = super().load_task_or_group(list(names), "chat")
                kept[names] = loaded
            return kept[names]

    return Manager


def _has_messages(task: Any) -> bool:
    """Whether a task generates and says itself how its pictures and texts follow one another."""
    config = getattr(task, "config", None)
    return getattr(task, "OUTPUT_TYPE", None) == "generate_until" and callable(getattr(config, "doc_to_messages", None))
