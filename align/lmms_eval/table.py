"""The JSON file of benchmarks in, a table on the terminal out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from align.evaluation.table import benchmark_rows

REMARKS = {
    "skipped": "could not be asked, and count as empty answers",
    "notes": "were asked otherwise than the task says",
}


def print_benchmarks(tasks: Sequence[str], path: Path) -> None:
    """A row for each number of the tasks, and what was skipped or not followed in lines below."""
    from rich.console import Console
    from rich.table import Table

    known = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    table = Table("task", "metric", title="lmms-eval")
    for name in ("value", "standard error", "documents"):
        table.add_column(name, justify="right")
    for row in benchmark_rows({"tasks": {name: known[name] for name in tasks}}):
        table.add_row(row.task, row.metric, row.value, row.stderr, row.documents)
    console = Console()
    console.print(table)
    for name in tasks:
        counts = known[name]["counts"]
        for kind, remark in REMARKS.items():
            for reason, count in counts.get(kind, {}).items():
                console.print(f"{name}: {count} of {counts['requests']} requests {remark}: {reason}", markup=False)
