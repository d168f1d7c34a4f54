"""A model in, a checkpoint folder out that opens wherever its parent opened.

Tensor names are those of the parent, whatever names the weights have in memory or in a gathered state dict. config.json
is the parent's, edited and never generated anew, because transformers 5 drops keys (`rope_theta`, `rope_scaling`,
`torch_dtype`) whose absence older loaders do not notice. Everything is written into a folder beside the final one, held
against the parent, and put in place by a rename: a folder that is there is whole.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel

from align.errors import UserError
from align.models.families import Family, family_of
from align.models.files import files_inside, inside, read_json, write_json
from align.models.remote_code import add_code, has_code
from align.models.weights import INDEX_FILE, SINGLE_FILE, TensorInfo, tensor_table, weight_files

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Code = Literal["parent", "toolkit", "both", "none"]
# What wrappers put in front of, or into, the names of a state dict.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# A parent's tokenizer, processor and licence. Whatever else lies in its folder tells of the parent, not of the child.
COMPANION_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
    "valley_processor.json",
    "processor_settings.json",
    "LICENSE*",
    "NOTICE*",
)


def save_checkpoint(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | os.PathLike,
    *,
    parent: str | os.PathLike | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    code: Code = "parent",
    max_shard_size: str | int = "5GB",
    extra_files: Mapping[str, str | Path] | None = None,
) -> Path:
    """Saves weights, config, tokenizer and processor; an existing checkpoint at `folder` is replaced. Gives the folder.

    `parent`: the folder the model came from, by default the one it remembers; without one, the files are those of
    transformers with the legacy keys put back. `state_dict`: the weights where the model's own are sharded or wrapped,
    as accelerate, FSDP or DeepSpeed gather them. `dtype`: cast floating-point weights,
    by default they stay as they are.
    `code`, of our own families: which modelling files make the folder open with
    `trust_remote_code=True` where this toolkit
    is not installed. `parent`: those that the parent brought, the toolkit's where it brought none; `toolkit`: the
    toolkit's in their place; `both`: as `parent`, with the toolkit's beside them; `none`: the toolkit's never.
    `extra_files`: further files of the checkpoint by name, as text or as a path to copy. Call it on one process only.

    Raises UserError where the tensors are not exactly those of the parent, with the names that are missing or too many.
    """
    final = Path(folder)
    parent_folder = _parent(model, parent)
    family = family_of(model)
    expected = tensor_table(parent_folder) if parent_folder else {}
    weights = plain_weights(model, state_dict, dtype)
    work = _fresh_sibling(final)
    try:
        if family is not None:
            # A parent that transformers saved has the names in memory.
            renamed = {name if name in expected else _name_on_disk(name, family): t for name, t in weights.items()}
            if parent_folder is not None:
                renamed |= _stored_buffers(parent_folder, family)
            kept = _with_tied_copies(model, renamed, set(expected))
            _check_tensors({name: tuple(tensor.shape) for name, tensor in kept.items()}, expected)
            _write_weights(kept, work, max_shard_size)
        else:
            kept = _with_tied_copies(model, weights, set(expected))
            _save_as_transformers(model, kept, work, max_shard_size)
            _check_tensors({name: info.shape for name, info in tensor_table(work).items()}, expected)
        _write_config(model, work, parent_folder, stored_dtype(weights))
        keeps_parents = code == "none" or (code != "toolkit" and parent_folder is not None and has_code(parent_folder))
        _write_companions(processor, work, parent_folder, with_code=family is None or keeps_parents)
        if family is not None and (code == "both" or not keeps_parents):
            add_code(family, work, keep_parents=keeps_parents)
        for name, content in (extra_files or {}).items():
            _write_extra(work / name, content)
        _replace(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def original_names(names: Iterable[str], family: Family) -> list[str]:
    """Names on disk for names in memory, of a state dict, or on disk already.

    >>> from align.models.families import FAMILIES
    >>> original_names(["model.vision_tower.vision_tower.post_layernorm.bias"], FAMILIES["ValleyQwen2ForCausalLM"])
    ['model.vision_tower.vision_tower.vision_model.post_layernorm.bias']
    """
    return [_name_on_disk(name, family) for name in names]


def stored_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The type of most of the floating-point weights, which is what config.json calls the model's."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in weights.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__)


def _parent(model: PreTrainedModel, parent: str | os.PathLike | None) -> Path | None:
    if parent is not None:
        if not (Path(parent) / "config.json").is_file():
            raise UserError("expected the parent's checkpoint folder, found no config.json in it", where=str(parent))
        return Path(parent)
    remembered = Path(getattr(model.config, "_name_or_path", "") or "")
    return remembered if str(remembered) != "." and (remembered / "config.json").is_file() else None


def plain_weights(
    model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The weights under the model's own names, detached, of one type where asked for."""
    own_names = set(model.state_dict())
    weights = {}
    for name, tensor in (state_dict if state_dict is not None else model.state_dict()).items():
        cast = tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()
        weights[_unwrapped(name, own_names)] = cast
    return weights


def _unwrapped(name: str, own_names: set[str]) -> str:
    """A name without what wrappers add to it.

    DDP and DeepSpeed put `module.` in front; ZeRO-3 doubles the backbone's prefix (`model.model.`).
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    for prefix in ("", "module.", "model.", "module.model."):
        if name.startswith(prefix) and name.removeprefix(prefix) in own_names:
            return name.removeprefix(prefix)
    return name


def _name_on_disk(name: str, family: Family) -> str:
    for pattern, replacement in family.names_on_disk:
        name = re.sub(pattern, replacement, name)
    return name


def _stored_buffers(parent: Path, family: Family) -> dict[str, torch.Tensor]:
    """The parent's buffers that are computed today, so that its older loaders find them where they were."""
    found = {}
    for path in weight_files(parent) if family.stored_buffers else []:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if any(re.search(p, name) for p in family.stored_buffers)]  # noqa: SIM118
            found.update({name: file.get_tensor(name) for name in names})
    return found


