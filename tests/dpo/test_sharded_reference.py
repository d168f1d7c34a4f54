"""Reference log-probabilities and the equivalence check of a model whose weights are
sharded over two processes (ZeRO-3)."""

from __future__ import annotations

import json

import pytest
import torch

from align.dpo.collator import PairCollator
from align.dpo.reference import read_reference
from align.media.images import ImageStore
from align.records import write_jsonl
from tests import tiny_models
from tests.dpo.conftest import KEY, compute, make_pairs
from tests.dpo.sharded_reference import compute_in_pieces
from tests.forks import in_two_processes


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_a_model_that_no_process_holds_gives_the_reference_of_an_unsharded_one(tmp_path, layout):
    pytest.importorskip("deepspeed")
    model, processor = tiny_models.llava_onevision(), tiny_models.llava_onevision_processor()
    model.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    # Seven questions and batches of two: one process has a batch less, and some batches have no image.
    pairs = make_pairs(tmp_path, 7, num_images=(1, 0, 0, 2))
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    in_two_processes(compute_in_pieces, tmp_path, layout)
    collator = PairCollator(processor, ImageStore(tmp_path), layout, always_images=True)
    whole = compute(tmp_path / "whole.safetensors", pairs, collator, lambda: model)
    sharded = read_reference(tmp_path / f"{layout}.safetensors", KEY)
    assert torch.allclose(sharded.logps, whole.logps, atol=1e-5)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    for rank in range(2):
        found = json.loads((tmp_path / f"{layout}-{rank}.json").read_text())
        assert found["held"] < 0.51 * num_weights
        assert found["proof"][0] == "shared"
        assert "agree" in found["proof"][1]
        assert found["freed"], "it would lie beside the model that is trained"
        assert found["dtypes"] == ["torch.bfloat16"]
