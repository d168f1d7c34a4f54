"""Comparison by a critic model: items in; verdicts on pairs of responses, in both orders, and rewards out.

All ordered pairs of an item are branches of one prompt, so an engine encodes image and question once. With a tournament
there is one prompt per item and round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from reward.critics.base import (
    NOTHING_TO_COMPARE,
    BaseCritic,
    FileName,
    Item,
    Judgement,
    Verdict,
    broadcast_to_duplicates,
    distinct_responses,
)
from reward.critics.random import shuffled
from reward.critics.reading import read_log_probs, read_text
from reward.critics.tournament import Match, next_matches
from reward.errors import RewardError
from reward.judge_model import BranchedPrompt
from reward.prompt import Prompt, load_prompt
from reward.ranking import MIN_RIDGE, bradley_terry, score_of, win_minus_loss, without_failures

Order = tuple[int, int]


@dataclass
class _Tournament:
    """An item's comparisons so far; keys are (shown first, shown second)."""

    item: Item
    responses: list[int]
    order: list[int]
    verdicts: dict[Order, Verdict] = field(default_factory=dict)
    failed: dict[Order, str] = field(default_factory=dict)
    masses: list[float] = field(default_factory=list)

    def results(self, *, soft: bool) -> dict[Match, float | None]:
        """Per match played what the smaller index gained in both orders, None if either failed."""
        results: dict[Match, float | None] = {}
        for one, other in {(min(pair), max(pair)) for pair in (*self.verdicts, *self.failed)}:
            forth, back = self.verdicts.get((one, other)), self.verdicts.get((other, one))
            complete = forth is not None and back is not None
            results[one, other] = score_of(forth, soft=soft) - score_of(back, soft=soft) if complete else None  # type: ignore[arg-type]
        return results


