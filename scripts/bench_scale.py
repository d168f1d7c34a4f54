"""What commands that need no model cost on large runs: processor seconds and peak memory by number of questions.

    python scripts/bench_scale.py [--questions 1000 10000 100000] [--folder DIR]

Synthetic runs: N questions of K = 5 responses of 30 words with scores and one image, no weights. Every command runs as
a process of its own; its processor time (user and system, start of Python with it) and largest resident set are those
that the system counted for it. `status, again` is the second look of a process that watches, in its own seconds; it is
taken of the round after `align pairs`, and of one whose sampling is under way with half of the questions finished.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from align.records import Question, Response, Samples, write_jsonl
from align.run.folder import RunDir
from reward.judgement import Judgement

NUM_RESPONSES, NUM_WORDS = 5, 30
WORDS = (
    "red",
    "green",
    "blue",
    "bus",
    "car",
    "man",
    "woman",
    "dog",
    "tree",
    "house",
    "road",
    "stands",
    "walks",
    "large",
)
WATCH = """
import sys, time
from pathlib import Path
from align.status.run_status import RunMonitor
monitor = RunMonitor(Path(sys.argv[1]))
monitor.look()
before = time.process_time()
monitor.look()
print(time.process_time() - before)
"""


@dataclass(frozen=True)
class Spent:
    """Processor seconds and peak resident memory (bytes) of a process, and what it printed."""

    seconds: float
    peak: int
    output: str


def spend(*command: str, cwd: Path) -> Spent:
    """Run a command to its end; SystemExit where it fails."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, *command], cwd=cwd, stdout=out, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        out.seek(0)
        text = out.read().decode(errors="replace")
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    return Spent(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, text)


def questions(number: int) -> Iterator[Question]:
    """The questions with their ids, answers of one word, and the one image."""
    for index in range(number):
        yield Question(id=f"q{index}", question=f"What stands by tree {index}?", images=["one.png"], answer="a bus")


def build(folder: Path, number: int) -> Path:
    """A project whose run has sampled and scored one round; returns the run's folder."""
    drawn = random.Random(0)
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "one.png")
    write_jsonl(folder / "questions.jsonl", list(questions(number)))
    (folder / "align.yaml").write_text(
        "policy: ./policy\nquestions: questions.jsonl\nname: run\nrounds: 1\ncritic: {kind: random}\n"
    )
    run = RunDir(folder / "runs" / "run")
    run.write_config_once((folder / "align.yaml").read_text())
    this = run.round(1)
    this.path.mkdir(parents=True)
    samples, scores = this.samples.open("w"), this.scores.open("w")
    with samples, scores:
        for question in questions(number):
            texts = [" ".join(drawn.choices(WORDS, k=NUM_WORDS)) for _ in range(NUM_RESPONSES)]
            responses = [Response(text=text, num_tokens=NUM_WORDS + drawn.randrange(9)) for text in texts]
            line = Samples(id=question.id, question=question, responses=responses, seed=1)
            samples.write(line.model_dump_json() + "\n")
            judged = Judgement(id=question.id, rewards=[drawn.random() for _ in texts])
            scores.write(judged.model_dump_json() + "\n")
    counts = {"questions": number, "responses": number * NUM_RESPONSES, "scored": number * NUM_RESPONSES}
    for stage, output in (("sample", this.samples), ("score", this.scores)):
        this.manifest.begin(stage, settings={}, inputs={})
        this.manifest.finish(stage, outputs=[output], counts=counts)
    return run.path


def half_sampled(run: Path) -> None:
    """A second round of which half of the questions have been sampled."""
    first, second = RunDir(run).round(1), RunDir(run).round(2)
    second.path.mkdir()
    second.manifest.begin("sample", settings={}, inputs={})
    lines = first.samples.read_bytes().splitlines(keepends=True)
    (second.path / "samples.part-0.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))


def foreign(path: Path, number: int) -> None:
    """The questions as a file in the LLaVA format, to be imported."""
    with path.open("w") as file:
        for index in range(number):
            turns = [("human", f"<image>\nWhat stands by tree {index}?"), ("gpt", "a bus")]
            said = [{"from": who, "value": text} for who, text in turns]
            file.write(json.dumps({"id": f"q{index}", "image": "one.png", "conversations": said}) + "\n")


def measure(folder: Path, number: int) -> list[tuple[str, Spent]]:
    """What every command costs with so many questions."""
    project = folder / f"questions-{number}"
    run = build(project, number)
    foreign(project / "foreign.jsonl", number)
    align = ("-m", "align")
    found = [("pairs", spend(*align, "pairs", "--round", "1", cwd=project))]
    found.append(("status", spend(*align, "status", str(run), cwd=project)))
    found.append(("status, again", _again(run)))
    found.append(("report", spend(*align, "report", str(run), cwd=project)))
    imported = ("data", "foreign.jsonl", "--out", "imported", "--image-root", ".")
    found.append(("data", spend(*align, *imported, cwd=project)))
    half_sampled(run)
    found.append(("status while sampling", spend(*align, "status", str(run), cwd=project)))
    found.append(("status while sampling, again", _again(run)))
    return found


def _again(run: Path) -> Spent:
    spent = spend("-c", WATCH, str(run), cwd=run)
    return Spent(float(spent.output.split()[-1]), spent.peak, "")


def main() -> None:
    """Measure and print a table, one row per command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument(
        "--folder", type=Path, help="where the runs go; default: a temporary folder, removed at the end"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        columns = [dict(measure(given.folder or Path(temporary), number)) for number in given.questions]
    print("| command | " + " | ".join(f"{number:,} questions" for number in given.questions) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for command in columns[0]:
        cells = [f"{found[command].seconds:.2f} s, {found[command].peak / 2**20:,.0f} MiB" for found in columns]
        print(f"| {command} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
