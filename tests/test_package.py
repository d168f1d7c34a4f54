"""The wheel alone, away from the repository: it has every file, starts, and plays a small demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = ("__pycache__", ".pyc")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel was unpacked into. It is built from a copy:
    setuptools leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "source"
    for package in ("align", "reward"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns(*("__pycache__", "*.pyc")))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*wheel, "--wheel-dir", str(folder), str(copy)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_in(site: Path, folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Python code with the wheel in front of everything else, in a folder that has nothing of ours."""
    variables = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=variables, capture_output=True, text=True
    )


def test_the_wheel_has_every_file_of_the_packages(site):
    for package in ("align", "reward"):
        here = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()}
        there = {path.relative_to(site) for path in (site / package).rglob("*")}
        missing = {path for path in here - there if not any(part in str(path) for part in NOT_SHIPPED)}
        assert not missing, "add their endings to tool.setuptools.package-data"


def test_the_wheel_brings_the_command_and_its_metadata(site, tmp_path):
    (info,) = site.glob("*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    assert "align = align.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Dist: trl<1.17,>=1.16\n" in metadata
    found = run_in(site, tmp_path, "import align, align.cli; print(align.__file__); align.cli.main()", "demo", "--help")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(str(site))
    assert "--rounds" in found.stdout


def test_the_wheel_plays_a_round_of_the_demo_without_the_repository(site, tmp_path):
    code = (
        "from pathlib import Path; import align; from align.demo import play\n"
        f"assert align.__file__.startswith({str(site)!r}), align.__file__\n"
        "play.NUM_QUESTIONS, play.NUM_EVAL = 10, 4\n"
        "play.play_demo(Path('demo'), rounds=1, seed=0, control=False)"
    )
    played = run_in(site, tmp_path, code)
    assert played.returncode == 0, played.stderr[-2000:]
    run = tmp_path / "demo" / "runs" / "critic"
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "round-1" / "checkpoint" / "model.safetensors").is_file()
