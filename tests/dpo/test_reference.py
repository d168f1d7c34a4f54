"""Cached reference log-probabilities: equal to a live reference, exact at step 1,
kept and refused as they should be."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os

import pytest
import torch

from align.dpo.collator import PairCollator
from align.dpo.reference import ReferenceKey, pairs_hash, read_reference
from align.records import Pair
from tests.dpo.conftest import KEY, compute, losses, make_args, make_pairs, tokenized, train_ours, train_trl
from tests.dpo.test_equals_trl import assert_same_curve


def must_not_load():
    raise AssertionError("the model was loaded although nothing was to be computed")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_first_step_has_loss_ln_2_and_rewards_0(tmp_path, processor, model, images, layout, bf16):
    pairs = make_pairs(images.root, 4)
    collator = PairCollator(processor, images, layout)
    reference = compute(tmp_path / "r.safetensors", pairs, collator, lambda: model, bf16=bf16)
    args = make_args(tmp_path / "run", max_steps=1, per_device_train_batch_size=1, bf16=bf16)
    first = losses(train_ours(model, processor, pairs, images, args, layout=layout, reference=reference.columns()))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_twenty_steps_with_a_cached_reference_equal_trl(tmp_path, processor, model, images, layout):
    pairs = make_pairs(images.root, 12, num_images=(1, 2))
    reference = compute(tmp_path / "r.safetensors", pairs, PairCollator(processor, images, layout), lambda: model)
    trl = train_trl(model, processor, pairs, images, make_args(tmp_path / "trl", max_steps=20))
    args = make_args(tmp_path / "ours", max_steps=20)
    ours = train_ours(model, processor, pairs, images, args, layout=layout, reference=reference.columns())
    assert ours.ref_model is None
    assert losses(ours)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_same_curve(ours, trl)


def test_pairs_of_one_question_share_its_prompt(tmp_path, processor, model, images):
    first, other = make_pairs(images.root, 2)
    second = Pair(
        id="again",
        images=first.images,
        prompt=first.prompt,
        chosen=[{"role": "assistant", "content": "a third answer"}],
        rejected=first.rejected,
    )
    collator = PairCollator(processor, images, "shared")
    together = compute(tmp_path / "together.safetensors", [first, other, second], collator, lambda: model, batch_size=2)
    apart = [compute(tmp_path / f"{p.id}.st", [p], collator, lambda: model) for p in (first, other, second)]
    assert torch.allclose(together.logps, torch.cat([reference.logps for reference in apart]), atol=1e-5)
    for index, reference in enumerate(apart):
        assert torch.allclose(together.chosen[index], reference.chosen[0], atol=1e-5)
    assert together.logps[0, 1] == together.logps[2, 1]


def test_sums_are_the_sums_of_the_tokens(tmp_path, processor, model, images):
    pairs = make_pairs(images.root, 3)
    for layout in ("plain", "shared"):
        path = tmp_path / f"{layout}.safetensors"
        reference = compute(path, pairs, PairCollator(processor, images, layout), lambda: model, batch_size=3)
        summed = [(float(c.sum()), float(r.sum())) for c, r in zip(reference.chosen, reference.rejected, strict=True)]
        assert torch.allclose(reference.logps, torch.tensor(summed), atol=1e-4)
        assert torch.allclose(torch.tensor(reference.columns(ld_alpha=1.0)), torch.tensor(summed), atol=1e-4)
        chosen, rejected = reference.chosen[1], reference.rejected[1]
        shared = min(len(chosen), len(rejected))
        assert reference.columns(ld_alpha=0.0)[1] == pytest.approx(
            (float(chosen[:shared].sum()), float(rejected[:shared].sum())), abs=1e-4
        )


def test_a_complete_file_is_used_again_without_a_model(tmp_path, processor, model, images):
    pairs = make_pairs(images.root, 3)
    collator = PairCollator(processor, images, "shared")
    path = tmp_path / "reference.safetensors"
    before = compute(path, pairs, collator, lambda: model)
    after = compute(path, pairs, collator, must_not_load)
    assert torch.equal(before.logps, after.logps)
    assert [p.name for p in tmp_path.glob("reference*")] == ["reference.safetensors"]


def test_a_damaged_file_is_computed_again(tmp_path, processor, model, images, caplog):
    pairs = make_pairs(images.root, 2)
    collator = PairCollator(processor, images, "shared")
    path = tmp_path / "reference.safetensors"
    before = compute(path, pairs, collator, lambda: model)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 64
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped), whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        caplog.clear()
        assert read_reference(path, KEY) is None
        assert "reference.safetensors is damaged, they are computed again" in caplog.text
    (tmp_path / "reference.json").write_text("{")
    after = compute(path, pairs, collator, lambda: model)
    assert torch.equal(before.logps, after.logps)
    # The names in its header have no order.
    assert sorted(path.read_bytes()) == sorted(whole)
    assert read_reference(path, KEY) is not None


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReferenceKey)])
def test_a_file_for_anything_else_is_not_used(tmp_path, processor, model, images, caplog, field):
    pairs = make_pairs(images.root, 2)
    collator = PairCollator(processor, images, "shared")
    path = tmp_path / "reference.safetensors"
    compute(path, pairs, collator, lambda: model)
    other = dataclasses.replace(KEY, **{field: "other"})
    with caplog.at_level(logging.WARNING):
        assert read_reference(path, other) is None
    assert f"{field} changed" in caplog.text
    changed = copy.deepcopy(model)
    torch.nn.init.normal_(changed.lm_head.weight)
    again = compute(path, pairs, collator, lambda: changed, key=other)
    assert read_reference(path, other) is not None
    assert not torch.equal(again.logps, compute(tmp_path / "x.safetensors", pairs, collator, lambda: model).logps)


def test_the_hash_of_pairs_sees_texts_and_images(processor, images):
    pairs = tokenized(make_pairs(images.root, 2), processor, images)
    before = pairs_hash(pairs, images)
    assert pairs_hash(pairs, images) == before
    changed = dataclasses.replace(pairs[1], chosen_ids=[*pairs[1].chosen_ids[:-1], 1])
    assert pairs_hash([pairs[0], changed], images) != before
    assert pairs_hash(pairs[::-1], images) != before
    picture = images.root / pairs[0].image_files[0]
    content, age = bytearray(picture.read_bytes()), picture.stat()
    content[-20] ^= 1
    picture.write_bytes(content)
    # Another picture under the same name, as large and as old as the one before.
    os.utime(picture, ns=(age.st_atime_ns, age.st_mtime_ns))
    assert picture.stat().st_size == age.st_size
    assert pairs_hash(pairs, images) != before


def test_unfinished_work_is_continued_and_discarded_for_another_key(tmp_path, processor, model, images):
    pairs = make_pairs(images.root, 5)
    collator = PairCollator(processor, images, "shared")
    whole = compute(tmp_path / "whole.safetensors", pairs, collator, lambda: model)

    class StopAfter:
        """A model that breaks down at its fourth question, as a killed process does."""

        calls = 0

        def __call__(self, module, arguments, keywords):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt

    broken = copy.deepcopy(model)
    broken.model.register_forward_pre_hook(StopAfter(), with_kwargs=True)
    path = tmp_path / "reference.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compute(path, pairs, collator, lambda: broken)
    lines = (tmp_path / "reference.part-0.jsonl").read_text()
    assert lines.count("\n") == 3
    (tmp_path / "reference.part-0.jsonl").write_text(lines[:-30])
    counted = copy.deepcopy(model)
    calls = []
    counted.model.register_forward_pre_hook(lambda *_: calls.append(1))
    resumed = compute(path, pairs, collator, lambda: counted)
    assert len(calls) == 3
    assert torch.equal(resumed.logps, whole.logps)

    path.unlink()
    (tmp_path / "reference.part-0.jsonl").write_text(lines)
    (tmp_path / "reference.json").write_text('{"weights": "other"}')
    calls.clear()
    compute(path, pairs, collator, lambda: counted)
    assert len(calls) == 5


def test_loader_workers_give_the_same(tmp_path, processor, model, images):
    pairs = make_pairs(images.root, 5)
    collator = PairCollator(processor, images, "shared")
    alone = compute(tmp_path / "alone.safetensors", pairs, collator, lambda: model, batch_size=2)
    together = compute(tmp_path / "together.safetensors", pairs, collator, lambda: model, batch_size=2, num_workers=2)
    assert torch.equal(alone.logps, together.logps)
