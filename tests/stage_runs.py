"""A small project folder (tiny random LLaVA-OneVision as policy and critic, six image questions) and `align` on it."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from align.cli import main
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
    """Run the command line in a process of its own, as a person would, but without the seconds of its imports."""
    with tempfile.TemporaryDirectory() as written:
        out, err = Path(written, "out"), Path(written, "err")
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        process = _FORKS.Process(target=_command, args=(arguments, folder, variables, out, err))
        process.start()
        process.join(PATIENCE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode or 0, out.read_text(), err.read_text())


# The process that others are forked from has imported what commands need.
_FORKS = multiprocessing.get_context("forkserver")
_STAGES = ["align.stages.sample", "align.stages.score", "align.dpo.stage", "align.evaluation.evaluate", "align.report"]
_FORKS.set_forkserver_preload(["tests.tiny_models", "align.loop", "align.check", "align.plan", "trl", "peft", *_STAGES])


def _command(arguments: tuple[str, ...], folder: Path, variables: dict[str, str], out: Path, err: Path) -> None:
    """What the process does: its output goes to files, its end is that of the command line."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["align", *arguments]
    main()
