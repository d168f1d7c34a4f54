"""Runs scenarios in a process of their own, whose torch believes in a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_rehearsal.fake_cuda import compile_guard, compiler, torch_folder

ROOT = Path(__file__).resolve().parents[2]
Scenario = tuple[str, dict[str, Any]]


@pytest.fixture(scope="session")
def rehearse(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Sequence[Scenario]], list[dict[str, Any]]]]:
    """Runs scenarios one after the other, all in one process; what each found, or its `error`."""
    if compiler() is None:
        pytest.skip("a rehearsal of CUDA needs a C++ compiler")
    if not (torch_folder() / "include").is_dir():
        pytest.skip("a rehearsal of CUDA needs torch's headers")
    import torch

    if torch.version.cuda is not None:
        pytest.skip("a rehearsal of CUDA needs a build of torch without CUDA")
    compile_guard()
    said = tmp_path_factory.mktemp("rehearsal") / "said.txt"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        said.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.cuda_rehearsal.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=ROOT,
        ) as worker,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None
        asked, answered = worker.stdin, worker.stdout

        def run(scenarios: Sequence[Scenario]) -> list[dict[str, Any]]:
            found = []
            for scenario in scenarios:
                asked.write(json.dumps(scenario) + "\n")
                asked.flush()
                line = answered.readline()
                assert line, f"the rehearsal ended too soon:\n{said.read_text()[-4000:]}"
                found.append(json.loads(line))
            return found

        yield run
        asked.close()
