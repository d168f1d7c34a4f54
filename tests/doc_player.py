"""Plays the programs that the pages call: `align` and scripts in this process and small, others not at all.

What is changed for a CPU without a network, and what cannot be run there, stands in the tables here with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from align.cli import app
from tests.doc_pages import ROOT
from tests.doc_shell import Program, Shell
from tests.engines.stub_server import StubServer

# Appended to every command that takes --set: sizes, and what only a GPU has.
SMALL = {
    "rounds": "1",
    "model.dtype": "float32",
    "model.device": "cpu",
    "sample.max_new_tokens": "16",
    "sample.temperature": "1.2",
    "sample.top_p": "1.0",
    "sample.num_responses": "4",
    "pairs.keep_truncated": "true",
    "critic.reliability_sample": "2",
    "dpo.max_steps": "1",
    "dpo.bf16": "false",
    "dpo.gradient_checkpointing": "false",
    "dpo.per_device_train_batch_size": "2",
    "dpo.gradient_accumulation_steps": "1",
    "evaluate.max_new_tokens": "16",
    "evaluate.limit": "2",
    # The stub server reads no prompt.
    "server.compare_prompts": "false",
    "launch.num_processes": "1",
    "launch.num_machines": "1",
    "launch.strategy": "ddp",
}
# Also, where align.yaml has this line: held-out questions, and other ways where the tour's checkpoints cannot follow.
ALSO = {
    "name: run": {"evaluate.questions": "data/eval.jsonl", "evaluate.image_root": "data"},
    # Random rounding is for bfloat16 weights.
    "name: one-gpu-full": {"dpo.optim": "adamw_torch", "dpo.optim_args": "null"},
    # The demo's critic writes no claims.
    "name: rlaif-v": {"critic.kind": "pointwise", "critic.options": "", "pairs.min_margin": "0"},
    # Its gate asks for a critic that looks, which only the demo's own prompt makes of the demo's.
    "name: llava-critic": {"critic.gates": ""},
    "name: llava-critic-onevision": {"critic.gates": "", "model.processor": "{image_aspect_ratio: pad}"},
}
# Options of `align` that are left out, with their value.
LEFT_OUT = {
    "--num-processes": "one process here; tests/distributed launches several",
    "--strategy": "tests/distributed trains with each",
}
# What begins so is not run.
NOT_RUN = {
    r"make (test|docs)\b": "is what runs this; tests/pages/test_docs.py builds the pages",
    r"make (dist|lock)\b": "write into the repository; tests/test_package.py builds a wheel, tests/test_locks.py holds the locks",
    r"(python -m )?pip install": "needs the network",
    r"accelerate launch": "tests/distributed launches so, with and without a configuration of accelerate's",
    r"hf auth login": "needs the network",
    r"align evaluate --lmms-eval": "its options are read; tests/test_lmms_eval.py runs it in processes of its own",
    r"align chat .*--web": "its options are read; tests/test_chat_web.py serves the page and drives it in a browser",
    r"align selftest\b": "minutes; its options are read, tests/selftest runs its checks",
    r"align plan --measured": "reads what a selftest wrote; tests/selftest does",
    r"scripts/first_gpu\.sh": "minutes, and wants a GPU",
    r"align label\b": "its options are read; tests/test_label_web.py serves the page and drives it in a browser",
    r"vllm serve": "needs a GPU and an environment of its own; the commands around it meet a stub server",
    r"python -m sglang": "as vllm",
    r"python scripts/bench_(dpo|sample)\.py": "minutes; its flags are read",
    r"python scripts/bench_(batching|scale)\.py": "minutes",
    r"python scripts/bench_engines\.py": "needs vLLM; its flags are read, the parts without vLLM are tested beside it",
    r"python scripts/bench_score\.py": "minutes; its flags are read; tests/engines/test_benchmark_model.py runs it tiny",
    r"python scripts/harmful_runs\.py": "ten minutes; its flags are read, a small form of it is among the report's tests",
    r"python scripts/bench_until_pair\.py": "ten minutes; its flags are read",
    r"python scripts/bench_image_preference\.py": "the better part of an hour; its flags are read",
    r"python scripts/demo_seeds\.py": "the better part of an hour; its flags are read",
    r"python scripts/demo_consistency\.py": "its flags are read; tests/demo/test_consistency.py runs it on a round of one question",
    r"python scripts/build_demo\.py": "an hour and more; its flags are read",
    r"python scripts/fault_test\.py": "its flags are read; tests/test_crashes.py runs it with a kill a stage",
    r"python scripts/(damage_runs|fuzz_images)\.py": "minutes; tests/test_damaged_runs.py and test_pictures.py run them short",
    r"python scripts/check_plan\.py": "its flags are read; tests/test_plan.py runs its cases",
}
# Scripts that are run, and what makes them small.
SMALLEST = {
    "scaling_table.py": [],
    "bench_server.py": ["--questions", "4", "--service-s", "0.05", "--repeats", "1"],
    "bench_tournaments.py": ["--questions", "2", "--responses", "3", "--repeats", "1"],
}
OUTPUTS = ("--out", "--write", "--report", "--json")
NEITHER = (127, "neither run nor in the table of what is not run")


class Player:
    """`shell` runs scripts with these programs; `used` are the entries of the tables that were needed,
    `pages` what was played."""

    def __init__(self, server: StubServer, **more: Program) -> None:
        self.server = server
        self.used: set[str] = set()
        self.pages: set[str] = set()
        self.outputs: list[Path] = []
        others = ("accelerate", "hf", "pip", "vllm")
        self.shell = Shell(
            {"align": self.align, "python": self.python, "make": self.make, "srun": self.srun}
            | {"scontrol": lambda arguments, folder: (0, "localhost\n")}
            | {name: self._other(name) for name in others}
            | more
        )

    def align(self, arguments: list[str], folder: Path) -> tuple[int, str]:
        if self.is_left_out(f"align {' '.join(arguments)}"):
            typer.main.get_command(app).commands[arguments[0]].make_context(arguments[0], arguments[1:])
            return 0, "not run\n"
        self.outputs += [folder / value for option, value in pairwise(arguments) if option in OUTPUTS]
        arguments = [word.replace("http://gpu1:8000", self.server.url) for word in self._left_out(arguments)]
        command = typer.main.get_command(app).commands.get(arguments[0])
        names_a_run = arguments[0] == "report" and len(arguments) > 1 and not arguments[1].startswith("-")
        if command is not None and not names_a_run and any(parameter.name == "set_" for parameter in command.params):
            arguments += [f"--set={key}={value}" for key, value in self._small(folder).items()]
        if arguments[0] == "demo":
            arguments.append("--rounds=1")
        result = CliRunner().invoke(app, arguments)
        printed = "\n".join(line for line in result.output.splitlines() if "it/s]" not in line)
        return result.exit_code, f"{printed}\n{result.exception or ''}\n"

    def _left_out(self, arguments: list[str]) -> list[str]:
        kept, words = [], iter(arguments)
        for word in words:
            if word in LEFT_OUT:
                self.used.add(word)
                next(words)
            else:
                kept.append(word)
        return kept

    def _small(self, folder: Path) -> dict[str, str]:
        config = folder / "align.yaml"
        lines = config.read_text(encoding="utf-8").splitlines() if config.exists() else []
        self.used |= ALSO.keys() & set(lines)
        return SMALL | {key: value for line in lines for key, value in ALSO.get(line, {}).items()}

    def python(self, arguments: list[str], folder: Path) -> tuple[int, str]:
        if arguments[:2] == ["-m", "align"]:
            return self.align(arguments[2:] or ["--help"], folder)
        left_out = self.is_left_out("python " + " ".join(arguments))
        script = Path(arguments[0])
        if script.parts[0] == "scripts" and (left_out or script.name in SMALLEST):
            return run_script(script, arguments[1:], only_flags=left_out)
        return (0, "not run\n") if left_out else NEITHER

    def make(self, arguments: list[str], folder: Path) -> tuple[int, str]:
        """Any target must be there; of what is not in the table the last line is run."""
        # Without what a `make test` around this says to a make within it, which would tell of folders it enters.
        alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        command = ["make", "-n", "--no-print-directory", *arguments]
        made = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
        if made.returncode or self.is_left_out("make " + " ".join(arguments)):
            return made.returncode, made.stderr
        program, *rest = made.stdout.strip().splitlines()[-1].split()
        return self.align(rest, folder) if program.endswith("/align") else NEITHER

    def srun(self, arguments: list[str], folder: Path) -> tuple[int, str]:
        """One task on one node: this one."""
        program, *rest = arguments[next(at for at, word in enumerate(arguments) if not word.startswith("-")) :]
        return self.shell.programs[program](rest, folder)

    def _other(self, name: str) -> Program:
        return lambda arguments, folder: (0, "not run\n") if self.is_left_out(" ".join([name, *arguments])) else NEITHER

    def is_left_out(self, command: str) -> bool:
        found = [pattern for pattern in NOT_RUN if re.match(pattern, command)]
        self.used |= set(found)
        return bool(found)


def run_script(script: Path, arguments: list[str], *, only_flags: bool) -> tuple[int, str]:
    """A script in this process at its smallest, or only until its flags are read."""
    parse = argparse.ArgumentParser.parse_args
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "argv", [str(script), *arguments, *([] if only_flags else SMALLEST[script.name])])
        patch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
        if only_flags:
            patch.setattr(argparse.ArgumentParser, "parse_args", _then_stop(parse))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except FlagsReadError:
            return 0, "not run\n"
        except SystemExit as end:
            return int(end.code or 0), printed.getvalue()
    return (1, "it reads no flags") if only_flags else (0, printed.getvalue())


class FlagsReadError(Exception):
    """The flags of a script were right."""


def _then_stop(parse: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
    def parse_args(*arguments: object, **more: object) -> argparse.Namespace:
        parse(*arguments, **more)
        raise FlagsReadError

    return parse_args


def worker_error_of(subcommand, name, arguments):
    """What the command line has against it; a command that is only named, without its arguments, is no fault."""
    try:
        subcommand.make_context(name, arguments)
    except Exception as error:
        return None if type(error).__name__ == "MissingParameter" else error
    return None
