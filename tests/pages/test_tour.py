"""Every command of README.md, CONTRIBUTING.md and docs/ is run, in its order, on what it talks about made small.

A page's shell blocks are run by bash (`doc_shell.py`); what is played, changed and left out there, and why, stands in
the tables of `doc_player.py`. A command that is neither run nor in a table fails.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from align.cli import app
from align.demo import play
from tests.doc_pages import PAGES, ROOT, name_of, named_commands, scripts_of
from tests.doc_player import ALSO, LEFT_OUT, NOT_RUN, Player
from tests.doc_world import NUM_EVAL, NUM_QUESTIONS, copy_of, write_world
from tests.engines.stub_server import StubServer

# In commands inside of a sentence.
PLACEHOLDERS = {r"\bN\b": "1", r"\bSTAGE\b": "pairs", r"\bRUN\b": "runs/run"}
PLACEHOLDERS |= {r"\bCHECKPOINT\b": "runs/run/round-3/checkpoint", r"\bOWNER/NAME\b": "me/my-model"}
# Pages go on from what the README leaves, but for those that begin without a run, some of them even without an
# align.yaml, and those whose every block begins anew.
WITHOUT_RUN = ("data.md", "installing.md", "migrating.md", "recipes.md", "scaling.md", "serving.md")
WITHOUT_CONFIG = ("data.md", "recipes.md")
APART = ("recipes.md", "scaling.md", "serving.md")
# What the README's `make demo` left there is found by that of another page.
WITH_THE_DEMO = ("recipes.md",)
# Its runs are those of the demo, whose images it also looks for `elsewhere`.
IN_THE_DEMO = ("reports/README.md",)
# Run by test_worked_examples.py, in a copy of the repository that has what the page adds.
WORKED = ("adding-a-family.md", "adding-a-critic.md", "adding-a-reader.md")
# What must be there when a page is over, beside whatever its commands name with --out, --write, --report or --json.
PROMISED = {
    "README.md": (
        "demo-run/runs/critic/report.html",
        "runs/run/round-1/samples.jsonl",
        "runs/run/round-1/scores.jsonl",
        "runs/run/round-1/pairs.jsonl",
        "runs/run/round-1/reference.safetensors",
        "runs/run/round-3/checkpoint/model.safetensors",
        "runs/run/round-3/evaluation.json",
        "runs/run/round-3/evaluation.jsonl",
        "runs/run/report.html",
    ),
    "data.md": ("runs/run/round-1/checkpoint/model.safetensors",),
    # But for the block that installs what one of them needs.
    "recipes.md": tuple(f"block-{number}/align.yaml" for number in (0, 1, 2, 3, 4, 5, 7, 8)),
}
POLICIES = tuple(f"policy-{number}" for number in range(4))
TOUR = [page for page in PAGES if name_of(page) not in WORKED]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def player() -> Iterator[Player]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(play, "NUM_QUESTIONS", NUM_QUESTIONS)
        patch.setattr(play, "NUM_EVAL", NUM_EVAL)
        player = Player(StubServer())
        yield player
        player.shell.close()
        player.server.stop()


@pytest.fixture(scope="session")
def finished(world: Path, player: Player, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that the README leaves behind, and what went wrong on the way."""
    folder = copy_of(world, tmp_path_factory.mktemp("readme") / "project")
    return folder, faults_of(ROOT / "README.md", player, folder)


def faults_of(page: Path, player: Player, folder: Path, *, apart: bool = False) -> list[str]:
    """What went wrong in the scripts of a page; `apart`: each begins in a copy of the folder."""
    faults, player.outputs = [], []
    player.pages.add(name_of(page))
    for number, (line, script) in enumerate(scripts_of(page)):
        if script.startswith("align ") and script.count("\n") == 1:
            for word, value in PLACEHOLDERS.items():
                script = re.sub(word, value, script)
        if script.startswith("scripts/") and player.is_left_out(script):
            continue
        where = copy_of(folder, folder.with_name(f"block-{number}")) if apart else folder
        player.server.models = (str(where / "path/to/Valley-Eagle-7B"), *POLICIES)
        player.shell.run(script, where)
        faults += [f"{name_of(page)}:{line}: {fault}" for fault in player.shell.faults]
    missing = [str(path) for path in player.outputs if not path.exists()]
    home = folder.parent if apart else folder
    missing += [path for path in PROMISED.get(name_of(page), ()) if not (home / path).exists()]
    return faults + [f"{name_of(page)}: promised, but not there: {path}" for path in missing]


@pytest.mark.slow
@pytest.mark.parametrize("page", TOUR, ids=name_of)
def test_the_commands_of_a_page_run(page, world, finished, player, tmp_path):
    if name_of(page) == "README.md":
        faults = finished[1]
    else:
        begin = world if name_of(page) in WITHOUT_RUN else finished[0]
        begin = begin / "demo-run" if name_of(page) in IN_THE_DEMO else begin
        folder = copy_of(begin, tmp_path / "project")
        (folder / "elsewhere").symlink_to(folder)
        if name_of(page) in WITHOUT_RUN and name_of(page) not in WITHOUT_CONFIG:
            shutil.copy(finished[0] / "align.yaml", folder)
        if name_of(page) in WITH_THE_DEMO:
            demo = shutil.copytree(finished[0] / "demo-run", tmp_path / "demo-run")
            (folder / "demo-run").symlink_to(demo)
        faults = faults_of(page, player, folder, apart=name_of(page) in APART)
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
def test_nothing_is_left_out_that_no_page_names(player):
    """Runs behind the pages above; alone, or before some of them, it cannot tell."""
    if player.pages != set(map(name_of, TOUR)):
        pytest.skip("not all of the pages were run in this process yet")
    assert {*NOT_RUN, *LEFT_OUT, *ALSO} == player.used


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_command_that_is_named_is_there(page):
    assert named_commands(page) <= set(typer.main.get_command(app).commands)


def test_the_readme_shows_the_main_way():
    shown = named_commands(ROOT / "README.md")
    assert {"sample", "score", "dpo", "run", "init", "report", "evaluate"} <= shown


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("align sample --no-such-option", "No such option"),
        ("align info nowhere", "nowhere"),
        ("frobnicate the model", "neither run nor in the table"),
        ("make no-such-target", "No rule"),
        ("python scripts/bench_dpo.py --no-such-flag", "unrecognized arguments"),
        ("for x in 1 2; do", "syntax error"),
    ],
)
def test_a_command_that_fails_is_a_fault(script, fault, player, tmp_path):
    player.shell.run(script + "\n", tmp_path)
    assert fault in "".join(player.shell.faults)
