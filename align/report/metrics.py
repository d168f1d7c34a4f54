"""What each held-out number is called, which direction is good, and how it is written.

Names are those of evaluation.json. A name that is not known here is shown as it stands, without a judgement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from align.records import Evaluated, Evaluation
from align.statistics import is_refusal, repetition

_UNITS = {
    "response_tokens": "tokens",
    "kl": "nats",
    "kl_per_token": "nats",
    "image_log_ratio": "nats",
    "image_log_ratio_change": "nats per token",
}
MINUS, NO_BREAK = "\u2212", "\u00a0"


@dataclass(frozen=True)
class Metric:
    """A held-out number; `good` is 1 when more is better, -1 when less is, 0 when neither is.

    `of_response` is its value for one response, None where it does not apply (no reference answer); it is absent for
    numbers that are not means over responses. `against` says with whom a win rate compares: one half is no change.
    What is not `drawn` stands in evaluation.json and has no curve: parts of another number, and changes that are said
    in words.
    """

    name: str
    label: str
    explanation: str
    good: int = 0
    percent: bool = True
    of_response: Callable[[Evaluation, Evaluated], float | None] | None = None
    against: Literal["first", "before"] | None = None
    drawn: bool = True

    def show(self, value: float) -> str:
        """A value as text."""
        return percent(value) if self.percent else plain(value)

    def show_change(self, value: float) -> str:
        """A difference with its sign; shares in percentage points."""
        size = f"{abs(value) * 100:.1f}" if self.percent else f"{abs(value):.{self._digits(value)}f}"
        sign = "±" if not size.strip("0.,") else "+" if value > 0 else MINUS
        return sign + size

    def _digits(self, change: float) -> int:
        """Of a change that is no share; nats may be few."""
        return 1 if abs(change) >= 10 else 4 if self.name == "kl_per_token" else 3 if self.unit == "nats" else 2

    @property
    def unit(self) -> str:
        """Of a change: shares move by percentage points."""
        return "points" if self.percent else _UNITS.get(self.name, "")


def percent(value: float, digits: int = 1) -> str:
    """A share as percent, with a real minus sign."""
    return f"{value * 100:.{digits}f}{NO_BREAK}%".replace("-", MINUS)


def plain(value: float) -> str:
    """A number with about three significant digits.

    >>> plain(0.12345), plain(12.345), plain(1234.5), plain(0.00154)
    ('0.123', '12.3', '1,234', '0.0015')
    """
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.01 or not size else 4
    return f"{value:,.{digits}f}".replace("-", MINUS)


def _correct(line: Evaluation, response: Evaluated) -> float | None:
    return None if response.correct is None else float(response.correct)


def _hallucinates(line: Evaluation, response: Evaluated) -> float | None:
    return float(bool(response.absent_named)) if line.question.absent_objects else None


_METRICS = (
    Metric("sampled_accuracy", "Right when sampled",
           "sampled responses that match the reference answer", 1, True, _correct),
    Metric("greedy_accuracy", "Right when greedy",
           "greedy responses that match the reference answer", 1, True, _correct),
    Metric("win_rate_first", "Wins against the first policy",
           "comparisons by the critic, both orders, a tie is half", 1, against="first"),
    Metric("win_rate_initial", "Wins against the first policy",
           "comparisons by the critic, both orders, a tie is half", 1, against="first"),
    Metric("win_rate_parent", "Wins against the round before",
           "comparisons by the critic, both orders, a tie is half", 1, against="before"),
    Metric("win_rate_previous", "Wins against the round before",
           "comparisons by the critic, both orders, a tie is half", 1, against="before"),
    Metric("hallucination", "Names what is not there",
           "sampled responses that name something absent from the image", -1, True, _hallucinates),
    Metric("image_dependence", "Changes its answer with the picture",
           "greedy answers that change when the picture is blank, or another question's (the lower of the two); "
           "0: it does not look", 0),
    Metric("image_log_ratio", "What the picture adds to an answer",
           "log-probability of the answer with its picture minus with a blank, or another question's (the lower of the "
           "two), nats per token", 0, False),
    Metric("greedy_accuracy_blank", "Right without looking",
           "greedy responses to a blank picture that match the reference answer", 0),
    Metric("response_tokens", "Tokens per response",
           "how long sampled responses are", 0, False, lambda line, r: float(r.num_tokens)),
    Metric("truncated", "Cut off",
           "responses that ran into the token limit", -1, True, lambda line, r: float(r.finish_reason == "length")),
    Metric("repetition", "Repetition",
           "share of 4-grams that stood before in the same response", -1, True, lambda line, r: repetition(r.text)),
    Metric("refusals", "Refusals",
           "responses that decline to answer", -1, True, lambda line, r: float(is_refusal(r.text))),
    Metric("distinct_2", "Distinct bigrams", "different bigrams over all bigrams: variety of wording", 0),
    Metric("kl", "Distance from the first policy",
           "KL divergence on the round's own samples at their temperature, nats per response", 0, False),
    Metric("kl_per_token", "Distance per token", "the same divergence, nats per token", 0, False),
    *(Metric(name, label, "", 0, not name.startswith("image_log"), drawn=False) for name, label in {
        "image_dependence_blank": "Changes its answer with a blank picture",
        "image_dependence_shuffled": "Changes its answer with another picture",
        "image_log_ratio_blank": "What the picture adds over a blank one",
        "image_log_ratio_shuffled": "What the picture adds over another one",
        "greedy_accuracy_shuffled": "Right with another picture",
        "image_dependence_change": "Answers that change with the picture",
        "image_log_ratio_change": "What the picture adds to an answer",
    }.items()),
)  # fmt: skip
METRICS = {metric.name: metric for metric in _METRICS}

# The number that the verdict speaks of: the first of these that was measured.
HEADLINES = ("sampled_accuracy", "greedy_accuracy", "win_rate_first", "win_rate_initial", "hallucination")


def metric(name: str) -> Metric:
    """What is known of a metric; for an unknown name, the name itself."""
    known = METRICS.get(name)
    if known is not None:
        return known
    return Metric(
        name, name.replace("_", " "), "", 1 if name.startswith("win_rate") else 0, name.startswith("win_rate")
    )


def in_order(names: set[str]) -> list[str]:
    """Known numbers first, in the order of importance; the others by name."""
    return [name for name in METRICS if name in names] + sorted(names - METRICS.keys())
