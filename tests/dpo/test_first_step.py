"""Policy and reference are one when training starts: the first loss shows it, for every loss of TRL."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from align.dpo.collator import REFERENCE_COLUMNS, PairCollator, pair_dataset
from align.dpo.first_step import TOLERANCE, noise_in
from align.dpo.train import run_dpo
from align.dpo.trainer import PairTrainer
from align.errors import UserError
from tests.dpo.conftest import compute, losses, make_args, make_pairs, tokenized, train_ours
from tests.dpo.test_equals_trl import LOSSES
from tests.dpo.test_train import history, make_run, round_1


@pytest.fixture
def pairs(images):
    return make_pairs(images.root, 3, num_images=(1, 2))


def trainer_of(folder, model, processor, images, pairs, reference, **fields):
    return PairTrainer(
        copy.deepcopy(model),
        args=make_args(folder, **fields),
        train_dataset=pair_dataset(tokenized(pairs, processor, images), reference),
        data_collator=PairCollator(processor, images, "shared"),
        processor=processor,
        starts_at_reference=True,
    )


@pytest.mark.parametrize("name", ["sigmoid", *LOSSES])
def test_a_reference_that_is_not_the_policy_is_found_with_every_loss(tmp_path, processor, model, images, pairs, name):
    fields = LOSSES.get(name, {})
    collator = PairCollator(processor, images, "shared")
    reference = compute(tmp_path / "r.safetensors", pairs, collator, lambda: model).columns(fields.get("ld_alpha"))
    trainer = trainer_of(tmp_path, model, processor, images, pairs, reference, **fields)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    if name in ("sigmoid", "sigmoid_norm", "LD-DPO"):
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    # Another model would find the chosen responses likelier and the others less likely, by a nat or so.
    chosen, rejected = REFERENCE_COLUMNS
    other = batch | {chosen: batch[chosen] + 1.5, rejected: batch[rejected] - 0.5}
    trainer._first_to_check = True
    if name == "sft":
        trainer.compute_loss(trainer.model, dict(other))  # this loss has no reference
        return
    with pytest.raises(UserError, match="the reference is not the policy that training starts from"):
        trainer.compute_loss(trainer.model, dict(other))


def test_what_is_computed_for_the_comparison_is_neither_logged_nor_counted(tmp_path, processor, model, images, pairs):
    collator = PairCollator(processor, images, "shared")
    reference = compute(tmp_path / "r.safetensors", pairs, collator, lambda: model).columns()
    fields = {"max_steps": 2, "per_device_train_batch_size": 3}
    checked = trainer_of(tmp_path / "checked", model, processor, images, pairs, reference, **fields)
    checked.train()
    args = make_args(tmp_path / "plain", **fields)
    plain = train_ours(model, processor, pairs, images, args, layout="shared", reference=reference)
    ignored = ("train_runtime", "epoch")
    for ours, theirs in zip(losses(checked), losses(plain), strict=True):
        assert {k: v for k, v in ours.items() if k not in ignored} == {
            k: v for k, v in theirs.items() if k not in ignored
        }


def test_the_first_step_only_is_compared(tmp_path, processor, model, images, pairs):
    # A rate at which the second step is far from the reference.
    collator = PairCollator(processor, images, "shared")
    reference = compute(tmp_path / "r.safetensors", pairs, collator, lambda: model).columns()
    fields = {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    trainer = trainer_of(tmp_path, model, processor, images, pairs, reference, **fields)
    trainer.train()
    assert abs(losses(trainer)[1]["loss"] - math.log(2)) > 10 * TOLERANCE


def test_with_noise_nothing_can_be_compared(tmp_path, processor, model, images, pairs):
    assert noise_in(model, make_args(tmp_path)) is None
    assert noise_in(model, make_args(tmp_path, neftune_noise_alpha=5)) == "neftune_noise_alpha"
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    assert noise_in(model, make_args(tmp_path)) == "attention_dropout in model.language_model.layers.0.self_attn"
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.0
    model.model.language_model.layers[0].mlp.act_fn = torch.nn.Dropout(0.2)
    assert noise_in(model, make_args(tmp_path)) == "dropout in model.language_model.layers.0.mlp.act_fn"


def test_an_adapter_that_changes_the_weights_below_it_needs_a_cached_reference(tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"}
    config = make_run(tmp_path, name="live", dpo={"lora": lora, "reference": "live"})
    with pytest.raises(UserError, match=r"is 0\.6931: the reference is not the policy.*set dpo.reference: round-start"):
        run_dpo(config, 1)
    config = make_run(tmp_path, name="cached", dpo={"lora": lora})
    run_dpo(config, 1)
    assert history(round_1(config).checkpoint)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
