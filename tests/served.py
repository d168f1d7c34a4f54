"""A page of `align` in a process of its own: its address, and what it said. It ends as Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from align.cli import main
from align.distributed.ports import free_port
from tests.forks import FORKS, begin
from tests.patience import PATIENCE_S, wait_until


class Served:
    """`align ARGUMENTS --port` of a free port, in `folder`; what the page takes lies under `temporary`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/"
        self.temporary, self._out, self._err = (folder / name for name in ("temporary", "said.txt", "errors.txt"))
        self.temporary.mkdir()
        self._out.touch()
        words = (*arguments, "--port", str(port))
        self._process = FORKS.Process(target=_serve, args=(folder, words, self.temporary, self._out, self._err))
        self._process.start()
        wait_until(lambda: self.url in self.said or not self._process.is_alive())
        assert self.url in self.said, self.errors

    @property
    def said(self) -> str:
        """What it wrote to standard output."""
        return self._out.read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        """What it wrote to standard error: also every address that it looked up, connected to or listened on."""
        return self._err.read_text(encoding="utf-8")

    def stop(self) -> int | None:
        """Press Ctrl-C; its exit code."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGINT)
        self._process.join(PATIENCE_S)
        code = self._process.exitcode
        self.kill()
        return code

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self._process.kill()
        self._process.join()

    def status(self, path: str) -> int:
        """The status that a path is answered with."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


def _serve(folder: Path, words: tuple[str, ...], temporary: Path, out: Path, err: Path) -> None:
    begin(out, err)
    # Tests may have been started in the background, where the signal is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.addaudithook(_note_address)
    os.environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    tempfile.tempdir = None
    os.chdir(folder)
    sys.argv = ["align", *words]
    main()


def _note_address(event: str, values: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo"):
        address = values[0] if event == "socket.getaddrinfo" else values[1]
        print("ADDRESS", event, address if isinstance(address, str) else address[0], file=sys.stderr, flush=True)
