"""Image-conditional preference: its terms by hand, its gradients by another way, its pictures, and a round with it."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import logsigmoid

from align.config import ImagePreference, build_config
from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.image_preference import OBJECTIVES, PictureRewards, picture_loss
from align.dpo.settings import check_fields, training_fields
from align.dpo.train import run_dpo
from align.dpo.trainer import PairTrainer
from align.errors import UserError
from align.media.corruption import corrupted
from align.records import write_jsonl
from tests import tiny_models
from tests.dpo.conftest import compute, make_args, tokenized
from tests.dpo.test_rows import ORDERS, gradient, pairs_of_questions
from tests.dpo.test_train import history, make_run, round_1, stop_once, weights

KINDS = ["crop", "blank", "blur", "shuffle", "other"]


def test_the_terms_are_those_of_the_paper():
    settings = ImagePreference(weight=2.0, anchor=0.5, delta=1.0)
    rewards = PictureRewards.of(
        0.5, torch.tensor([-6.0, -8.0]), torch.tensor([-10.0, -8.0]), torch.tensor([-9.0, -8.0]), torch.tensor([-10.0, -8.0])
    )  # fmt: skip
    assert rewards.real.tolist() == [2.0, 0.0]
    assert rewards.corrupted.tolist() == [0.5, 0.0]
    # log(1 + e^-1.5) and log(1 + e^-1): 2 - 0.5 and 2 - delta.
    conditional, anchor = (OBJECTIVES[name](rewards, settings)[0].item() for name in ("conditional", "anchor"))
    assert conditional == pytest.approx(0.201413, abs=1e-6)
    assert anchor == pytest.approx(0.313262, abs=1e-6)
    # The second pair has no picture, and counts in the mean all the same.
    loss, metrics = picture_loss(rewards, torch.tensor([True, False]), settings)
    assert loss.item() == pytest.approx((2.0 * 0.201413 + 0.5 * 0.313262) / 2, abs=1e-6)
    assert metrics["image/margins"][0] == 1.5
    assert metrics["image/accuracies"].isnan().tolist() == [False, True]


def plain_log_prob(model: Any, processor: Any, prompt: str, pictures: list[Any], ids: list[int]) -> torch.Tensor:
    """Of a response behind a prompt with these pictures: logits of the whole sequence, and nothing of ours."""
    inputs = dict(processor(text=[prompt], images=[pictures] if pictures else None, return_tensors="pt"))
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs).logits[0, length - 1 : -1]
    return logits.float().log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None]).sum()


def no_other(drawn: random.Random) -> Image.Image:
    raise AssertionError("a crop needs no other picture")


@pytest.mark.parametrize("grouping", ["pair", "question"])
def test_gradients_and_cached_references_equal_a_plain_implementation(tmp_path, processor, model, images, grouping):
    pairs = pairs_of_questions(images.root, [[(0, 1), (0, 2), (3, 2)], [(1, 2)], [(4, 3)]])
    pool = tuple(sorted({name for pair in pairs for name in pair.images}))
    collator = PairCollator(
        processor, images, "shared", grouping=grouping, corruption="crop", seed=5, pool=pool
    )  # fmt: skip
    cached = compute(tmp_path / "r.safetensors", pairs, collator, lambda: model)
    read = tokenized(pairs, processor, images)
    policy = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    settings = ImagePreference(weight=0.7, anchor=0.4, delta=0.1)
    trainer = PairTrainer(
        copy.deepcopy(policy),
        args=make_args(tmp_path),
        train_dataset=pair_dataset(read, cached.columns(), corrupted=cached.corrupted.tolist()),
        data_collator=collator,
        processor=processor,
        image_preference=settings,
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(collator(list(trainer.train_dataset))))
    ours = gradient(trainer, loss)

    total, beta = torch.zeros(()), 0.1
    for index, pair in enumerate(read):
        real = [images.open(name) for name in pair.image_files]
        less = [
            corrupted(picture, "crop", 5, f"{place}/{pair.image_files}/{pair.prompt}", no_other)
            for place, picture in enumerate(real)
        ]
        sides = [(real, pair.chosen_ids), (real, pair.rejected_ids), (less, pair.chosen_ids)]
        now = [plain_log_prob(policy, processor, pair.prompt, seen, ids) for seen, ids in sides]
        with torch.no_grad():
            before = [plain_log_prob(model, processor, pair.prompt, seen, ids) for seen, ids in sides]
        live = [value.item() for value in before]
        assert [*cached.logps[index].tolist(), cached.corrupted[index].item()] == pytest.approx(live, abs=2e-4)
        chosen, rejected, without = (beta * (a - b) for a, b in zip(now, before, strict=True))
        total = total - logsigmoid(chosen - rejected)
        if real:
            total = total - 0.7 * logsigmoid(chosen - without) - 0.4 * logsigmoid(chosen - 0.1)
    total = total / len(read)
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    total.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in sorted(policy.named_parameters())]
    expected = torch.cat([each.flatten() for each in grads])
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_picture_is_as_large_says_less_and_is_the_same_every_time(kind):
    picture = tiny_models.random_image(3, width=90, height=61)
    picture.info["frame_file"] = True
    another = Image.new("RGB", (20, 20), (255, 0, 0))
    first, again, elsewhere = (
        corrupted(picture, kind, 1, key, lambda drawn: another) for key in ("question", "question", "another question")
    )
    assert first.size == picture.size
    assert first.mode == "RGB"
    assert first.info["frame_file"]
    assert first.tobytes() == again.tobytes() != picture.tobytes()
    drawn_by_question = kind in ("crop", "shuffle")
    assert (first.tobytes() != elsewhere.tobytes()) == drawn_by_question


def test_a_crop_shows_at_most_a_fifth_of_the_area():
    # Every pixel has a colour of its own: what is seen can be counted, nearest neighbours only.
    picture = Image.new("RGB", (64, 64))
    picture.putdata([(x, y, 0) for y in range(64) for x in range(64)])
    for seed in range(20):
        seen = corrupted(picture, "crop", seed, "q", lambda drawn: picture)
        (left, right), (top, bottom), _ = seen.getextrema()
        assert (right - left) * (bottom - top) <= 0.2 * 64 * 64


def test_another_picture_is_never_the_own_one_and_has_its_size(processor, images):
    pairs = tokenized(pairs_of_questions(images.root), processor, images)
    pool = tuple(sorted({name for pair in pairs for name in pair.image_files}))
    opened = []

    class Recording(type(images)):  # type: ignore[misc]
        def open(self, reference):
            opened.append(reference)
            return super().open(reference)

    collator = PairCollator(processor, Recording(images.root), "shared", corruption="other", pool=pool)
    collator.collate(pairs[:1])
    assert opened[:2] == [pairs[0].image_files[0]] * 2, "once as it is, once to be corrupted"
    assert opened[2] in set(pool) - set(pairs[0].image_files)
    assert random.Random(f"0/other/0/{pairs[0].image_files}/{pairs[0].prompt}").choice(list(pool[1:])) == opened[2]


PREFERENCE: dict[str, Any] = {
    "rows": "question",
    "image_preference": {"corruption": "shuffle", "anchor": 0.5},
    "per_device_train_batch_size": 1,
    "loss_type": ["sigmoid", "sft"],
}


def test_a_round_starts_at_its_reference_logs_its_terms_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = make_run(tmp_path, name="whole", dpo=PREFERENCE)
    pairs = pairs_of_questions(tmp_path / "images", [*ORDERS[:2], *ORDERS])
    write_jsonl(round_1(whole).pairs, pairs)
    run_dpo(whole, 1)
    first, *_, last = history(round_1(whole).checkpoint)
    assert first["image/margins"] == pytest.approx(0.0, abs=1e-5)
    assert first["image/conditional"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["image/anchor"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["image/anchor"] < first["image/anchor"]
    stopped = make_run(tmp_path, name="stopped", dpo=PREFERENCE)
    write_jsonl(round_1(stopped).pairs, pairs)
    with monkeypatch.context() as patch:
        stop_once(patch, 2)
        with pytest.raises(SystemExit):
            run_dpo(stopped, 1)
    run_dpo(stopped, 1)
    before, after = weights(round_1(whole).checkpoint), weights(round_1(stopped).checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_it_cannot_go_with_is_refused(tmp_path):
    def config(**fields: Any) -> Any:
        dpo = {"image_preference": {"corruption": "blank"}} | fields.pop("dpo", {})
        return build_config({"policy": "p", "questions": "q.jsonl", "dpo": dpo} | fields, base=tmp_path)

    with pytest.raises(UserError, match=r"needs cached reference log-probabilities"):
        check_fields(config(dpo={"reference": "live"}).dpo)
    with pytest.raises(UserError, match=r"has no meaning with dpo.ld_alpha"):
        check_fields(config(dpo={"ld_alpha": 0.5}).dpo)
    with pytest.raises(UserError, match=r"dpo.image_preference needs shared prompts"):
        training_fields(config(shared_prefix="off"), tmp_path, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=r"has no effect: weight and anchor are 0"):
        check_fields(config(dpo={"image_preference": {"weight": 0, "anchor": 0}}).dpo)
    for endless in ({"weight": math.inf}, {"delta": math.nan}):
        with pytest.raises(UserError, match=r"dpo.image_preference.*: Input should be a finite number"):
            config(dpo={"image_preference": endless})
    with pytest.raises(UserError, match=r"dpo.image_preference.corruptoin: unknown key"):
        config(dpo={"image_preference": {"corruptoin": "crop"}})
