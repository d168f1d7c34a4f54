"""What goes into a critic and what comes out of it: `Item` in; `Judgement`, with its `Verdict`s, out.

A `Judgement` is also a line of scores.jsonl, and is checked whenever it is read: people may edit that file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PlainSerializer, model_validator

# Kept in full in memory, written down with six decimals.
Probability = Annotated[float, Field(ge=0, le=1), PlainSerializer(lambda value: round(value, 6))]


@dataclass(frozen=True)
class Item:
    """One question with its images and the responses to be judged.

    `images` are opaque handles (paths, pictures, keys): critics hand them through and never open them. `answer` is
    the reference answer, where there is one, and `answer_kind` how answers are compared (None: found by itself). `key`
    stands for these very responses, as `Judgement.judged` does; None where nobody compares.
    """

    id: str
    question: str
    images: tuple[Any, ...]
    responses: tuple[str, ...]
    answer: str | None = None
    answer_kind: str | None = None
    key: str | None = None


class Verdict(BaseModel):
    """One comparison in one order: response `first` was shown before response `second`.

    The probabilities are those of the offered answers, normalised to 1 among them; `p_tie` is None where no tie was
    offered. `winner` is `first`, `second`, or None for a tie. A comparison that failed makes no verdict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int = Field(ge=0)
    second: int = Field(ge=0)
    p_first: Probability
    p_second: Probability
    p_tie: Probability | None = None
    winner: int | None = None
    rationale: str | None = None

    @model_validator(mode="after")
    def _is_between_two(self) -> Verdict:
        if self.first == self.second or self.winner not in (None, self.first, self.second):
            raise ValueError(f"a verdict between {self.first} and {self.second} with the winner {self.winner}")
        return self


class Judgement(BaseModel):
    """What a critic says about the item with this id; `rewards` and `ratings` have one place per response.

    A response either has a reward or stands in `unscored` (index -> reason); never both, never neither. `ratings` are
    pointwise numbers on 0-100, empty where the critic makes none. `evidence` is plain JSON data, so that a judgement
    that was written down and read again is worth as much. `judged`, a hash of the item, says that it is of these very
    responses; None where nobody compares.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1)
    rewards: list[FiniteFloat | None]
    verdicts: list[Verdict] = Field(default_factory=list)
    ratings: list[FiniteFloat | None] = Field(default_factory=list)
    unscored: dict[int, str] = Field(default_factory=dict)
    evidence: dict[str, Any] = Field(default_factory=dict)
    judged: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Judgement:
        num = len(self.rewards)
        missing = {index for index, reward in enumerate(self.rewards) if reward is None}
        if missing != set(self.unscored):
            raise ValueError(f"no reward for {sorted(missing)}, but unscored are {sorted(self.unscored)}")
        if len(self.ratings) not in (0, num):
            raise ValueError(f"{len(self.ratings)} ratings for {num} responses")
        if any(max(verdict.first, verdict.second) >= num for verdict in self.verdicts):
            raise ValueError(f"a verdict on a response beyond the {num} that have a place in rewards")
        return self

    @property
    def decided(self) -> bool:
        """Whether any response has a reward."""
        return any(reward is not None for reward in self.rewards)


def all_unscored(item: Item, reason: str, evidence: dict[str, Any] | None = None) -> Judgement:
    """The judgement of an item of which no response could be scored."""
    num = len(item.responses)
    return Judgement(
        id=item.id, rewards=[None] * num, unscored=dict.fromkeys(range(num), reason), evidence=evidence or {}
    )
