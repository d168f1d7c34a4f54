"""The shell blocks of a page, run by bash; programs are played by functions of the test's process.

bash itself reads comments, loops, variables and pipes. Each program on its PATH is a few lines that hand arguments and
folder to the test and print what comes back, so that `align` needs no new interpreter. What is neither a program here
nor one of `TOOLS` is a fault.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

# arguments, folder -> exit code, output
Program = Callable[[list[str], Path], tuple[int, str]]
TOOLS = ("bash", "env", "cat", "cd", "cp", "head", "ls", "mkdir", "sleep", "tail", "true")
UNKNOWN = "tour-unknown-command"
BEFORE = f'command_not_found_handle() {{ {UNKNOWN} "$@"; }}\nexport -f command_not_found_handle\n'
# A loop over the rounds, and what is run of it.
THREE_ROUNDS, TWO_ROUNDS = "in 1 2 3; do", "in 1 2; do"
# One task on this machine, at once.
SBATCH = f"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift 2; done
export SLURM_JOB_NODELIST=localhost
script=$(<"$1")
exec bash -c "${{script//{THREE_ROUNDS}/{TWO_ROUNDS}}}" "$@"
"""
STAND_IN = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect({address!r})
    line.sendall(json.dumps([os.path.basename(sys.argv[0]), os.getcwd(), sys.argv[1:]]).encode() + b"\\n")
    code, text = json.loads(line.makefile().readline())
sys.stdout.write(text)
sys.exit(code)
"""


class Shell:
    """Runs scripts in a folder; `faults` holds what went wrong in the last one."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self.programs = {**programs, UNKNOWN: self._unknown}
        self.faults: list[str] = []
        self.home = Path(tempfile.mkdtemp(prefix="tour-"))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.home / "line"))
        self.listener.listen()
        self.listener.settimeout(0.02)
        path = self.home / "bin"
        path.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            if found is not None:
                (path / tool).symlink_to(found)
        (path / "sbatch").write_text(SBATCH)
        (path / "sbatch").chmod(0o755)
        for name in self.programs:
            text = STAND_IN.format(python=sys.executable, address=str(self.home / "line"))
            (path / name).write_text(text)
            (path / name).chmod(0o755)

    def close(self) -> None:
        self.listener.close()
        shutil.rmtree(self.home)

    def run(self, script: str, folder: Path) -> str:
        """Run a script in a folder and give what it printed; see `faults` afterwards."""
        self.faults = []
        log = self.home / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", BEFORE + script.replace(THREE_ROUNDS, TWO_ROUNDS)],
                cwd=folder,
                env={"PATH": str(self.home / "bin"), "HOME": str(self.home), "LANG": "C.UTF-8"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None:
                try:
                    connection, _ = self.listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    self._serve(connection)
        printed = log.read_text()
        if process.returncode and not self.faults:
            self.faults.append(f"exit code {process.returncode}: {printed[-2000:]}")
        return printed

    def _serve(self, connection: socket.socket) -> None:
        name, folder, arguments = json.loads(connection.makefile().readline())
        before = os.getcwd()
        os.chdir(folder)
        try:
            code, text = self.programs[name](arguments, Path(folder))
        except BaseException as error:
            code, text = 1, f"{type(error).__name__}: {error}"
        finally:
            os.chdir(before)
        if code:
            self.faults.append(f"{name} {' '.join(arguments)}: exit code {code}\n{text[-3000:]}")
        connection.sendall(json.dumps([code, text]).encode() + b"\n")

    def _unknown(self, arguments: list[str], folder: Path) -> tuple[int, str]:
        return 127, "neither run nor in the table of what is not run"
