"""Rounds in; out those whose answers depend on the picture less than their parent's, and whether they got better so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from align.report.changes import MIN_QUESTIONS, History
from align.report.metrics import metric
from align.report.read import RunData

CHANGES = ("image_dependence_change", "image_log_ratio_change")
RIGHT = ("sampled_accuracy", "greedy_accuracy")


@dataclass(frozen=True)
class LooksLess:
    """`better`: right answers became more at the same time, so that the round got better by looking less."""

    number: int
    text: str
    better: bool


def looks_less(run: RunData, changes: History) -> Iterator[LooksLess]:
    """Rounds whose 95 % interval of the change lies below zero, over `MIN_QUESTIONS` questions or more."""
    for data in run.trained:
        found = {name: data.metrics[name] for name in CHANGES if name in data.metrics}
        less = {name: one for name, one in found.items() if one.high < 0 and one.count >= MIN_QUESTIONS}
        if not less:
            continue
        text = "; ".join(
            f"{metric(name).label.lower()} {metric(name).show_change(one.mean)} {metric(name).unit} "
            f"({metric(name).show_change(one.low)} to {metric(name).show_change(one.high)})"
            for name, one in less.items()
        )
        steps = [step for name in RIGHT for step in changes.steps.get(name, []) if step.last_round == data.number]
        yield LooksLess(data.number, text, better=any(step.state == "better" for step in steps))
