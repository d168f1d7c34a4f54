"""align.yaml in, one typed and fully checked `Config` out; the other way round, a commented file to start from.

An unknown key is an error that names the nearest known one, and all faults are reported at once.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from align.config.schema import Config, CriticSettings
from align.errors import UserError
from align.strict_yaml import BAD_YAML, parse_yaml, yaml_problem

CONFIG_NAME = "align.yaml"

# Keys that have another name now; the error for the old one says so.
RENAMED = {
    "critic.trust_sample": "critic.reliability_sample",
    "dpo.too_long": "dpo.on_too_long",
    "pairs.k": "pairs.top_k_pairs",
    "pairs.mix_earlier": "pairs.replay_fraction",
    "pairs.mix_order": "pairs.replay_order",
    "server.tries": "server.max_attempts",
}


def find_config(explicit: Path | None) -> Path:
    """The configuration file: the one named, else align.yaml in the current folder."""
    path = explicit if explicit is not None else Path(CONFIG_NAME)
    if path.is_dir():
        path = path / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            "no such configuration file", where=str(path), fix="write one with `align init`, or name it with --config"
        )
    return path


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and check a configuration; relative paths in it count from its own folder.

    Raises:
        UserError: bad YAML, unknown keys (with the nearest known one), wrong values: all of them at once.
    """
    path = Path(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=str(path)) from None
    except BAD_YAML as error:
        raise UserError(f"not valid YAML: {yaml_problem(error)}", where=str(path)) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"expected keys and values, found {type(data).__name__}", where=str(path))
    for override in overrides or []:
        _apply_override(data, override)
    return build_config(data, base=path.resolve().parent, where=str(path))


def checkpoint_config(checkpoint: str, overrides: list[str] | None = None) -> Config:
    """The defaults with overrides, for a checkpoint by itself: a run's own keys (questions, critic)
    mean nothing in it."""
    data: dict[str, Any] = {"policy": checkpoint, "questions": os.devnull}
    for override in overrides or []:
        _apply_override(data, override)
    return build_config(data, base=Path.cwd(), where="--set")


def build_config(data: dict[str, Any], *, base: Path, where: str = CONFIG_NAME) -> Config:
    """A checked Config from plain data; relative paths become absolute under `base`."""
    renamed = [f"{old}: is called {new} now" for old, new in RENAMED.items() if _stands_in(data, old)]
    if renamed:
        problems = "\n".join(f"  - {line}" for line in renamed)
        raise UserError(f"the configuration has keys of an earlier version:\n{problems}", where=where)
    try:
        config = Config.model_validate(_without_empty(data))
    except ValidationError as error:
        problems = "\n".join(f"  - {line}" for line in _problems(error))
        raise UserError(f"the configuration has faults:\n{problems}", where=where) from None
    config.run_root = base / config.run_root
    if isinstance(config.questions, list):
        for source in config.questions:
            source.file = base / source.file
            source.image_root = base / source.image_root if source.image_root else None
    elif config.questions is not None:
        config.questions = base / config.questions
    config.pairs_file = base / config.pairs_file if config.pairs_file else None
    config.image_root = base / config.image_root if config.image_root else None
    config.policy = _local_or_hub(config.policy, base)
    _resolve_critic(config.critic, base)
    if config.evaluate.questions:
        config.evaluate.questions = base / config.evaluate.questions
    if config.evaluate.image_root:
        config.evaluate.image_root = base / config.evaluate.image_root
    if config.launch.accelerate_config:
        config.launch.accelerate_config = base / config.launch.accelerate_config
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML, complete and without comments."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def commented_config(values: dict[str, Any] | None = None) -> str:
    """A complete align.yaml with every key explained; `values` (nested) stand in for the defaults."""
    lines = [
        "# align.yaml: one run of sample -> score -> dpo, round after round.",
        "# Relative paths count from this file's folder.",
        "",
    ]
    lines += _section_lines(Config, values or {}, indent=0)
    return "\n".join(lines) + "\n"


