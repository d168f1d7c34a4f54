"""The command line: each command reads align.yaml, runs one stage (or all), and names the next command.

torch is imported inside the commands, so `--help` is instant. Exit codes: 0 done, 2 the user can fix it, 1 our fault.
"""

from __future__ import annotations

import signal

# `align --help` lists the commands in the order of these imports.
from align.cli import before, stages, serve, label, results, checkpoints  # isort: skip
from align.cli.console import fail, set_up_logging, stop
from align.cli.options import app
from align.distributed.launch import adopt_slurm, is_started_by_align
from align.distributed.ranks import world_size
from align.distributed.worker_errors import WorkerError, worker_error_of

__all__ = ["app", "before", "checkpoints", "label", "main", "results", "serve", "stages"]


def main() -> None:
    """Entry point: faults of the user end in one message and exit code 2."""
    adopt_slurm()
    set_up_logging()
    if not is_started_by_align():
        signal.signal(signal.SIGTERM, stop)
    try:
        app()
    except SystemExit as ended:
        # typer makes this of Ctrl-C, where the command itself does not take it.
        if isinstance(getattr(ended.__context__, "__cause__", None), KeyboardInterrupt):
            fail(WorkerError("interrupted; the same command resumes from here", 130, "users"))
        raise
    except Exception as error:
        fault = worker_error_of(error)
        if fault.kind == "ours" and world_size() == 1 and not is_started_by_align():
            raise
        fail(fault)
