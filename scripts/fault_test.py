"""Kill every stage at random moments and see that the same command ends with the same result.

    python scripts/fault_test.py --kills 30

For each stage: run it once undisturbed; then, `--kills` times, start it again from the same files, end it with SIGKILL
at a moment drawn from its own duration (every third time twice in a row), run the same command to its end, and hold
every file it leaves against those of the undisturbed run. Samples, scores and pairs must be equal byte for byte; of
an evaluation the figures and of a training the losses and weights, within rounding. Prints a table and ends with exit
code 1 if anything differs.

The model is a random LLaVA-OneVision of a few thousand weights. Every run is a process of its own, forked from one that
has imported the libraries already, so that the moments fall into the work and not into the imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STAGES = ("sample", "score", "pairs", "dpo", "evaluate")
MODULES = (
    "align.cli",
    "align.loop",
    "align.stages.sample",
    "align.stages.score",
    "align.stages.pairs",
    "align.dpo.train",
    "align.evaluation.evaluate",
    "align.engines.local",
    "align.models.load",
    "tests.stage_runs",
)
# What a stage leaves; training is compared by its numbers instead.
OUTPUTS = {
    "sample": ["samples.jsonl"],
    "score": ["scores.jsonl", "controls.jsonl"],
    "pairs": ["pairs.jsonl"],
    "dpo": [],
    "evaluate": ["evaluation.json", "evaluation.jsonl"],
}
LOSS_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 1e-6
FIGURE_TOLERANCE = 1e-4
LONGEST_RUN_S = 1800.0


@dataclass
class Row:
    """What became of one stage. `kept` counts runs that found finished work (lines, or a training's state)."""

    stage: str
    seconds: float
    kills: int = 0
    runs: int = 0
    kept: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    arguments = read_arguments()
    import_everything()
    with working_folder(arguments.folder) as folder:
        project = prepare(folder)
        rows = [try_stage(project, stage, arguments.kills, arguments.seed) for stage in arguments.stages]
    print_table(rows)
    return int(any(row.faults for row in rows))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills a stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    return parser.parse_args()


def import_everything() -> None:
    """Import what the stages will, without running anything: threads would not survive a fork."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name in MODULES:
        importlib.import_module(name)


@contextlib.contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def prepare(folder: Path) -> Path:
    """A project with a critic that reads and judges, and a training with an intermediate state every second step."""
    project = folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with quiet(folder / "prepare.log"):
                write_project(project)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, (folder / "prepare.log").read_text()
    return project


def write_project(project: Path) -> None:
    from tests.stage_runs import SETTINGS, make_project

    sections: dict[str, Any] = SETTINGS
    make_project(
        project,
        rounds=1,
        sample=sections["sample"] | {"batch_size": 1},
        critic={
            "kind": "pairwise",
            "model": "./critic",
            "options": {"soft": True},
            "reliability_sample": 2,
            "batch_size": 1,
        },
        dpo=sections["dpo"] | {"gradient_accumulation_steps": 1, "save_steps": 2},
    )
    for name in ("questions.jsonl", "eval.jsonl"):
        ask_more(project / name)


def ask_more(path: Path) -> None:
    """Several questions in place of each, about the same images, so that a stage has many small pieces of work."""
    questions = [json.loads(line) for line in path.read_text().splitlines()]
    more = [q | {"id": f"{q['id']}-{n}", "question": f"{q['question']} ({n})"} for q in questions for n in range(4)]
    path.write_text("".join(json.dumps(question) + "\n" for question in more))


def try_stage(project: Path, stage: str, kills: int, seed: int) -> Row:
    """Run a stage undisturbed in `project`, then disturbed in copies of what was there before."""
    before = project.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(project, before)
    started = time.monotonic()
    code = wait(start(project, stage), LONGEST_RUN_S)
    row = Row(stage, time.monotonic() - started)
    if code != 0:
        row.faults.append(f"undisturbed, it ended with {code}: {last_words(project)}")
        return row
    moments = random.Random(f"{seed}/{stage}")
    disturbed = project.with_name("disturbed")
    while row.kills < kills and len(row.faults) < 3 and row.runs < 5 * kills:
        shutil.rmtree(disturbed, ignore_errors=True)
        shutil.copytree(before, disturbed)
        row.runs += 1
        for _ in range(2 if row.runs % 3 == 0 else 1):
            code = wait(start(disturbed, stage), moments.uniform(0, row.seconds), kill=True)
            row.kills += code == -signal.SIGKILL
        row.kept += has_finished_work(disturbed, stage)
        code = wait(start(disturbed, stage), LONGEST_RUN_S)
        if code != 0:
            row.faults.append(f"after kill {row.kills} it ended with {code}: {last_words(disturbed)}")
            continue
        row.faults += [f"after kill {row.kills}: {fault}" for fault in differences(project, disturbed, stage)]
    return row


def start(project: Path, stage: str) -> int:
    """`align STAGE` in the project's folder, in a process of its own; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.chdir(project)
    with quiet(project / "last.log"):
        sys.argv = ["align", stage, "--round", "1"]
        code = 70
        try:
            from align.cli import main as align

            align()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def wait(pid: int, seconds: float, *, kill: bool = False) -> int:
    """The exit code of a process (minus the signal that ended it), which has `seconds` before it is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert kill or code != -signal.SIGKILL, f"still running after {seconds} s"
    return code


@contextlib.contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Both outputs of this process go to a file."""
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield


def has_finished_work(project: Path, stage: str) -> bool:
    """Whether a killed stage left something for the next run to resume from."""
    folder = project / "runs" / "run" / "round-1"
    if stage == "dpo":
        return any(folder.glob("trainer/checkpoint-*/trainer_state.json")) or any(folder.glob("reference.*"))
    return any(path.stat().st_size for path in folder.glob("*.part-*"))


def differences(expected: Path, found: Path, stage: str) -> list[str]:
    """What a disturbed run has left otherwise than the undisturbed one."""
    one, other = (project / "runs" / "run" / "round-1" for project in (expected, found))
    faults = [f"{name} differs" for name in OUTPUTS[stage] if not _is_same(one / name, other / name)]
    entry = json.loads((other / "manifest.json").read_text())["stages"].get(stage, {})
    if entry.get("status") != "complete":
        faults.append("not complete")
    if entry.get("counts") != json.loads((one / "manifest.json").read_text())["stages"][stage]["counts"]:
        faults.append("other counts")
    left = [path.name for path in other.rglob("*") if ".part-" in path.name or path.name.endswith(".tmp")]
    left += [path.name for path in other.glob(".checkpoint.*")] + [
        path.name for path in other.glob("trainer/checkpoint-*")
    ]
    if left:
        faults.append(f"left behind: {', '.join(left)}")
    return faults + (training_differences(one, other) if stage == "dpo" else [])


def _is_same(one: Path, other: Path) -> bool:
    """Byte for byte; the figures of an evaluation but for the last digits of log-probabilities, which vary by batch."""
    if not (one.exists() and other.exists()):
        return one.exists() == other.exists()
    if one.name == "evaluation.json":
        return _are_near(json.loads(one.read_text()), json.loads(other.read_text()))
    return one.read_bytes() == other.read_bytes()


def _are_near(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_near(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= FIGURE_TOLERANCE
    return bool(one == other)


def training_differences(one: Path, other: Path) -> list[str]:
    """Losses of every step and all weights, in numpy: torch would start threads."""
    from safetensors.numpy import load_file

    faults = []
    histories = []
    for folder in (one, other):
        state = json.loads((folder / "checkpoint" / "trainer_state.json").read_text())
        histories.append({entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry})
        lines = (folder / "trainer" / "metrics.jsonl").read_text().splitlines()
        twice = [step for step, count in Counter(json.loads(line)["step"] for line in lines).items() if count > 1]
        if twice or len(lines) != len(histories[-1]):
            faults.append(f"metrics.jsonl has {len(lines)} lines for {len(histories[-1])} steps")
    if histories[0].keys() != histories[1].keys():
        faults.append(f"steps {sorted(histories[1])}")
    elif any(abs(loss - histories[1][step]) > LOSS_TOLERANCE for step, loss in histories[0].items()):
        faults.append("other losses")
    expected, found = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, other))
    if expected.keys() != found.keys():
        return [*faults, "other tensors"]
    largest = max(float(abs(expected[name] - found[name]).max()) for name in expected)
    return faults + ([f"weights differ by {largest:.1e}"] if largest > WEIGHT_TOLERANCE else [])


def last_words(project: Path) -> str:
    return (project / "last.log").read_text()[-800:]


def print_table(rows: list[Row]) -> None:
    print("| stage | undisturbed | disturbed runs | kills | found finished work | result |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        result = "equal" if not row.faults else f"{len(row.faults)} faults"
        print(f"| {row.stage} | {row.seconds:.1f} s | {row.runs} | {row.kills} | {row.kept} | {result} |")
    for row in rows:
        for fault in row.faults:
            print(f"{row.stage}: {fault}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
