"""A rating of every response by itself: items in; ratings from 0 to 100, which are the rewards, out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from reward.critics.base import (
    BaseCritic,
    FileName,
    Item,
    Judgement,
    broadcast_to_duplicates,
    distinct_responses,
    why_unreadable,
)
from reward.critics.reading import read_log_probs
from reward.errors import RewardError
from reward.prompt import Prompt, load_prompt
from reward.written_rating import NO_RATING, Rating, Scale, read_rating


class PointwiseCritic(BaseCritic):
    """Rates each response on 0-100 with the image in view, without seeing the others.

    read: `log_probs` takes the mean over the probabilities of the ratings that the prompt offers, which tells apart
        responses that would be written the same number; `text` lets the critic write, reads the number and keeps
        what it wrote.
    min_option_mass: a rating is a failure if the offered ones together have less probability than this (`log_probs`).
    """

    judge_model: Any = Field(exclude=True)
    prompt: FileName = "pointwise"
    read: Literal["log_probs", "text"] = "log_probs"
    min_option_mass: float = Field(0.0, ge=0, le=1)
    max_new_tokens: int = Field(512, ge=1)
    _prompt: Prompt = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """What the settings lead to; raises RewardError where they cannot be used."""
        self._prompt = load_prompt(self.prompt, "pointwise")
        if self.read == "log_probs" and len(self._prompt.options) < 2:
            raise RewardError(
                f"prompt {self._prompt.name}: to read log_probs it must offer at least two ratings as options"
            )

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        responses = [distinct_responses(item) for item in items]
        prompts = [
            self._prompt.fill(item.images, item.question, [(item.responses[index],) for index in indices])
            for item, indices in zip(items, responses, strict=True)
        ]
        if self.read == "text":
            texts = self.judge_model.generate(prompts, max_new_tokens=self.max_new_tokens)
            return [self._from_texts(*one) for one in zip(items, responses, texts, strict=True)]
        tables = self.judge_model.log_probs(prompts)
        return [self._from_log_probs(*one) for one in zip(items, responses, tables, strict=True)]

    def _from_log_probs(self, item: Item, responses: list[int], table: Any) -> Judgement:
        ratings, unscored, spreads, masses = {}, {}, {}, []
        for index, row in zip(responses, table, strict=True):
            reading = read_log_probs(row, self._prompt.options, min_mass=self.min_option_mass)
            if reading.mass is not None:
                masses.append(reading.mass)
            if reading.probabilities is None:
                unscored[index] = reading.reason
                continue
            ratings[index], spreads[str(index)] = expectation(reading.probabilities, self._prompt.scale)
        evidence: dict[str, Any] = {"rating_sd": spreads}
        if masses:
            evidence["mean_option_mass"] = sum(masses) / len(masses)
        return _judgement(item, ratings, unscored, evidence)

    def _from_texts(self, item: Item, responses: list[int], texts: Sequence[str | None]) -> Judgement:
        ratings, unscored = {}, {}
        for index, text in zip(responses, texts, strict=True):
            rating = Rating(None, NO_RATING) if text is None else read_rating(text, self._prompt.scale)
            if rating.value is None:
                unscored[index] = why_unreadable(text) if rating.reason == NO_RATING else rating.reason
            else:
                ratings[index] = rating.value
        rationales = {str(index): text for index, text in zip(responses, texts, strict=True) if text is not None}
        return _judgement(item, ratings, unscored, {"rationales": rationales})


def _judgement(item: Item, ratings: dict[int, float], unscored: dict[int, str], evidence: dict[str, Any]) -> Judgement:
    rewards, reasons = broadcast_to_duplicates(item, ratings, unscored)
    return Judgement(
        id=item.id, rewards=rewards, ratings=rewards if ratings else [], unscored=reasons, evidence=evidence
    )


def expectation(probabilities: dict[str, float], scale: Scale) -> tuple[float, float]:
    """Mean and standard deviation, on 0-100, of a rating whose possible values are named by the options.

    >>> expectation({"1": 0.5, "5": 0.5}, (1, 5))
    (50.0, 50.0)
    """
    values = {name: to_hundred(float(name), scale) for name in probabilities}
    mean = sum(share * values[name] for name, share in probabilities.items())
    variance = sum(share * (values[name] - mean) ** 2 for name, share in probabilities.items())
    return mean, math.sqrt(variance)


def to_hundred(value: float, scale: Scale) -> float:
    """A value on `scale` as one on 0-100."""
    lowest, highest = scale
    return 100.0 * (value - lowest) / (highest - lowest)
