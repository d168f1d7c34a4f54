"""Manifests in; where the data went (questions to pairs, each loss by reason) and what each stage cost, out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from align.monitoring.format import duration as duration
from align.report.read import RoundData, RunData, Stage, number


@dataclass(frozen=True)
class Loss:
    reason: str
    count: float


@dataclass(frozen=True)
class Step:
    """A station of the data; `share` is what is left of `of` (0 to 1), None where there is nothing to compare with."""

    label: str
    count: float
    of: str = ""
    share: float | None = None
    losses: list[Loss] = field(default_factory=list)


@dataclass(frozen=True)
class Funnel:
    number: int
    steps: list[Step]
    others: list[tuple[str, float]]


@dataclass(frozen=True)
class Cost:
    """What one stage of one round took, all attempts and processes together; None where nobody counted.

    `cpu_hours` are hours of processor time, on as many cores as were busy. What servers spent is theirs to say.
    """

    number: int
    stage: str
    seconds: float
    tokens_read: float | None = None
    tokens_written: float | None = None
    gpu_hours: float | None = None
    cpu_hours: float | None = None
    device: str = ""
    on_servers: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens read and written per second; None where neither was counted."""
        tokens = (self.tokens_read or 0.0) + (self.tokens_written or 0.0)
        return tokens / self.seconds if tokens and self.seconds > 0 else None


_SHOWN = {
    "sample": {"questions", "responses", "further_responses", "truncated", "empty", "identical", "tokens"},
    "score": {"questions", "responses", "scored", "unscored", "verdicts", "pairs", "dropped", "dropped_responses",
              "dropped_pairs", "questions_without_pair", "critic"},
    "pairs": {"questions", "pairs", "dropped", "dropped_responses", "dropped_pairs", "questions_without_pair"},
    "dpo": {"pairs", "tokens", "dropped", "dropped_too_long", "loss", "reward_accuracy", "reward_margin"},
}  # fmt: skip


def funnels(run: RunData) -> list[Funnel]:
    """One per round that has counted anything."""
    found = [Funnel(data.number, _steps(data), _others(data)) for data in run.trained]
    return [funnel for funnel in found if funnel.steps]


def _steps(data: RoundData) -> list[Step]:
    sample, judged, dpo = data.counts("sample"), data.judged, data.counts("dpo")
    questions, responses = number(sample.get("questions")), number(sample.get("responses"))
    steps = []
    if questions is not None:
        steps.append(Step("questions asked", questions, losses=reasons(sample.get("left_out"))))
    if responses is not None:
        # Once pairs are made, these stand among the responses that were not fit for one.
        kinds = () if "dropped_responses" in judged else ("truncated", "empty", "identical")
        losses = [Loss(_WORDS[key], n) for key in kinds if (n := number(sample.get(key)))]
        further = number(sample.get("further_responses"))
        label = f"responses sampled, {further:,.0f} of them to questions without two different" if further else ""
        steps.append(Step(label or "responses sampled", responses, losses=losses))
    scored, verdicts = number(judged.get("scored")), number(judged.get("verdicts"))
    if scored is not None:
        label = f"responses scored by {verdicts:,.0f} verdicts" if verdicts else "responses scored"
        steps.append(_kept(label, scored, responses, "responses", reasons(judged.get("unscored"))))
    left_out = reasons(judged.get("dropped_responses"))
    if scored is not None and left_out:
        # Unscored responses were taken off in the step before.
        losses = [loss for loss in left_out if loss.reason != "unscored"]
        usable = scored - sum(loss.count for loss in losses)
        steps.append(_kept("responses fit for a pair", usable, scored, "scored responses", losses))
    pairs = number(judged.get("pairs"))
    if pairs is not None:
        losses = reasons(judged.get("questions_without_pair")) or reasons(judged.get("dropped"))
        without = sum(loss.count for loss in losses)
        if questions and judged.get("questions_without_pair") is not None:
            steps.append(_kept("questions with a pair", questions - without, questions, "questions", losses))
            losses = []
        steps.append(Step("preference pairs", pairs, losses=losses))
    trained = number(dpo.get("pairs"))
    if trained is not None:
        too_long = reasons({"too long": dpo.get("dropped_too_long")})
        steps.append(_kept("pairs trained on", trained, pairs, "pairs", too_long + reasons(dpo.get("dropped"))))
    return steps


_WORDS = {"truncated": "cut off at the token limit", "empty": "empty", "identical": "same text as another"}


def _kept(label: str, count: float, before: float | None, of: str, losses: list[Loss]) -> Step:
    return Step(label, count, of, count / before if before else None, losses)


def reasons(value: Any) -> list[Loss]:
    """A table of counts by reason, the largest first; a bare number has no reason."""
    if isinstance(value, dict):
        found = [Loss(str(reason), n) for reason, count in value.items() if (n := number(count))]
        return sorted(found, key=lambda loss: (-loss.count, loss.reason))
    bare = number(value)
    return [Loss("no reason given", bare)] if bare else []


def _others(data: RoundData) -> list[tuple[str, float]]:
    """Counts that no step shows; `dropped_pairs` counts combinations, of which most questions have many."""
    found = []
    for stage in data.stages.values():
        for key, value in stage.counts.items():
            if key not in _SHOWN.get(stage.name, {"questions"}) and (n := number(value)) is not None:
                found.append((f"{stage.name}: {key.replace('_', ' ')}", n))
            if key.endswith("_by_source") and isinstance(value, dict):
                what = key.removesuffix("_by_source").replace("_", " ")
                found += [(f"{stage.name}: {what} of {name}", n) for name, c in value.items() if (n := number(c))]
    found += [(f"combinations: {loss.reason}", loss.count) for loss in reasons(data.judged.get("dropped_pairs"))]
    return found


def costs(run: RunData) -> list[Cost]:
    """Every stage with a time, in order."""
    return [
        _cost(data.number, stage) for data in run.rounds for stage in data.stages.values() if stage.seconds is not None
    ]


def _cost(round_: int, stage: Stage) -> Cost:
    def hours(name: str) -> float | None:
        seconds = number(stage.cost.get(name))
        return None if seconds is None else seconds / 3600

    read, written = (number(stage.cost.get(f"tokens_{what}")) for what in ("read", "written"))
    if not read and not written:
        # Without a meter, what the stage itself counted: responses when sampling, whole rows when training.
        counted = number(stage.counts.get("tokens"))
        read, written = (None, counted) if stage.name == "sample" else (counted, None)
    device = str(stage.cost.get("device", ""))
    processes = number(stage.cost.get("num_processes")) or 1
    return Cost(
        number=round_,
        stage=stage.name,
        seconds=stage.seconds or 0.0,
        tokens_read=read,
        tokens_written=written,
        gpu_hours=hours("gpu_seconds"),
        cpu_hours=hours("cpu_seconds"),
        device=f"{processes:.0f} x {device}" if processes > 1 else device,
        on_servers="servers" in stage.notes,
        notes=stage.notes,
    )


def hours(value: float) -> str:
    """
    >>> hours(0.0), hours(0.0004), hours(1234.5)
    ('0', '<0.01', '1,234.50')
    """
    return "0" if value == 0 else "<0.01" if value < 0.01 else f"{value:,.2f}"
