"""Runs in, one table out: held-out numbers by round, with intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.rundir import RunDir

COLUMNS = {
    "sampled_accuracy": "sampled accuracy",
    "greedy_accuracy": "greedy accuracy",
    "hallucination": "hallucination",
}


def metrics_by_round(run: Path) -> dict[int, dict[str, dict[str, float]]]:
    """The metrics of every evaluated round: round -> metric -> mean, low, high, count."""
    found = {}
    for this in RunDir(run).rounds():
        if this.evaluation.is_file():
            found[this.number] = json.loads(this.evaluation.read_text(encoding="utf-8"))["metrics"]
    return found


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
    """Print a table with a row for each round of each run; runs without an evaluation are left out."""
    from rich.console import Console
    from rich.table import Table

    rows = [(name, number, metrics) for name, run in runs.items() for number, metrics in metrics_by_round(run).items()]
    if not rows:
        return
    names = [name for name in (*COLUMNS, "response_tokens") if any(name in metrics for _, _, metrics in rows)]
    table = Table(title="Held-out questions by round (mean, 95 % interval)")
    table.add_column("run")
    table.add_column("round", justify="right")
    for name in names:
        table.add_column(COLUMNS.get(name, name.replace("_", " ")), justify="right")
    for run_name, number, metrics in rows:
        table.add_row(run_name, str(number), *(_cell(name, metrics.get(name)) for name in names))
    Console().print(table)


def _cell(name: str, metric: dict[str, float] | None) -> str:
    if metric is None:
        return "-"
    scale, digits = (1.0, 1) if name == "response_tokens" else (100.0, 1)
    mean, low, high = (scale * metric[key] for key in ("mean", "low", "high"))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
