"""The same equalities on Valley-Eagle, opened from its golden folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from align.dpo.collator import PairCollator
from align.dpo.train import run_dpo
from align.models.load import load_model, load_processor
from align.run.folder import RunDir
from tests.dpo.conftest import compute, make_args, make_pairs, tokenized, train_ours, train_trl
from tests.dpo.test_equals_trl import assert_same_curve
from tests.dpo.test_train import history, make_run, weights

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_eagle_tiny"


@pytest.fixture
def model():
    return load_model(GOLDEN, dtype=torch.float32)


@pytest.fixture
def processor():
    return load_processor(GOLDEN)


@pytest.mark.parametrize("num_images", [(1,), (1, 2, 0)])
def test_valley_eagle_trains_as_with_trl(tmp_path, processor, model, images, num_images):
    pairs = make_pairs(images.root, 6, num_images)
    reference = compute(tmp_path / "r.safetensors", pairs, PairCollator(processor, images, "shared"), lambda: model)
    trl = train_trl(model, processor, pairs, images, make_args(tmp_path / "trl", max_steps=3))
    args = make_args(tmp_path / "ours", max_steps=3)
    ours = train_ours(model, processor, pairs, images, args, layout="shared", reference=reference.columns())
    assert_same_curve(ours, trl)


def test_lengths_counted_from_sizes_are_those_of_the_batch(processor, images):
    pairs = make_pairs(images.root, 6, num_images=(1, 2, 0))
    for layout in ("plain", "shared"):
        collator = PairCollator(processor, images, layout)
        for pair in tokenized(pairs, processor, images):
            batch = collator.collate([pair])
            prompt, chosen, rejected = pair.prompt_tokens, len(pair.chosen_ids), len(pair.rejected_ids)
            expected = [prompt + chosen + rejected] if layout == "shared" else [prompt + chosen, prompt + rejected]
            assert batch["attention_mask"].sum(dim=1).tolist() == expected


def test_a_round_of_valley_eagle_keeps_its_form(tmp_path):
    config = make_run(tmp_path, policy=str(GOLDEN), dpo={"freeze": ["vision"], "projector_learning_rate_multiplier": 3})
    run_dpo(config, 1)
    this = RunDir(config.run_dir).round(1)
    before, after = weights(GOLDEN), weights(this.checkpoint)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any("vision_tower" in name for name in moved)
    assert any("mm_projector" in name for name in moved)
    assert history(this.checkpoint)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "agree" in this.manifest.stage("dpo").notes["shared_prefix"]
    load_model(this.checkpoint)
    load_processor(this.checkpoint)
