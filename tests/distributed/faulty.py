"""The real command line with commands that go wrong, each process of a launch running the one named at its rank."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from align.cli import app, main
from align.distributed.ranks import rank
from align.distributed.worker_errors import FOLDER
from align.errors import UserError


@app.command()
def fine() -> None:
    """Nothing goes wrong."""


@app.command()
def bad_key() -> None:
    """What a person can fix."""
    raise UserError("there is no key 'polcy'", where="align.yaml", fix="did you mean 'policy'?")


@app.command()
def bad_image() -> None:
    raise UserError("not a readable image", where=f"{rank()}.png")


@app.command()
def crash() -> None:
    """A fault of ours."""
    raise ZeroDivisionError(f"in process {rank()}")


@app.command()
def lost() -> None:
    """What torch says where a neighbour has gone: after the neighbour has said why."""
    while not any(Path(os.environ[FOLDER]).glob("*.json")):
        time.sleep(0.01)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:33333")


@app.command()
def killed() -> None:
    """What the system does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.command()
def stoppable() -> None:
    """Until it is told to stop, as a training that saves its step."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    Path(f"waiting-{rank()}").touch()
    while not stopped:
        time.sleep(0.01)
    Path(f"stopped-{rank()}").touch()


@app.command()
def wait() -> None:
    """Until it is interrupted."""
    print("waiting", flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    sys.argv = ["align", sys.argv[1 + rank()]]
    main()
