"""`align report` as a person types it, on made-up runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import app
from align.errors import UserError
from tests.report.fake_run import FakeRun


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    FakeRun(root / "critic", num_held_out=20, num_training=6).build()
    FakeRun(root / "random", skill=(0.5, 0.5), num_held_out=20, num_training=6, random_critic=True).build()
    return root


def report(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_run_is_reported_by_its_folder_alone(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no align.yaml here
    said = report(str(runs / "critic"))
    assert str(runs / "critic/report.html") in said.replace("\n", "")
    assert (runs / "critic/report.html").is_file()


def test_a_report_has_the_size_and_the_place_that_were_asked_for(runs, tmp_path):
    out = tmp_path / "new/page.html"
    few = ["--max-held-out", "3", "--max-training", "2", "--no-reference-curve"]
    report(str(runs / "critic"), "--control", str(runs / "random"), "--out", str(out), *few)
    page = out.read_text(encoding="utf-8")
    assert page.count('<details class="q"') == 5
    assert "Valley2-DPO" not in page
    assert "random (control)" in page


def test_images_that_were_moved_are_found_again(runs, tmp_path):
    (runs / "images").rename(tmp_path / "elsewhere")
    try:
        report(str(runs / "critic"), "--out", str(tmp_path / "without.html"))
        report(str(runs / "critic"), "--out", str(tmp_path / "with.html"), "--image-root", str(tmp_path / "elsewhere"))
    finally:
        (tmp_path / "elsewhere").rename(runs / "images")
    assert "data:image/" not in (tmp_path / "without.html").read_text(encoding="utf-8")
    assert "data:image/" in (tmp_path / "with.html").read_text(encoding="utf-8")


def test_a_folder_and_a_configuration_are_one_too_many(runs):
    with pytest.raises(UserError, match="a run's folder and a configuration"):
        report(str(runs / "critic"), "--config", str(runs / "critic/align.yaml"))
