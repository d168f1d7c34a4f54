"""docs/migrating.md as data: its tables, its examples, and what they make of the settings of another trainer."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable
from typing import Any

from trl import DPOConfig

from align.strict_yaml import parse_yaml
from tests.doc_pages import ROOT, blocks_of

PAGE = ROOT / "docs" / "migrating.md"
BLOCKS = {block.title: block.text for block in blocks_of(PAGE) if block.title is not None}
SECTIONS = {"trl": "From TRL", "llama-factory": "From LLaMA-Factory", "ms-swift": "From ms-swift"}
TRL_FIELDS = {field.name for field in dataclasses.fields(DPOConfig)}
Table = dict[str, tuple[str, ...]]


def section(title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert found
    return found[1]


def table_of(tool: str) -> Table:
    """Their `key`, or `key: value` for one value alone, to what stands for it here; empty for nothing."""
    found: Table = {}
    for theirs, here in re.findall(r"^\| (.*?) \| (.*?) \|$", section(SECTIONS[tool]), re.M):
        ours = () if here.startswith("nothing") else tuple(re.findall(r"`([^`]+)`", here))
        if here.endswith("in `dpo.freeze`"):
            ours = (f"freeze {ours[0]}",)
        elif here.endswith(", a list"):
            ours = (f"list {ours[0]}",)
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", theirs), ours)
    return found


def defaults_of(tool: str) -> dict[str, tuple[str, str]]:
    """What a setting is where it is left out, there and here, as the page says it."""
    column = list(SECTIONS).index(tool)
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", section("What they leave out"), re.M)
    cells = {name: re.split(r" \| ", rest) for name, rest in rows}
    return {name: (found[column], found[-1]) for name, found in cells.items()}


def parsed(text: str) -> dict[str, Any]:
    """An example as keys and values: of a YAML file, or of a command and the variables before it."""
    if "\\\n" not in text:
        return parse_yaml(text)
    words = [part for word in shlex.split(text.replace("\\\n", " ")) for part in _apart(word)]
    found: dict[str, Any] = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    options = [index for index, word in enumerate(words) if word.startswith("--")]
    for index, end in zip(options, [*options[1:], len(words)], strict=True):
        values = [parse_yaml(word) for word in words[index + 1 : end]]
        found[words[index][2:]] = values[0] if len(values) == 1 else values or True
    return {key: parse_yaml(value) if isinstance(value, str) else value for key, value in found.items()}


def _apart(word: str) -> list[str]:
    """
    >>> _apart("--lora_target_modules=all-linear"), _apart("MAX_PIXELS=1")
    (['--lora_target_modules', 'all-linear'], ['MAX_PIXELS=1'])
    """
    return word.split("=", 1) if word.startswith("--") else [word]


def converted(tool: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as the page says that they are written here, with what they leave out."""
    table = table_of(tool)
    result: dict[str, Any] = {"rounds": 1}
    given: set[str] = set()
    frozen: dict[str, bool] = {}
    for key, value in settings.items():
        exact = next((theirs for theirs in table if _says(theirs, key, value)), key)
        if exact in table:
            ours = table[exact]
        else:
            assert key in TRL_FIELDS, f"{key}: {value!r} stands in no row"
            ours = (f"dpo.{key}",)
        for name in ours:
            if name.startswith("freeze "):
                frozen[name.removeprefix("freeze ")] = value
                continue
            is_list, name = name.startswith("list "), name.removeprefix("list ")
            dotted, constant, text = name.partition(": ")
            given.add(dotted)
            _put(result, dotted, _constant(text, key, value) if constant else _listed(value) if is_list else value)
    _add_defaults(result, given, frozen, tool, settings)
    return result


def _add_defaults(
    result: dict[str, Any], given: set[str], frozen: dict[str, bool], tool: str, settings: dict[str, Any]
) -> None:
    adapter = _has_adapter(tool, settings)
    for dotted, (theirs, here) in defaults_of(tool).items():
        if dotted in given or (dotted.startswith("dpo.lora.") and not adapter):
            continue
        value = _default(theirs, settings, adapter)
        if dotted == "dpo.freeze":
            parts = dict.fromkeys(value, True) | frozen
            value = [part for part, is_frozen in parts.items() if is_frozen]
        if value is not None and value != _default(here, settings, adapter):
            _put(result, dotted, value)


def _default(cell: str, settings: dict[str, Any], adapter: bool) -> Any:
    """The value of a cell; None where it is not one but said in words."""
    words: dict[str, Callable[[], Any]] = {
        "`1.0e-4`, without an adapter `1.0e-5`": lambda: 1e-4 if adapter else 1e-5,
        "twice the rank": lambda: 2 * settings.get("lora_rank", 8),
        "`[vision, projector]`, with modules by name `[]`": lambda: (
            [] if _by_name(settings) else ["vision", "projector"]
        ),
        "what makes 16 pairs a step, or more": lambda: -(-16 // _pairs_at_a_time(settings)),
        "`bfloat16` with an adapter and `bf16`, else `float32`": lambda: (
            "bfloat16" if adapter and settings.get("bf16") else None
        ),
    }
    if cell in words:
        return words[cell]()
    only = re.fullmatch(r"`([^`]+)`", cell)
    return parse_yaml(only[1]) if only else None


def _pairs_at_a_time(settings: dict[str, Any]) -> int:
    return settings.get("per_device_train_batch_size", 1) * settings.get("NPROC_PER_NODE", 1)


def _by_name(settings: dict[str, Any]) -> bool:
    return "target_regex" in settings or settings.get("target_modules", "all-linear") != "all-linear"


def _has_adapter(tool: str, settings: dict[str, Any]) -> bool:
    if tool == "trl":
        return settings.get("use_peft", False)
    kind = settings.get("finetuning_type", settings.get("tuner_type", settings.get("train_type", "lora")))
    return kind == "lora"


def _put(result: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for name in sections:
        result = result.setdefault(name, {})
    result[last] = value


def _constant(text: str, key: str, value: Any) -> Any:
    """What a row says, with the value of their key where the key stands in it."""
    found = parse_yaml(text)
    return [value if item == key else item for item in found] if isinstance(found, list) else found


def _listed(value: str) -> list[str]:
    return [name.strip() for name in value.split(",")]


def _says(theirs: str, key: str, value: Any) -> bool:
    """
    >>> _says("pref_loss: sigmoid", "pref_loss", "sigmoid"), _says("pref_loss: sigmoid", "pref_loss", "orpo")
    (True, False)
    """
    name, constant, text = theirs.partition(": ")
    return bool(constant) and name == key and parse_yaml(text) == value
