"""Held-out pairs while training: what is measured on them, and that the best state is kept and a hopeless training ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.config import Config, build_config
from align.dpo.collator import PairCollator
from align.dpo.held_out import split_pairs
from align.dpo.settings import check_fields
from align.dpo.train import run_dpo
from align.errors import UserError
from align.media.images import ImageStore
from align.models.load import load_model, load_processor
from align.records import Pair, write_jsonl
from tests.dpo.conftest import compute, make_pairs, tokenized
from tests.dpo.test_train import make_run, round_1, stop_once, weights

YES, NO = ([{"role": "assistant", "content": text}] for text in ("it is a red square", "there is nothing at all"))
DPO: dict[str, Any] = {
    "eval_steps": 1,
    "held_out": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "num_train_epochs": 4,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
}


def overfitting_run(folder: Path, name: str, **dpo: Any) -> tuple[Config, list[Pair]]:
    """All pairs that are trained on prefer one answer, and all that are held out the other: every step makes it worse."""
    config = make_run(folder, name=name, num_pairs=10, dpo=DPO | dpo)
    given = make_pairs(folder / "images", 10)
    processor, images = load_processor(folder / "policy"), ImageStore(folder / "images")
    _, apart = split_pairs(tokenized(given, processor, images), 0.3, config.seed)
    held_out = {pair.id for pair in apart}
    pairs = [
        pair.model_copy(update=dict(zip(("chosen", "rejected"), (NO, YES) if pair.id in held_out else (YES, NO), strict=True)))
        for pair in given
    ]  # fmt: skip
    write_jsonl(round_1(config).pairs, pairs)
    return config, [pair for pair in pairs if pair.id in held_out]


def looks(config: Config) -> list[dict[str, float]]:
    """What was logged of the held-out pairs, look by look."""
    log = json.loads((round_1(config).checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "eval_loss" in entry]


def loss_of(config: Config, checkpoint: Path, pairs: list[Pair]) -> float:
    """DPO's loss of the pairs under a checkpoint, from log-probabilities of it and of the first policy."""
    collator = PairCollator(load_processor(config.policy), ImageStore(config.question_images), "shared")
    now, first = (
        compute(checkpoint.parent / f"of-{Path(model).name}.safetensors", pairs, collator, lambda at=model: load_model(at)).logps
        for model in (checkpoint, config.policy)
    )  # fmt: skip
    ratios = (now - first)[:, 0] - (now - first)[:, 1]
    return float(-logsigmoid(0.1 * ratios).mean())


def test_a_training_that_overfits_ends_keeps_its_best_state_and_resumes_to_the_same(tmp_path, monkeypatch):
    config, held_out = overfitting_run(tmp_path, "whole", keep="best", patience=2)
    run_dpo(config, 1)
    this = round_1(config)
    found = looks(config)
    assert [entry["step"] for entry in found] == [1, 2, 3], "two looks without improvement after the first"
    assert found[0]["eval_loss"] < found[1]["eval_loss"] < found[2]["eval_loss"]
    assert loss_of(config, this.checkpoint, held_out) == pytest.approx(found[0]["eval_loss"], abs=1e-4)
    assert found[0]["eval_rewards/margins"] < 0
    entry = this.manifest.stage("dpo")
    assert entry.counts["pairs"] == 7
    assert entry.notes["kept"].startswith("the state of step 1, the best by loss; loss of 3 held-out pairs: ")
    assert entry.notes["kept"].endswith("at step 3; ended early, loss has not improved for 2 looks")
    assert not list(this.trainer.glob("checkpoint-*"))

    stopped, _ = overfitting_run(tmp_path, "stopped", keep="best", patience=2)
    with monkeypatch.context() as patch:
        stop_once(patch, 1)
        with pytest.raises(SystemExit):
            run_dpo(stopped, 1)
    assert {path.name for path in round_1(stopped).trainer.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    run_dpo(stopped, 1)
    before, after = weights(this.checkpoint), weights(round_1(stopped).checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_last_state_is_kept_unless_the_best_is_asked_for_and_the_last_step_is_looked_at(tmp_path):
    config, _ = overfitting_run(tmp_path, "last", eval_steps=0.5, num_train_epochs=1, max_steps=3, rows="question")
    run_dpo(config, 1)
    assert [entry["step"] for entry in looks(config)] == [2, 3]
    kept = round_1(config).manifest.stage("dpo").notes["kept"]
    assert kept.startswith("the last state, of step 3; loss of 3 held-out pairs: ")


def test_what_has_no_effect_is_refused_at_once(tmp_path):
    def faults(**dpo: Any) -> str:
        config = build_config({"policy": "p", "questions": "q.jsonl", "dpo": dpo}, base=tmp_path)
        with pytest.raises(UserError) as error:
            check_fields(config.dpo)
        return str(error.value)

    assert "dpo.keep: best needs dpo.eval_steps" in faults(keep="best")
    assert "dpo.patience needs dpo.keep: best" in faults(eval_steps=5, patience=2)
    assert "dpo.save_steps cannot be set with dpo.keep: best" in faults(eval_steps=5, keep="best", save_steps=3)
    assert "dpo.eval_steps: expected whole steps or a share below 1, found 2.5" in faults(eval_steps=2.5)
    assert "dpo.load_best_model_at_end cannot be set: see dpo.keep" in faults(load_best_model_at_end=True)


def test_nothing_can_be_held_out_of_one_question(processor, images):
    pair = tokenized(make_pairs(images.root, 1), processor, images)
    with pytest.raises(UserError, match="all pairs are of one question"):
        split_pairs(pair * 3, 0.1, 0)