def _with_tied_copies(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], stored_by_parent: set[str]
) -> dict[str, torch.Tensor]:
    """Weights that are tied to others only where the parent stores them too, then as tensors of their own.

    Names of modules in front of a weight's own may be others on disk.
    """
    tied = dict(model.all_tied_weights_keys)
    kept = {name: tensor for name, tensor in weights.items() if name not in tied}
    for name, source in tied.items():
        own_name = "." + ".".join(name.split(".")[-2:])
        if any(f".{stored}".endswith(own_name) for stored in stored_by_parent):
            kept[name] = weights[name if name in weights else source].clone()
    return kept


def _save_as_transformers(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path, max_shard_size: str | int
) -> None:
    """Without the generation config, which transformers refuses to save where its settings do not go together."""
    generation_config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    finally:
        model.generation_config = generation_config


def _write_weights(weights: dict[str, torch.Tensor], folder: Path, max_shard_size: str | int) -> None:
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for filename, names in split.filename_to_tensors.items():
        shard = {name: weights[name].contiguous() for name in names}
        save_file(shard, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX_FILE, index)
    assert split.is_sharded or (folder / SINGLE_FILE).is_file()


def _check_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, TensorInfo]) -> None:
    """Holds names and shapes against the parent's, where it has safetensors."""
    if not expected:
        return
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise UserError(
            f"expected the {len(expected)} tensors of the parent; missing {_few(missing)}, too many {_few(extra)}",
            fix="pass the state dict of the whole model",
        )
    for name, info in expected.items():
        if info.shape != found[name]:
            raise UserError(f"expected {name} to have the parent's shape {info.shape}, found {found[name]}")


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})" if names else "none"


def _write_config(model: PreTrainedModel, folder: Path, parent: Path | None, dtype: torch.dtype) -> None:
    """config.json and generation_config.json."""
    dtype_name = str(dtype).removeprefix("torch.")
    if parent is not None:
        config = read_json(parent / "config.json")
        for key in {"torch_dtype", "dtype"} & set(config) or {"torch_dtype"}:
            config[key] = dtype_name
    else:
        config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
        config.pop("_name_or_path", None)
        for part in (config, config.get("text_config") or {}):
            part.update(_legacy_keys(part, dtype_name))
    write_json(folder / "config.json", config)
    if parent is not None and (parent / "generation_config.json").is_file():
        shutil.copyfile(parent / "generation_config.json", folder / "generation_config.json")
    elif model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")


def _legacy_keys(config: dict[str, Any], dtype_name: str) -> dict[str, Any]:
    """The keys that loaders older than transformers 5 read, from their successors."""
    rope = config.get("rope_parameters")
    legacy: dict[str, Any] = {"torch_dtype": dtype_name} if "dtype" in config or "architectures" in config else {}
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
        is_plain = scaled.get("rope_type", "default") == "default"
        legacy.update(rope_theta=rope["rope_theta"], rope_scaling=None if is_plain else scaled)
    return legacy


def _write_companions(processor: ProcessorMixin, folder: Path, parent: Path | None, *, with_code: bool) -> None:
    """Tokenizer, processor and the parent's own code: copied where there is a parent, else written by the processor."""
    companions = [path for path in sorted(parent.iterdir()) if _is_companion(path.name, with_code)] if parent else []
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in companions):
        processor.save_pretrained(folder)
        _forget_origin(folder / "tokenizer_config.json")
        return
    for path in companions:
        assert parent is not None
        inside(parent, path.name)
        if path.is_dir():
            files_inside(path)
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    if hasattr(processor, "save_settings"):
        processor.save_settings(folder)


def _forget_origin(tokenizer_config: Path) -> None:
    """Takes out of a written tokenizer how it was opened, which transformers 5 keeps among its settings."""
    if tokenizer_config.is_file():
        content = read_json(tokenizer_config)
        kept = {key: value for key, value in content.items() if key not in ("is_local", "local_files_only")}
        if kept != content:
            write_json(tokenizer_config, kept)


def _is_companion(name: str, with_code: bool) -> bool:
    return any(fnmatch(name, pattern) for pattern in (*COMPANION_FILES, *(["*.py"] if with_code else [])))


def _write_extra(path: Path, content: str | Path) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_text(content, encoding="utf-8")


def _fresh_sibling(final: Path) -> Path:
    """An empty folder beside the final one; what a killed process left there is removed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.is_file():
        raise UserError("expected a folder to save the checkpoint in, found a file", where=str(final))
    for moved_away in final.parent.glob(f".{glob.escape(final.name)}.old-*"):
        if not final.exists():
            moved_away.rename(final)
    for kind in ("old", "new"):
        for left_over in final.parent.glob(f".{glob.escape(final.name)}.{kind}-*"):
            shutil.rmtree(left_over, ignore_errors=True)
    work = final.parent / f".{final.name}.new-{os.getpid()}"
    work.mkdir()
    return work


def _replace(work: Path, final: Path) -> None:
    if final.exists():
        old = final.parent / f".{final.name}.old-{os.getpid()}"
        final.rename(old)
        work.rename(final)
        shutil.rmtree(old)
    else:
        work.rename(final)
