"""A run's manifests in, the facts under the report's headline out: what happened,
not what the first align.yaml asked for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from align.report.metrics import plain
from align.report.read import RoundData, RunData, number

GIVEN = "existing preference pairs"


def run_facts(run: RunData) -> list[tuple[str, str]]:
    """Name and value of each: policy, critic by round, rounds trained, responses per question."""
    facts = []
    policy = run.setting("policy")
    if policy:
        facts.append(("Policy", _last_names(str(policy))))
    judges = [(data.number, judge) for data in run.trained if (judge := _judge(run, data)) is not None]
    if judges or run.setting("critic", "kind"):
        facts.append(("Critic", by_round(judges) or _critic_name(run, run.setting("critic", "kind"))))
    if run.trained:
        done, asked = len(run.complete), number(run.setting("rounds")) or 0
        facts.append(("Rounds", f"{done} of {asked:.0f}" if done < asked else str(done)))
    sampled = [(data.number, per) for data in run.trained if (per := _responses_per_question(data)) is not None]
    if sampled:
        facts.append(("Responses per question", by_round(sampled)))
    return facts


def by_round(values: Iterable[tuple[int, str]]) -> str:
    """Values with the rounds that have them; without rounds where all have the same.

    >>> by_round([(1, "5"), (2, "5")]), by_round([(1, "random"), (2, "pairwise"), (3, "pairwise")])
    ('5', 'random (round 1), pairwise (rounds 2 to 3)')
    """
    values = list(values)
    starts = [0, *(index for index, (a, b) in enumerate(pairwise(values), start=1) if a[1] != b[1]), len(values)]
    spans = [(values[start], values[end - 1]) for start, end in pairwise(starts) if end > start]
    if len(spans) < 2:
        return "".join(first[1] for first, _ in spans)
    return ", ".join(f"{first[1]} ({_rounds(first[0], last[0])})" for first, last in spans)


def _rounds(first: int, last: int) -> str:
    return f"round {first}" if first == last else f"rounds {first} to {last}"


def _judge(run: RunData, data: RoundData) -> str | None:
    """What made a round's pairs; None where it is not known yet."""
    kind = data.setting("score", "critic", "kind")
    if kind is not None:
        return _critic_name(run, kind)
    return GIVEN if "pairs" in data.stages and "sample" not in data.stages else None


def _critic_name(run: RunData, kind: Any) -> str:
    # The manifest knows a critic's model by its content; its name stands in the configuration, if it is that critic.
    model = run.setting("critic", "model") if kind == run.setting("critic", "kind") else None
    return f"{kind} ({_last_names(str(model))})" if model else str(kind)


def _responses_per_question(data: RoundData) -> str | None:
    counts = data.counts("sample")
    questions, responses = number(counts.get("questions")), number(counts.get("responses"))
    if not questions or responses is None:
        return None
    per = responses / questions
    return f"{per:.0f}" if per == round(per) else plain(per)


def _last_names(path: str) -> str:
    return "/".join(path.rstrip("/").split("/")[-2:])
