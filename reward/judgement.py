"""The records that go into a critic and come out of it: item in; verdicts, ratings and rewards out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One question with its images and the responses to be judged.

    `images` are opaque handles (paths, pictures, keys): critics hand them through and never open them. `answer` is
    the reference answer, where there is one, and `answer_kind` how answers are compared (None: found by itself).
    """

    id: str
    question: str
    images: tuple[Any, ...]
    responses: tuple[str, ...]
    answer: str | None = None
    answer_kind: str | None = None


@dataclass(frozen=True)
class Verdict:
    """One comparison in one order: response `first` was shown before response `second`.

    The probabilities are those of the offered answers, normalised to 1 among them; `p_tie` is None where no tie was
    offered. `winner` is `first`, `second`, or None for a tie. A comparison that failed makes no verdict.
    """

    first: int
    second: int
    p_first: float
    p_second: float
    p_tie: float | None = None
    winner: int | None = None
    rationale: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What a critic says about one item; every list has one place per response.

    A response is either in `unscored` (index -> reason, its reward is None) or has a reward; never both, never
    neither. `ratings` are pointwise numbers on 0-100 where the critic makes such. `evidence` is plain JSON data, so
    that a judgement that was written down and read again is worth as much.
    """

    rewards: list[float | None]
    verdicts: list[Verdict] = field(default_factory=list)
    ratings: list[float | None] = field(default_factory=list)
    unscored: dict[int, str] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = {index for index, reward in enumerate(self.rewards) if reward is None}
        assert missing == set(self.unscored), f"unscored {sorted(self.unscored)}, but no reward for {sorted(missing)}"
        if not self.ratings:
            object.__setattr__(self, "ratings", [None] * len(self.rewards))
