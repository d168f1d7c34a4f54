"""Rounds in, charts out: held-out curves over rounds, and training curves with a published one behind them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.report.changes import Change, History
from align.report.figures import Chart, Curve, Panel, rounds_chart, training_chart
from align.report.metrics import Metric, in_order, metric
from align.report.read import RoundData, RunData

PUBLISHED = Path(__file__).with_name("valley2_dpo.json")


@dataclass(frozen=True)
class HeldOutFigure:
    metric: Metric
    chart: Chart
    change: Change | None
    quiet: bool


@dataclass(frozen=True)
class TrainingFigure:
    """A training curve with, where wanted, a second drawing that has the published one
    behind it (the reference curve)."""

    title: str
    explanation: str
    kinds: list[tuple[str, str]]
    chart: Chart
    with_reference: Chart | None


# Title, what it says, baseline, and the trainer's keys with the class that colours each.
_TRAINING: tuple[tuple[str, str, float | None, dict[str, str]], ...] = (
    ("Loss", "dashed: ln 2, a policy that equals its reference", 0.6931, {"loss": "loss"}),
    ("Accuracy", "pairs whose chosen response has the higher reward; dashed: random preferences", 0.5,
     {"rewards/accuracies": "accuracy"}),
    ("Margin", "reward of the chosen minus that of the rejected response", 0.0, {"rewards/margins": "margin"}),
    ("Rewards", "beta times the log-probability ratio to the reference", 0.0,
     {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ("Loss on held-out pairs", "of questions that are not trained on", None, {"eval_loss": "loss"}),
    ("Accuracy on held-out pairs", "dashed: random preferences", 0.5, {"eval_rewards/accuracies": "accuracy"}),
    ("Image margin", "reward of the chosen response with its picture minus that with less of it", 0.0,
     {"image/margins": "margin"}),
    ("Image accuracy", "chosen responses whose reward is higher with their picture than with less of it", 0.5,
     {"image/accuracies": "accuracy"}),
    ("Image anchor", "the term that keeps chosen responses likely with their picture; dashed: at the start", 0.6931,
     {"image/anchor": "loss"}),
)  # fmt: skip


def held_out_figures(run: RunData, changes: History, control: RunData | None) -> list[HeldOutFigure]:
    """A chart for every number that was measured in any round, the control's curve beside the run's.

    A figure is quiet when there is nothing to draw: zero in every round of both runs.
    """
    names = in_order({name for data in run.rounds for name in data.metrics if metric(name).drawn})
    return [_held_out_figure(name, run, changes.overall.get(name), control) for name in names]


def _held_out_figure(name: str, run: RunData, moved: Change | None, control: RunData | None) -> HeldOutFigure:
    points = _points(name, run) + (_points(name, control) if control else [])
    quiet = all(item.mean == 0 for _, item in points)
    return HeldOutFigure(metric(name), _held_out_chart(name, run, control), moved, quiet)


def _held_out_chart(name: str, run: RunData, control: RunData | None) -> Chart:
    known = metric(name)
    curves = [Curve("this run", "run", _points(name, run))]
    if control is not None and (points := _points(name, control)):
        curves.append(Curve("control", "control", points))
    baseline = 0.5 if name.startswith("win_rate") else None
    return rounds_chart(known.label, curves, known.show, share=known.percent, baseline=baseline)


def _points(name: str, run: RunData) -> list[tuple[int, Any]]:
    return [(data.number, data.metrics[name]) for data in run.rounds if name in data.metrics]


def training_figures(run: RunData, *, reference_curve: bool) -> list[TrainingFigure]:
    """Loss, accuracy, margin and rewards over the rounds' training; empty when nothing was trained yet."""
    published = read_published() if reference_curve else {}
    figures = []
    for title, explanation, baseline, keys in _TRAINING:
        panels = [_panel(data, keys, published) for data in run.trained]
        panels = [panel for panel in panels if any(panel.series.values())]
        if not panels:
            continue
        if title == "Loss" and not _sigmoid_alone(run):
            explanation, baseline = f"sum of the terms {_terms(run)}, each with its weight", None
        plain = training_chart(title, panels, baseline=baseline)
        behind = training_chart(title, panels, reference_curve=True, baseline=baseline) if published else None
        kinds = [(kind, kind) for kind in keys.values()] if len(keys) > 1 else []
        figures.append(TrainingFigure(title, explanation, kinds, plain, behind))
    return figures


def _terms(run: RunData) -> str:
    terms = _loss_type(run)
    return ", ".join(map(str, terms)) if isinstance(terms, list) else str(terms)


def _sigmoid_alone(run: RunData) -> bool:
    """Whether the loss is DPO's own, which starts at ln 2; with further terms it starts anywhere."""
    return _loss_type(run) in (None, "sigmoid", ["sigmoid"])


def _loss_type(run: RunData) -> Any:
    """What the last round was trained with."""
    trained = [terms for data in run.trained if (terms := data.setting("dpo", "dpo", "loss_type")) is not None]
    return trained[-1] if trained else run.setting("dpo", "loss_type")


def _panel(data: RoundData, keys: dict[str, str], published: dict[str, list[tuple[float, float]]]) -> Panel:
    series = {
        kind: [(entry.get("step", float(index)), entry[key]) for index, entry in enumerate(data.log) if key in entry]
        for key, kind in keys.items()
    }
    return Panel(data.number, series, {kind: published[key] for key, kind in keys.items() if key in published})


@dataclass(frozen=True)
class Ending:
    """Where a round's training arrived: means over the last fifth of its steps, by the trainer's key."""

    number: int
    steps: int
    values: list[float | None]


ENDING_KEYS = {
    "loss": "Loss",
    "rewards/accuracies": "Accuracy",
    "rewards/margins": "Margin",
    "rewards/chosen": "Chosen",
    "rewards/rejected": "Rejected",
}


def endings(run: RunData) -> list[Ending]:
    """One per round that has logged any training."""
    return [
        Ending(
            data.number,
            int(max(entry.get("step", 0.0) for entry in data.log)),
            [end_of(data, key) for key in ENDING_KEYS],
        )
        for data in run.trained
        if any(key in entry for entry in data.log for key in ENDING_KEYS)
    ]


def end_of(data: RoundData, key: str) -> float | None:
    """Mean of a logged number over the last fifth of the steps."""
    values = [entry[key] for entry in data.log if key in entry]
    tail = values[-max(1, len(values) // 5) :]
    return sum(tail) / len(tail) if tail else None


def read_published() -> dict[str, list[tuple[float, float]]]:
    """The training curves of Valley2-DPO by the trainer's key, as (share of the training,
    mean over a window of steps)."""
    data = _published()
    steps = data["steps"]
    return {
        key: [((window[0] + window[1]) / 2 / steps, window[column]) for window in data["windows"]]
        for column, key in enumerate(data["columns"])
        if column >= 2
    }


def published_source() -> str:
    """Where the reference curve was published."""
    return str(_published()["source"])


def _published() -> Any:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))