def _section_lines(model: type[BaseModel], values: dict[str, Any], indent: int) -> list[str]:
    pad = "  " * indent
    lines: list[str] = []
    for key, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += ["", f"{pad}# {(section.__doc__ or '').strip().splitlines()[0]}", f"{pad}{key}:"]
            lines += _section_lines(section, values.get(key, {}), indent + 1)
            continue
        value = values.get(
            key, "" if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        )
        lines += [f"{pad}# {field.description}{_choices(section)}", f"{pad}{key}: {_scalar(value)}"]
    extra = {key: value for key, value in values.items() if key not in model.model_fields}
    lines += [f"{pad}{key}: {_scalar(value)}" for key, value in extra.items()]
    return lines


def _choices(annotation: Any) -> str:
    values = get_args(annotation)
    return f" [{' | '.join(values)}]" if values and all(isinstance(value, str) for value in values) else ""


def _scalar(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, Path):
        value = str(value)
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
        .strip()
        .removesuffix("...")
        .strip()
    )


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set expects key=value, found {override!r}", fix="for example --set dpo.learning_rate=5e-7")
    try:
        value = parse_yaml(text)
    except BAD_YAML as error:
        raise UserError(f"--set {key}: the value is not valid YAML ({yaml_problem(error)})") from None
    *parents, last = key.strip().split(".")
    node = data
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {key}: {part!r} is a value, not a section")
    node[last] = value


def _without_empty(data: dict[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """An empty value means the default, so that a key can stand in the file with its comment and nothing after it.

    Only the keys of the configuration itself: inside of settings that are handed on (`processor`, `options`) an empty
    value is a value.
    """
    kept = {}
    for key, value in data.items():
        field = model.model_fields.get(key)
        section = field.annotation if field is not None else None
        if value is None:
            continue
        if isinstance(value, dict) and isinstance(section, type) and issubclass(section, BaseModel):
            value = _without_empty(value, section)
        kept[key] = value
    return kept


def _stands_in(data: Any, key: str) -> bool:
    """
    >>> _stands_in({"dpo": {"beta": 0.1}}, "dpo.beta"), _stands_in({"dpo": None}, "dpo.beta")
    (True, False)
    """
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        key = ".".join(path)
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(path[-1], _known_keys(path[:-1]), n=1, cutoff=0.5)
            lines.append(f"{key}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else ""))
        elif fault["type"] == "missing":
            lines.append(f"{key}: required, but not given")
        else:
            problem = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {problem}, found {fault['input']!r}" if key else problem)
    return lines


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _resolve_critic(critic: CriticSettings, base: Path) -> None:
    """Make the places that the critic's settings name absolute: its own, and those of a panel's members."""
    own = {name: getattr(critic, name) for name in ("model", "prompt", "function", "file")}
    for name, value in _resolved_places(own, base).items():
        setattr(critic, name, value)
    options = _resolved_places(critic.options, base)
    if isinstance(options.get("critics"), dict):
        options["critics"] = {
            name: _resolved_places(member, base) if isinstance(member, dict) else member
            for name, member in options["critics"].items()
        }
    critic.options = options


def _resolved_places(settings: dict[str, Any], base: Path) -> dict[str, Any]:
    """Settings with the model, prompts, function and file that they name as absolute paths."""
    found = dict(settings)
    for name, value in settings.items():
        if not isinstance(value, str | Path):
            continue
        if name == "model":
            found[name] = _local_or_hub(str(value), base)
        elif name in ("prompt", "split_prompt") and (base / value).is_file():
            found[name] = str(base / value)
        elif name == "function":
            found[name] = str(base / os.path.expanduser(value))
        elif name == "file":
            found[name] = type(value)(base / os.path.expanduser(value))
    return found


def _local_or_hub(reference: str, base: Path) -> str:
    """A path under `base` when there is one, else the reference as it was (a hub id)."""
    local = base / os.path.expanduser(reference)
    looks_local = local.exists() or reference.startswith((".", "/", "~")) or reference.count("/") != 1
    return str(local) if looks_local else reference
