"""Further responses where the first ones were the same, against more responses to every question: on the demo.

    python scripts/bench_until_pair.py --folder build/until-pair

Every setting runs the demo's rounds with the critic model on the same questions; a run that is complete is not
repeated. A table of the share of questions that end with a pair, the tokens sampled, and what the held-out accuracy
gained for them; markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from align.config import Config, load_config
from align.demo import write_demo
from align.evaluation.summary import read_summary
from align.loop import run_rounds
from align.run.folder import RunDir
from reward.intervals import Interval

UNTIL = ["sample.until_pair=true", "sample.max_responses=16"]
SETTINGS = {
    "K = 5": ["sample.num_responses=5"],
    "K = 8": ["sample.num_responses=8"],
    "K = 5, until a pair": ["sample.num_responses=5", *UNTIL],
    "K = 5, until a pair, further at 1.3": ["sample.num_responses=5", *UNTIL, "sample.further_temperature=1.3"],
}
# Neither is looked at here, and both cost time.
PLAIN = ["evaluate.kl=false", "evaluate.win_rate=false", "critic.reliability_sample=0"]


@dataclass(frozen=True)
class Outcome:
    """A run: per round the share of questions with a pair and the tokens sampled; accuracy before and after."""

    with_pair: list[float]
    num_tokens: list[int]
    before: Interval
    after: Interval
    hallucination: Interval

    @property
    def gain(self) -> float:
        """Points of sampled accuracy per 10,000 sampled tokens."""
        return 100 * (self.after.mean - self.before.mean) / (sum(self.num_tokens) / 10_000)


def configure(folder: Path, setting: str, seed: int, *, questions: int, rounds: int) -> Config:
    """The demo's configuration of a setting."""
    name = "".join(char if char.isalnum() else "-" for char in setting)
    overrides = [f"name={name}", f"seed={seed}", f"rounds={rounds}", f"sample.questions_per_round={questions}"]
    return load_config(folder / f"seed-{seed}" / "align.yaml", overrides + PLAIN + SETTINGS[setting])


def outcome(config: Config) -> Outcome:
    """What a complete run came to."""
    run = RunDir(config.run_dir)
    with_pair, tokens = [], []
    for number in range(1, config.rounds + 1):
        stages = run.round(number).manifest.stages()
        counts = stages["pairs"].counts
        with_pair.append(1 - sum(counts["questions_without_pair"].values()) / counts["questions"])
        tokens.append(int(stages["sample"].counts["tokens"]))
    first, last = (read_summary(run.round(number).evaluation).metrics for number in (0, config.rounds))
    return Outcome(with_pair, tokens, first["sampled_accuracy"], last["sampled_accuracy"], last["hallucination"])


def table(found: dict[str, list[Outcome]]) -> str:
    """A line per setting, the mean over seeds, with each seed's accuracy and gain."""
    lines = [
        (
            "| responses | questions with a pair, by round | tokens sampled | sampled accuracy, by seed |"
            " hallucination, by seed | points per 10,000 tokens, by seed |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for setting, outcomes in found.items():
        shares = " ".join(f"{mean(shares):.1%}" for shares in zip(*(one.with_pair for one in outcomes), strict=True))
        tokens = f"{mean(sum(one.num_tokens) for one in outcomes):,.0f}"
        after = ", ".join(_percent(one.after) for one in outcomes)
        absent = ", ".join(_percent(one.hallucination) for one in outcomes)
        gains = f"{mean(one.gain for one in outcomes):.2f} ({', '.join(f'{one.gain:.2f}' for one in outcomes)})"
        lines.append(f"| {setting} | {shares} | {tokens} | {after} | {absent} | {gains} |")
    return "\n".join(lines)


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/until-pair"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=400, help="per round")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[Outcome]] = {setting: [] for setting in SETTINGS}
    for seed in options.seeds:
        home = options.folder / f"seed-{seed}"
        if not (home / "align.yaml").exists():
            write_demo(home, num_questions=options.questions * options.rounds, num_eval=options.held_out, seed=seed)
        for setting, outcomes in found.items():
            config = configure(options.folder, setting, seed, questions=options.questions, rounds=options.rounds)
            run_rounds(config, report=False)
            outcomes.append(outcome(config))
            print(json.dumps({"seed": seed, "setting": setting, "with_pair": outcomes[-1].with_pair}), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
