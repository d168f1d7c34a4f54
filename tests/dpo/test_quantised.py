"""QLoRA: refused where it cannot work; on a GPU its round ends with whole weights."""

from __future__ import annotations

import sys

import pytest
import torch

from align.dpo.qlora import quantization
from align.dpo.train import run_dpo
from align.errors import UserError
from align.models.load import load_model
from tests.dpo.test_train import history, make_run, round_1, weights

QLORA = {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "quantize": "nf4"}}
GPU = torch.device("cuda", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_is_refused_before_a_weight_is_loaded(tmp_path):
    with pytest.raises(UserError, match="needs a CUDA GPU, and there is none; train the adapter without it"):
        run_dpo(make_run(tmp_path, dpo=QLORA), 1)


def test_unknown_kinds_missing_libraries_and_spread_weights_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"quantize is 'int3'; use one of nf4, fp4"):
        quantization({"quantize": "int3"}, GPU, "ddp")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantization({"quantize": "nf4"}, GPU, "ddp")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"does not go with launch\.strategy zero3"):
        quantization({"quantize": "nf4"}, GPU, "zero3")
    assert quantization({"r": 4}, GPU, "zero3") is None
    assert quantization(None, GPU, "ddp") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_quantised_policy_learns_an_adapter_that_is_merged_into_whole_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = make_run(tmp_path, dpo=QLORA | {"learning_rate": 1e-2})
    run_dpo(config, 1)
    checkpoint = round_1(config).checkpoint
    assert history(checkpoint)[0]["loss"] == pytest.approx(0.6931, abs=0.01)
    before, after = weights(tmp_path / "policy"), weights(checkpoint)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    load_model(checkpoint)
