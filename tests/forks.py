"""Processes forked from one that has imported what commands need, which is what takes a process of its own so long."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.distributed.ports import free_port
from tests.patience import PATIENCE_S

FORKS = multiprocessing.get_context("forkserver")
_STAGES = ["align.stages.sample", "align.stages.score", "align.dpo.stage", "align.evaluation.evaluate", "align.report"]
# What DeepSpeed imports when a training begins, which takes longer than the training of a tiny model; may be missing.
_ZERO = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
_TRAINING = ["trl", "peft", "torch.utils.tensorboard", *_ZERO]
_COMMANDS = ["align.cli", "align.loop", "align.check", "align.plan"]
FORKS.set_forkserver_preload(["tests.tiny_models", *_COMMANDS, *_TRAINING, *_STAGES])


def remember_packages() -> None:
    """accelerate reads and parses a package's metadata again at every step of a training, to see whether it is there."""
    imports = sys.modules.get("accelerate.utils.imports")
    if imports is not None and not hasattr(imports._is_package_available, "cache_info"):
        imports._is_package_available = functools.cache(imports._is_package_available)  # type: ignore[attr-defined]


def begin(out: Path, err: Path) -> None:
    """Let files take what this process and its libraries print, and the collector leave alone what was there before."""
    remember_packages()
    gc.freeze()
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def in_a_process(function: Callable[..., None], *arguments: Any) -> str:
    """Call a function of a module in a process of its own, which must succeed; what it said."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        process = FORKS.Process(target=_rank, args=(function, arguments, {}, said))
        process.start()
        process.join(PATIENCE_S)
        assert process.exitcode == 0, said.read_text()[-6000:]
        return said.read_text()


class Launch:
    """A function of a module in both processes of a launch, as torchrun would start them."""

    def __init__(self, function: Callable[..., None], *arguments: Any, **environment: str) -> None:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        common |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"} | environment
        self._folder = tempfile.TemporaryDirectory()
        self.processes = []
        for rank in ("0", "1"):
            variables = common | {"RANK": rank, "LOCAL_RANK": rank}
            arguments_of = (function, arguments, variables, Path(self._folder.name, rank))
            self.processes.append(FORKS.Process(target=_rank, args=arguments_of))
        for process in self.processes:
            process.start()

    def poll(self) -> int | None:
        """The exit code of one that has ended, None while both run."""
        return next((process.exitcode for process in self.processes if process.exitcode is not None), None)

    def terminate(self) -> None:
        """Send SIGTERM to both."""
        for process in self.processes:
            process.terminate()

    def end(self) -> str:
        """Wait for both, which must succeed; what the first said."""
        try:
            for process in self.processes:
                process.join(PATIENCE_S)
            said = [Path(self._folder.name, rank).read_text() for rank in ("0", "1")]
            assert [process.exitcode for process in self.processes] == [0, 0], "\n\n".join(
                text[-6000:] for text in said
            )
            return said[0]
        finally:
            self.kill()

    def kill(self) -> None:
        """End both at once, where they still run."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def in_two_processes(function: Callable[..., None], *arguments: Any, **environment: str) -> str:
    """Call a function of a module in both processes of a launch, which must succeed; what the first said."""
    return Launch(function, *arguments, **environment).end()


def _rank(function: Callable[..., None], arguments: tuple[Any, ...], variables: dict[str, str], said: Path) -> None:
    begin(said, said)
    os.environ.update(variables)
    function(*arguments)
