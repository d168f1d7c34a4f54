"""Our trainer against stock TRL on the same pairs: the same losses, margins and rewards."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from align.dpo.collator import PairCollator
from align.dpo.trainer import pair_dataset
from tests.dpo.conftest import losses, make_args, make_pairs, train_ours, train_trl, trl_dataset

COMPARED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "entropy",
    "mean_token_accuracy",
    "grad_norm",
    "learning_rate",
)


def assert_same_course(ours, trl, tolerance=5e-5):
    assert len(losses(ours)) == len(losses(trl)) > 0
    for step, (a, b) in enumerate(zip(losses(ours), losses(trl), strict=True), start=1):
        for name in COMPARED:
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=1e-4), f"{name} at step {step}"


@pytest.mark.parametrize("num_images", [(1,), (1, 2), (1, 0, 2)])
def test_plain_batch_equals_the_collator_of_trl(tmp_path, processor, images, num_images):
    pairs = make_pairs(images.root, 4, num_images)
    ours = PairCollator(processor, images)(list(pair_dataset(pairs)))
    theirs = DataCollatorForVisionPreference(processor)(list(trl_dataset(pairs, images)))
    assert set(theirs) == set(ours) - {"pair_index"}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_twenty_steps_with_a_live_reference_equal_trl(tmp_path, processor, model, images, layout):
    pairs = make_pairs(images.root, 12)
    args = {"max_steps": 20}
    trl = train_trl(model, processor, pairs, images, make_args(tmp_path / "trl", **args))
    ours = train_ours(model, processor, pairs, images, make_args(tmp_path / "ours", **args), layout=layout)
    assert_same_course(ours, trl)
