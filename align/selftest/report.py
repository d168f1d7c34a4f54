"""Checks in, one line on the screen for each and one JSON out, which is complete up to the check that is running."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import align
from align.errors import UserError
from align.files import make_folder, write_text
from align.selftest.output import end_of, output_to

Verdict = Literal["passed", "failed", "left out"]
MARKS: dict[str, str] = {"passed": "ok", "failed": "FAILED", "left out": "-"}


class LeftOut(Exception):
    """What a check needs is not there; the message says what."""


class Wrong(Exception):
    """A check has found something wrong; the message says what."""

    def __init__(self, message: str, **numbers: Any) -> None:
        super().__init__(message)
        self.numbers = numbers


@dataclass(frozen=True)
class Finding:
    """What a check that has passed says: one line, and numbers for the JSON."""

    text: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How one check went; `traceback` is empty unless something raised that was not expected, `output` (the end of what
    was printed) unless it failed."""

    name: str
    verdict: Verdict
    text: str
    seconds: float
    numbers: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""
    output: str = ""

    def line(self) -> str:
        """For the screen.

        >>> Outcome("speed", "passed", "0.05 TFLOP/s", 2.04).line()
        '  ok      speed            2.0 s  0.05 TFLOP/s'
        """
        return f"  {MARKS[self.verdict]:<7} {self.name:<12}{self.seconds:>8.1f} s  {self.text}"


Check = Callable[[], Finding]


def run_checks(
    checks: Mapping[str, Check],
    out: Path,
    on_outcome: Callable[[Outcome], None],
    on_start: Callable[[str], None] = lambda name: None,
) -> list[Outcome]:
    """Run checks in their order. After each, `out` holds all that is known; `complete` says whether it is all of it.

    What they print stands in a file beside it (`log_of`).

    Raises:
        UserError: the file cannot be written.
    """
    make_folder(out.parent)
    outcomes: list[Outcome] = []
    _save(out, outcomes, complete=not checks)
    log = log_of(out)
    write_text(log, "")
    for name, check in checks.items():
        on_start(name)
        outcomes.append(_run(name, check, log))
        _save(out, outcomes, complete=len(outcomes) == len(checks))
        on_outcome(outcomes[-1])
    return outcomes


def log_of(out: Path) -> Path:
    """Where stands what the checks print."""
    return out.with_name(f"{out.stem}-output.log")


def _run(name: str, check: Check, log: Path) -> Outcome:
    started, trace, numbers = time.perf_counter(), "", {}
    verdict: Verdict = "failed"
    begin = log.stat().st_size
    try:
        with output_to(log):
            found = check()
        verdict, text, numbers = "passed", found.text, found.numbers
    except LeftOut as reason:
        verdict, text = "left out", str(reason)
    except Wrong as wrong:
        text, numbers = str(wrong), wrong.numbers
    except UserError as error:
        text = str(error)
    except Exception as error:
        text, trace = f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc()
    seconds = round(time.perf_counter() - started, 2)
    output = end_of(log, begin) if verdict == "failed" else ""
    return Outcome(name, verdict, text, seconds, numbers, trace, output)


def _save(out: Path, outcomes: list[Outcome], *, complete: bool) -> None:
    machine = next((outcome.numbers["machine"] for outcome in outcomes if "machine" in outcome.numbers), None)
    found = {
        "valley-align": align.__version__,
        "complete": complete,
        "machine": machine,
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    write_text(out, json.dumps(found, indent=2) + "\n")


def summary(outcomes: list[Outcome]) -> str:
    """How many checks passed, failed and were left out."""
    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in MARKS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
