"""A seed in, everything the demo's run needs out: pictures, questions, held-out questions and an align.yaml.

The pictures a run learns from and the held-out ones show different scans of different writers, and neither was seen
while the policy and the critic were trained.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config import CONFIG_NAME, commented_config
from align.demo.canvas import draw
from align.demo.questions import TASKS, Task, absent_words, make_task
from align.records import Question, write_jsonl

HERE = Path(__file__).parent
POLICY = HERE / "policy"
CRITIC = HERE / "critic"
CRITIC_PROMPT = HERE / "critic_prompt.md"
#: How the critic is asked: a verdict counts by its probability, so that a doubtful one weighs little.
CRITIC_OPTIONS: dict[str, Any] = {"soft": True}

QUESTIONS_PER_ROUND = 1000


def write_demo(folder: Path, *, num_questions: int, num_eval: int, seed: int) -> None:
    """Write the demo's data and configuration into `folder`.

    Makes `questions.jsonl` and `eval.jsonl` with their pictures under `images/`, and `align.yaml`. Questions depend on
    `seed`; the held-out ones are the same for every seed, so that runs can be compared.

    Raises:
        UserError: scikit-learn, which brings the digits, is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "questions.jsonl", make_questions(folder, "policy", num_questions, seed=seed))
    write_jsonl(folder / "eval.jsonl", make_questions(folder, "eval", num_eval, seed=0))
    (folder / CONFIG_NAME).write_text(commented_config(demo_settings(seed)), encoding="utf-8")


def make_questions(folder: Path, part: str, number: int, *, seed: int) -> Iterator[Question]:
    """Questions about fresh pictures of a part, the tasks in turn; each picture is written as it is made."""
    (folder / "images" / part).mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{part}:{seed}")
    for index in range(number):
        canvas = draw(rng, part)
        task = make_task(rng, TASKS[index % len(TASKS)], canvas.digits)
        image = f"images/{part}/{index:05d}.png"
        canvas.image().save(folder / image)
        yield as_question(f"{part}-{index:05d}", task, image)


def as_question(name: str, task: Task, image: str) -> Question:
    """The record of a task; exactly one text is right."""
    meta: dict[str, Any] = {"task": task.kind, "digits": list(task.digits)}
    return Question(
        id=name,
        question=task.question,
        images=[image],
        answer=task.answer,
        answer_kind="exact",
        absent_objects=absent_words(task),
        meta=meta,
    )


def demo_settings(seed: int) -> dict[str, Any]:
    """The keys of align.yaml in which the demo differs from the defaults."""
    return {
        "name": "critic",
        "policy": str(POLICY),
        "questions": "questions.jsonl",
        "rounds": 3,
        "seed": seed,
        "model": {"dtype": "float32"},
        "sample": {
            "num_responses": 5,
            "temperature": 0.9,
            "top_p": 1.0,
            "max_new_tokens": 24,
            "questions_per_round": QUESTIONS_PER_ROUND,
        },
        "critic": {
            "kind": "pairwise",
            "model": str(CRITIC),
            "prompt": str(CRITIC_PROMPT),
            "options": CRITIC_OPTIONS,
        },
        "dpo": {
            "reference": "round-start",
            "freeze": ["vision", "projector"],
            "beta": 0.1,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "linear",
            "warmup_steps": 5,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "bf16": False,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 1.0],
        },
        "evaluate": {"questions": "eval.jsonl", "num_samples": 2, "temperature": 0.9, "max_new_tokens": 24},
    }
