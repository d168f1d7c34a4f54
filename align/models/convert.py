"""A checkpoint folder in one layout in, the same weights in another layout out, tensor by tensor and bit by bit.

`CONVERSIONS` names what there is. Values and types are never changed, except where a delta is added to its base; one
file of weights is in memory at a time. A folder is written beside its final place and moved there whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from align.errors import UserError
from align.models.delta import apply_delta
from align.models.files import inside, read_json, write_json
from align.models.llava_lmms import hf_layout
from align.models.weights import INDEX_FILE, SINGLE_FILE, tensor_table, weight_files

DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
Rename = Callable[[str], str]


@dataclass(frozen=True)
class Converted:
    """The folder that was made, what it holds, and how many rows of the vocabulary, all padding, were left out."""

    folder: Path
    num_tensors: int
    num_bytes: int
    num_dropped_rows: int = 0


@dataclass(frozen=True)
class Conversion:
    """A layout to convert to: `write(source, work, base, allow_pickle)` fills the folder `work`,
    gives the dropped rows."""

    description: str
    write: Callable[[Path, Path, Path | None, bool], int]
    needs_base: bool = False


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: str,
    base: str | os.PathLike | None = None,
    allow_pickle: bool = False,
) -> Converted:
    """Writes the folder `target`: the checkpoint `source` in the layout `to`, one of `CONVERSIONS`.

    `base`: the model that a delta was subtracted from. `allow_pickle`: read pickled weights (.bin) of a delta too.
    Raises UserError where `target` exists, the layout is unknown or the checkpoint is not one that it can hold.
    """
    source, target = Path(source), Path(target)
    if to not in CONVERSIONS:
        raise UserError(f"expected one of {', '.join(CONVERSIONS)}, found {to!r}", fix="name one of these with --to")
    conversion = CONVERSIONS[to]
    if conversion.needs_base != (base is not None):
        raise UserError(f"{to}: expected {'a' if conversion.needs_base else 'no'} base model", where=str(source))
    if not (source / "config.json").is_file():
        raise UserError("expected a checkpoint folder, found no config.json in it", where=str(source))
    with _whole_folder(target) as work:
        dropped = conversion.write(source, work, Path(base) if base is not None else None, allow_pickle)
    written = tensor_table(target)
    return Converted(target, len(written), sum(info.num_bytes for info in written.values()), dropped)


def _to_hf(source: Path, work: Path, rules: tuple[tuple[str, str], ...]) -> int:
    config = _onevision_config(source)
    canonical = _canonical_names(config)
    table = tensor_table(source)
    num_rows = next(i.shape[0] for name, i in table.items() if canonical(name) == hf_layout.VOCABULARY_TENSORS[0])
    _write_weights(source, work, lambda name: hf_layout.renamed(canonical(name), rules))
    if config["architectures"][0] == hf_layout.HF:
        _copy_other_files(source, work)
        return 0
    image_token_id = hf_layout.write_hf_companions(source, work, config, num_rows)
    write_json(work / "config.json", hf_layout.hf_config(config, image_token_id, _dtype_name(source)))
    _copy_generation_config(source, work)
    return 0


def _to_llava_hf(source: Path, work: Path, base: Path | None, allow_pickle: bool) -> int:
    return _to_hf(source, work, hf_layout.TO_HF)


def _to_native(source: Path, work: Path, base: Path | None, allow_pickle: bool) -> int:
    return _to_hf(source, work, hf_layout.TO_NATIVE)


def _to_lmms(source: Path, work: Path, base: Path | None, allow_pickle: bool) -> int:
    config = _onevision_config(source)
    canonical = _canonical_names(config)
    if config["architectures"][0] == hf_layout.LMMS:
        _write_weights(source, work, canonical)
        _copy_other_files(source, work)
        return 0
    table = tensor_table(source)
    found = next(i.shape[0] for name, i in table.items() if canonical(name) == hf_layout.VOCABULARY_TENSORS[0])
    num_rows = hf_layout.rows_for_lmms(config, found)
    image_token_id = config.get("image_token_index", 151646)
    if image_token_id >= num_rows:
        raise UserError(f"expected image_token_index below {num_rows}, found {image_token_id}", where=str(source))
    _write_weights(source, work, canonical, num_rows)
    hf_layout.write_lmms_companions(source, work, num_rows)
    write_json(work / "config.json", hf_layout.lmms_config(config, num_rows, _dtype_name(source)))
    _copy_generation_config(source, work)
    return found - num_rows


def _with_base(source: Path, work: Path, base: Path | None, allow_pickle: bool) -> int:
    assert base is not None
    work.rmdir()
    apply_delta(source, base, work, allow_pickle=allow_pickle)
    return 0


CONVERSIONS: dict[str, Conversion] = {
    "llava-hf": Conversion(
        "LLaVA-OneVision and LLaVA-Critic as llava-hf publishes them, what vLLM loads", _to_llava_hf
    ),
    "lmms": Conversion("LLaVA-OneVision and LLaVA-Critic as lmms-lab publishes them", _to_lmms),
    "native": Conversion("LLaVA-OneVision under the names that transformers 5 has in memory", _to_native),
    "whole": Conversion("published delta weights (Valley 1) added to their base", _with_base, needs_base=True),
}


def _onevision_config(source: Path) -> dict[str, Any]:
    """config.json. Raises UserError where it is not LLaVA-OneVision's in either layout."""
    config = read_json(source / "config.json")
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in (hf_layout.LMMS, hf_layout.HF):
        raise UserError(
            f"expected {hf_layout.LMMS} or {hf_layout.HF}, found {architecture!r}", where=str(source / "config.json")
        )
    if not weight_files(source):
        raise UserError("expected weights (model.safetensors), found none", where=str(source))
    return config


