"""The demo over several seeds, with the critic model, the rule verifier and random preferences: a table with intervals.

    python scripts/demo_seeds.py --folder build/seeds

Every run goes through `align run`, as a person's would; a run that is complete is not repeated. The verifier knows the
answers and is the upper bound; random preferences are the control. Prints markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from align.demo import write_demo

CRITICS = {
    "critic": [],
    "verifier": ["critic.kind=verifier", "critic.model=", "critic.prompt=", "critic.options="],
    "random": ["critic.kind=random", "critic.model=", "critic.prompt=", "critic.options="],
}
METRICS = {"sampled_accuracy": "sampled", "greedy_accuracy": "greedy", "hallucination": "hallucination"}


@dataclass(frozen=True)
class Value:
    """A share in per cent with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def run_all(folder: Path, seeds: list[int], *, questions: int, held_out: int, rounds: int, threads: int) -> None:
    for seed in seeds:
        home = folder / f"seed-{seed}"
        if not (home / "align.yaml").exists():
            write_demo(home, num_questions=questions * rounds, num_eval=held_out, seed=seed)
        for critic, settings in CRITICS.items():
            started = time.monotonic()
            overrides = [f"name={critic}", f"seed={seed}", f"sample.questions_per_round={questions}", *settings]
            command = [sys.executable, "-m", "align", "run", "--rounds", str(rounds)]
            command += [part for override in overrides for part in ("--set", override)]
            subprocess.run(command, cwd=home, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
            print(f"seed {seed}, {critic}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def values(run: Path, rounds: int) -> list[dict[str, Value]]:
    """Per round (0 is the first policy) the metrics of a run."""
    found = []
    for number in range(rounds + 1):
        metrics = json.loads((run / f"round-{number}" / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
        found.append({name: _percent(metrics[name]) for name in METRICS})
    return found


def _percent(interval: dict[str, float]) -> Value:
    return Value(*(100 * interval[key] for key in ("mean", "low", "high")))


def seconds(run: Path, rounds: int) -> dict[str, float]:
    """Wall seconds of each stage, summed over rounds."""
    total: dict[str, float] = {}
    for number in range(rounds + 1):
        manifest = json.loads((run / f"round-{number}" / "manifest.json").read_text(encoding="utf-8"))
        for stage, entry in manifest["stages"].items():
            total[stage] = total.get(stage, 0.0) + entry["seconds"]
    return total


def table(folder: Path, seeds: list[int], rounds: int) -> str:
    """One line a run: every metric before and after, with intervals, and the course of the means between."""
    lines = ["| seed | preferences | " + " | ".join(f"{name}: first, last" for name in METRICS.values())]
    lines[0] += " | sampled by round | greedy by round | loop |"
    lines.append("|---|---|" + "---|" * (len(METRICS) + 3))
    for seed in seeds:
        for critic in CRITICS:
            run = folder / f"seed-{seed}" / "runs" / critic
            course = values(run, rounds)
            cells = [f"{course[0][name]} -> {course[-1][name]}" for name in METRICS]
            for name in ("sampled_accuracy", "greedy_accuracy"):
                cells.append(" ".join(f"{step[name].mean:.1f}" for step in course))
            cells.append(f"{sum(seconds(run, rounds).values()):.0f} s")
            lines.append(f"| {seed} | {critic} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(folder: Path, seeds: list[int], rounds: int) -> str:
    """Per seed what is claimed of the demo, with its numbers."""
    lines = []
    for seed in seeds:
        home = folder / f"seed-{seed}" / "runs"
        critic, random = values(home / "critic", rounds), values(home / "random", rounds)
        gain = critic[-1]["sampled_accuracy"].mean - critic[0]["sampled_accuracy"].mean
        greedy = critic[-1]["greedy_accuracy"].mean - critic[0]["greedy_accuracy"].mean
        fell = critic[-1]["hallucination"].mean / max(critic[0]["hallucination"].mean, 1e-9)
        control = random[-1]["sampled_accuracy"].mean - random[0]["sampled_accuracy"].mean
        apart = random[-1]["sampled_accuracy"].high < critic[-1]["sampled_accuracy"].low
        claims = {
            f"sampled +{gain:.1f} points (15 wanted)": gain >= 15,
            f"greedy +{greedy:.1f} (15 wanted)": greedy >= 15,
            f"hallucination x{fell:.2f} (0.5 wanted)": fell <= 0.5,
            f"random +{control:.1f} (a third of the critic's at most)": control <= gain / 3,
            "intervals of critic and random apart": apart,
        }
        lines.append(
            f"seed {seed}: " + "; ".join(f"{'yes' if held else 'NO'}: {text}" for text, held in claims.items())
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=1000, help="a round")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sizes = {"questions": options.questions, "held_out": options.held_out, "rounds": options.rounds}
    run_all(options.folder, options.seeds, threads=options.threads, **sizes)
    print(table(options.folder, options.seeds, options.rounds))
    print()
    print(verdicts(options.folder, options.seeds, options.rounds))


if __name__ == "__main__":
    main()
