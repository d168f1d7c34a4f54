"""The demo's critic, trained and tiny, on answers whose order is known: right, one digit wrong, every digit wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from align.demo.canvas import draw
from align.demo.data import demo_settings
from align.demo.questions import Task, say
from align.records import Question, Response, Samples, write_jsonl
from align.run.folder import RunDir
from tests.critic_runs import score, score_lines

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

NUM_QUESTIONS = 24


def write_round(folder: Path) -> None:
    """Questions that ask for all digits, each with a right, a slightly wrong and a thoroughly wrong answer."""
    rng = random.Random(77)
    (folder / "images").mkdir()
    lines = []
    while len(lines) < NUM_QUESTIONS:
        canvas = draw(rng, "eval")
        if len(canvas.digits) < 3:
            continue
        name = f"images/{len(lines)}.png"
        canvas.image().save(folder / name)
        task = Task("list", 0, tuple(canvas.digits))
        place = rng.randrange(len(canvas.digits))
        slightly = [(d + 5) % 10 if at == place else d for at, d in enumerate(canvas.digits)]
        thoroughly = [(d + 5) % 10 for d in canvas.digits]
        texts = [say(task, seen) for seen in (canvas.digits, slightly, thoroughly)]
        question = Question(id=f"q{len(lines)}", question=task.question, images=[name], answer=task.answer)
        question.answer_kind = "exact"
        responses = [Response(text=text, num_tokens=9) for text in texts]
        lines.append(Samples(id=question.id, question=question, responses=responses, seed=0))
    write_jsonl(folder / "questions.jsonl", [line.question for line in lines])
    this = RunDir(folder / "runs/run").round(1)
    this.path.mkdir(parents=True)
    write_jsonl(this.samples, lines)
    this.manifest.begin("sample", settings={}, inputs={})
    this.manifest.finish("sample", outputs=[this.samples], counts={}, seconds=0.0)


def test_a_trained_critic_orders_answers_as_built_looks_and_passes_gates(tmp_path):
    write_round(tmp_path)
    gates = {"max_position_bias": 0.3, "min_image_dependence": 0.1, "min_agreement_with_reference": 0.65}
    settings = demo_settings(0)["critic"]
    found = score(tmp_path, **settings, gates=gates)["critic"]
    lines = score_lines(tmp_path)
    assert sum(line.rewards[0] > line.rewards[2] for line in lines) >= 0.85 * NUM_QUESTIONS
    assert found["mean_option_mass"]["value"] > 0.9
    agreement = found["agreement_with_reference"]
    assert agreement["low"] <= agreement["value"] <= agreement["high"]
