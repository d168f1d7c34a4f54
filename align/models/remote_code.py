"""A family's modelling files into a checkpoint folder, so that it opens where this toolkit is not installed.

transformers then imports them with `trust_remote_code=True`. The files are those of the family's classes and all that
they import relatively, side by side under names that tell packages apart; what they import otherwise must be
transformers, torch, numpy or PIL.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

from align.models.families import Family
from align.models.files import read_json, write_json

MODEL_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
RELATIVE_IMPORT = re.compile(r"^(?P<indent> *)from (?P<dots>\.+)(?P<name>\w[\w.]*) import", re.MULTILINE)
# Files that may say, before config.json is asked, which code opens the processor.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def add_code(family: Family, folder: Path) -> None:
    """Copies the files and names them in `auto_map` of config.json and of the processor's files that have one."""
    waiting = {cls.__module__ for cls in (family.config, family.model, family.processor)}
    written: set[str] = set()
    while waiting:
        module = waiting.pop()
        written.add(module)
        text, imported = _flattened(module)
        (folder / f"{_flat_name(module)}.py").write_text(text, encoding="utf-8")
        waiting |= imported - written
    auto_map = _auto_map(family)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "auto_map": auto_map})
    for name in PROCESSOR_FILES:
        content = read_json(folder / name) if (folder / name).is_file() else {}
        if "AutoProcessor" in content.get("auto_map", {}):
            content["auto_map"]["AutoProcessor"] = auto_map["AutoProcessor"]
            write_json(folder / name, content)


def _flattened(module: str) -> tuple[str, set[str]]:
    """A module's text with its relative imports as those of one folder, and the full names of what it so imports."""
    imported: set[str] = set()

    def flat_import(match: re.Match[str]) -> str:
        other = importlib.util.resolve_name(match["dots"] + match["name"], module.rpartition(".")[0])
        imported.add(other)
        return f"{match['indent']}from .{_flat_name(other)} import"

    text = inspect.getsource(importlib.import_module(module))
    return RELATIVE_IMPORT.sub(flat_import, text), imported


def _flat_name(module: str) -> str:
    """A module's name where all lie in one folder.

    >>> _flat_name("align.models.valley_eagle.tiles")
    'tiles_valley_eagle'
    """
    *_, package, name = module.split(".")
    return f"{name}_{package}"


def _auto_map(family: Family) -> dict[str, str]:
    def address(cls: type) -> str:
        return f"{_flat_name(cls.__module__)}.{cls.__name__}"

    models = {auto_class: address(family.model) for auto_class in MODEL_CLASSES}
    return {"AutoConfig": address(family.config), **models, "AutoProcessor": address(family.processor)}
