"""Where the demo's critic says the same in both orders and where not: runs of the demo in, a table by kind of pair out.

    align demo --folder build/demo-run
    python scripts/demo_consistency.py build/demo-run/runs/critic --rounds 1 2

*right* is a pair of a right and a wrong response, *unequal* two wrong ones of which one is nearer to the answer,
*equal* two that are equally wrong. *Leans alike* forgets ties: whether both orders give the higher probability to the
same response, by however little. `--by-task` prints the *right* pairs of every task too. Prints markdown for
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from demo_build.faults import merit

from align.demo.questions import PHRASINGS, TASKS, Task
from align.records import Question, Samples, read_jsonl
from align.run.folder import RunDir
from reward.judgement import Judgement
from reward.ranking import both_orders, score_of


class Compared(NamedTuple):
    """A pair in both orders: each 0 or 1, but the place it prefers, -1 (second) to 1, and ties, which are a share."""

    same: float
    leans_alike: float
    first_place: float
    ties: float
    ordered_by_merit: float


def task_of(question: Question) -> Task:
    """The task that a question of the demo was made from."""
    kind = question.meta["task"]
    for phrasing, text in enumerate(PHRASINGS[kind]):
        found = re.fullmatch(re.escape(text).replace(r"\{asked\}", r"(\d)"), question.as_text())
        if found:
            asked = int(found[1]) if found.groups() else None
            return Task(kind, phrasing, tuple(question.meta["digits"]), asked)
    raise ValueError(f"not a question of the demo: {question.as_text()!r}")


def compare(run: Path, number: int) -> dict[str, list[Compared]]:
    """Every pair of a round that was judged in both orders, by kind, over all, and by task where one is right."""
    this = RunDir(run).round(number)
    samples = {line.id: line for line in read_jsonl(this.samples, Samples)}
    found: dict[str, list[Compared]] = defaultdict(list)
    for judgement in read_jsonl(this.scores, Judgement):
        line = samples[judgement.id]
        task = task_of(line.question)
        for forth, back in both_orders([judgement.verdicts]):
            one, other = (merit(task, line.responses[at].text) for at in (forth.first, forth.second))
            kind = "equal" if one == other else "right" if max(one, other) > 0 else "unequal"
            leans = score_of(forth, soft=True), score_of(back, soft=True)
            row = Compared(
                same=float(forth.winner == back.winner),
                leans_alike=float(np.sign(leans[0]) == -np.sign(leans[1])),
                first_place=(score_of(forth) + score_of(back)) / 2,
                ties=((forth.winner is None) + (back.winner is None)) / 2,
                ordered_by_merit=float((leans[0] - leans[1]) * (one - other) > 0),
            )
            for name in (kind, "all", *([f"right, {task.kind}"] if kind == "right" else [])):
                found[name].append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1])
    parser.add_argument("--by-task", action="store_true")
    options = parser.parse_args()
    tasks = [f"right, {task}" for task in TASKS] if options.by_task else []
    heads = ("same verdict in both orders", "ties", "leans alike", "position bias", "ordered by merit")
    print(f"| round | pairs | number | {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|")
    for number in options.rounds:
        found = compare(options.run, number)
        for kind in ("right", *tasks, "unequal", "equal", "all"):
            if not found[kind]:
                continue
            mean = Compared(*np.mean(found[kind], axis=0))
            ordered = f"{mean.ordered_by_merit:.3f}" if kind not in ("equal", "all") else ""
            cells = f"{mean.same:.3f} | {mean.ties:.3f} | {mean.leans_alike:.3f} | {mean.first_place:+.3f} | {ordered}"
            print(f"| {number} | {kind} | {len(found[kind])} | {cells} |")


if __name__ == "__main__":
    main()
