"""Delta weights and the model they were subtracted from in, the whole model out, shard by shard.

Valley's 13B was published as its difference from LLaMA-13B, whose licence did not allow more. What both have is added;
where the delta has more rows (tokens that were added), these rows are whole already,
as are the tensors that the base does not
have: the projection and the vision tower. Sums are taken in the delta's type, as its authors took the differences.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.errors import UserError
from align.models.files import inside, write_json
from align.models.weights import INDEX_FILE, SINGLE_FILE, has_pickle, shards_of, weight_files

RESIZED = ("model.embed_tokens.weight", "lm_head.weight")
# What a Llama does not have and a delta brings whole.
WHOLE = re.compile(
    r"^model\.(mm_projector|vision_tower|pooling_layer|position_matrix|transformer_delta_encoder|transforemr_adding_layer)\b"
)
# Frequencies that are computed today. Their difference is zero,
# and their sum is right only where the base stores them too.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$")
COPIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".md")


def apply_delta(
    delta: str | os.PathLike, base: str | os.PathLike, target: str | os.PathLike, *, allow_pickle: bool = False
) -> Path:
    """Writes the folder `target`: the sum of the folders `delta` and `base`, with the other files of the delta.

    `allow_pickle`: read pickled weights (.bin) too, without running what is in them. One shard of the delta and one of
    the base are in memory at a time. Gives the folder.

    Raises UserError where the two do not belong together, a folder has no weights, or `target` exists.
    """
    delta, base, target = Path(delta), Path(base), Path(target)
    if target.exists():
        raise UserError("expected a folder that is not there yet", where=str(target), fix="name another, or remove it")
    differences, originals = _Weights(delta, allow_pickle), _Weights(base, allow_pickle)
    _check(differences, originals)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.new-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _write(differences, originals, work)
        for path in sorted(delta.iterdir()):
            if path.suffix in COPIED_SUFFIXES and not path.name.endswith(".index.json"):
                shutil.copyfile(inside(delta, path.name), work / path.name)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def add(name: str, difference: Tensor, original: Tensor) -> Tensor:
    """The sum over what both have, in the type of the difference;
    rows and columns beyond the original stay as they are.

    Raises UserError where the shapes differ and the tensor is not one that grows with the vocabulary.

    >>> add("lm_head.weight", torch.ones(3, 2), torch.ones(2, 2)).tolist()
    [[2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]
    """
    if difference.shape == original.shape:
        return difference + original.to(difference.dtype)
    grows = name in RESIZED and all(a >= b for a, b in zip(difference.shape, original.shape, strict=True))
    if not grows:
        raise UserError(
            f"{name} has the shape {tuple(difference.shape)} in the delta and {tuple(original.shape)} in the base",
            fix="use the base that the delta was made from",
        )
    total = difference.clone()
    total[tuple(slice(0, size) for size in original.shape)] += original.to(difference.dtype)
    return total


class _Weights:
    """The tensors of a folder by name, with the files they lie in; a pickled file is kept while it is read."""

    def __init__(self, folder: Path, allow_pickle: bool) -> None:
        if not folder.is_dir():
            raise UserError("there is no such folder", where=str(folder))
        self.folder = folder
        self.files = weight_files(folder) or self._pickled(allow_pickle)
        self._opened: tuple[Path, dict[str, Tensor]] | None = None
        self.file_of = {name: path for path in self.files for name in self._names(path)}

    def get(self, name: str) -> Tensor:
        path = self.file_of[name]
        if path.suffix == ".bin":
            return self._unpickled(path)[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def _pickled(self, allow_pickle: bool) -> list[Path]:
        if not has_pickle(self.folder):
            raise UserError("expected weights (model.safetensors), found none", where=str(self.folder))
        if not allow_pickle:
            raise UserError(
                "the weights are pickled (.bin), which is not opened by default",
                where=str(self.folder),
                fix="allow it if you trust their author",
            )
        index = self.folder / "pytorch_model.bin.index.json"
        if not index.is_file():
            return [self.folder / "pytorch_model.bin"]
        return shards_of(index)

    def _names(self, path: Path) -> list[str]:
        if path.suffix == ".bin":
            return list(self._unpickled(path))
        with safe_open(path, framework="pt") as file:
            return list(file.keys())

    def _unpickled(self, path: Path) -> dict[str, Tensor]:
        if self._opened is None or self._opened[0] != path:
            self._opened = (path, torch.load(path, map_location="cpu", weights_only=True))
        return self._opened[1]


def _check(differences: _Weights, originals: _Weights) -> None:
    """Every tensor of the delta is in the base or whole by itself, and every tensor of the base is in the delta."""
    unknown = [
        n for n in differences.file_of if n not in originals.file_of and not WHOLE.match(n) and not BUFFERS.search(n)
    ]
    missing = [n for n in originals.file_of if n not in differences.file_of and not BUFFERS.search(n)]
    for names, where, what in ((unknown, originals.folder, "base"), (missing, differences.folder, "delta")):
        if names:
            raise UserError(
                f"expected a base and its delta; {len(names)} tensors are not in the {what}, such as"
                f" {sorted(names)[0]}",
                where=str(where),
                fix="use the base that the delta was made from",
            )


def _write(differences: _Weights, originals: _Weights, folder: Path) -> None:
    """The sums as safetensors, a file for every file of the delta."""
    weight_map, total_size = {}, 0
    count = len(differences.files)
    for number, path in enumerate(differences.files, start=1):
        sums = dict(_sums_of(path, differences, originals))
        filename = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(sums, folder / filename, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(sums, filename))
        total_size += sum(tensor.numel() * tensor.element_size() for tensor in sums.values())
    if count > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _sums_of(path: Path, differences: _Weights, originals: _Weights) -> Iterator[tuple[str, Tensor]]:
    """The sums of the tensors in one file of the delta, in the order of the base's files."""
    names = [name for name, file in differences.file_of.items() if file == path]
    for name in sorted(names, key=lambda name: (str(originals.file_of.get(name, "")), name)):
        if name in originals.file_of:
            yield name, add(name, differences.get(name), originals.get(name)).contiguous()
        elif not BUFFERS.search(name):
            yield name, differences.get(name).contiguous()
