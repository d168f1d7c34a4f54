"""A critic's figures in, what a person should know about them, in words, out; the limits are those of MEASURES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reward.reliability import MEASURES, PAIR_MEASURES, Figure, Measure


@dataclass(frozen=True)
class Warned:
    """A figure beyond its limit: what is wrong, what was found, and what it means in general."""

    title: str
    finding: str
    advice: str
    serious: bool


def critic_warnings(figures: Mapping[str, Figure]) -> list[Warned]:
    """One warning per figure that lies beyond its limit, on enough comparisons to say so.

    >>> found = critic_warnings({"position_bias": Figure(value=0.9, count=40, questions=5)})
    >>> [(warned.title, warned.finding) for warned in found]
    [('The critic prefers the response shown first', 'Position bias 0.90 (40 pairs judged in both orders).')]
    >>> critic_warnings({"position_bias": Figure(value=0.9, count=4, questions=1)})
    []
    """
    found = []
    for name, measure in (MEASURES | PAIR_MEASURES).items():
        figure = figures.get(name)
        # Said by another one: by the correlation among equals, by the lower of the two controls.
        covered = name == "length_correlation" and "length_correlation_given_reference" in figures
        covered = covered or name in ("image_dependence_blank", "image_dependence_shuffled")
        if figure is not None and not covered and measure.is_beyond(figure):
            title, finding, advice = _words(name, measure, figure)
            found.append(Warned(title, f"{finding} ({_size(measure, figure)}).", advice, measure.is_serious(figure)))
    return found


def _size(measure: Measure, figure: Figure) -> str:
    count = f"{figure.count:,} {measure.counted}"
    if figure.low is None or figure.high is None:
        return count
    return f"95 % interval {measure.show(figure.low)} to {measure.show(figure.high)}, {count}"


def _words(name: str, measure: Measure, figure: Figure) -> tuple[str, str, str]:
    """Title, finding and advice."""
    value, limit = measure.show(figure.value), measure.show(measure.limit or 0.0)
    if name == "consistency":
        return (
            "The critic contradicts itself",
            f"It says the same in both orders for {value} of pairs",
            f"Below {limit} much of what it says is noise.",
        )
    if name == "position_bias":
        return (
            f"The critic prefers the response shown {'first' if figure.value > 0 else 'second'}",
            f"Position bias {value}",
            "0 is none, 1 always the first. Judging both orders cancels it, at the price of ties.",
        )
    if name == "mean_option_mass":
        return (
            "The critic wants to say something else",
            f"The answers it is offered have {value} of its probability",
            "Its prompt may not fit it: see critic.prompt.",
        )
    if name.startswith("length_correlation"):
        among = "equally right responses" if name.endswith("reference") else "responses to a question"
        return (
            f"The critic likes {'longer' if figure.value > 0 else 'shorter'} responses",
            f"Among {among}, reward and length correlate by {value}",
            f"Beyond {limit} length may be what is learned.",
        )
    if name == "agreement_with_people":
        return (
            "People do not agree with the critic",
            f"Beyond chance its preferences agree with theirs by {value} (Cohen's kappa)",
            f"Below {limit} what the pairs teach is not what people prefer.",
        )
    if name == "agreement_between_people":
        return (
            "People do not agree with each other",
            f"Beyond chance they agree by {value} (Cohen's kappa)",
            f"Below {limit} the responses hardly differ, or it is not clear what is asked of people.",
        )
    if name == "image_dependence":
        return (
            "The critic hardly looks at the image",
            f"With another image in its place, {value} of its preferences change",
            "A critic that knows nothing without the image changes about half of them.",
        )
    seen = "It orders" if name == "agreement_with_reference" else "The pairs chose"
    return (
        "The critic does not know the right answers",
        f"{seen} the right response above a wrong one in {value} of cases",
        f"Random preferences give 50 %; below {limit} the pairs teach little that is true.",
    )