class PairwiseCritic(BaseCritic):
    """Compares responses two by two, with the image in view (LLaVA-Critic, arXiv 2410.02712).

    read: `log_probs` takes the verdict from the probabilities of the prompt's options; `text` lets the critic write,
        reads the option it names and keeps what it wrote as rationale.
    soft: a verdict counts p_first - p_second instead of 1, 0 or -1.
    tie_threshold: a verdict with |p_first - p_second| at or below it is a tie.
    use_tie_option: offer the prompt's `tie` option if it has one.
    min_option_mass: a verdict is a failure if the options together have less probability than this (`log_probs`).
    pairing: `all` ordered pairs, or a cheaper `swiss` or `knockout` tournament (`rounds`: of Swiss; None: as needed).
    reward: `win_minus_loss` (the paper's) or `bradley_terry` (with `ridge`).
    seed: the starting order of tournaments, together with the item's id.
    """

    judge_model: Any = Field(exclude=True)
    prompt: FileName = "pairwise"
    read: Literal["log_probs", "text"] = "log_probs"
    soft: bool = False
    tie_threshold: float = Field(0.0, ge=0, lt=1)
    use_tie_option: bool = True
    min_option_mass: float = Field(0.0, ge=0, le=1)
    pairing: Literal["all", "swiss", "knockout"] = "all"
    rounds: int | None = Field(None, ge=1)
    reward: Literal["win_minus_loss", "bradley_terry"] = "win_minus_loss"
    ridge: float = Field(0.1, ge=MIN_RIDGE, allow_inf_nan=False)
    max_new_tokens: int = Field(512, ge=1)
    seed: int = 0
    _prompt: Prompt = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """What the settings lead to; raises RewardError where they cannot be used."""
        self._prompt = _offered(load_prompt(self.prompt, "pairwise"), use_tie_option=self.use_tie_option)

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        tournaments = [self._tournament(item) for item in items]
        open_matches = [(tournament, matches) for tournament in tournaments if (matches := self._matches(tournament))]
        while open_matches:
            self._play(open_matches)
            open_matches = [
                (tournament, matches) for tournament, _ in open_matches if (matches := self._matches(tournament))
            ]
        return [self._judgement(tournament) for tournament in tournaments]

    def _tournament(self, item: Item) -> _Tournament:
        responses = distinct_responses(item)
        return _Tournament(item, responses, shuffled(responses, f"{self.seed}:{item.id}"))

    def _matches(self, tournament: _Tournament) -> list[Match]:
        results = tournament.results(soft=self.soft)
        return next_matches(self.pairing, tournament.order, results, rounds=self.rounds)

    def _play(self, open_matches: Sequence[tuple[_Tournament, list[Match]]]) -> None:
        # Sorted by the response shown first: neighbours in a prompt then share their leading piece.
        orders = [sorted([*matches, *((other, one) for one, other in matches)]) for _, matches in open_matches]
        prompts = [
            self._ask(tournament.item, pairs) for (tournament, _), pairs in zip(open_matches, orders, strict=True)
        ]
        for (tournament, _), pairs, answers in zip(open_matches, orders, self._answers(prompts), strict=True):
            for pair, answer in zip(pairs, answers, strict=True):
                self._record(tournament, pair, answer)

    def _ask(self, item: Item, pairs: Sequence[Order]) -> BranchedPrompt:
        branches = [(item.responses[first], item.responses[second]) for first, second in pairs]
        return self._prompt.fill(item.images, item.question, branches)

    def _answers(self, prompts: list[BranchedPrompt]) -> Sequence[Sequence[Any]]:
        if self.read == "text":
            return self.judge_model.generate(prompts, max_new_tokens=self.max_new_tokens)
        return self.judge_model.log_probs(prompts)

    def _record(self, tournament: _Tournament, pair: Order, answer: Any) -> None:
        if self.read == "text":
            reading = read_text(answer, self._prompt.options)
        else:
            reading = read_log_probs(answer, self._prompt.options, min_mass=self.min_option_mass)
        if reading.mass is not None:
            tournament.masses.append(reading.mass)
        if reading.probabilities is None:
            tournament.failed[pair] = reading.reason
        else:
            rationale = answer if self.read == "text" else None
            tournament.verdicts[pair] = make_verdict(*pair, reading.probabilities, self.tie_threshold, rationale)

    def _judgement(self, tournament: _Tournament) -> Judgement:
        unscored = without_failures(tournament.responses, tournament.failed)
        left = [index for index in tournament.responses if index not in unscored]
        if len(left) < 2:
            unscored |= dict.fromkeys(left, NOTHING_TO_COMPARE)
            left = []
        valid = [v for v in tournament.verdicts.values() if v.first in left and v.second in left]
        evidence = self._evidence(tournament)
        values = self._rewards(tournament.item, left, valid, evidence) if left else {}
        rewards, reasons = broadcast_to_duplicates(tournament.item, values, unscored)
        return Judgement(
            id=tournament.item.id,
            rewards=rewards,
            verdicts=list(tournament.verdicts.values()),
            unscored=reasons,
            evidence=evidence,
        )

    def _rewards(
        self, item: Item, left: list[int], verdicts: list[Verdict], evidence: dict[str, Any]
    ) -> dict[int, float]:
        num = len(item.responses)
        if self.reward == "win_minus_loss":
            sums = win_minus_loss(num, verdicts, soft=self.soft, scale_to_all=self.pairing != "all")
            return {index: sums[index] for index in left}
        place = {index: row for row, index in enumerate(left)}
        moved = [_moved(verdict, place) for verdict in verdicts]
        fit = bradley_terry(len(left), moved, soft=self.soft, ridge=self.ridge)
        evidence["standard_errors"] = {str(index): fit.standard_errors[place[index]] for index in left}
        return {index: fit.strengths[place[index]] for index in left}

    def _evidence(self, tournament: _Tournament) -> dict[str, Any]:
        evidence: dict[str, Any] = {"num_comparisons": len(tournament.verdicts) + len(tournament.failed)}
        if tournament.masses:
            evidence["mean_option_mass"] = sum(tournament.masses) / len(tournament.masses)
        if tournament.failed:
            evidence["failed"] = [[first, second, why] for (first, second), why in tournament.failed.items()]
        return evidence


def make_verdict(
    first: int, second: int, probabilities: dict[str, float], tie_threshold: float, rationale: str | None = None
) -> Verdict:
    """A verdict from the probabilities of the options `first`, `second` and perhaps `tie`.

    >>> make_verdict(3, 1, {"first": 0.2, "second": 0.8}, 0.0).winner
    1
    """
    p_first, p_second, p_tie = probabilities["first"], probabilities["second"], probabilities.get("tie")
    tied = abs(p_first - p_second) <= tie_threshold or (p_tie is not None and p_tie >= max(p_first, p_second))
    winner = None if tied else first if p_first > p_second else second
    return Verdict(
        first=first,
        second=second,
        p_first=p_first,
        p_second=p_second,
        p_tie=p_tie,
        winner=winner,
        rationale=rationale,
    )


def _moved(verdict: Verdict, place: dict[int, int]) -> Verdict:
    winner = None if verdict.winner is None else place[verdict.winner]
    update = {"first": place[verdict.first], "second": place[verdict.second], "winner": winner}
    return verdict.model_copy(update=update)


def _offered(prompt: Prompt, *, use_tie_option: bool) -> Prompt:
    if not prompt.options:
        raise RewardError(f"prompt {prompt.name}: a pairwise prompt needs options first and second in its heading")
    options = {name: text for name, text in prompt.options.items() if use_tie_option or name != "tie"}
    return replace(prompt, options=options)
