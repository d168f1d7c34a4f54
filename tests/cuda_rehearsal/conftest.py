"""Runs scenarios in a process of their own, whose torch believes in a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_rehearsal.fake_cuda import compile_guard, compiler, torch_folder

ROOT = Path(__file__).resolve().parents[2]
Scenario = tuple[str, dict[str, Any]]


@pytest.fixture(scope="session")
def rehearse() -> Callable[[Sequence[Scenario]], list[dict[str, Any]]]:
    """Runs scenarios one after the other; what each found, or its `error`."""
    if compiler() is None:
        pytest.skip("a rehearsal of CUDA needs a C++ compiler")
    if not (torch_folder() / "include").is_dir():
        pytest.skip("a rehearsal of CUDA needs torch's headers")
    import torch

    if torch.version.cuda is not None:
        pytest.skip("a rehearsal of CUDA needs a build of torch without CUDA")
    compile_guard()

    def run(scenarios: Sequence[Scenario]) -> list[dict[str, Any]]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        worker = subprocess.run(
            [sys.executable, "-m", "tests.cuda_rehearsal.worker"],
            input=json.dumps(list(scenarios)),
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        found = [json.loads(line) for line in worker.stdout.splitlines()]
        assert len(found) == len(scenarios), f"the rehearsal ended too soon:\n{worker.stderr[-4000:]}"
        return found

    return run
