"""Runs in, one table out: held-out metrics by round, with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.evaluation.summary import EvaluationSummary, read_summary
from align.run.folder import RunDir
from align.run.parents import selected_by
from reward.intervals import Interval

# What tables and cards show, where it was measured; shares are written in percent.
COLUMNS = {
    "sampled_accuracy": "sampled accuracy, %",
    "greedy_accuracy": "greedy accuracy, %",
    "win_rate_initial": "wins over first, %",
    "win_rate_parent": "wins over parent, %",
    "hallucination": "hallucination, %",
    "image_dependence": "image dependence, %",
    "image_log_ratio": "image log ratio, nats",
    "response_tokens": "tokens per response",
    "kl": "KL from first, nats",
}
LABEL_WIDTH = max(map(len, COLUMNS.values()))
NOT_SHARES = {"response_tokens", "kl", "image_log_ratio"}


def metrics_by_round(run: Path) -> dict[int, dict[str, Interval]]:
    """The reported metrics of every evaluated round: round -> metric -> its interval."""
    return {number: summary.metrics for number, summary in _summaries(run).items()}


def _summaries(run: Path) -> dict[int, EvaluationSummary]:
    return {this.number: read_summary(this.evaluation) for this in RunDir(run).rounds() if this.evaluation.is_file()}


def footnotes(run: Path) -> list[str]:
    """What stands below the numbers of a run: which questions they are of, and which round was chosen by the others."""
    summaries = _summaries(run)
    if not summaries:
        return []
    last = summaries[max(summaries)]
    lines = []
    if last.decision is not None:
        lines.append(
            f"Over {last.questions} held-out questions; {len(last.decision.questions)} others, which decide (gates, "
            "stopping, selection), are not in these numbers."
        )
    chosen = selected_by(RunDir(run), last.round)
    return [*lines, *([f"Chosen: {chosen.why}."] if chosen is not None else [])]


@dataclass(frozen=True)
class BenchmarkRow:
    """A number of one of lmms-eval's tasks, as text; `documents` also says how many requests were not asked."""

    task: str
    metric: str
    value: str
    stderr: str
    documents: str


def benchmark_rows(summary: dict[str, Any]) -> list[BenchmarkRow]:
    """The rows of a file that `align evaluate --lmms-eval` wrote; figures of a group stand beside those of its tasks.

    >>> number = {"value": 0.51234, "stderr": None, "higher_is_better": True}
    >>> counts = {"requests": 6, "skipped": {"sound is not supported": 2}}
    >>> found = {"mme": {"results": {"mme": {"documents": 6, "metrics": {"acc": number}}}, "counts": counts}}
    >>> benchmark_rows({"tasks": found})
    [BenchmarkRow(task='mme', metric='acc', value='0.5123', stderr='-', documents='6, 2 not asked')]
    """
    rows = []
    for entry in summary["tasks"].values():
        skipped = sum(entry["counts"].get("skipped", {}).values())
        for task, found in entry["results"].items():
            documents = "-" if found["documents"] is None else str(found["documents"])
            documents += f", {skipped} not asked" if skipped else ""
            for metric, number in found["metrics"].items():
                stderr = "-" if number["stderr"] is None else f"{number['stderr']:.4g}"
                rows.append(BenchmarkRow(task, metric, f"{number['value']:.4g}", stderr, documents))
    return rows


def print_table(runs: dict[str, Path]) -> None:
    """Print a table for each run: its held-out metrics, one column per round;
    runs without an evaluation are left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, run in runs.items():
        rounds = metrics_by_round(run)
        names = columns_of(rounds.values())
        if not names:
            continue
        title = f"{name}: held-out questions (mean, 95 % interval)"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column()
        for number in rounds:
            table.add_column("first policy" if number == 0 else f"round {number}", justify="right")
        cells = {key: [with_interval(key, metrics.get(key)) for metrics in rounds.values()] for key in names}
        wide = LABEL_WIDTH + sum(2 + max(map(len, column)) for column in zip(*cells.values(), strict=True))
        for key in names:
            # The interval stands below its mean where the terminal is too narrow for one line.
            row = cells[key] if wide <= console.width else [cell.replace(" ", "\n", 1) for cell in cells[key]]
            table.add_row(COLUMNS[key], *row)
        console.print(table)
        for line in footnotes(run):
            console.print(line, highlight=False)


def digits_of(name: str, value: float) -> int:
    """Decimals of a column's numbers: nats may be few."""
    return 1 if name not in ("kl", "image_log_ratio") or abs(value) >= 10 else 2 if abs(value) >= 0.01 else 3


def columns_of(rounds: Iterable[dict[str, Interval]]) -> list[str]:
    """The columns that any of these rounds has a number for."""
    measured = {name for metrics in rounds for name in metrics}
    return [name for name in COLUMNS if name in measured]


def with_interval(name: str, metric: Interval | None) -> str:
    """A number of a column with its interval, a dash where it was not measured.

    >>> with_interval("hallucination", Interval(0.25, 0.2, 0.31, 60))
    '25.0 [20.0, 31.0]'
    >>> with_interval("kl", Interval(0.0139, -0.007, 0.0348, 60))
    '0.01 [-0.01, 0.03]'
    """
    if metric is None:
        return "-"
    scale = 1.0 if name in NOT_SHARES else 100.0
    mean, low, high = (scale * value for value in (metric.mean, metric.low, metric.high))
    digits = digits_of(name, mean)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
