"""A small project folder (tiny random LLaVA-OneVision as policy and critic, six image questions) and `align` on it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from align.cli import main
from tests.forks import FORKS, Launch, begin, in_two_processes
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


class Command:
    """The command line in a process of its own, as a person would start it, but without the seconds of its imports."""

    def __init__(
        self, folder: Path, *arguments: str, env: dict[str, str] | None = None, limit_bytes: int | None = None
    ) -> None:
        self.arguments = arguments
        self._written = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._written.name, name) for name in ("out", "err"))
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        self._process = FORKS.Process(
            target=_run, args=(arguments, folder, variables, self._out, self._err, limit_bytes)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; what it said."""
        self._process.join(PATIENCE_S)
        if self.poll() is None:
            self._process.kill()
            self._process.join()
        code, out, err = self.poll(), self._out.read_text(), self._err.read_text()
        self._written.cleanup()
        return subprocess.CompletedProcess(self.arguments, -signal.SIGKILL if code is None else code, out, err)


def align(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return Command(folder, *arguments, env=env).end()


def begin_in_two_processes(folder: Path, *arguments: str) -> Launch:
    """Begin a command in both processes of a launch."""
    return Launch(_main, folder, arguments)


def align_in_two_processes(folder: Path, *arguments: str, **environment: str) -> str:
    """Run a command in both processes of a launch; it must succeed. What the first process said."""
    return in_two_processes(_main, folder, arguments, **environment)


def _run(
    arguments: tuple[str, ...], folder: Path, variables: dict[str, str], out: Path, err: Path, limit_bytes: int | None
) -> None:
    """What the process does: its output goes to files, its end is that of the command line."""
    begin(out, err)
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    os.environ.clear()
    os.environ.update(variables)
    _main(folder, arguments)


def _main(folder: Path, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    sys.argv = ["align", *arguments]
    main()
