"""Held-out responses of two checkpoints in, which one the critic prefers by question, and how often, out.

The greedy responses to the same questions are compared in both orders; a tie (identical texts, or both orders summing
to nothing) counts as half. What the critic could not judge is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config import Config
from align.engines.judge import judge_each, open_critic, open_judged, plan_critic
from align.media.images import evaluation_images
from align.monitoring.progress import progress
from align.records import Compared, Evaluation
from align.run.sharding import batches
from align.statistics import bootstrap_share
from reward.critics import Item, Judgement
from reward.intervals import Interval

BATCH = 64
NAMES = {"initial": "the first policy", "parent": "the round before"}


@dataclass(frozen=True)
class WinRate:
    """The share of questions on which the first is preferred, ties as half; and how many were tied or not judged."""

    rate: Interval | None
    num_ties: int
    num_unjudged: int


def has_judge(config: Config) -> bool:
    """Whether a critic model is named that can be asked; rules and random controls judge no win rate."""
    named = config.critic.model is not None or bool(config.critic.servers)
    return config.evaluate.win_rate and named and plan_critic(config).looks


def compare_answers(
    config: Config, lines: Sequence[Evaluation], opponents: Mapping[str, Sequence[Evaluation]], logs: Path
) -> list[Compared]:
    """What the critic says of `lines` against each opponent's responses to the same questions.

    `logs`: where a critic's servers that are started here write, a file without its ending.

    Raises:
        UserError: the critic cannot be opened.
    """
    images = evaluation_images(config)
    critic, _ = open_critic(plan_critic(config), config, open_judged(images.open), logs=logs)
    found = {line.id: Compared(id=line.id, preferred={}) for line in lines}
    for name, others in opponents.items():
        by_id = {line.id: line for line in others}
        pairs = [(line, by_id[line.id]) for line in lines if line.id in by_id]
        judgements: list[Judgement] = []
        with progress(f"win rate against {NAMES.get(name, name)}", total=len(pairs)) as advance:
            for some in batches([_item(*pair) for pair in pairs], BATCH):
                judgements += judge_each(critic, some)
                advance(len(some))
        for pair, judgement in zip(pairs, judgements, strict=True):
            found[pair[0].id].preferred[name] = _outcome(*pair, judgement)
    return list(found.values())


def win_rates(compared: Sequence[Compared]) -> dict[str, WinRate]:
    """The win rate against each opponent that anything was compared with."""
    names = dict.fromkeys(name for line in compared for name in line.preferred)
    return {name: summarise([line.preferred[name] for line in compared if name in line.preferred]) for name in names}


def summarise(outcomes: Sequence[float | None]) -> WinRate:
    """1 is a win, 0 a loss, 0.5 a tie, None not judged.

    >>> summarise([1.0, 0.5, None, 1.0]).num_ties
    1
    """
    judged = [outcome for outcome in outcomes if outcome is not None]
    return WinRate(
        rate=bootstrap_share(judged) if judged else None,
        num_ties=sum(outcome == 0.5 for outcome in judged),
        num_unjudged=len(outcomes) - len(judged),
    )


def _outcome(mine: Evaluation, other: Evaluation, judgement: Judgement) -> float | None:
    if mine.greedy.text.strip() == other.greedy.text.strip():
        return 0.5
    first, second = judgement.rewards
    if first is None or second is None:
        return None
    return 0.5 if first == second else float(first > second)


def _item(mine: Evaluation, other: Evaluation) -> Item:
    question = mine.question
    return Item(
        id=mine.id,
        question=question.as_text(),
        images=tuple(question.images),
        responses=(mine.greedy.text, other.greedy.text),
        answer=question.answer,
        answer_kind=question.answer_kind,
    )
