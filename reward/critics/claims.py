"""Facts checked one by one (RLAIF-V's way): items in; minus the number of wrong claims of each response out.

A response is split into claims, by its sentences or by asking a model; every claim is put to the critic with the
image as a yes/no question. A claim that several responses make is asked once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from reward.critics.base import (
    NO_ANSWER,
    BaseCritic,
    FileName,
    Item,
    Judgement,
    broadcast_to_duplicates,
    distinct_responses,
)
from reward.critics.reading import Reading, read_log_probs, read_text
from reward.errors import RewardError
from reward.prompt import Prompt, load_prompt

NO_CLAIMS = "the response makes no claim that can be checked"


class ClaimsCritic(BaseCritic):
    """Rewards a response by how many of its claims are wrong.

    split: `sentences` cuts at the ends of sentences; `ask` lets the model list the facts (with `split_prompt`).
    score: `wrong` is minus the number of wrong claims (RLAIF-V; longer answers have more to lose), `share` minus
        their share, `soft` minus the sum of their probabilities of being wrong.
    read: `log_probs` or `text`, for the yes/no questions.
    """

    judge_model: Any = Field(exclude=True)
    prompt: FileName = "claims"
    split: Literal["sentences", "ask"] = "sentences"
    split_prompt: FileName = "claims_split"
    score: Literal["wrong", "share", "soft"] = "wrong"
    read: Literal["log_probs", "text"] = "log_probs"
    min_option_mass: float = Field(0.0, ge=0, le=1)
    max_new_tokens: int = Field(512, ge=1)
    _prompt: Prompt = PrivateAttr()
    _split_prompt: Prompt | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        """What the settings lead to; raises RewardError where they cannot be used."""
        self._prompt = load_prompt(self.prompt, "claims")
        if self.split == "ask":
            self._split_prompt = load_prompt(self.split_prompt, "split")
        if not self._prompt.options:
            raise RewardError(f"prompt {self._prompt.name}: a claims prompt needs options correct and wrong")

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        responses = [distinct_responses(item) for item in items]
        claims, unscored = self._claims(items, responses)
        asked = [sorted({claim for index in by_index for claim in by_index[index]}) for by_index in claims]
        readings = self._check(items, asked)
        return [self._judgement(*one) for one in zip(items, claims, unscored, readings, strict=True)]

    def _claims(
        self, items: Sequence[Item], responses: list[list[int]]
    ) -> tuple[list[dict[int, list[str]]], list[dict[int, str]]]:
        """Per item the claims by response, and the responses without any with the reason."""
        if self._split_prompt is None:
            texts: list[list[str | None]] = [
                ["\n".join(sentences(item.responses[index])) for index in indices]
                for item, indices in zip(items, responses, strict=True)
            ]
        else:
            prompt = self._split_prompt
            prompts = [
                # Splitting is a matter of text: without the image it cannot slip into correcting the answer.
                prompt.fill((), item.question, [(item.responses[index],) for index in indices])
                for item, indices in zip(items, responses, strict=True)
            ]
            texts = self.judge_model.generate(prompts, max_new_tokens=self.max_new_tokens)
        claims: list[dict[int, list[str]]] = [{} for _ in items]
        unscored: list[dict[int, str]] = [{} for _ in items]
        for row, (indices, found) in enumerate(zip(responses, texts, strict=True)):
            for index, text in zip(indices, found, strict=True):
                listed = listed_claims(text) if text else []
                if listed:
                    claims[row][index] = listed
                else:
                    unscored[row][index] = NO_CLAIMS if text is not None else NO_ANSWER
        return claims, unscored

    def _check(self, items: Sequence[Item], asked: list[list[str]]) -> list[dict[str, Reading]]:
        """Per item what the critic says to each claim."""
        places = [row for row, claims in enumerate(asked) if claims]
        prompts = [
            self._prompt.fill(items[row].images, items[row].question, [(claim,) for claim in asked[row]])
            for row in places
        ]
        readings: list[dict[str, Reading]] = [{} for _ in items]
        if self.read == "text":
            answers: Sequence[Any] = (
                self.judge_model.generate(prompts, max_new_tokens=self.max_new_tokens) if prompts else []
            )
        else:
            answers = self.judge_model.log_probs(prompts) if prompts else []
        for row, rows in zip(places, answers, strict=True):
            readings[row] = {claim: self._read(answer) for claim, answer in zip(asked[row], rows, strict=True)}
        return readings

    def _read(self, answer: Any) -> Reading:
        if self.read == "text":
            return read_text(answer, self._prompt.options)
        return read_log_probs(answer, self._prompt.options, min_mass=self.min_option_mass)

    def _judgement(
        self, item: Item, claims: dict[int, list[str]], unscored: dict[int, str], readings: dict[str, Reading]
    ) -> Judgement:
        values: dict[int, float] = {}
        evidence: dict[str, Any] = {"claims": {}}
        for index, made in claims.items():
            evidence["claims"][str(index)] = [[claim, _p_correct(readings[claim])] for claim in made]
            failed = [readings[claim].reason for claim in made if readings[claim].probabilities is None]
            if failed:
                unscored[index] = failed[0]
            else:
                values[index] = self._value([_p_wrong(readings[claim]) for claim in made])
        masses = [reading.mass for reading in readings.values() if reading.mass is not None]
        if masses:
            evidence["mean_option_mass"] = sum(masses) / len(masses)
        rewards, reasons = broadcast_to_duplicates(item, values, unscored)
        return Judgement(id=item.id, rewards=rewards, unscored=reasons, evidence=evidence)

    def _value(self, p_wrong: list[float]) -> float:
        if self.score == "soft":
            return -sum(p_wrong)
        num_wrong = sum(p > 0.5 for p in p_wrong)
        return -num_wrong / len(p_wrong) if self.score == "share" else -float(num_wrong)


def _p_correct(reading: Reading) -> float | None:
    return None if reading.probabilities is None else reading.probabilities["correct"]


def _p_wrong(reading: Reading) -> float:
    assert reading.probabilities is not None
    return reading.probabilities["wrong"]


_END = re.compile(r"(?<=[.!?。！？；])[\"'”’)\]]*(?:\s+|(?<=[。！？；]))|\n+")
_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|vs|fig|approx|e\.g|i\.e|etc|[a-z])\.$", re.IGNORECASE)
# Neither "2.5 litres" nor "-5 degrees" begins with a bullet.
_BULLET = re.compile(r"^\s*(?:[-*•](?![\d*])|\(?\d+[.)、](?!\d))\s*")
_LONGEST_ABBREVIATION = len("approx.")


def sentences(text: str) -> list[str]:
    """Cut a text at the ends of sentences and lines, in English and Chinese.

    >>> sentences("Mr. Hall holds 2.5 kg. Is it red? Yes!\\n- a bag")
    ['Mr. Hall holds 2.5 kg.', 'Is it red?', 'Yes!', 'a bag']
    >>> sentences("图中有一只猫。它是黑色的！")
    ['图中有一只猫。', '它是黑色的！']
    """
    parts: list[str] = []
    start = 0
    for match in _END.finditer(text):
        if "\n" not in match.group() and _ABBREVIATION.search(_before(text, start, match)):
            continue
        parts.append(text[start : match.end()])
        start = match.end()
    parts.append(text[start:])
    cleaned = (_BULLET.sub("", part).strip() for part in parts)
    return [part for part in cleaned if re.search(r"\w", part)]


def _before(text: str, start: int, end: re.Match[str]) -> str:
    """As much of the piece as an abbreviation at its end needs, so that a text full of points is read once."""
    return text[max(start, end.start() - _LONGEST_ABBREVIATION - 1) : end.end()].strip()


def listed_claims(text: str) -> list[str]:
    """The claims that a model listed, one per line, without bullets and repeats; none if it wrote NONE.

    >>> listed_claims("1. A cat sits.\\n2. It is black.\\n- A cat sits.")
    ['A cat sits.', 'It is black.']
    >>> listed_claims("NONE.")
    []
    """
    lines = [_BULLET.sub("", line).strip() for line in text.splitlines()]
    kept = [line for line in lines if re.search(r"\w", line) and line.strip(".*").upper() != "NONE"]
    return list(dict.fromkeys(kept))
