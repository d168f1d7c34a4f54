"""All pairs of a question in one row: the same gradients as separate rows, and batches that hold what they should."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from align.config import build_config
from align.dpo.collator import PairCollator, layout_of, pair_dataset
from align.dpo.rows import RowBatches, by_question, make_batches, pair_weights
from align.dpo.settings import LOSSES, check_fields, own_batches, planned_steps
from align.dpo.tokenize import TokenizedPair
from align.dpo.train import run_dpo
from align.dpo.trainer import PairTrainer
from align.errors import UserError
from align.records import Pair, write_jsonl
from tests.dpo.conftest import compute, make_args, make_pairs, tokenized
from tests.dpo.test_train import history, make_run, round_1, stop_once, weights

ANSWERS = ["a cat", "two dogs", "nothing at all", "three", "it is blue"]
# Of five answers: which is chosen over which. The third question has one pair.
ORDERS = [[(0, 1), (0, 2), (3, 2), (4, 1), (1, 2)], [(2, 0), (1, 0)], [(3, 4)]]


def pairs_of_questions(folder: Path, orders: list[list[tuple[int, int]]] = ORDERS) -> list[Pair]:
    """Questions with images, each with several pairs of the same few answers."""
    pairs = []
    for number, question in enumerate(make_pairs(folder, len(orders), num_images=(1, 2, 0))):
        for chosen, rejected in orders[number]:
            turns = [[{"role": "assistant", "content": ANSWERS[index]}] for index in (chosen, rejected)]
            pairs.append(
                Pair(
                    id=f"{question.id}-{chosen}{rejected}",
                    images=question.images,
                    prompt=question.prompt,
                    chosen=turns[0],
                    rejected=turns[1],
                )
            )
    return pairs


def make_trainer(folder: Path, model: Any, processor: Any, images: Any, pairs: list[Pair], **given: Any) -> PairTrainer:
    """A trainer on a copy of the model, its reference a little off, so that no log-ratio is 0."""
    read = tokenized(pairs, processor, images)
    path = folder / "reference.safetensors"
    exact = compute(path, pairs, PairCollator(processor, images, "shared"), lambda: model).columns()
    reference = [(chosen - 0.3 * n, rejected + 0.2 * n - 0.5) for n, (chosen, rejected) in enumerate(exact, start=1)]
    layout, grouping, weigh = (given.pop(name, value) for name, value in
                               (("layout", "shared"), ("grouping", "question"), ("weigh", None)))  # fmt: skip
    batches = given.pop("batches", None)
    return PairTrainer(
        copy.deepcopy(model),
        args=make_args(folder, **given),
        train_dataset=pair_dataset(read, reference, None if weigh is None else pair_weights(read, weigh)),
        data_collator=PairCollator(processor, images, layout, grouping=grouping),
        processor=processor,
        batches=batches,
    )


def gradient(trainer: PairTrainer, loss: torch.Tensor | None = None) -> torch.Tensor:
    """What the parameters have, or of a loss alone."""
    if loss is not None:
        trainer.model.zero_grad()
        loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in sorted(trainer.model.named_parameters())]
    return torch.cat([each.flatten() for each in found])


VARIANTS: dict[str, dict[str, Any]] = {kind: {"loss_types": [kind]} for kind in LOSSES} | {
    "MPO": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "WPO": {"use_weighting": True},
    "LD-DPO": {"ld_alpha": 0.3},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"f_divergence_type": "js_divergence"},
    "alpha divergence": {"f_divergence_type": "alpha_divergence"},
}


def test_gradients_of_a_row_of_all_pairs_equal_those_of_separate_rows_for_every_loss(
    tmp_path, processor, model, images
):
    pairs = pairs_of_questions(images.root)
    # Only with WPO from the start the head gives what WPO needs.
    separate, together = (
        make_trainer(tmp_path, model, processor, images, pairs, use_weighting=True, **way)
        for way in ({"layout": "plain"}, {})
    )
    batches = [trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
               for trainer in (separate, together)]  # fmt: skip
    assert batches[1]["prompt_ids"].shape[0] == 3, "a row for each question"
    assert batches[1]["attention_mask"].sum() < 0.4 * batches[0]["attention_mask"].sum()
    usual = {"use_weighting": False, "ld_alpha": None, "f_divergence_type": "reverse_kl", "label_smoothing": 0.0}
    for name, fields in VARIANTS.items():
        found = []
        for trainer, batch in zip((separate, together), batches, strict=True):
            smoothed = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
            kinds = fields.get("loss_types", ["sigmoid"])
            weights_of = {"loss_types": kinds, "loss_weights": [1.0] * len(kinds)}
            for field, value in (usual | weights_of | smoothed | fields).items():
                setattr(trainer, field, value)
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, batch)
            found.append((loss.detach(), gradient(trainer, loss)))
        (loss, expected), (ours, actual) = found
        assert torch.allclose(ours, loss, rtol=1e-6), name
        assert expected.norm() > 0, name
        # Squares of sums over all tokens magnify the rounding of the sums.
        tolerance = 5e-6 if name == "sppo_hard" else 1e-6
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1), name
        assert (actual - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("each", ["pair", "question"])
def test_every_pair_or_question_of_a_step_counts_the_same(tmp_path, processor, model, images, each):
    pairs = pairs_of_questions(images.root)
    trainer = make_trainer(
        tmp_path, model, processor, images, pairs, weigh=each, per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        batches=make_batches(tokenized(pairs, processor, images), "question", num_rows=2, max_tokens=None, seed=0),
    )  # fmt: skip
    assert len(trainer.get_train_dataloader()) == 2, "two questions and one"
    trainer.model.train()
    steps, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(steps)
    trainer.model.zero_grad()
    for batch in steps:
        trainer.training_step(trainer.model, batch)
    step = gradient(trainer)

    one_by_one = make_trainer(tmp_path, model, processor, images, pairs, layout="plain")
    one_by_one.model.train()
    expected = torch.zeros_like(step)
    for row, pair in zip(one_by_one.train_dataset, pairs, strict=True):
        # By hand: of eight pairs five belong to the first question, two to the second, one to the third.
        of_question = {"p0": 1 / 5, "p1": 1 / 2, "p2": 1}[pair.id.split("-")[0]] / 3
        loss = one_by_one.compute_loss(one_by_one.model, one_by_one.data_collator([row]))
        expected += (1 / 8 if each == "pair" else of_question) * gradient(one_by_one, loss)
    assert (step - expected).norm() <= 1e-5 * expected.norm()


def sized(number: int, prompt: int, chosen: int, question: str = "") -> TokenizedPair:
    return TokenizedPair(f"p{number}", [], question or f"q{number}", prompt, list(range(chosen)), [7])


def test_a_budget_is_kept_with_its_padding_and_every_pair_comes_once():
    pairs = [sized(n, 50 + 13 * (n // 3) % 90, 5 + 7 * n % 31, f"q{n // 3}") for n in range(40)]
    for grouping in ("pair", "question"):
        batches = make_batches(pairs, grouping, num_rows=1, max_tokens=500, seed=1)
        assert sorted(index for batch in batches for index in batch.pairs) == list(range(40))
        assert max(batch.num_rows for batch in batches) > 2
        for batch in batches:
            members = [pairs[index] for index in batch.pairs]
            longest = max(pair.prompt_tokens for pair in members)
            widths = [sum(len(ids) for ids in {tuple(ids) for i in group for ids in (members[i].chosen_ids, members[i].rejected_ids)})
                      for group in by_question(members)] if grouping == "question" else \
                     [len(pair.chosen_ids) + 1 for pair in members]  # fmt: skip
            assert len(widths) * (longest + max(widths)) == batch.tokens <= 500


def test_a_row_above_the_budget_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"1 of 2 rows have more tokens than dpo.tokens_per_batch, 60:\n  p1: 81 tokens"
    ):
        make_batches([sized(0, 10, 3), sized(1, 70, 10)], "pair", num_rows=1, max_tokens=60, seed=0)


def test_the_largest_batches_come_first_and_the_order_knows_epochs_but_not_processes():
    pairs = [sized(n, 10 + 17 * n % 50, 3) for n in range(24)]
    batches = make_batches(pairs, "pair", num_rows=2, max_tokens=None, seed=4)
    largest = max(batches, key=lambda batch: batch.tokens).pairs
    second = sorted(batches, key=lambda batch: batch.tokens)[-2].pairs
    epochs = [list(RowBatches(batches, 4, lambda e=epoch: e, per_step=3)) for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert all((epoch[0], epoch[3]) == (second, largest) for epoch in epochs), "the optimiser has its state in step 2"
    assert all(sorted(index for batch in epoch for index in batch) == list(range(24)) for epoch in epochs)
    assert next(iter(RowBatches(batches, 4, lambda: 0, per_step=12))) == largest, "there is one step"
    shares = [list(BatchSamplerShard(RowBatches(batches, 4, lambda: 0, per_step=3), 2, rank)) for rank in range(2)]
    assert [batch for both in zip(*shares, strict=True) for batch in both] == epochs[0]


def test_branches_that_stand_in_several_pairs_are_computed_once(processor, images):
    pairs = tokenized(pairs_of_questions(images.root), processor, images)
    layout = layout_of(PairCollator(processor, images, "shared", grouping="question").collate(pairs))
    assert [int(row.max()) + 1 for row in layout.segment] == [5, 3, 2]


ROWS = {"rows": "question", "tokens_per_batch": 250, "gradient_accumulation_steps": 1}


def test_a_round_of_question_rows_starts_at_its_reference_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = make_run(tmp_path, name="whole", dpo=ROWS)
    pairs = pairs_of_questions(tmp_path / "images", [*ORDERS, *ORDERS])
    write_jsonl(round_1(whole).pairs, pairs)
    run_dpo(whole, 1)
    assert history(round_1(whole).checkpoint)[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    stopped = make_run(tmp_path, name="stopped", dpo=ROWS)
    write_jsonl(round_1(stopped).pairs, pairs)
    with monkeypatch.context() as patch:
        stop_once(patch, 4)
        with pytest.raises(SystemExit):
            run_dpo(stopped, 1)
    run_dpo(stopped, 1)
    counts = round_1(whole).manifest.stage("dpo").counts
    assert counts["pairs"] == 16
    assert counts["steps"] > 5, "the run was stopped in its second epoch"
    assert counts == round_1(stopped).manifest.stage("dpo").counts
    before, after = weights(round_1(whole).checkpoint), weights(round_1(stopped).checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_shared_prompts_pairs_are_rows_and_the_manifest_says_so(tmp_path):
    config = make_run(tmp_path, dpo=ROWS | {"tokens_per_batch": None, "num_train_epochs": 1}, shared_prefix="off")
    run_dpo(config, 1)
    entry = round_1(config).manifest.stage("dpo")
    assert entry.notes["rows"] == "dpo.rows: question had no effect, every response repeats its prompt"
    assert entry.counts["steps"] == 6


def test_what_cannot_go_together_is_refused_at_once(tmp_path):
    dpo = {
        "rows": "question", "pair_weight": "question", "loss_type": ["aot"], "tokens_per_batch": 100,
        "per_device_train_batch_size": 2, "dataloader_drop_last": True,
    }  # fmt: skip
    config = build_config({"policy": "p", "questions": "q.jsonl", "dpo": dpo}, base=tmp_path)
    with pytest.raises(UserError) as error:
        check_fields(config.dpo)
    for fault in (
        "dpo.dataloader_drop_last cannot be set with dpo.rows: question",
        "dpo.per_device_train_batch_size has no effect: dpo.tokens_per_batch is set",
        "dpo.pair_weight: question has no meaning for the loss aot",
    ):
        assert fault in str(error.value)


def test_steps_are_counted_in_batches_of_rows(tmp_path):
    config = build_config({"policy": "p", "questions": "q.jsonl", "dpo": {"rows": "question"}}, base=tmp_path)
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "seed": 0}
    pairs = [sized(n, 10, 3, f"q{n // 3}") for n in range(15)]
    own = own_batches(config, fields, pairs)
    assert own is not None
    assert (planned_steps(fields, 15, 1, own), planned_steps(fields, 15, 2, own)) == (3, 2)
    assert len(own_batches(config, fields, pairs, shared=False) or []) == 15
