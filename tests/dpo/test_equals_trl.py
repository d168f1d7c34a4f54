"""Our trainer against stock TRL on the same pairs: the same losses, margins and rewards."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.trainer import PairTrainer
from align.models.modules import freeze_parts, part_of
from tests.dpo.conftest import compute, losses, make_args, make_pairs, tokenized, train_ours, train_trl, trl_dataset

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


def assert_same_curve(ours, trl, tolerance=5e-5):
    assert len(losses(ours)) == len(losses(trl)) > 0
    for step, (a, b) in enumerate(zip(losses(ours), losses(trl), strict=True), start=1):
        for name in COMPARED:
            if name == "rewards/accuracies" and abs(b["rewards/margins"]) < 1e-4:
                # Before anything is learnt, rewards are rounding errors around 0 and their signs mean nothing.
                continue
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=1e-4), f"{name} at step {step}"


@pytest.mark.parametrize("num_images", [(1,), (1, 2), (1, 0, 2)])
def test_plain_batch_equals_the_collator_of_trl(tmp_path, processor, images, num_images):
    pairs = make_pairs(images.root, 4, num_images)
    ours = PairCollator(processor, images)(list(pair_dataset(tokenized(pairs, processor, images))))
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
    assert_same_curve(ours, trl)


LOSSES = {
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"]},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "WPO": {"loss_type": ["sigmoid"], "use_weighting": True},
    "LD-DPO": {"loss_type": ["sigmoid"], "ld_alpha": 0.3},
    # The loss takes the exponential of log-ratios: small steps,
    # so that it does not magnify the rounding of one processor.
    "forward KL": {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl", "learning_rate": 1e-4},
    "Jensen-Shannon": {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "alpha divergence": {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_trl_gives_the_same_with_shared_prompts(tmp_path, processor, model, images, name):
    pairs = make_pairs(images.root, 6, num_images=(1, 2))
    args = LOSSES[name] | {"max_steps": 2, "per_device_train_batch_size": 3, "warmup_steps": 0}
    collator = PairCollator(processor, images, "shared")
    reference = compute(tmp_path / "r.safetensors", pairs, collator, lambda: model).columns(args.get("ld_alpha"))
    trl = train_trl(model, processor, pairs, images, make_args(tmp_path / "trl", **args))
    ours_args = make_args(tmp_path / "ours", **args)
    ours = train_ours(model, processor, pairs, images, ours_args, layout="shared", reference=reference)
    assert_same_curve(ours, trl, tolerance=2e-4 if name == "sppo_hard" else 5e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
    ],
    ids=["accumulation", "checkpointing", "reentrant checkpointing", "loader workers"],
)
def test_ways_to_train_equal_trl_with_shared_prompts(tmp_path, processor, model, images, fields):
    pairs = make_pairs(images.root, 6)
    trl = train_trl(model, processor, pairs, images, make_args(tmp_path / "trl", max_steps=3, **fields))
    args = make_args(tmp_path / "ours", max_steps=3, **fields)
    assert_same_curve(train_ours(model, processor, pairs, images, args, layout="shared"), trl)


@pytest.mark.parametrize("frozen", [["vision"], ["vision", "projector"], ["language"]])
def test_frozen_parts_stay_and_the_rest_learns_as_with_trl(tmp_path, processor, model, images, frozen):
    freeze_parts(model, frozen)
    pairs = make_pairs(images.root, 6)
    trl = train_trl(model, processor, pairs, images, make_args(tmp_path / "trl", max_steps=3))
    ours = train_ours(model, processor, pairs, images, make_args(tmp_path / "ours", max_steps=3), layout="shared")
    assert_same_curve(ours, trl)
    before = dict(model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert part_of(name) not in frozen or torch.equal(parameter, before[name]), name
    moved = {part_of(name) for name, p in ours.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"vision", "projector", "language"} - set(frozen)


def test_gradients_of_shared_prompts_equal_those_of_separate_rows(tmp_path, processor, model, images):
    pairs = make_pairs(images.root, 4, num_images=(1, 2, 0))
    gradients = {}
    for layout in ("plain", "shared"):
        trainer = PairTrainer(
            copy.deepcopy(model),
            ref_model=copy.deepcopy(model),
            args=make_args(tmp_path, loss_type=["bco_pair", "sft"]),
            train_dataset=pair_dataset(tokenized(pairs, processor, images)),
            data_collator=PairCollator(processor, images, layout),
            processor=processor,
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        # The last norm of the vision tower is not used by this model and has no gradient.
        named = trainer.model.named_parameters()
        gradients[layout] = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    assert gradients["shared"].keys() == gradients["plain"].keys()
    total = torch.cat([gradient.flatten() for gradient in gradients["plain"].values()]).norm()
    for name, plain in gradients["plain"].items():
        error = (gradients["shared"][name] - plain).norm()
        assert error <= 1e-5 * plain.norm() + 1e-7 * total, name


def test_an_adapter_learns_as_with_trl_and_merges_into_the_model(tmp_path, processor, model, images):
    pairs = make_pairs(images.root, 6)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    trl = DPOTrainer(
        copy.deepcopy(model),
        args=make_args(tmp_path / "trl", max_steps=4, learning_rate=1e-2),
        train_dataset=trl_dataset(pairs, images),
        processing_class=processor,
        peft_config=adapter,
    )
    trl.train()
    collator = PairCollator(processor, images, "shared")
    reference = compute(tmp_path / "r.safetensors", pairs, collator, lambda: model).columns()
    for columns in (None, reference):
        ours = PairTrainer(
            copy.deepcopy(model),
            args=make_args(tmp_path / "ours", max_steps=4, learning_rate=1e-2),
            train_dataset=pair_dataset(tokenized(pairs, processor, images), columns),
            data_collator=collator,
            processor=processor,
            peft_config=adapter,
        )
        ours.train()
        assert_same_curve(ours, trl)


def test_the_projector_learns_at_its_own_rate(tmp_path, processor, model, images):
    pairs = make_pairs(images.root, 4)
    trainer = PairTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=make_args(tmp_path, max_steps=1, warmup_steps=0, optim="sgd", max_grad_norm=0.0, learning_rate=1e-2),
        train_dataset=pair_dataset(tokenized(pairs, processor, images)),
        data_collator=PairCollator(processor, images, "shared"),
        processor=processor,
        projector_learning_rate_multiplier=3.0,
    )
    trainer.train()
    plain = train_ours(
        model,
        processor,
        pairs,
        images,
        make_args(tmp_path, max_steps=1, warmup_steps=0, optim="sgd", max_grad_norm=0.0, learning_rate=1e-2),
        layout="shared",
    )
    before, usual = dict(model.named_parameters()), dict(plain.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        factor = 3.0 if part_of(name) == "projector" else 1.0
        moved, expected = parameter.detach() - before[name], factor * (usual[name] - before[name])
        assert torch.allclose(moved, expected, atol=2e-6), name
