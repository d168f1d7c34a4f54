"""`from align import ...`: a run made from Python is the run that the commands make."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import align
from align import UserError, load_config, run_rounds, run_stage
from align.run.folder import RunDir
from align.run.stages import STAGES, TABLE
from tests.stage_runs import align as command
from tests.stage_runs import make_project

# What differs between two runs of one configuration: times, and what is made of them.
TIMES = {"started", "finished", "seconds", "cost", "reference_seconds"}
WITH_TIMES = {"README.md", "report.html", "trainer_state.json", "training_args.bin"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of one round that `align run` has run; its run is moved to `by-commands`."""
    folder = make_project(tmp_path_factory.mktemp("library"), rounds=1)
    done = command(folder, "run")
    assert done.returncode == 0, done.stderr
    (folder / "runs" / "run").rename(folder / "by-commands")
    return folder


def contents(run: Path) -> dict[str, object]:
    """Every file of a run by its path: its bytes, or its JSON without times; those made of times by name alone."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if not path.is_file() or "tfevents" in name or path.name.startswith("."):
            continue
        if path.name == "manifest.json":
            stages = json.loads(path.read_text())["stages"]
            found[name] = {
                stage: {key: value for key, value in entry.items() if key not in TIMES}
                for stage, entry in stages.items()
            }
        else:
            found[name] = None if path.name in WITH_TIMES else _bytes_of(path)
    return found


def _bytes_of(path: Path) -> object:
    """A file's bytes; of a safetensors file its header as an object, since entries of its metadata have no order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def test_a_run_from_python_leaves_the_folder_that_commands_leave(project):
    done = run_rounds(load_config(project / "align.yaml"))
    by_commands, by_python = contents(project / "by-commands"), contents(project / "runs" / "run")
    assert by_python.keys() == by_commands.keys()
    assert [name for name in by_commands if by_commands[name] != by_python[name]] == []
    assert [(result.stage, result.round) for result in done.stages] == [
        ("evaluate", 0),
        *((stage, 1) for stage in STAGES),
    ]
    assert done.checkpoint == project / "runs/run/round-1/checkpoint"
    assert done.report == project / "runs/run/report.html"
    assert not done.stopped_early
    sampled = next(result for result in done.stages if result.stage == "sample")
    assert sampled.counts["responses"] == 12
    assert sampled.outputs["samples.jsonl"].is_file()
    assert not sampled.was_complete
    # The same call again does nothing and says so.
    again = run_rounds(load_config(project / "align.yaml"), report=False)
    assert all(result.was_complete for result in again.stages)


def test_an_unknown_stage_is_named(project):
    with pytest.raises(UserError, match=r"no stage 'smaple'; stages are sample, score, pairs, dpo, evaluate"):
        run_stage(load_config(project / "align.yaml"), "smaple", 1)


def test_everything_public_is_there_and_the_package_is_light():
    code = "import sys, align; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
    assert [name for name in align.__all__ if getattr(align, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = align.nothing


def begun(this, stage: str) -> None:
    """Enter a stage as complete, with everything that its row says it writes."""
    row = next(row for row in TABLE if row.name == stage)
    this.manifest.begin(stage, settings={}, inputs={})
    outputs = [this.path / name for name in row.writes]
    for path in outputs:
        path.write_text("{}\n")
    this.manifest.finish(stage, outputs=outputs, counts={})


def test_a_redo_that_was_killed_leaves_nothing_to_go_on_from(tmp_path, monkeypatch):
    this = RunDir(tmp_path).round(1)
    this.path.mkdir()
    for stage in STAGES:
        begun(this, stage)
    (this.path / "scores.part-0.jsonl").write_text("{}\n")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("align.run.folder.Round._remove", staticmethod(killed))
        with pytest.raises(KeyboardInterrupt):
            this.discard("score")
    assert this.scores.exists()
    assert this.manifest.complete("sample")
    assert not any(this.manifest.complete(stage) for stage in STAGES[1:])
    with this.lock():
        left = {path.name for path in this.path.iterdir() if not path.name.startswith(".")}
    assert left == {"samples.jsonl", "manifest.json"}
    assert set(this.manifest.stages()) == {"sample"}


def test_a_complete_stage_without_its_file_says_so_and_what_helps(tmp_path):
    this = RunDir(tmp_path).round(2)
    this.path.mkdir()
    begun(this, "sample")
    this.samples.unlink()
    with pytest.raises(UserError, match=r"samples.jsonl is not there.* align sample --round 2 --redo"):
        this.need("sample", "scores are made from it", "align sample --round 2")
    # What the message says works.
    this.discard("sample")
    assert this.manifest.begin("sample", settings={}, inputs={})


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"stages": []}',
        '{"stages": {"sample": 3}}',
        '{"stages": {"sample": {"status": "new"}}}',
        "\0",
        "[" * 9999,
    ],
)
def test_a_damaged_manifest_is_one_message(tmp_path, damage):
    this = RunDir(tmp_path).round(1)
    this.path.mkdir()
    this.manifest_path.write_text(damage)
    with pytest.raises(UserError, match=r"manifest.json: the manifest is damaged .*restore it from a copy"):
        this.manifest.complete("sample")
