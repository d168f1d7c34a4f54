"""What the pages "adding a ..." show is built in a copy of the repository, tested and used there as they say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.doc_pages import ROOT, blocks_of
from tests.doc_worked import copy_repository, put_in_place, run_in_copy

PAGES = ["docs/adding-a-family.md", "docs/adding-a-critic.md", "docs/adding-a-reader.md"]


@pytest.mark.slow
def test_the_worked_examples_work(tmp_path):
    for page in PAGES:
        kinds = [(block.title is not None, block.is_shell) for block in blocks_of(ROOT / page)]
        assert (True, False) in kinds, f"{page} adds nothing"
        assert (False, True) in kinds, f"{page} runs nothing"
    project = tmp_path / "project"
    project.mkdir()
    done = run_in_copy(PAGES, copy_repository(ROOT, tmp_path / "copy"), project)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_of_the_examples_keeps_to_the_house_rules(tmp_path):
    copy = copy_repository(ROOT, tmp_path / "copy")
    for page in PAGES:
        put_in_place(blocks_of(ROOT / page), copy, tmp_path / "project")
    titles = {block.title for page in PAGES for block in blocks_of(ROOT / page) if block.language == "python"}
    places = [(copy / title, tmp_path / "project" / title) for title in sorted(titles - {None})]
    files = [str(one if one.exists() else other) for one, other in places]
    assert len(files) > 6
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), *files]
        done = subprocess.run(ruff, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
