"""The counts of a round's score and pairs stages in, the figures that say how far its critic can be relied on out.

Measured where the judgements are made (reward.reliability); here they are only read and put in rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from align.report.read import RoundData
from reward.reliability import MEASURES, PAIR_MEASURES, Figure, Measure, read_figures

Figures = Mapping[str, Figure]

# Told elsewhere: by the two figures that it is the lower of, and under Data.
NOT_SHOWN = ("image_dependence", "unscored_rate")


def critic_figures(data: RoundData) -> dict[str, Figure]:
    """Every figure of a round's critic, of the pairs that were made of its rewards and of people's ratings, by name."""
    judged = read_figures(data.counts("score").get("critic")) | read_figures(data.counts("pairs").get("figures"))
    return judged | data.people


def rows(by_round: Mapping[int, Figures]) -> list[tuple[Measure, list[tuple[int, Figure | None]]]]:
    """The measures that any round has, each with its figure by round."""
    return [
        (measure, [(number, figures.get(name)) for number, figures in by_round.items()])
        for name, measure in (MEASURES | PAIR_MEASURES).items()
        if name not in NOT_SHOWN and any(name in figures for figures in by_round.values())
    ]
