"""DPO alone against DPO with image-conditional preference: one round of the demo on the same pairs, in as many steps.

    python scripts/bench_image_preference.py --folder build/image-preference

Of every seed the responses are sampled once, every critic judges them once, and every arm trains on the very pairs that
came out and is asked the same held-out questions with the same seeds: what differs is the objective alone. `critic` is
the demo's critic model. `length` prefers the longer response without a look at the picture: in the demo mostly a wrong
one, which names a digit more. A stage that is complete is not repeated. Prints markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config import Config, load_config
from align.demo import write_demo
from align.evaluation.grading import hallucinates, is_right
from align.evaluation.image_dependence import looked_on_disk
from align.loop import run_stage
from align.records import Evaluation, read_jsonl
from align.run.folder import Round, RunDir
from align.statistics import bootstrap_mean, paired_difference
from reward.intervals import Interval

CRITICS = {
    "critic": [],
    "length": ["critic.kind=length", "critic.model=", "critic.prompt=", "critic.options="],
}
ALONE = "DPO alone"
CROP = "dpo.image_preference.corruption=crop"
ARMS = {
    ALONE: [],
    "crop": [CROP],
    "another picture": ["dpo.image_preference.corruption=other"],
    "crop, without anchor": [CROP, "dpo.image_preference.anchor=0"],
    "crop, weight 0.3": [CROP, "dpo.image_preference.weight=0.3"],
}
# Neither is looked at here, and both cost time.
PLAIN = ["rounds=1", "evaluate.kl=false", "evaluate.win_rate=false", "critic.reliability_sample=0"]
FIRST = "first policy"
# The last is in nats per token, the others are shares.
METRICS = ("sampled accuracy", "hallucination", "answers that change with the picture", "what the picture adds")
NATS = METRICS[-1]
Values = dict[str, list[float]]


@dataclass(frozen=True)
class Outcome:
    """A policy on the held-out questions: of every metric the values of a question, by its id.

    `note` says what it was trained on, and what the training took.
    """

    values: dict[str, Values]
    note: str = ""


def configure(home: Path, seed: int, name: str, settings: Sequence[str]) -> Config:
    """The demo's configuration with these settings, as the run of this name."""
    words = "".join(char if char.isalnum() else " " for char in name).split()
    return load_config(home / "align.yaml", [f"name={'-'.join(words)}", f"seed={seed}", *PLAIN, *settings])


def need(config: Config, stage: str, number: int) -> Round:
    """The round, in which the stage is complete; for `pairs`, the responses are judged first."""
    this = RunDir(config.run_dir).round(number)
    if not this.manifest.complete(stage):
        run_stage(config, "score" if stage == "pairs" else stage, number)
    return this


def sample(home: Path, seed: int, sizes: list[str], *, questions: int, held_out: int) -> Round:
    """The round whose samples all share."""
    if not (home / "align.yaml").exists():
        write_demo(home, num_questions=questions, num_eval=held_out, seed=seed)
    return need(configure(home, seed, FIRST, sizes), "sample", 1)


def judge(home: Path, seed: int, critic: str, sizes: list[str], samples: Round) -> Round:
    """The round with the pairs that a critic makes of these samples."""
    config = configure(home, seed, f"pairs of {critic}", [*sizes, *CRITICS[critic]])
    this = RunDir(config.run_dir).round(1)
    if not this.samples.exists():
        this.path.mkdir(parents=True, exist_ok=True)
        for path in (samples.manifest_path, samples.image_hashes, samples.samples):
            shutil.copy(path, this.path)
    return need(config, "pairs", 1)


def train(home: Path, seed: int, name: str, arm: str, sizes: list[str], judged: Round) -> Outcome:
    """What an arm made of these pairs."""
    pairs_file = f"pairs_file={judged.pairs.resolve()}"
    config = configure(home, seed, name, [pairs_file, *sizes, *ARMS[arm]])
    need(config, "dpo", 1)
    this = need(config, "evaluate", 1)
    counts, spent = judged.manifest.stages()["pairs"].counts, this.manifest.stages()["dpo"].cost["cpu_seconds"]
    right = counts["figures"].get("pairs_agree_with_reference")
    rightly = f"of {right['count']} with a right and a wrong response, {right['value']:.0%} prefer the right one; "
    return Outcome(held_out_values(this), f"{counts['pairs']} pairs; {rightly if right else ''}{spent:.0f} s")


