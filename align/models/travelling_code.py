"""A family's modelling files into a checkpoint folder, so that it opens where this toolkit is not installed.

transformers then imports them with `trust_remote_code=True`. The files are those of the family's package, under names
that tell families apart; they import transformers, torch, numpy, PIL and each other, nothing else of this toolkit.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from align.models.families import Family
from align.models.files import read_json, write_json

MODEL_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
# Files that may say, before config.json is asked, which code opens the processor.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def add_code(family: Family, folder: Path) -> None:
    """Copies the files and names them in `auto_map` of config.json and of the processor's files that have one."""
    package = family.model.__module__.rpartition(".")[0]
    suffix = package.rpartition(".")[2]
    source = Path(str(importlib.import_module(package).__file__)).parent
    modules = [path.stem for path in sorted(source.glob("*.py")) if path.stem != "__init__"]
    for module in modules:
        text = (source / f"{module}.py").read_text(encoding="utf-8")
        for other in modules:
            text = re.sub(rf"^from \.{other} import", f"from .{other}_{suffix} import", text, flags=re.MULTILINE)
        (folder / f"{module}_{suffix}.py").write_text(text, encoding="utf-8")
    auto_map = _auto_map(family, suffix)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "auto_map": auto_map})
    for name in PROCESSOR_FILES:
        content = read_json(folder / name) if (folder / name).is_file() else {}
        if "AutoProcessor" in content.get("auto_map", {}):
            content["auto_map"]["AutoProcessor"] = auto_map["AutoProcessor"]
            write_json(folder / name, content)


def _auto_map(family: Family, suffix: str) -> dict[str, str]:
    def address(cls: type) -> str:
        return f"{cls.__module__.rpartition('.')[2]}_{suffix}.{cls.__name__}"

    models = {auto_class: address(family.model) for auto_class in MODEL_CLASSES}
    return {"AutoConfig": address(family.config), **models, "AutoProcessor": address(family.processor)}
