"""A small project folder (tiny random LLaVA-OneVision as policy and critic, six image questions) and `align` on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.patience import PATIENCE_S
from tests.tiny_models import random_image, save_llava_onevision

SETTINGS = {
    "policy": "./policy",
    "questions": "questions.jsonl",
    "rounds": 2,
    "sample": {"num_responses": 3, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "batch_size": 2},
    "critic": {"kind": "random"},
    "pairs": {"keep_truncated": True},
    "evaluate": {"questions": "eval.jsonl", "max_new_tokens": 6},
    "dpo": {
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
    },
}


def make_project(folder: Path, **changes: object) -> Path:
    """Write checkpoints, images, questions and align.yaml; `changes` replace top-level settings."""
    save_llava_onevision(folder / "policy", 0)
    save_llava_onevision(folder / "critic", 1)
    (folder / "images").mkdir()
    questions = []
    for index in range(6):
        name = f"images/{index}.png"
        random_image(index, 30 + 4 * index, 40).save(folder / name)
        questions.append({"id": f"q{index}", "question": f"What is {index}?", "images": [name], "answer": str(index)})
    write_lines(folder / "questions.jsonl", questions[:4])
    write_lines(folder / "eval.jsonl", questions[4:])
    (folder / "align.yaml").write_text(yaml.safe_dump(SETTINGS | changes))
    return folder


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def align(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a person would."""
    return subprocess.run(
        [sys.executable, "-m", "align.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        timeout=PATIENCE_S,
    )
