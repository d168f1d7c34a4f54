"""Runs that must not be praised, really run with the demo's models through every stage:
what their reports say first."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from align.config import Config, dump_config, load_config
from align.demo import write_demo
from align.loop import run_stage
from align.report import write_report
from align.run.folder import RunDir

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow

QUESTIONS, HELD_OUT = 192, 40
WITHOUT_MODEL = ["critic.model=", "critic.prompt=", "critic.options="]


def config_of(folder: Path, name: str, kind: str) -> Config:
    """One round with a learning rate of four times the demo's, so that what is learned shows on few questions."""
    sizes = [f"sample.questions_per_round={QUESTIONS}", "rounds=1", "dpo.learning_rate=4e-4", "dpo.warmup_steps=0"]
    answers_alone = ["evaluate.kl=false", "evaluate.image_dependence=0"]
    changes = [f"name={name}", f"critic.kind={kind}", *WITHOUT_MODEL, *sizes, *answers_alone]
    return load_config(folder / "align.yaml", changes)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> Path:
    """The demo with the first policy evaluated and asked: what both runs have in common."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, num_questions=QUESTIONS, num_eval=HELD_OUT, seed=0)
    config = config_of(folder, "common", "random")
    RunDir(config.run_dir).write_config_once(dump_config(config))
    run_stage(config, "evaluate", 0)
    run_stage(config, "sample", 1)
    return folder


def run_with(folder: Path, kind: str) -> Path:
    config = config_of(folder, kind, kind)
    shutil.copytree(folder / "runs/common", config.run_dir)
    for stage in ("score", "pairs", "dpo", "evaluate"):
        run_stage(config, stage, 1)
    return config.run_dir


def headline_of(run: Path) -> tuple[str, str]:
    """The first sentence of the report, and all that stands above its curves."""
    html = write_report(run).read_text(encoding="utf-8")
    header = re.search(r"<header.*?</header>", html, flags=re.S)
    title = re.search(r"<h1>(.*?)</h1>", html)
    assert header is not None
    assert title is not None
    return title.group(1).replace("&#39;", "'"), re.sub(r"<[^>]*>", "", header.group()).replace("&#39;", "'")


def metrics_of(run: Path) -> list[dict[str, float]]:
    rounds = [json.loads((run / f"round-{number}/evaluation.json").read_text())["metrics"] for number in (0, 1)]
    return [{name: item["mean"] for name, item in metrics.items()} for metrics in rounds]


def test_a_run_on_random_preferences_is_not_called_better_and_its_preferences_are_as_good_as_random(sampled):
    run = run_with(sampled, "random")
    title, header = headline_of(run)
    assert not title.startswith("Better")
    assert title.endswith("its preferences were no better than random.")
    assert "It was trained on preferences that are as good as random:" in header


def test_a_run_with_a_critic_that_loves_length_is_said_to_have_learned_length(sampled):
    run = run_with(sampled, "length")
    before, after = metrics_of(run)
    assert after["response_tokens"] > 1.05 * before["response_tokens"]
    title, header = headline_of(run)
    assert not title.startswith("Better")
    assert title.endswith("what it learned is length.")
    assert "What was learned is length:" in header
