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

from align.errors import UserError
from align.models.families import FAMILIES, Family
from align.models.files import read_json, write_json

MODEL_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
RELATIVE_IMPORT = re.compile(r"^(?P<indent> *)from (?P<dots>\.+)(?P<name>\w[\w.]*) import", re.MULTILINE)
# Files that may say, before config.json is asked, which code opens the processor.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")

FURTHER = "# What the files above import in turn: loaders before transformers 5 copy only what this file names."


def has_code(folder: Path) -> bool:
    """Whether a checkpoint folder names code that is there: a file in it,
    or one of another repository (`owner/name--`)."""
    entries = []
    for name in ("config.json", *PROCESSOR_FILES):
        named = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        # Code of a tokenizer alone opens no model.
        entries += [value for auto_class, value in (named or {}).items() if auto_class != "AutoTokenizer"]
    texts = [entry for entry in entries if isinstance(entry, str)]
    return any("--" in text or (folder / f"{text.partition('.')[0]}.py").is_file() for text in texts)


def whose_code(folder: Path) -> str | None:
    """`toolkit` where config.json names files that this toolkit writes, `parent` where it names others,
    None without code."""
    if not has_code(folder):
        return None
    named = read_json(folder / "config.json").get("auto_map") or {}
    ours = {entry for family in FAMILIES.values() for entry in _auto_map(family).values()}
    return "toolkit" if set(named.values()) <= ours and named else "parent"


def add_code(family: Family, folder: Path, *, keep_parents: bool = False) -> None:
    """Copies the files and names them in `auto_map` of config.json and of the processor's files that have one.

    `keep_parents`: the entries that are there stay, and ours stand in config.json as `auto_map_toolkit`, from where
    they can be put in their place. Raises UserError where a file of the parent has the name of one of ours.
    """
    texts = _texts(family)
    for name, text in texts.items():
        path = folder / name
        if keep_parents and path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise UserError(
                f"the parent's code has a file {name}, as the toolkit's has", fix="set save.code to parent or toolkit"
            )
        path.write_text(text, encoding="utf-8")
    auto_map = _auto_map(family)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "auto_map_toolkit" if keep_parents else "auto_map": auto_map})
    for name in () if keep_parents else PROCESSOR_FILES:
        content = read_json(folder / name) if (folder / name).is_file() else {}
        if "AutoProcessor" in content.get("auto_map", {}):
            content["auto_map"]["AutoProcessor"] = auto_map["AutoProcessor"]
            write_json(folder / name, content)


def _texts(family: Family) -> dict[str, str]:
    """The files of a family's code by name."""
    entries = {cls.__module__ for cls in (family.config, family.model, family.processor)}
    texts: dict[str, str] = {}
    imports: dict[str, set[str]] = {}
    waiting = set(entries)
    while waiting:
        module = waiting.pop()
        texts[module], imports[module] = _flattened(module)
        waiting |= imports[module] - texts.keys()
    for module in entries:
        further = sorted(_all_imports(module, imports) - imports[module] - {module})
        lines = [f"from .{_flat_name(other)} import __name__ as _{_flat_name(other)}" for other in further]
        if lines:
            texts[module] += "\n".join(["", "", FURTHER, *lines, ""])
    return {f"{_flat_name(module)}.py": text for module, text in texts.items()}


def _all_imports(module: str, imports: dict[str, set[str]]) -> set[str]:
    """What a module imports, and what that imports, and so on.

    >>> sorted(_all_imports("a", {"a": {"b"}, "b": {"c"}, "c": set()}))
    ['b', 'c']
    """
    found: set[str] = set()
    waiting = set(imports[module])
    while waiting:
        other = waiting.pop()
        found.add(other)
        waiting |= imports[other] - found
    return found


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
