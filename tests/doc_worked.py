"""A page that adds code: its blocks are put where their titles say, in a copy of the repository;
its commands are run there.

python -m tests.doc_worked docs/adding-a-critic.md PROJECT     (in the copy; PROJECT is an empty folder)
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

from tests.doc_pages import Block, blocks_of
from tests.patience import PATIENCE_S

CODE = ("align", "reward", "tests", "scripts", "docs")
FILES = ("pyproject.toml", "README.md", "CONTRIBUTING.md")


def copy_repository(root: Path, target: Path) -> Path:
    """The code, the tests and the pages of a working tree; what Python has compiled of them as well."""
    for name in CODE:
        shutil.copytree(root / name, target / name)
    for name in FILES:
        shutil.copy(root / name, target / name)
    return target


def put_in_place(blocks: list[Block], copy: Path, project: Path) -> None:
    """Write every block that has a title: code into the copy, other files into the project."""
    for block in blocks:
        if block.title is None:
            continue
        path = (copy if block.title.split("/")[0] in CODE else project) / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        if block.language == "diff":
            path.write_text(patched(path.read_text(encoding="utf-8"), block), encoding="utf-8")
        elif block.flags == "append":
            path.write_text(path.read_text(encoding="utf-8") + "\n\n" + block.text, encoding="utf-8")
        else:
            assert not path.exists(), f"{block.title} is there already"
            path.write_text(block.text, encoding="utf-8")


def patched(text: str, block: Block) -> str:
    """The text with a diff applied, whose unchanged lines must stand there exactly once.

    >>> patched("a\\nb\\n", Block("diff", None, "", " a\\n+new\\n", 1))
    'a\\nnew\\nb\\n'
    """
    lines = block.text.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    assert text.count(before) == 1, f"{block.title}: these lines stand there {text.count(before)} times:\n{before}"
    return text.replace(before, after)


def run_pytest(arguments: list[str], folder: Path) -> tuple[int, str]:
    """The tests of the copy, in this process."""
    import pytest

    printed = io.StringIO()
    os.chdir(Path(__file__).parent.parent)
    with redirect_stdout(printed):
        code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments])
    return int(code), printed.getvalue()


def run_in_copy(pages: list[str], copy: Path, project: Path) -> subprocess.CompletedProcess[str]:
    """Put the blocks of pages in place and run their commands in a process that has only the copy's code."""
    for page in pages:
        put_in_place(blocks_of(copy / page), copy, project)
    return subprocess.run(
        [sys.executable, "-m", "tests.doc_worked", str(project), *pages],
        cwd=copy,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HOME": str(project)},
        timeout=PATIENCE_S,
    )


def main(project: Path, pages: list[Path]) -> int:
    """Run the commands of pages in a project whose first round is sampled; print them and what went wrong."""
    from tests.doc_player import Player
    from tests.doc_world import write_world
    from tests.engines.stub_server import StubServer

    write_world(project)
    player = Player(StubServer(), pytest=run_pytest)
    start = "align init --policy path/to/Valley-Eagle-7B --questions data/questions.jsonl --critic path/to/critic\n"
    printed, faults = player.shell.run(start + "align sample\n", project), [*player.shell.faults]
    for page in pages:
        blocks = blocks_of(page)
        for block in blocks:
            if block.is_shell:
                printed += player.shell.run(block.text, project)
                faults += [f"{page}:{block.line}: {fault}" for fault in player.shell.faults]
        promised = [line for block in blocks if block.language == "text" for line in block.text.splitlines()]
        faults += [f"{page}: promised, but not said: {line}" for line in promised if line not in printed]
    print(printed, *faults, sep="\n")
    player.shell.close()
    player.server.stop()
    return len(faults)


if __name__ == "__main__":
    project, *pages = map(Path, sys.argv[1:])
    sys.exit(main(project, pages))
