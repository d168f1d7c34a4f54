"""A round's samples, scores and pairs in, figures out that say how far its critic can be trusted.

What the manifest counted is taken as it is. Two things are measured here, because they need all three files: whether
reward follows length, and whether the critic agrees with reference answers where questions have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from align.records import Question
from align.report.read import JSON, RoundData, iter_objects, number
from align.statistics import Interval, wilson
from reward.critics.verifier import grade
from reward.errors import RewardError

# In the manifest besides, but shown here as the report measures it, or as the two figures that it is the lower of.
REPEATED = ("length_correlation", "length_correlation_given_reference", "image_dependence", "unscored_rate")


@dataclass(frozen=True)
class Trust:
    """`figures` by name; `agreement` is over the pairs that set a right response against a wrong one."""

    figures: dict[str, float] = field(default_factory=dict)
    agreement: Interval | None = None


def measure_trust(data: RoundData, problems: list[str]) -> Trust:
    figures = _of_manifest(data)
    samples = {str(line.get("id")): line for line in iter_objects(data.folder.samples, problems)}
    correlation = _length_correlation(samples, iter_objects(data.folder.scores, problems))
    if correlation is not None:
        figures.setdefault("reward_length_correlation", correlation)
    right, wrong, longer, shorter = _compare_pairs(samples, iter_objects(data.folder.pairs, problems))
    if longer + shorter:
        figures["chosen_longer"] = longer / (longer + shorter)
    if right + wrong:
        figures["agreement"] = right / (right + wrong)
        return Trust(figures, wilson(right, right + wrong))
    return Trust(figures)


def grade_response(text: str, question: Question) -> bool | None:
    """Whether a response agrees with the question's reference answer; None where there is none to compare with."""
    if question.answer is None:
        return None
    try:
        found = grade(text, question.answer, question=question.question, kind=question.answer_kind)
    except RewardError:
        return None
    return None if found is None else found.correct


def _of_manifest(data: RoundData) -> dict[str, float]:
    figures = data.judged.get("critic")
    if not isinstance(figures, dict):
        return {}
    return {str(key): x for key, value in figures.items() if key not in REPEATED and (x := number(value)) is not None}


def _length_correlation(samples: dict[str, JSON], scores: Iterable[JSON]) -> float | None:
    """Pearson's correlation of reward and number of tokens among comparable responses.

    Comparable are responses to one question, and where its answer is known only those that are equally right: a critic
    that knows wrong answers to be longer does not love brevity. Each group's own means are taken off.
    """
    sums = [0.0, 0.0, 0.0]
    for line in scores:
        for points in _comparable(samples.get(str(line.get("id")), {}), line.get("rewards") or []):
            mean_reward = sum(reward for reward, _ in points) / len(points)
            mean_tokens = sum(tokens for _, tokens in points) / len(points)
            for reward, tokens in points:
                x, y = reward - mean_reward, tokens - mean_tokens
                sums = [sums[0] + x * y, sums[1] + x * x, sums[2] + y * y]
    product, squares = sums[0], sums[1] * sums[2]
    return product / math.sqrt(squares) if squares > 1e-12 else None


def _comparable(line: JSON, rewards: list[Any]) -> Iterable[list[tuple[float, float]]]:
    """(reward, tokens) of a question's responses, in groups of equal correctness."""
    question = _question(line)
    groups: dict[bool | None, list[tuple[float, float]]] = {}
    for reward, response in zip(map(number, rewards), line.get("responses") or [], strict=False):
        tokens = number(response.get("num_tokens")) if isinstance(response, dict) else None
        if reward is not None and tokens is not None:
            correct = grade_response(str(response.get("text")), question) if question else None
            groups.setdefault(correct, []).append((reward, tokens))
    return groups.values()


def _question(line: JSON) -> Question | None:
    try:
        return Question.model_validate(line.get("question"))
    except ValueError:
        return None


