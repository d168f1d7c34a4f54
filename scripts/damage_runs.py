"""Damaged run folders in; out what did not end in an equal result, a stage done again or a message whose advice works.

    python scripts/damage_runs.py --edits 2000 --seed 0

A tiny run is kept at several moments: while sampling and scoring are unfinished, between the stages, in the middle of a
training, and when all is done. Each edit takes one file of one of them and cuts, empties, reorders, doubles, mixes up
or
overwrites it; then the same command resumes. Every message is obeyed as a person would: the command that it names is
run, the file that it names is put back. At the end the run must hold together (`check_consistent`), and equal the
undamaged one where the damaged file is none that people may edit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from align.config import Config, load_config
from align.errors import UserError
from align.loop import run_stage
from align.records import Samples, iter_jsonl
from align.run.folder import RunDir
from align.run.hashes import content_hash
from align.stages.pairs import make_pairs
from reward.judgement import Judgement

RUN = "runs/run"
# What people may edit between the stages: another result is then what they asked for, as long as it holds together.
EDITABLE = ("samples.jsonl", "scores.jsonl", "pairs.jsonl")
RESULTS = ("samples.jsonl", "scores.jsonl", "pairs.jsonl", "evaluation.json", "evaluation.jsonl")
MAX_ADVICE = 12
COMMAND = re.compile(r"align (sample|score|pairs|dpo|evaluate) --round (\d+)( --redo)?( --keep-unchanged)?")


@dataclass(frozen=True)
class Moment:
    """A run folder at some moment, and the stages that the same command would go through from there."""

    name: str
    folder: Path
    stages: tuple[tuple[str, int], ...]
    weight: int


@dataclass(frozen=True)
class Outcome:
    """What became of an edit: `equal`, `consistent`, or a fault that must not be; with every message on the way."""

    moment: str
    file: str
    edit: str
    ended: str
    messages: tuple[str, ...] = ()
    fault: str = ""


EARLY = (("sample", 1), ("score", 1))
ALL = (("evaluate", 0), ("sample", 1), ("score", 1), ("dpo", 1), ("evaluate", 1))


def make_moments(project: Path, folder: Path, *, training: bool = True) -> tuple[list[Moment], dict[str, str]]:
    """Run the project once and keep its run folder at every moment, in `folder`; and the undamaged run's results.

    Without `training` the run ends with its pairs.
    """
    config = load_config(project / "align.yaml")
    run = RunDir(config.run_dir)
    this = run.round(1)
    moments = []

    def keep(name: str, stages: tuple[tuple[str, int], ...], weight: int) -> None:
        moments.append(Moment(name, Path(shutil.copytree(run.path, folder / name)), stages, weight))

    def cut_parts(stem: str, lines: int) -> None:
        part = this.path / f"{stem}.part-0.jsonl"
        part.write_text("".join(part.read_text().splitlines(keepends=True)[:lines]))

    run_stage(config, "sample", 1)
    keep("sampled", EARLY, 3)
    run_stage(config, "score", 1)
    keep("scored", EARLY, 4)
    this.reopen("score")
    cut_parts("scores", 2)
    keep("scoring", EARLY, 3)
    this.reopen("sample")
    cut_parts("samples", 2)
    keep("sampling", EARLY, 3)
    for stage, number in EARLY:
        run_stage(config, stage, number)
    if training:
        run_stage(config, "evaluate", 0)
        _stop_training(config)
        keep("training", ALL[:4], 1)
        run_stage(config, "dpo", 1)
        run_stage(config, "evaluate", 1)
        keep("complete", ALL, 6)
    return moments, results_of(run.path)


def _stop_training(config: Config) -> None:
    """Train, and die when the first trainer checkpoint is complete."""
    from align.dpo import trainer_checkpoints

    class Killed(BaseException):
        pass

    seal = trainer_checkpoints.seal

    def seal_and_die(folder: Path) -> None:
        seal(folder)
        raise Killed

    import align.dpo.trainer as trainer

    trainer.seal = seal_and_die  # type: ignore[attr-defined]
    try:
        run_stage(config, "dpo", 1)
    except Killed:
        pass
    finally:
        trainer.seal = seal  # type: ignore[attr-defined]


# --- edits ---------------------------------------------------------------------------------------------------------


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] if data else b"x"


def _cut_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join(lines[: rng.randrange(len(lines))]) if lines else b"\n"


def _empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\0"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def _zeros(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data)) if data else 0
    return data[:place] + bytes(len(data) - place)


def _shuffle_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def _double_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join([*lines, rng.choice(lines)]) if lines else b"{}\n"


def _drop_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    if lines:
        del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def _swap_halves(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data)) if data else 0
    return data[place:] + data[:place]


def _garbage(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data)) if data else 0
    return data[:place] + rng.randbytes(rng.randrange(1, 40)) + data[place:]


STRANGE = (None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x", "\ud83d", [], {}, [[]], {"a": 1}, "../../etc")


def _json_value(data: bytes, rng: random.Random) -> bytes:
    """One value somewhere in a JSON document (or a line of one) becomes another."""
    lines = data.decode("utf-8", "surrogateescape").splitlines()
    whole = len(lines) > 1 and not lines[0].rstrip().endswith("}")
    at = 0 if whole or not lines else rng.randrange(len(lines))
    try:
        value = json.loads("\n".join(lines) if whole else lines[at])
    except (ValueError, IndexError):
        return _garbage(data, rng)
    places: list[tuple[object, object]] = []
    stack = [value]
    while stack:
        node = stack.pop()
        for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            stack.append(child)
    if not places:
        return b"{}\n"
    node, key = rng.choice(places)
    kind = rng.randrange(3)
    if kind == 0:
        del node[key]  # type: ignore[attr-defined]
    elif kind == 1:
        node[key] = rng.choice(STRANGE)  # type: ignore[index]
    else:
        other, name = rng.choice(places)
        node[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None  # type: ignore[index]
    text = json.dumps(value)
    lines = [text] if whole else [*lines[:at], text, *lines[at + 1 :]]
    return "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")


def _keys(node: object) -> object:
    return node if isinstance(node, dict) else range(len(node))  # type: ignore[arg-type]


EDITS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut,
    _cut_line,
    _empty,
    _flip,
    _zeros,
    _shuffle_lines,
    _double_line,
    _drop_line,
    _swap_halves,
    _garbage,
    _json_value,
    _json_value,
    _json_value,
)


def files_of(run: Path) -> list[str]:
    """Every file of a run folder by its path, those of the Hugging Face folders less often than there are many."""
    names = [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]
    return [name for name in names if not name.endswith((".lock", "report.html")) and "tfevents" not in name]


def damage(run: Path, rng: random.Random) -> tuple[str, str]:
    """Edit one file of a run folder; the file's path and the edit's name."""
    names = files_of(run)
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    name = rng.choice(by_folder[rng.choice(sorted(by_folder))])
    path = run / name
    kind = rng.randrange(len(EDITS) + 2)
    if kind == len(EDITS):
        path.unlink()
        return name, "delete"
    if kind == len(EDITS) + 1:
        other = rng.choice(names)
        path.write_bytes((run / other).read_bytes())
        return name, f"overwrite with {other}"
    path.write_bytes(EDITS[kind](path.read_bytes(), rng))
    return name, EDITS[kind].__name__.strip("_")


# --- going on --------------------------------------------------------------------------------------------------------


def obey(project: Path, good: Path, error: UserError) -> None:
    """Do what a message says, as a person would; AssertionError where it says nothing that helps."""
    text, run = str(error), project / RUN
    config = load_config(project / "align.yaml")
    command = COMMAND.search(text)
    if command is not None:
        stage, number, redo, keep = command.groups()
        run_stage(config, stage, int(number), redo=bool(redo), keep_unchanged=bool(keep))
        return
    places = [Path(found) for found in re.findall(re.escape(str(project)) + r"[^\s:;,')]*", text)]
    inside = [place.relative_to(run) for place in places if place.is_relative_to(run)]
    if re.search(r"restore it|put it back|put them back|from a copy", text) and inside:
        for place in inside:
            source, target = good / place, run / place
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
            else:
                target.unlink(missing_ok=True)
        return
    line = re.search(r"(\S+\.jsonl):(\d+): .*take it out of the file", text)
    if line is not None:
        lines = Path(line[1]).read_bytes().split(b"\n")
        del lines[int(line[2]) - 1]
        Path(line[1]).write_bytes(b"\n".join(lines))
        return
    if re.search(r"[Rr]emove", text) and inside and (run / inside[0]).exists():
        target = run / inside[0]
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        return
    raise AssertionError(f"no advice that helps: {text}")


def go_on(project: Path, moment: Moment) -> list[str]:
    """Run the moment's stages to their end, obeying every message; the messages."""
    said: list[str] = []
    error: UserError | None = None
    for _ in range(MAX_ADVICE):
        try:
            if error is not None:
                obey(project, moment.folder, error)
            error = None
            config = load_config(project / "align.yaml")
            for stage, number in moment.stages:
                run_stage(config, stage, number)
            return said
        except UserError as found:
            said.append(str(found))
            error = found
    raise AssertionError("a circle of messages:\n  " + "\n  ".join(said[-4:]))


