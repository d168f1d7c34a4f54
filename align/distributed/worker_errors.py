"""What a process of a launch died of in, one message for all of them out, said by whoever can see the others' faults.

Processes that `align` started itself leave their faults as files in a folder of the launch (ALIGN_FAULTS) and stay
silent; the command that started them reads the folder when they have ended. Under another launcher (torchrun, srun)
nobody comes after them: whoever is the first on a machine to have a fault says it, with its rank where that is not 0.

A process whose neighbour died finds its connection closed. That is no fault of its own: it is said only where nothing
else is known.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from align.distributed.ranks import rank, world_size
from align.errors import UserError, writing_failed

# Names the folder in which the processes that `align` started leave their faults.
FOLDER = "ALIGN_FAULTS"
USERS_FAULT, OUR_FAULT = 2, 1
Kind = Literal["users", "ours", "neighbour"]

_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|communicator was aborted|socket (timeout|closed)"
    r"|failed to (recv|send)|remote process exited",
    re.IGNORECASE,
)
LOST = "the connection to another process was lost; what that one died of stands where it ran"


@dataclass(frozen=True)
class WorkerError:
    """Why a process ends: `text` for a person, `code` to exit with; `kind` says whose fault it is.

    `trace` is the traceback of a fault of ours, empty for everything that a person can fix.
    """

    text: str
    code: int
    kind: Kind
    trace: str = ""
    rank: int = field(default_factory=rank)
    when: float = field(default_factory=time.time)

    @property
    def message(self) -> str:
        """The text, or the traceback where there is one, with the process where the main one has no such fault."""
        text = self.trace or self.text
        return f"process {self.rank}: {text}" if self.rank or self.kind != "users" else text


def worker_error_of(error: Exception) -> WorkerError:
    """What an exception means to the person who started the command; called while it is handled."""
    if isinstance(error, UserError):
        return WorkerError(str(error), USERS_FAULT, "users")
    if world_size() > 1 and _is_lost_connection(error):
        return WorkerError(LOST, OUR_FAULT, "neighbour")
    # A full disk, a read-only folder, a file that vanished: the machine's state, not a bug of ours.
    problem = writing_failed(error)
    if problem is not None:
        return WorkerError(f"{problem}; fix that, and the same command resumes from here", USERS_FAULT, "users")
    trace = traceback.format_exc().rstrip()
    return WorkerError(f"{type(error).__name__}: {error}", OUR_FAULT, "ours", trace)


def killed_by(number: int, rank: int) -> WorkerError:
    """A process that a signal ended, so that it could leave nothing itself."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = ": the machine's memory may have run out" if name == "SIGKILL" else ""
    # Launchers end the neighbours of a dead process with SIGTERM, and some libraries abort themselves.
    kind: Kind = "neighbour" if number in (signal.SIGTERM, signal.SIGABRT) else "ours"
    return WorkerError(f"ended by {name}{hint}", OUR_FAULT, kind, rank=rank)


def report(fault: WorkerError) -> str | None:
    """Hand on the fault of this process; returns what it must say itself, None where another one speaks."""
    if FOLDER in os.environ:
        write(fault, Path(os.environ[FOLDER]))
        return None
    if world_size() == 1:
        return fault.message
    folder = _folder_of_launch()
    write(fault, folder)
    if fault.kind == "neighbour" and any(other.kind != "neighbour" for other in read_worker_errors(folder)):
        return None
    return fault.message if _is_first(fault, folder) else None


def write(fault: WorkerError, folder: Path) -> None:
    """Write a fault into a folder, under its rank."""
    path = folder / f"{fault.rank}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(fault)), encoding="utf-8")
    unfinished.replace(path)


def read_worker_errors(folder: Path) -> list[WorkerError]:
    """All faults in a folder, the earliest first."""
    faults = [WorkerError(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    return sorted(faults, key=lambda fault: fault.when)


def root_causes(faults: list[WorkerError]) -> list[WorkerError]:
    """The faults that should be said: each text once (of its lowest rank), and lost connections only when alone.

    Of several faults of ours only the earliest is kept: the others mostly follow from it.

    >>> one = WorkerError("bad key", 2, "users", rank=1, when=1.0)
    >>> two = WorkerError("bad key", 2, "users", rank=0, when=2.0)
    >>> lost = WorkerError("connection lost", 1, "neighbour", rank=2, when=0.0)
    >>> [(fault.text, fault.rank) for fault in root_causes([lost, one, two])]
    [('bad key', 0)]
    """
    own = [fault for fault in faults if fault.kind != "neighbour"] or faults[:1]
    by_text: dict[str, WorkerError] = {}
    for fault in own:
        if fault.text not in by_text or fault.rank < by_text[fault.text].rank:
            by_text[fault.text] = fault
    users = [fault for fault in by_text.values() if fault.kind == "users"]
    if own and own[0].kind == "users":
        return users
    return [*list(by_text.values())[:1], *users] if by_text else []


def is_reported() -> bool:
    """Whether another process of this launch has left a fault already, so that this one is stopped because of it."""
    if world_size() == 1:
        return False
    folder = Path(os.environ[FOLDER]) if FOLDER in os.environ else _folder_of_launch()
    return any(fault.rank != rank() for fault in read_worker_errors(folder))


def _is_lost_connection(error: Exception) -> bool:
    of_torch = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return of_torch or (isinstance(error, RuntimeError | ConnectionError) and _LOST.search(str(error)) is not None)


def _folder_of_launch() -> Path:
    """The same for all processes that one launcher started on this machine, and never for those of another launch."""
    import psutil

    launcher = psutil.Process(os.getppid())
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"align-{_user()}-{launcher.pid}-{launcher.create_time():.2f}-{attempt}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _user() -> int:
    """Tells users of one temporary folder apart; on Windows each has a folder of their own."""
    return os.getuid() if hasattr(os, "getuid") else 0


def _is_first(fault: WorkerError, folder: Path) -> bool:
    """Whether no other process has claimed to say this text."""
    digest = hashlib.sha256(fault.text.encode()).hexdigest()[:16]
    try:
        (folder / f"{digest}.said").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
