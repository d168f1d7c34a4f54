"""Evaluated rounds in, the best of them by the questions that decide out; the first policy is one of them."""

from __future__ import annotations

from collections.abc import Sequence

from align.config import Config
from align.errors import UserError
from align.evaluation.summary import EvaluationSummary, read_summary
from align.evaluation.table import with_interval
from align.evaluation.win_rate import has_judge
from align.records import Question
from align.run.folder import RunDir
from align.run.manifest import SelectedRound
from align.run.parents import name_of
from reward.intervals import Interval
from reward.reliability import MIN_COUNT

LABELS = {
    "sampled_accuracy": "sampled accuracy",
    "greedy_accuracy": "greedy accuracy",
    "win_rate": "win rate over the first policy",
    "hallucination": "hallucination (less is better)",
}
# Those that `auto` takes the first of that was measured.
AUTO = ("sampled_accuracy", "win_rate", "hallucination")


def select_round(config: Config, run: RunDir, last: int) -> SelectedRound:
    """The best of the evaluated rounds up to `last` by `evaluate.select_metric`; of equally good ones the earliest.

    Raises:
        UserError: the metric was not measured in all of them, or not all set the same questions apart.
    """
    summaries = _evaluated(run, last)
    _check_parts(summaries)
    metric, values = _measured(config.evaluate.select_metric, summaries)
    sign = -1 if metric == "hallucination" else 1
    best = max(values, key=lambda number: (sign * values[number].mean, -number))
    count = max(len(summary.deciding_questions) for summary in summaries.values())
    shown = ", ".join(f"{name_of(number)} {with_interval(metric, value)} %" for number, value in values.items())
    few = f"; {count} questions are too few (below {MIN_COUNT}) to tell rounds apart" if count < MIN_COUNT else ""
    entry = run.round(best).manifest.stage("evaluate")
    assert entry is not None
    return SelectedRound(
        round=best,
        checkpoint=entry.inputs["checkpoint"],
        by=config.evaluate.select_metric,
        why=f"{name_of(best)}, by {LABELS[metric]} on {count} held-out questions set apart for that: {shown}{few}",
    )


def can_measure(config: Config, questions: Sequence[Question]) -> None:
    """Raise UserError where `evaluate.select_metric` cannot be measured on these questions, before any is asked."""
    answers = any(question.answer is not None for question in questions)
    possible = {
        "sampled_accuracy": answers,
        "greedy_accuracy": answers,
        "win_rate": has_judge(config),
        "hallucination": any(question.absent_objects for question in questions),
    }
    wanted = config.evaluate.select_metric
    if not any(possible.values()) if wanted == "auto" else not possible[wanted]:
        raise _nothing_to_choose_by(wanted)


def _evaluated(run: RunDir, last: int) -> dict[int, EvaluationSummary]:
    """The summaries of evaluated rounds up to `last`, which itself may not be marked complete yet."""
    rounds = (this for this in run.rounds() if this.number <= last and this.manifest.stage("evaluate") is not None)
    return {
        this.number: read_summary(this.evaluation)
        for this in rounds
        if this.number == last or this.manifest.complete("evaluate")
    }


def _check_parts(summaries: dict[int, EvaluationSummary]) -> None:
    last = summaries[max(summaries)]
    for number, summary in summaries.items():
        if (summary.decision is None) or not (summary.deciding_questions & last.deciding_questions):
            raise UserError(
                f"{name_of(number)} was evaluated without the questions that are set apart for decisions now",
                fix=f"run `align evaluate --round {number}`; what is evaluated already is not asked again",
            )


def _measured(wanted: str, summaries: dict[int, EvaluationSummary]) -> tuple[str, dict[int, Interval]]:
    """The metric that chooses, and its value in every round."""
    for metric in AUTO if wanted == "auto" else (wanted,):
        values = {number: _value(metric, summary) for number, summary in summaries.items()}
        known = {number: value for number, value in values.items() if value is not None}
        if len(known) == len(values):
            return metric, known
    raise _nothing_to_choose_by(wanted)


def _nothing_to_choose_by(wanted: str) -> UserError:
    what = f"none of {', '.join(AUTO)}" if wanted == "auto" else f"no {wanted}"
    return UserError(
        f"there is nothing to choose a round by: {what} can be measured in every round (evaluate.select_metric)",
        fix="give held-out questions an answer or absent_objects, name a critic model, or take evaluate.select and "
        "select_metric out",
    )


def _value(metric: str, summary: EvaluationSummary) -> Interval | None:
    if metric != "win_rate":
        return summary.deciding_metrics.get(metric)
    half = Interval(0.5, 0.5, 0.5, len(summary.deciding_questions))
    return summary.deciding_metrics.get("win_rate_initial") if summary.round else half
