"""What a critic model answered in; probabilities of the options, or the reason why there are none, out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward.critics.base import NO_ANSWER, OUTSIDE_OPTIONS, why_unreadable


@dataclass(frozen=True)
class Reading:
    """Probabilities of the options by name, normalised to 1; None if there are none, and then `reason` says why.

    `mass` is what the options had together before normalising (None for text): how far the critic answers in the
    words that it was offered.
    """

    probabilities: dict[str, float] | None
    reason: str = ""
    mass: float | None = None


def read_log_probs(row: Any, options: dict[str, str], *, min_mass: float) -> Reading:
    """Read one branch's log-probabilities, one an option.

    >>> reading = read_log_probs([math.log(0.3), math.log(0.1)], {"first": "1", "second": "2"}, min_mass=0.0)
    >>> round(reading.probabilities["first"], 3), round(reading.mass, 3)
    (0.75, 0.4)
    """
    log_probs = np.asarray(row, dtype=np.float64)
    assert log_probs.shape == (len(options),), f"{len(options)} options, but the judge_model gave {log_probs.shape}"
    mass = float(np.exp(log_probs).sum())
    if not math.isfinite(mass):
        return Reading(None, NO_ANSWER)
    if mass < min_mass or np.isneginf(log_probs).all():
        return Reading(None, OUTSIDE_OPTIONS, mass)
    weights = np.exp(log_probs - log_probs.max())
    return Reading(dict(zip(options, (weights / weights.sum()).tolist(), strict=True)), mass=mass)


def read_text(text: str | None, options: dict[str, str]) -> Reading:
    """Read which option a written judgement chooses; it gets probability 1."""
    chosen = chosen_option(text, options)
    if chosen is None:
        return Reading(None, why_unreadable(text))
    return Reading({name: float(name == chosen) for name in options})


def chosen_option(text: str | None, options: dict[str, str]) -> str | None:
    """The name of the option that a written judgement chooses, None if that is not clear.

    In this order: the option that begins the first line or the last one (not clear if they begin with two different
    ones, as in "First, let me look. ..."); the only option that occurs in it at all.
    An option of one word must occur as
    it is written: a "no" in a sentence is no "No".

    >>> options = {"first": "the first response is better", "second": "the second response is better"}
    >>> chosen_option("The second response is better, as the first response is wrong.", options)
    'second'
    >>> chosen_option("Hm. The first names no colour.\\n**The second response is better.**", options)
    'second'
    >>> chosen_option("Either the first response is better or the second response is better", options)
    """
    lines = [line for line in (text or "").strip().splitlines() if line.strip()]
    if not lines:
        return None
    ends = (lines[0], lines[-1])
    named = [name for name, option in options.items() if any(_begins(option, line) for line in ends)]
    named = named or [name for name, option in options.items() if _occurs(option, text or "")]
    return named[0] if len(named) == 1 else None


def _begins(option: str, line: str) -> bool:
    return re.match(r"[\W_]*" + _pattern(option), line, re.IGNORECASE) is not None


def _occurs(option: str, text: str) -> bool:
    return re.search(_pattern(option), text, re.IGNORECASE if len(option.split()) > 1 else 0) is not None


def _pattern(option: str) -> str:
    return r"(?<![^\W_])" + r"\s+".join(re.escape(word) for word in option.split()) + r"(?![^\W_])"
