"""A finished stage in, the numbers that say how it went out: counts, rewards, held-out numbers."""

from __future__ import annotations

from typing import Any

from align.evaluation.summary import read_summary
from align.records import read_jsonl
from align.run.folder import Round
from reward.judgement import Judgement


def stage_metrics(this: Round, stage: str) -> dict[str, float]:
    """Numbers by name, such as `sample/responses`, `score/reward_mean` or `evaluate/greedy_accuracy`.

    Counts by reason are added up; held-out numbers come with the ends of their 95 % interval.
    """
    entry = this.manifest.stage(stage)
    numbers = _flat(entry.counts) | {"seconds": entry.seconds} if entry else {}
    if stage == "score":
        rewards = [r for line in read_jsonl(this.scores, Judgement) for r in line.rewards if r is not None]
        numbers["reward_mean"] = sum(rewards) / len(rewards)
    if stage == "evaluate":
        for name, interval in read_summary(this.evaluation).metrics.items():
            numbers |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {f"{stage}/{name}": value for name, value in numbers.items()}


def _flat(counts: dict[str, Any]) -> dict[str, float]:
    """
    >>> bias = {"position_bias": {"value": 0.1, "count": 9}}
    >>> _flat({"scored": 9, "unscored": {"no answer": 2, "torn": 1}, "critic": bias})
    {'scored': 9.0, 'unscored': 3.0, 'critic/position_bias': 0.1}
    """
    found: dict[str, float] = {}
    for name, value in counts.items():
        if isinstance(value, dict) and "value" in value:
            found[name] = float(value["value"])
        elif isinstance(value, dict) and all(type(count) is int for count in value.values()):
            if value:
                found[name] = float(sum(value.values()))
        elif isinstance(value, dict):
            found |= {f"{name}/{inner}": number for inner, number in _flat(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found
