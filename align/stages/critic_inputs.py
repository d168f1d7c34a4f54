"""A critic's settings in, what says that it is the same critic out: settings by value, files and functions by content.

Where a file lies does not count: a run may be moved.
"""

from __future__ import annotations

import inspect
import marshal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from align.config import CriticSettings
from align.errors import UserError, reward_faults
from align.run.hashes import content_hash, text_hash
from align.run.manifest import Manifest
from reward.critics.python import split_function

PLACES = ("model", "prompt", "split_prompt", "function", "file")


def critic_settings(critic: CriticSettings) -> dict[str, Any]:
    """The settings that change what the critic says; gates judge what was measured and may
    change without judging again."""
    settings = critic.model_dump(exclude={*PLACES, "batch_size", "gates", "servers", "engine", "options"})
    settings["options"] = _without_places(critic.options)
    members = critic.options.get("critics")
    if isinstance(members, dict):
        settings["options"]["critics"] = {name: _without_places(member) for name, member in members.items()}
    return settings


def _without_places(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: value for name, value in settings.items() if name not in PLACES}


def critic_files(critic: CriticSettings) -> dict[str, str]:
    """Every prompt, function and file that the critic or a member of its panel names, by content."""
    found = {}
    for who, name, value in _named(critic):
        if name != "model":
            found[f"{name} {who}".strip()] = _identity(name, value)
    return found


def check_same_samples(critic: CriticSettings, samples: str) -> None:
    """Finished scores lie beside the manifest that says which samples they are of: those must be these (by hash).

    Raises:
        UserError: they are of others. Scores without a manifest are taken for what they are named.
    """
    for _, name, value in _named(critic):
        path = Path(value) if name == "file" else None
        entry = Manifest(path.parent / "manifest.json").stages().get("score") if path is not None else None
        if entry is not None and entry.inputs.get("samples", samples) != samples:
            raise UserError(
                "these scores are of other samples than this round's",
                where=str(path),
                fix="score the same samples with every critic (copy the round's samples.jsonl into each run)",
            )


def _named(critic: CriticSettings) -> Iterator[tuple[str, str, Any]]:
    """(member or empty, setting, value) of every place that is named."""
    own = {name: getattr(critic, name, None) for name in PLACES}
    members = critic.options.get("critics")
    holders: list[tuple[str, Any]] = [("", own), ("", critic.options)]
    holders += [(str(name), member) for name, member in members.items()] if isinstance(members, dict) else []
    for who, settings in holders:
        for name in PLACES:
            if isinstance(settings, dict) and settings.get(name):
                yield who, name, settings[name]


def _identity(name: str, value: Any) -> str:
    if callable(value):
        return f"{source_hash(value)}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    if name == "function":
        with reward_faults():
            path, function = split_function(value)
        return f"{content_hash(path)}:{function}"
    return content_hash(Path(value)) if Path(value).is_file() else str(value)


def source_hash(function: Callable[..., Any]) -> str:
    """sha256 of a function's source text, or of its compiled code where there is no source."""
    made = function if inspect.isroutine(function) else type(function)
    try:
        return text_hash(inspect.getsource(inspect.unwrap(made)))
    except (OSError, TypeError):
        code = getattr(made, "__code__", None)
        return text_hash(marshal.dumps(code).hex() if code is not None else made.__qualname__)
