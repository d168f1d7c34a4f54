"""Valley 1 and 360VL through training and sampling, opened from their golden folders: as with TRL, as with generate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from align.dpo.collator import PairCollator
from align.dpo.train import run_dpo
from align.engines.base import SampleRequest, SamplingSettings
from align.engines.local import LocalEngine
from align.models.load import load_model, load_processor
from align.records import write_jsonl
from align.run.folder import RunDir
from tests.dpo.conftest import compute, make_args, make_pairs, tokenized, train_ours, train_trl
from tests.dpo.test_equals_trl import assert_same_curve
from tests.dpo.test_train import history, make_run, round_1, weights
from tests.forks import in_two_processes
from tests.models import test_valley1 as valley1
from tests.tiny_models import random_image

GOLDENS = Path(__file__).parents[1] / "golden"
# Folder, and how many images its questions have: 360VL takes one at most.
FAMILIES = {"valley_v1_tiny": (1, 2, 0), "vl360_tiny": (1, 0)}
SETTINGS = {"valley_v1_tiny": {"default_system": "v1"}, "vl360_tiny": {"default_system": ""}}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return load_model(GOLDENS / name, dtype=torch.float32)


@pytest.fixture
def processor(name):
    return load_processor(GOLDENS / name, **SETTINGS[name])


def test_three_steps_behind_a_shared_prompt_are_those_of_trl(tmp_path, name, processor, model, images):
    pairs = make_pairs(images.root, 3, FAMILIES[name])
    reference = compute(tmp_path / "r.safetensors", pairs, PairCollator(processor, images, "shared"), lambda: model)
    # At this rate the sharp attention of the golden weights does not yet make rounding errors grow.
    fields = {"max_steps": 3, "learning_rate": 1e-5, "per_device_train_batch_size": 1}
    trl = train_trl(model, processor, pairs, images, make_args(tmp_path / "trl", **fields))
    args = make_args(tmp_path / "ours", **fields)
    ours = train_ours(model, processor, pairs, images, args, layout="shared", reference=reference.columns())
    assert_same_curve(ours, trl)


def test_lengths_counted_from_sizes_are_those_of_the_batch(name, processor, images):
    pairs = make_pairs(images.root, 6, num_images=FAMILIES[name])
    collator = PairCollator(processor, images, "plain")
    for pair in tokenized(pairs, processor, images):
        batch = collator.collate([pair])
        expected = [pair.prompt_tokens + len(ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        assert batch["attention_mask"].sum(dim=1).tolist() == expected


def test_greedy_samples_behind_a_shared_prompt_are_generates(name, processor, model):
    ends = model.generation_config.eos_token_id
    engine = LocalEngine(model, processor)
    question = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    requests = [
        SampleRequest(f"q{i}", [{"role": "user", "content": question}], (random_image(i, 60, 40 + 9 * i),), 2, seed=i)
        for i in range(2)
    ]
    found = {}
    engine.sample(
        requests, SamplingSettings(temperature=0.0, max_new_tokens=8), lambda result: found.update({result.id: result})
    )
    assert engine.fallback_reason is None, engine.notes
    for request in requests:
        text = processor.apply_chat_template(request.messages, add_generation_prompt=True)
        inputs = processor(images=[list(request.images)], text=[text], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=ends)
        expected = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found[request.id].texts == (expected,) * 2


def test_a_round_keeps_the_form_of_the_checkpoint(tmp_path, name):
    config = make_run(
        tmp_path,
        num_pairs=2,
        policy=str(GOLDENS / name),
        dpo={
            "freeze": ["vision"],
            "gradient_checkpointing": True,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-5,
        },
        model={"processor": SETTINGS[name]},
    )
    run_dpo(config, 1)
    this = RunDir(config.run_dir).round(1)
    before, after = weights(GOLDENS / name), weights(this.checkpoint)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in moved)
    assert any("mm_projector" in name for name in moved)
    assert history(this.checkpoint)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert "agree" in this.manifest.stage("dpo").notes["shared_prefix"]
    load_model(this.checkpoint)
    reopened = load_processor(this.checkpoint)
    assert reopened.default_system == load_processor(GOLDENS / name, **SETTINGS[name]).default_system


@pytest.mark.slow
@pytest.mark.parametrize("family", ["valley_v1_delta", "vl360_tiny"])
def test_two_steps_under_zero3_are_those_of_one_process(tmp_path, family):
    """Delta pooling has attention of torch's own, the abstractor convolutions; a process may have texts only."""
    pytest.importorskip("deepspeed")
    policy = GOLDENS / family
    if family == "valley_v1_delta":
        policy = valley1.write_folder(tmp_path / "policy", valley1.FLAGS["delta"], valley1.EXTRA_TENSORS["delta"])
    fields: dict[str, Any] = {"policy": str(policy), "model": {"processor": {"default_system": ""}}}
    dpo = {"num_train_epochs": 1, "learning_rate": 1e-5, "freeze": ["vision"]}
    alone = make_run(tmp_path, name="alone", dpo=dpo, **fields)
    pairs = make_pairs(tmp_path / "images", 4, num_images=(1, 0, 1, 1))
    write_jsonl(round_1(alone).pairs, pairs)
    run_dpo(alone, 1)
    together = make_run(
        tmp_path, name="together", dpo=dpo | {"gradient_accumulation_steps": 1}, launch={"strategy": "zero3"}, **fields
    )
    write_jsonl(round_1(together).pairs, pairs)
    in_two_processes(run_dpo, together, 1)
    for a, b in zip(history(round_1(alone).checkpoint), history(round_1(together).checkpoint), strict=True):
        for metric in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert a[metric] == pytest.approx(b[metric], abs=1e-4, rel=1e-4), f"{metric} at step {a['step']}"
    one, two, before = (weights(f) for f in (round_1(alone).checkpoint, round_1(together).checkpoint, policy))
    assert one.keys() == two.keys() == before.keys()
    moved = torch.cat([(one[n].float() - before[n].float()).flatten() for n in before]).norm()
    apart = torch.cat([(one[n].float() - two[n].float()).flatten() for n in before]).norm()
    assert apart < 1e-2 * moved
    load_model(round_1(together).checkpoint)