def _compare_pairs(samples: dict[str, JSON], pairs: Iterable[JSON]) -> tuple[int, int, int, int]:
    """How many pairs chose the right response over a wrong one, the wrong over a right; the longer, the shorter."""
    right = wrong = longer = shorter = 0
    for pair in pairs:
        sides = _sides(samples.get(str(pair.get("question_id"))), pair.get("responses"))
        if sides is None:
            continue
        question, chosen, rejected = sides
        longer += chosen["num_tokens"] > rejected["num_tokens"]
        shorter += chosen["num_tokens"] < rejected["num_tokens"]
        grades = grade_response(chosen["text"], question), grade_response(rejected["text"], question)
        right += grades == (True, False)
        wrong += grades == (False, True)
    return right, wrong, longer, shorter


def _sides(line: JSON | None, indices: Any) -> tuple[Question, JSON, JSON] | None:
    """The question of a pair with its chosen and rejected response; None where the samples do not hold them."""
    try:
        responses = line["responses"]  # type: ignore[index]
        sides = responses[indices["chosen"]], responses[indices["rejected"]]
        assert all(isinstance(side["text"], str) and isinstance(side["num_tokens"], int) for side in sides)
    except (TypeError, KeyError, IndexError, ValueError, AssertionError):
        return None
    question = _question(line) if line else None
    return None if question is None else (question, *sides)


@dataclass(frozen=True)
class Figure:
    """How a figure is named and when it looks wrong."""

    key: str
    label: str
    explanation: str
    percent: bool = True
    doubtful: Callable[[float], bool] = lambda value: False


LEAST_CONSISTENCY, MOST_POSITION_BIAS, MOST_LENGTH_CORRELATION, LEAST_AGREEMENT = 0.7, 0.1, 0.3, 0.65
LEAST_IMAGE_DEPENDENCE, LEAST_OPTION_MASS = 0.1, 0.5

FIGURES = (
    Figure("consistency", "Same verdict in both orders", "share of pairs judged alike when the two responses change places", True, lambda x: x < LEAST_CONSISTENCY),
    Figure("position_bias", "Position bias", "rate of preferring the first place minus that of the second; 0 is none", False, lambda x: abs(x) > MOST_POSITION_BIAS),
    Figure("tie_rate", "Ties", "share of verdicts without a winner"),
    Figure("agreement", "Agrees with reference answers", "of the pairs that set a right response against a wrong one, those that chose the right one", True, lambda x: x < LEAST_AGREEMENT),
    Figure("reward_length_correlation", "Reward follows length", "correlation of reward and tokens among the responses to a question, equally right ones where the answer is known; 0 is none", False, lambda x: abs(x) > MOST_LENGTH_CORRELATION),
    Figure("image_dependence_blank", "Changes its mind on a blank image", "preferences that change when the image is blank, on a few questions; 0: it does not look", True, lambda x: x < LEAST_IMAGE_DEPENDENCE),
    Figure("image_dependence_shuffled", "Changes its mind on another image", "preferences that change when the image is another question's, on a few questions", True, lambda x: x < LEAST_IMAGE_DEPENDENCE),
    Figure("agreement_with_reference", "Orders right above wrong", "of all right-wrong pairs of responses, those it orders rightly, a tie being half", True, lambda x: x < LEAST_AGREEMENT),
    Figure("agreement_between_critics", "The panel agrees", "pairs that two of its critics order the same way, lowest of all couples"),
    Figure("mean_option_mass", "Answers in the words offered", "probability of the offered answers together", True, lambda x: x < LEAST_OPTION_MASS),
    Figure("chosen_longer", "Chosen is the longer one", "of the pairs of unequal length, those whose chosen response has more tokens"),
)  # fmt: skip


def rows(trust: dict[int, Trust]) -> list[tuple[Figure, list[tuple[int, float | None]]]]:
    """The figures that any round has, each with its value by round; unknown names come last as they stand."""
    names = {name for item in trust.values() for name in item.figures}
    known = [figure for figure in FIGURES if figure.key in names]
    rest = sorted(names - {figure.key for figure in FIGURES})
    known += [Figure(name, name.replace("_", " "), "", percent=False) for name in rest]
    return [(figure, [(number, item.figures.get(figure.key)) for number, item in trust.items()]) for figure in known]
