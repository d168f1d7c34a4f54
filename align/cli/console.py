"""What a command says and how it ends: text for people, warnings, one message and an exit code for a fault."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer

from align.distributed.launch import is_started_by_align
from align.distributed.ranks import is_main_process
from align.distributed.worker_errors import WorkerError, is_reported, report
from align.log import log


def say(text: str, *, next_command: str | None) -> None:
    """Print what came of a command and what to type next; in a launch only the process that speaks for all does."""
    if not is_main_process() or is_started_by_align():
        return
    typer.echo(text)
    if next_command:
        typer.secho(f"next: {next_command}", fg=typer.colors.CYAN)


def warn(text: str | None) -> None:
    """Print a warning; nothing for None."""
    if text is not None:
        typer.secho(f"WARNING: {text}", fg=typer.colors.RED, bold=True, err=True)


def stop(*_: object) -> None:
    """SIGTERM: what is finished is on the disk. Training takes the signal itself, to finish its step first."""
    if not is_reported():
        log.info("stopped; the same command resumes from here")
    raise SystemExit(0)


@contextlib.contextmanager
def nothing_to_resume() -> Iterator[None]:
    """For commands that only look: Ctrl-C and SIGTERM end them without a word about resuming."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def fail(fault: WorkerError) -> NoReturn:
    """End this process for a fault, said by whichever process of a launch should say it."""
    text = report(fault)
    if text is not None:
        typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)
    sys.exit(fault.code)


class _CurrentStderr(logging.StreamHandler[Any]):
    """Writes to what standard error is at the moment: while a bar is shown, above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def set_up_logging() -> None:
    """Send the package's log to standard error, and silence the libraries' own bars."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    log.propagate = False
    # The libraries' own bars and notices would drown ours; their warnings still come through.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
