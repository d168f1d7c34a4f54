"""Command lines of servers in, running servers on free local ports out: started, waited for, stopped.

Each has a supervisor of its own (`supervisor.py`), which restarts it a bounded number of times and ends it with this
process, however that ends. What a server prints stands in a log file of its own; where they answer, in a file beside.
Any server with OpenAI's interface will do.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from align.config import Server
from align.distributed.ports import free_port
from align.errors import UserError
from align.log import log
from align.monitoring.format import duration
from align.run.server_addresses import publish, withdraw

if TYPE_CHECKING:
    import httpx

SUPERVISOR = Path(__file__).with_name("supervisor.py")
LOCAL_HOST = "127.0.0.1"
TELL_EVERY_S = 15.0
LOOK_EVERY_S = 0.25
# Of a log that is shown where a server does not start.
SHOWN_LINES = 15
LONGEST_LINE = 300


@dataclass(frozen=True)
class Launch:
    """A server to start: its command line for a port, and what is added to its environment."""

    command: Callable[[int], Sequence[str]]
    environment: Mapping[str, str]


@dataclass
class _Replica:
    launch: Launch
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://{LOCAL_HOST}:{self.port}"


class Replicas:
    """Servers of one model; a context in which they run.

    `logs`: files without their endings, one per launch, and one with the addresses of all. `model`: the name that they
    serve. `max_restarts`: of each. `start_timeout_s`: how long all of them may take to answer. `stop_s`: how long each
    may take to stop by itself.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        *,
        model: str,
        logs: Path,
        max_restarts: int,
        start_timeout_s: float,
        stop_s: float = 20.0,
    ) -> None:
        self.launches, self.model, self.logs = list(launches), model, logs
        self.max_restarts, self.start_timeout_s, self.stop_s = max_restarts, start_timeout_s, stop_s
        self._replicas: list[_Replica] = []

    def __enter__(self) -> Replicas:
        """Raises UserError where a server does not answer in time, with the end of its log."""
        try:
            for index, launch in enumerate(self.launches):
                self._replicas.append(self._start(index, launch))
            self._wait()
            publish(self._addresses, self.model, [replica.url for replica in self._replicas])
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _addresses(self) -> Path:
        return self.logs.with_name(f"{self.logs.name}.json")

    @property
    def servers(self) -> list[Server]:
        """The endpoints, as configuration names them."""
        return [Server(url=replica.url, model=self.model) for replica in self._replicas]

    def ended(self, url: str) -> bool:
        """Whether the server at this address has died and will not be restarted."""
        return any(url.startswith(replica.url) and replica.process.poll() is not None for replica in self._replicas)

    def stop(self) -> None:
        """End all servers and wait until they and all that they started are gone."""
        withdraw(self._addresses)
        for replica in self._replicas:
            assert replica.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                replica.process.stdin.close()
        for replica in self._replicas:
            replica.process.wait()
        self._replicas.clear()

    def _start(self, index: int, launch: Launch) -> _Replica:
        port = free_port()
        path = self.logs.with_name(f"{self.logs.name}-{index}.log")
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(SUPERVISOR), str(self.max_restarts), str(self.stop_s), *launch.command(port)]
        with path.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **launch.environment},
                # Ctrl-C in the terminal is this process's business.
                start_new_session=True,
            )
        return _Replica(launch, port, path, process)

    def _wait(self) -> None:
        import httpx

        # No proxy stands between this machine and itself.
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            self._wait_for_answers(client)

    def _wait_for_answers(self, client: httpx.Client) -> None:
        began = reported = time.monotonic()
        waiting = list(self._replicas)
        log.info("starting %s on %s; logs: %s-*.log", self.model, ", ".join(one.url for one in waiting), self.logs)
        while waiting:
            for replica in waiting:
                if replica.process.poll() is not None:
                    raise _not_started("a server that was started has died", replica)
            for replica in [replica for replica in waiting if _answers(client, replica.url)]:
                _tell(replica)
                waiting.remove(replica)
            now = time.monotonic()
            if waiting and now - began > self.start_timeout_s:
                raise _not_started(f"a server does not answer after {self.start_timeout_s:g} s", waiting[0])
            if waiting and now - reported > TELL_EVERY_S:
                reported = now
                ready = len(self._replicas) - len(waiting)
                log.info("%d of %d servers answer after %s", ready, len(self._replicas), duration(now - began))
            if waiting:
                time.sleep(LOOK_EVERY_S)
        log.info("all of them answer after %s", duration(time.monotonic() - began))


def _tell(replica: _Replica) -> None:
    """Lets the supervisor restart it from now on."""
    assert replica.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        replica.process.stdin.write(b"a")
        replica.process.stdin.flush()


def _answers(client: httpx.Client, url: str) -> bool:
    import httpx

    try:
        return client.get(f"{url}/v1/models").is_success
    except httpx.HTTPError:
        return False


def _not_started(what: str, replica: _Replica) -> UserError:
    lines = replica.log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    end = "\n".join(f"  | {line[:LONGEST_LINE]}" for line in lines)
    return UserError(
        f"{what}; its log ends:\n{end}",
        where=str(replica.log),
        fix="fix what it says, or set the stage's engine to local",
    )