def look(project: Path) -> None:
    """What only looks at a run: status and report, which may refuse but not break."""
    from align.report import write_report
    from align.status.run_status import run_status

    for command in (lambda: run_status(project / RUN), lambda: write_report(project / RUN)):
        with contextlib.suppress(UserError):
            command()


def check_consistent(project: Path) -> None:
    """Every complete stage was made of the files that are there; raises AssertionError where one was not."""
    config = load_config(project / "align.yaml")
    this = RunDir(config.run_dir).round(1)
    stages = this.manifest.stages()
    read = {"score": {"samples": this.samples}, "dpo": {"pairs": this.pairs}}
    read["pairs"] = {"samples": this.samples, "scores": this.scores}
    for name, files in read.items():
        for key, path in files.items():
            if name in stages:
                assert stages[name].complete, f"{name} is not complete"
                assert stages[name].inputs[key] == content_hash(path), f"{name} was made of another {path.name}"
    if "pairs" not in stages or stages["pairs"].outputs["pairs.jsonl"] != content_hash(this.pairs):
        return
    samples, scores = iter_jsonl(this.samples, Samples), iter_jsonl(this.scores, Judgement)
    made = make_pairs(samples, scores, config.pairs, 1, where="")
    expected = [one.line for one in made.pairs]
    assert this.pairs.read_text().splitlines() == expected, "pairs are not those of samples and scores"