def held_out_values(this: Round) -> dict[str, Values]:
    """Of an evaluated round every metric's values by question: one per sampled response, or per other picture."""
    lines, seen = read_jsonl(this.evaluation_lines, Evaluation), looked_on_disk(this).values()
    found: list[Values] = [
        {line.id: [value(one) for one in line.sampled] for line in lines} for value in (is_right, hallucinates)
    ]
    for by_picture in ([one.changed for one in seen], [one.log_ratios for one in seen]):
        ids = {id_ for values in by_picture for id_ in values}
        found.append({id_: [values[id_] for values in by_picture if id_ in values] for id_ in ids})
    return dict(zip(METRICS, found, strict=True))


def mean_of(outcomes: Sequence[Outcome], metric: str) -> Interval:
    """The mean over seeds and questions, with an interval from drawing questions anew."""
    return bootstrap_mean([_of_all(outcomes, metric, id_) for id_ in _ids(outcomes, metric)])


def difference(before: Sequence[Outcome], now: Sequence[Outcome], metric: str) -> Interval:
    """How much larger the mean of `now` is than that of `before`, paired over the questions that both were asked."""
    ids = sorted(set(_ids(before, metric)) & set(_ids(now, metric)))
    return paired_difference(*([_of_all(side, metric, id_) for id_ in ids] for side in (before, now)))


def _ids(outcomes: Sequence[Outcome], metric: str) -> list[str]:
    return sorted(set.intersection(*(set(one.values[metric]) for one in outcomes)))


def _of_all(outcomes: Sequence[Outcome], metric: str, id_: str) -> list[float]:
    return [value for one in outcomes for value in one.values[metric][id_]]


def table(found: dict[tuple[str, str], dict[int, Outcome]]) -> str:
    """By critic and arm a line for every seed, and one for all of them: metrics, and differences from DPO alone."""
    lines = [f"| critic | objective | seed | {' | '.join(METRICS)} |", "|---|---|---|" + "---|" * len(METRICS)]
    for (critic, arm), by_seed in found.items():
        sets = [[seed] for seed in by_seed] + ([list(by_seed)] if len(by_seed) > 1 else [])
        for seeds in sets:
            now = [by_seed[seed] for seed in seeds]
            cells = [_show(mean_of(now, metric), metric) for metric in METRICS]
            name = str(seeds[0]) if len(seeds) == 1 else "all"
            lines.append(f"| {critic} | {arm} | {name} | {' | '.join(cells)} |")
            alone = found.get((critic, ALONE), {})
            if arm != ALONE and set(seeds) <= set(alone):
                before = [alone[seed] for seed in seeds]
                cells = [_show(difference(before, now, metric), metric, sign="+") for metric in METRICS]
                lines.append(f"| | *minus {ALONE}* | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _show(value: Interval, metric: str, sign: str = "") -> str:
    """
    >>> _show(Interval(-0.012, -0.04, 0.01, 60), METRICS[0], "+"), _show(Interval(1.5, 1.25, 1.75, 60), NATS)
    ('-1.2 [-4.0, +1.0]', '1.500 [1.250, 1.750]')
    """
    scale, digits = (1, 3) if metric == NATS else (100, 1)
    mean, low, high = (format(scale * number, f"{sign}.{digits}f") for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/image-preference"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--critics", nargs="+", choices=CRITICS, default=list(CRITICS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[ALONE, "crop"])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=500)
    options = parser.parse_args()
    found: dict[tuple[str, str], dict[int, Outcome]] = {}
    sizes = [f"sample.questions_per_round={options.questions}", f"evaluate.image_dependence={options.held_out}"]
    for seed in options.seeds:
        home = options.folder / f"seed-{seed}"
        samples = sample(home, seed, sizes, questions=options.questions, held_out=options.held_out)
        for critic in options.critics:
            judged = judge(home, seed, critic, sizes, samples)
            for arm in options.arms:
                one = train(home, seed, f"{critic} {arm}", arm, sizes, judged)
                found.setdefault((critic, arm), {})[seed] = one
                print(f"seed {seed}, {critic}, {arm}: {one.note}", flush=True)
    first = {
        seed: need(configure(options.folder / f"seed-{seed}", seed, FIRST, sizes), "evaluate", 0)
        for seed in options.seeds
    }
    print(table({("", FIRST): {seed: Outcome(held_out_values(this)) for seed, this in first.items()}} | found))


if __name__ == "__main__":
    main()
