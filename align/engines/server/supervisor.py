"""Runs one server and ends it with whoever started it: a command line in, a server that is restarted when it dies.

Started as a program of its own, without the toolkit's imports:

    python supervisor.py MAX_RESTARTS STOP_S COMMAND...

Standard input is a pipe that the starting process holds. A byte in it says that the server has answered: one that dies
before that has a fault that a restart would only repeat. It closes however that process ends, also by SIGKILL; the
server is then asked to stop (SIGTERM), and after STOP_S seconds it and all that it started are killed. On Linux what
the server leaves behind is adopted by this process, and the server dies with this process too. Exits with 0 when it was
asked to stop, with 1 when the server has died and is not restarted.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LOOK_EVERY_S = 0.2
PAUSE_S = 1.0


def main(arguments: list[str]) -> int:
    """Run the command and keep it running; returns its exit code."""
    max_restarts, stop_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    started_by = os.getppid()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    answered = False
    for restart in range(max_restarts + 1):
        server = _start(command)
        while server.poll() is None:
            read = _read(sys.stdin.fileno(), LOOK_EVERY_S)
            answered = answered or bool(read)
            if asked or read == b"" or os.getppid() != started_by:
                _stop(server, stop_s)
                return 0
        _kill_descendants()
        left = max_restarts - restart if answered else 0
        _say(f"the server ended with code {server.returncode}; {left} restarts left")
        if not left:
            break
        time.sleep(PAUSE_S)
    return 1


# By its number: Windows knows no such name.
SIGKILL = 9


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    _say(f"starting: {' '.join(command)}")
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, SIGKILL),
    )


def _stop(server: subprocess.Popen[bytes], stop_s: float) -> None:
    server.terminate()
    try:
        server.wait(stop_s)
    except subprocess.TimeoutExpired:
        _say(f"the server did not stop within {stop_s:g} s and is killed")
    _kill_descendants()


def _kill_descendants() -> None:
    """Until none is left: one may start another while it is killed."""
    while found := psutil.Process().children(recursive=True):
        for process in found:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(found, timeout=5)
        _reap()


def _reap() -> None:
    """Takes note of adopted processes that have ended; they would stay as zombies."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _read(pipe: int, wait_s: float) -> bytes | None:
    """A byte, none (b"") where the pipe is closed, None where neither happens within `wait_s`."""
    ready, _, _ = select.select([pipe], [], [], wait_s)
    return os.read(pipe, 1) if ready else None


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _say(text: str) -> None:
    print(f"[align {time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
