"""People as the critic: their ratings of pairs of responses in (a file), rewards out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from reward.critics.base import BaseCritic, FileName, Item, Judgement
from reward.human_ratings import HumanRating, read_ratings
from reward.judgement import all_unscored
from reward.ranking import MIN_RIDGE, bradley_terry, win_minus_loss

NOT_RATED = "nobody rated it"
OTHER_RESPONSES = "the ratings are of other responses"


class RatingsCritic(BaseCritic):
    """Rewards what people preferred; every rating counts once, whoever gave it.

    file: JSON Lines of `{"question_id", "responses": [i, j], "preferred": i, j or null, "annotator"}`.
    reward: `win_minus_loss` over the ratings, or `bradley_terry` (with `ridge`), which also orders responses that were
        compared with different others.
    """

    file: FileName
    reward: Literal["win_minus_loss", "bradley_terry"] = "win_minus_loss"
    ridge: float = Field(0.1, ge=MIN_RIDGE, allow_inf_nan=False)
    _by_question: dict[str, list[HumanRating]] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        """What the settings lead to; raises RewardError where they cannot be used."""
        for rating in read_ratings(Path(self.file)):
            self._by_question.setdefault(rating.question_id, []).append(rating)

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        return [self._judge_one(item) for item in items]

    def _judge_one(self, item: Item) -> Judgement:
        ratings = self._by_question.get(item.id, [])
        if any(not _is_about(rating, item) for rating in ratings):
            return all_unscored(item, OTHER_RESPONSES)
        num = len(item.responses)
        verdicts = [rating.verdict() for rating in ratings]
        rated = {index for rating in ratings for index in rating.responses}
        if self.reward == "bradley_terry":
            values = bradley_terry(num, verdicts, ridge=self.ridge).strengths
        else:
            values = win_minus_loss(num, verdicts)
        rewards = [round(values[index], 9) if index in rated else None for index in range(num)]
        return Judgement(
            id=item.id,
            rewards=rewards,
            verdicts=verdicts,
            unscored={index: NOT_RATED for index in range(num) if index not in rated},
            evidence={"annotators": sorted({rating.annotator for rating in ratings})} if ratings else {},
        )


def _is_about(rating: HumanRating, item: Item) -> bool:
    if max(rating.responses) >= len(item.responses):
        return False
    shown = tuple(item.responses[index].strip() for index in rating.responses)
    return rating.texts is None or tuple(text.strip() for text in rating.texts) == shown
