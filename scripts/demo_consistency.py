"""Where the demo's critic says the same in both orders and where not: runs of the demo in, a table by kind of pair out.

    align demo --folder build/demo-run
    python scripts/demo_consistency.py build/demo-run/runs/critic --rounds 1 2

*right* is a pair of a right and a wrong response, *unequal* two wrong ones of which one is nearer to the answer,
*equal* two that are equally wrong. Prints markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from demo_build.comparisons import quality

from align.demo.questions import PHRASINGS, Task
from align.records import Question, Samples, read_jsonl
from align.run.folder import RunDir
from reward.judgement import Judgement
from reward.ranking import both_orders

#: Same verdict, prefers its first place (-1 to 1), and orders the two as their quality does.
Compared = tuple[float, float, float]


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
    """Every pair of a round that was judged in both orders, by kind and over all."""
    this = RunDir(run).round(number)
    samples = {line.id: line for line in read_jsonl(this.samples, Samples)}
    found: dict[str, list[Compared]] = defaultdict(list)
    for judgement in read_jsonl(this.scores, Judgement):
        line = samples[judgement.id]
        task = task_of(line.question)
        for forth, back in both_orders([judgement.verdicts]):
            one, other = (quality(task, line.responses[at].text) for at in (forth.first, forth.second))
            kind = "equal" if one == other else "right" if 1.0 in (one, other) else "unequal"
            leans = (forth.p_first - forth.p_second) - (back.p_first - back.p_second)
            first = (np.sign(forth.p_first - forth.p_second) + np.sign(back.p_first - back.p_second)) / 2
            row = (float(forth.winner == back.winner), float(first), float(leans * (one - other) > 0))
            for name in (kind, "all"):
                found[name].append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    print("| round | pairs | number | same verdict in both orders | position bias | ordered by quality |")
    print("|---|---|---|---|---|---|")
    for number in options.rounds:
        found = compare(options.run, number)
        for kind in ("right", "unequal", "equal", "all"):
            if not found[kind]:
                continue
            same, bias, right = np.mean(found[kind], axis=0)
            ordered = f"{right:.3f}" if kind in ("right", "unequal") else ""
            print(f"| {number} | {kind} | {len(found[kind])} | {same:.3f} | {bias:+.3f} | {ordered} |")


if __name__ == "__main__":
    main()