def _canonical_names(config: dict[str, Any]) -> Rename:
    """From the names of a folder to those of lmms-lab."""
    rules = hf_layout.TO_LMMS if config["architectures"][0] == hf_layout.HF else ()
    return lambda name: hf_layout.renamed(name, rules)


def _write_weights(source: Path, work: Path, rename: Rename, num_rows: int | None = None) -> None:
    """Every file of weights with its tensors renamed, those of the vocabulary cut to `num_rows`."""
    files = weight_files(source)
    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(files, start=1):
        name = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dictionary)
                new = rename(key)
                tensor = file.get_tensor(key)
                is_cut = num_rows is not None and new in hf_layout.VOCABULARY_TENSORS
                tensors[new] = tensor[:num_rows].clone() if is_cut else tensor
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if set(tensors) & set(weight_map):
            raise UserError("two tensors would get one name", where=str(path))
        weight_map.update(dict.fromkeys(tensors, name))
        save_file(tensors, work / name, metadata={"format": "pt"})
    if len(files) > 1:
        write_json(work / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _dtype_name(source: Path) -> str:
    """The type of most of the stored weights."""
    sizes: dict[str, int] = {}
    for info in tensor_table(source).values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    most = max(sizes, key=sizes.__getitem__)
    if most not in DTYPE_NAMES:
        raise UserError(f"expected weights of type {', '.join(DTYPE_NAMES)}, found {most}", where=str(source))
    return DTYPE_NAMES[most]


def _copy_generation_config(source: Path, work: Path) -> None:
    if (source / "generation_config.json").is_file():
        shutil.copyfile(inside(source, "generation_config.json"), work / "generation_config.json")


def _copy_other_files(source: Path, work: Path) -> None:
    """Everything but weights, where only the names of tensors change."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and ".index." not in path.name:
            shutil.copyfile(inside(source, path.name), work / path.name)


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when all went well and vanishes otherwise."""
    if target.exists():
        raise UserError("expected a folder that is not there yet", where=str(target), fix="name another, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.converting-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