def results_of(run: Path) -> dict[str, str]:
    """Hashes of everything that a run is made for."""
    found = {}
    for path in sorted(run.glob("round-*/*")):
        if path.name in RESULTS:
            found[path.relative_to(run).as_posix()] = content_hash(path)
        elif path.name == "checkpoint":
            found[path.relative_to(run).as_posix()] = content_hash(path / "model.safetensors")
    return found


def try_edit(project: Path, moment: Moment, expected: dict[str, str], seed: int, *, looks: bool) -> Outcome:
    """Damage the run at a moment by a seed, go on, and say how it ended. The project's run folder is replaced."""
    rng = random.Random(seed)
    run = project / RUN
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(moment.folder, run)
    name, edit = damage(run, rng)
    messages: list[str] = []
    try:
        if looks:
            look(project)
        messages = go_on(project, moment)
        check_consistent(project)
    except UserError as error:
        return Outcome(moment.name, name, edit, "fault", tuple(messages), f"a message with no way on: {error}")
    except Exception as error:
        trace = "" if isinstance(error, AssertionError) else traceback.format_exc(limit=-4)
        return Outcome(moment.name, name, edit, "fault", tuple(messages), f"{type(error).__name__}: {error}\n{trace}")
    now = results_of(run)
    same = all(now.get(key) == value for key, value in expected.items() if key in now) and now.keys() <= expected.keys()
    if same:
        return Outcome(moment.name, name, edit, "equal after a message" if messages else "equal", tuple(messages))
    if name.endswith(EDITABLE):
        return Outcome(moment.name, name, edit, "another result, as edited", tuple(messages))
    changed = [key for key, value in now.items() if expected.get(key) != value]
    return Outcome(moment.name, name, edit, "fault", tuple(messages), f"another result: {', '.join(changed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="only this moment")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.damage_project import make_damage_project

    logging.disable(logging.WARNING)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        project = make_damage_project(Path(folder) / "project")
        moments, expected = make_moments(project, Path(folder) / "moments")
        choices = [moment for moment in moments for _ in range(moment.weight) if arguments.only in (None, moment.name)]
        ended: Counter[str] = Counter()
        for number in range(arguments.seed, arguments.seed + arguments.edits):
            moment = random.Random(f"moment {number}").choice(choices)
            outcome = try_edit(project, moment, expected, number, looks=number % 8 == 0)
            ended[outcome.ended] += 1
            if outcome.fault:
                print(f"--- {number}: {outcome.moment}, {outcome.file}, {outcome.edit}\n{outcome.fault}", flush=True)
                for message in outcome.messages:
                    print(f"    said: {message}", flush=True)
            if number % 100 == 99:
                print(f"{number + 1 - arguments.seed}: {dict(ended)}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{arguments.edits} edits in {time.monotonic() - started:.0f} s: {dict(ended)}")
    raise SystemExit(1 if ended["fault"] else 0)


if __name__ == "__main__":
    main()
