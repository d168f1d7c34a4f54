"""What lmms-eval computed, and the records of all requests, in; the numbers that are kept of a task out."""

from __future__ import annotations

from collections import Counter
from typing import Any

from align.lmms_eval.instances import Answered


def counts_of(records: list[Answered]) -> dict[str, Any]:
    """How many requests, tokens and cut responses; requests that could not be asked, and notes, each by reason."""
    asked = [record for record in records if not record.skipped]
    counts: dict[str, Any] = {
        "requests": len(records),
        "tokens": sum(record.num_tokens for record in asked),
        "truncated": sum(record.finish_reason == "length" for record in asked),
    }
    for name, reasons in (
        ("skipped", [record.skipped for record in records]),
        ("notes", [record.note for record in records]),
    ):
        if any(reasons):
            counts[name] = dict(Counter(reason for reason in reasons if reason))
    return counts


def numbers_of(found: dict[str, Any]) -> dict[str, Any]:
    """By task (or group): version, shots, documents and metrics, each with its standard error where there is one.

    >>> row = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_stderr_clt,none": 0.1, "sub,none": None}
    >>> numbers_of({"results": {"t": row}, "higher_is_better": {"t": {"acc": True}}})["t"]["metrics"]
    {'acc': {'value': 0.5, 'stderr': 0.1, 'higher_is_better': True}}
    """
    numbers = {}
    for task, row in found["results"].items():
        better = found.get("higher_is_better", {}).get(task, {})
        metrics = {}
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if "_stderr" in metric or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            errors = (row.get(f"{metric}_stderr{which},{kind}") for which in ("", "_clt"))
            stderr = next((float(error) for error in errors if isinstance(error, (int, float))), None)
            shown = metric if kind in ("", "none") else f"{metric} ({kind})"
            metrics[shown] = {"value": float(value), "stderr": stderr, "higher_is_better": better.get(metric)}
        numbers[task] = {
            "version": found.get("versions", {}).get(task),
            "num_fewshot": found.get("n-shot", {}).get(task),
            "documents": found.get("n-samples", {}).get(task, {}).get("effective"),
            "metrics": metrics,
        }
    return numbers
