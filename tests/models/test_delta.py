"""Delta weights: what is subtracted from a base comes back with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.models.delta import apply_delta
from align.models.load import load_model, load_processor

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_v1_tiny"
NUM_BASE_TOKENS = 369
COMPANIONS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def whole(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / "model.safetensors")
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def is_llama(name: str) -> bool:
    return not name.startswith(("model.mm_projector", "model.vision_tower"))


def make_base(tensors: dict[str, torch.Tensor], *, buffers: bool = True) -> dict[str, torch.Tensor]:
    """A Llama of the same sizes without the seven tokens that Valley adds; numbers that sums do not round."""
    generator = torch.Generator().manual_seed(3)
    base = {}
    for name, tensor in tensors.items():
        if is_llama(name) and (buffers or "inv_freq" not in name):
            rows = NUM_BASE_TOKENS if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor)
            shape = (rows, *tensor.shape[1:])
            base[name] = torch.randint(-64, 64, shape, generator=generator).to(tensor.dtype) / 64
    return base


def make_delta(tensors: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    delta = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in base.items():
        delta[name][: len(tensor)] -= tensor
    return delta


def write(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, pickled: bool = False) -> Path:
    folder.mkdir()
    for name in COMPANIONS:
        shutil.copyfile(GOLDEN / name, folder / name)
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[start::shards]} for start in range(shards)]
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    files = [f"{stem}.{suffix}"] if shards == 1 else [f"{stem}-{i + 1}-of-{shards}.{suffix}" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("shards", "pickled"), [(1, False), (3, False), (1, True), (2, True)])
def test_a_delta_and_its_base_give_the_whole(tmp_path, shards, pickled):
    tensors = whole()
    base = make_base(tensors)
    delta = make_delta(tensors, base)
    folders = [
        write(tmp_path / name, part, shards=shards, pickled=pickled)
        for name, part in (("delta", delta), ("base", base))
    ]
    target = apply_delta(*folders, tmp_path / "whole", allow_pickle=pickled)
    found = stored(target)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        if not is_llama(name):
            assert torch.equal(found[name], tensor)
    added = slice(NUM_BASE_TOKENS, None)
    assert torch.equal(found["lm_head.weight"][added], tensors["lm_head.weight"][added])
    assert not list(tmp_path.glob(".*"))
    load_processor(target)
    model = load_model(target)
    assert model.num_parameters() == load_model(GOLDEN).num_parameters()


def test_sums_are_taken_in_half_precision_as_the_differences_were(tmp_path):
    tensors = whole(torch.float16)
    base = make_base(tensors)
    delta = make_delta(tensors, base)
    folders = write(tmp_path / "delta", delta), write(tmp_path / "base", {n: t.float() for n, t in base.items()})
    found = stored(apply_delta(*folders, tmp_path / "whole"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[name].dtype == torch.float16
    assert torch.equal(found[name], delta[name] + base[name])


def test_buffers_that_only_the_delta_has_are_left_out(tmp_path):
    """Their difference is zero; stored, it would stand in older loaders for the frequencies."""
    tensors = whole()
    base = make_base(tensors, buffers=False)
    folders = write(tmp_path / "delta", make_delta(tensors, base)), write(tmp_path / "base", base)
    found = stored(apply_delta(*folders, tmp_path / "whole"))
    assert set(tensors) - set(found) == {name for name in tensors if "inv_freq" in name}


def test_a_base_that_is_another_model_is_refused(tmp_path):
    tensors = whole()
    base = make_base(tensors)
    delta = write(tmp_path / "delta", make_delta(tensors, base))
    smaller = {name: tensor[:-1] if name == "model.norm.weight" else tensor for name, tensor in base.items()}
    longer = base | {"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}
    shorter = {name: tensor for name, tensor in base.items() if ".layers.1." not in name}
    for label, other, reason in [
        ("smaller", smaller, "model.norm.weight has the shape"),
        ("longer", longer, "1 tensors are not in the delta"),
        ("shorter", shorter, "not in the base"),
    ]:
        with pytest.raises(UserError, match=reason):
            apply_delta(delta, write(tmp_path / label, other), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_opened_or_would_be_lost_is_refused(tmp_path):
    tensors = whole()
    base = make_base(tensors)
    delta = write(tmp_path / "delta", make_delta(tensors, base))
    with pytest.raises(UserError, match="no such folder"):
        apply_delta(delta, tmp_path / "missing", tmp_path / "whole")
    with pytest.raises(UserError, match="pickled"):
        apply_delta(delta, write(tmp_path / "pickled", base, pickled=True), tmp_path / "whole")
    with pytest.raises(UserError, match="not there yet"):
        apply_delta(delta, write(tmp_path / "base", base), delta)
