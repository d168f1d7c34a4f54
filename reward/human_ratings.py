"""What people said of pairs of responses in; agreement with a critic and among each other out.

A file of ratings holds one comparison per line:

    {"question_id": "q1", "responses": [0, 2], "preferred": 2, "annotator": "anna"}

`preferred` is one of the two response indices, null for a tie. `texts`, the two responses as they were shown, may stand
beside it; they are compared with the samples, so that labels of other samples are not taken for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward.intervals import wilson_bounds
from reward.judgement import Judgement, Verdict
from reward.lines import read_lines
from reward.ranking import sign

# Which of two responses is preferred, by their order in the samples: 1 the earlier, -1 the later, 0 neither.
Label = int
# A question and two of its responses, the earlier first.
Compared = tuple[str, int, int]


class HumanRating(BaseModel):
    """One person's preference between two responses to a question."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question_id: str = Field(min_length=1)
    responses: tuple[int, int]
    preferred: int | None
    annotator: str = Field(min_length=1)
    texts: tuple[str, str] | None = None

    @model_validator(mode="after")
    def _is_between_two(self) -> HumanRating:
        if self.responses[0] == self.responses[1] or min(self.responses) < 0:
            raise ValueError(f"responses must be two different indices from 0 on, found {list(self.responses)}")
        if self.preferred not in (None, *self.responses):
            raise ValueError(f"preferred is {self.preferred}, which is none of {list(self.responses)}")
        return self

    @property
    def compared(self) -> Compared:
        """Question and responses that were compared, the lower index first."""
        return (self.question_id, min(self.responses), max(self.responses))

    @property
    def label(self) -> Label:
        """1: the lower index is preferred, -1: the other, 0: neither."""
        return 0 if self.preferred is None else 1 if self.preferred == min(self.responses) else -1

    def verdict(self) -> Verdict:
        """The same as a critic would have written it; a tie is half a preference each."""
        first, second = self.responses
        p_first = 0.5 if self.preferred is None else float(self.preferred == first)
        return Verdict(first=first, second=second, p_first=p_first, p_second=1 - p_first, winner=self.preferred)


def read_ratings(path: Path) -> list[HumanRating]:
    """The ratings of a file; of one person's several about the same two responses the last one counts.

    Raises:
        RewardError: the file cannot be read, or a line is not a rating (with its place).
    """
    latest = {(rating.compared, rating.annotator): rating for _, rating in read_lines(path, HumanRating)}
    return list(latest.values())


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa of two raters: agreement beyond chance, 1 at most, 0 by chance; `agreed` of `count` were the same.

    The interval is Wilson's of the observed agreement with the chance agreement held fixed, as in Cohen's own standard
    error; so it is not empty where everything or nothing agreed. `kappa` is None where both always say the same one
    thing: chance agrees fully, too.
    """

    kappa: float | None
    low: float | None
    high: float | None
    agreed: int
    count: int


def cohens_kappa(labels: Sequence[tuple[Label, Label]]) -> Kappa | None:
    """Agreement of two raters on the same comparisons (Cohen 1960); None without any.

    >>> cohens_kappa([(1, 1), (1, 1), (-1, -1), (-1, 1)]).kappa  # observed 3/4, by chance 1/2
    0.5
    """
    if not labels:
        return None
    count, agreed = len(labels), sum(one == other for one, other in labels)
    kinds = {label for pair in labels for label in pair}
    chance = sum(
        sum(one == kind for one, _ in labels) * sum(other == kind for _, other in labels) for kind in kinds
    ) / (count * count)
    if chance >= 1:
        return Kappa(None, None, None, agreed, count)
    low, high = wilson_bounds(agreed / count, count)
    kappa, low, high = ((share - chance) / (1 - chance) for share in (agreed / count, low, high))
    return Kappa(kappa, low, high, agreed, count)


def agreement_with_people(judgements: Iterable[Judgement], ratings: Iterable[HumanRating]) -> Kappa | None:
    """A critic's rewards against every rating of responses that it scored, joined by question."""
    return cohens_kappa(labels_with_critic(judgements, ratings))


def labels_with_critic(judgements: Iterable[Judgement], ratings: Iterable[HumanRating]) -> list[tuple[Label, Label]]:
    """(the critic's label, the person's) of every rating of responses that the critic scored."""
    rewards = {judgement.id: judgement.rewards for judgement in judgements}
    labels = []
    for rating in ratings:
        found = rewards.get(rating.question_id)
        if found is not None and max(rating.responses) < len(found):
            critic = sign(found, rating.compared[1:])
            if critic is not None:
                labels.append((critic, rating.label))
    return labels


def agreement_of_people(ratings: Iterable[HumanRating]) -> dict[str, Kappa]:
    """Every two people against each other over the comparisons that both made, by "one / other"."""
    found = {names: cohens_kappa(labels) for names, labels in labels_of_people(ratings).items()}
    return {names: kappa for names, kappa in found.items() if kappa is not None}


def labels_of_people(ratings: Iterable[HumanRating]) -> dict[str, list[tuple[Label, Label]]]:
    """The labels of every two people for the comparisons that both made, by "one / other"."""
    by_person: dict[str, dict[Compared, Label]] = {}
    for rating in ratings:
        by_person.setdefault(rating.annotator, {})[rating.compared] = rating.label
    return {
        f"{one} / {other}": _both(by_person[one], by_person[other]) for one, other in combinations(sorted(by_person), 2)
    }


def _both(one: Mapping[Compared, Label], other: Mapping[Compared, Label]) -> list[tuple[Label, Label]]:
    return [(label, other[compared]) for compared, label in one.items() if compared in other]
