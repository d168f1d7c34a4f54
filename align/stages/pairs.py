"""Stage 3: samples and scores in, pairs.jsonl out: rewards become preference pairs in TRL's format.

Cheap, and apart from the judging, so that other pair settings need no new judgement. Where `pairs_file` brings existing
preference pairs (off-policy), round 1 takes those instead. Pairs of earlier rounds may be replayed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from align.config import Config
from align.data.pairs_file import read_pairs_file, text_of
from align.distributed.ranks import barrier, is_main_process
from align.errors import UserError, reward_faults
from align.log import log
from align.media.images import question_images
from align.records import Pair, Question, Samples, iter_jsonl, parse_line, read_jsonl, to_line, write_lines
from align.run.folder import Round, RunDir
from align.run.hashes import content_hash
from align.run.sharding import begin
from align.sources import count_by_source
from align.stages.critic_metrics import check_gates
from align.stages.join import Scored, is_about, join_scores, scores_by_id
from reward.critics.verifier import is_correct
from reward.judgement import Judgement
from reward.pairs import Chosen, PairChoice, PairSettings, choose_pairs
from reward.reliability import Figure, share
from reward.replay import balance_lengths, draw_replay, mean_log_ratio

STAGE = "pairs"
LOPSIDED = "dropped to balance lengths"
NOT_IN_SCORES = "no line in the scores"
CHANGED_SINCE = "its question or responses have changed since they were judged"


@dataclass(frozen=True, slots=True)
class MadePair:
    """A pair as a line of pairs.jsonl, which takes a fifth of an object's memory, and what the whole round asks of it.

    `lengths` are those of chosen and rejected, in tokens where they were sampled, else in characters. `right` says
    whether the right response was chosen over a wrong one; None where the reference answer does not tell.
    """

    line: str
    id: str
    question_id: str | None
    source: str | None
    lengths: tuple[int, int]
    right: bool | None = None

    @classmethod
    def of(cls, pair: Pair, lengths: tuple[int, int], right: bool | None = None) -> MadePair:
        """The pair as it will be written."""
        return cls(to_line(pair), pair.id, pair.question_id, pair.meta.get("source"), lengths, right)

    @property
    def pair(self) -> Pair:
        """The pair as it will be read."""
        return parse_line(self.line, Pair, self.id)


@dataclass
class Made:
    """A round's own pairs, and what became of every response and pair, by reason."""

    pairs: list[MadePair] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


def run_pairs(config: Config, number: int) -> None:
    """Make a round's pairs; does nothing when that has been done.

    Raises:
        UserError: the round is not scored, its critic does not pass the gates, the settings are wrong, or no pair is
            left (with the counts by reason).
    """
    run = RunDir(config.run_dir)
    this = run.round(number)
    given = config.pairs_file if number == 1 else None
    if given is None:
        this.need("score", "pairs are made from its scores", f"align score --round {number}")
        check_gates(this, config.critic.gates)
        inputs = {"samples": content_hash(this.samples), "scores": content_hash(this.scores)}
    else:
        if not given.is_file():
            raise UserError("no such file", where=str(given), fix="set pairs_file to a JSONL file of pairs")
        inputs = {"pairs_file": content_hash(given)}
    earlier: list[Pair] = []
    if config.pairs.replay_fraction:
        earlier = _earlier_pairs(run, number)
        inputs |= {f"pairs of round {before}": content_hash(run.round(before).pairs) for before in range(1, number)}
    if not begin(this.manifest, STAGE, settings={"pairs": config.pairs.model_dump()}, inputs=inputs):
        log.info("the pairs of round %d are made already: %s", number, this.pairs)
        return
    if is_main_process():
        made = _own_pairs(config, this)
        balance(made, config.pairs.balance_lengths)
        if not made.pairs:
            this.manifest.note(STAGE, counts=made.counts)
            raise _nothing_left(config, this, made.counts)
        replayed = replay([one.id for one in made.pairs], earlier, config)
        counts = made.counts | {"pairs": len(made.pairs) + len(replayed)}
        counts |= {"replayed_pairs": len(replayed)} if earlier else {}
        counts["figures"] = {name: figure.model_dump(exclude_none=True) for name, figure in pair_figures(made).items()}
        write_lines(this.pairs, chain((one.line for one in made.pairs), map(to_line, replayed)))
        this.manifest.finish(STAGE, outputs=[this.pairs], counts=counts)
    barrier()


def _own_pairs(config: Config, this: Round) -> Made:
    if config.pairs_file is not None and this.number == 1:
        pairs, counts = read_pairs_file(config.pairs_file, question_images(config))
        return Made(
            [MadePair.of(pair, (len(text_of(pair.chosen)), len(text_of(pair.rejected)))) for pair in pairs], counts
        )
    samples, scores = iter_jsonl(this.samples, Samples), iter_jsonl(this.scores, Judgement)
    return make_pairs(samples, scores, config.pairs, this.number, where=str(this.path))


def _nothing_left(config: Config, this: Round, counts: dict[str, Any]) -> UserError:
    lopsided = {key: count for key, count in counts["dropped_pairs"].items() if key == LOPSIDED}
    why = lopsided or counts["questions_without_pair"] or counts["dropped_pairs"]
    reasons = ", ".join(f"{reason} ({count})" for reason, count in why.items())
    if config.pairs_file is not None and this.number == 1:
        return UserError(
            f"no pair is left: {reasons or 'the file is empty'}",
            where=str(config.pairs_file),
            fix="convert your data with `align data`, and check image_root",
        )
    if set(why) <= {NOT_IN_SCORES, CHANGED_SINCE}:
        return UserError(
            f"no pair is left of {counts['questions']} questions: {reasons}",
            where=str(this.scores),
            fix=f"judge the samples again: align score --round {this.number} --redo",
        )
    return UserError(
        f"no pair is left of {counts['questions']} questions: {reasons}",
        where=str(this.scores),
        fix=(
            f"look at the scores; change pairs.* (align pairs --round {this.number} --redo), use another critic (align"
            f" score --round {this.number} --redo) or raise sample.temperature (align sample --round {this.number}"
            " --redo)"
        ),
    )


def make_pairs(
    samples: Iterable[Samples], scores: Iterable[Judgement], settings: PairSettings, number: int, *, where: str
) -> Made:
    """The round's pairs in the order of `samples`, and what became of every response and pair, by reason.

    Raises:
        UserError: samples and scores do not fit together (see align.stages.join).
    """
    by_id = scores_by_id(scores, where)
    made = Made()
    responses: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    without: Counter[str] = Counter()
    questions = scored = 0
    for line, score in join_scores(samples, by_id, number, where=where):
        questions += 1
        if score is None:
            without[NOT_IN_SCORES] += 1
            continue
        if not is_about(score, line):
            without[CHANGED_SINCE] += 1
            continue
        scored += 1
        chosen = _choose(line, score, settings)
        responses += chosen.dropped_responses
        dropped += chosen.dropped_pairs
        if chosen.why_none:
            without[chosen.why_none] += 1
        for choice in chosen.pairs:
            sides = line.responses[choice.chosen], line.responses[choice.rejected]
            lengths = sides[0].num_tokens, sides[1].num_tokens
            right = _right(line.question, sides[0].text, sides[1].text)
            made.pairs.append(MadePair.of(_pair(line, score, choice, number), lengths, right))
    made.counts = {
        "questions": questions,
        "pairs": len(made.pairs),
        "dropped_responses": dict(responses),
        "dropped_pairs": dict(dropped),
        "questions_without_pair": dict(without),
    }
    if by_source := count_by_source([one.source for one in made.pairs]):
        made.counts["pairs_by_source"] = by_source
    if scored < len(by_id):
        made.counts["scores_without_samples"] = len(by_id) - scored
    return made


def balance(made: Made, limit: float | None) -> None:
    """Drop the pairs that keep lengths from balancing; counts how many, and the mean log ratio before and after."""
    lengths = [one.lengths for one in made.pairs]
    made.counts["mean_log_length_ratio"] = round(mean_log_ratio(lengths) or 0.0, 4)
    if limit is None:
        return
    kept = balance_lengths(lengths, limit=limit)
    num_dropped = len(made.pairs) - len(kept)
    if num_dropped:
        made.counts["dropped_pairs"] = made.counts["dropped_pairs"] | {LOPSIDED: num_dropped}
    made.pairs = [made.pairs[index] for index in kept]
    made.counts["mean_log_length_ratio_balanced"] = round(mean_log_ratio([lengths[i] for i in kept]) or 0.0, 4)


def pair_figures(made: Made) -> dict[str, Figure]:
    """PAIR_MEASURES of a round's own pairs, where there is anything to take them of."""
    by_question: dict[str, list[MadePair]] = {}
    for one in made.pairs:
        by_question.setdefault(one.question_id or one.id, []).append(one)
    unequal = [[m.lengths for m in own if m.lengths[0] != m.lengths[1]] for own in by_question.values()]
    known = [[m.right for m in own if m.right is not None] for own in by_question.values()]
    found = {
        "pairs_agree_with_reference": share((sum(rights), len(rights)) for rights in known),
        "chosen_longer": share((sum(a > b for a, b in lengths), len(lengths)) for lengths in unequal),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _right(question: Question, chosen: str, rejected: str) -> bool | None:
    """Whether the chosen response is right and the rejected one wrong, or the other way round (False)."""
    if question.answer is None:
        return None
    better, worse = (
        is_correct(text, question.answer, question=question.question, kind=question.answer_kind)
        for text in (chosen, rejected)
    )
    return better if better is not None and worse is not None and better != worse else None


def replay(ids: Sequence[str], earlier: Sequence[Pair], config: Config) -> list[Pair]:
    """The pairs of earlier rounds to train on again beside those with these ids.

    What they say of samples holds for their own round only.
    """
    taken = set(ids)
    fresh = [pair for pair in earlier if pair.id not in taken]
    # A pair without a margin (from a file) counts as easy: it is taken when nothing harder is left.
    margins = [math.inf if pair.margin is None else pair.margin for pair in fresh]
    with reward_faults():
        indices = draw_replay(
            len(ids),
            margins,
            fraction=config.pairs.replay_fraction,
            order=config.pairs.replay_order,
            seed=config.seed,
        )
    return [fresh[index] for index in indices]


def _earlier_pairs(run: RunDir, number: int) -> list[Pair]:
    """Every pair that an earlier round made itself, marked with its round."""
    found = []
    for earlier in range(1, number):
        before = run.round(earlier)
        before.need("pairs", "pairs of earlier rounds are replayed", f"align pairs --round {earlier}")
        for pair in read_jsonl(before.pairs, Pair):
            if "from_round" not in pair.meta:
                meta = pair.meta | {"from_round": earlier, "responses": pair.responses}
                found.append(pair.model_copy(update={"meta": meta, "responses": {}}))
    return found


def _choose(line: Samples, score: Scored, settings: PairSettings) -> Chosen:
    excluded = {}
    for index, response in enumerate(line.responses):
        if not response.text.strip():
            excluded[index] = "empty response"
        elif response.finish_reason == "length" and not settings.keep_truncated:
            excluded[index] = "truncated"
    return choose_pairs(
        score.rewards,
        [response.text for response in line.responses],
        settings,
        excluded=excluded,
        correct=score.correct,
        lengths=[response.num_tokens for response in line.responses],
    )


def _pair(line: Samples, score: Scored, choice: PairChoice, number: int) -> Pair:
    def message(index: int) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": line.responses[index].text}]}]

    rewards = {"chosen": score.rewards[choice.chosen], "rejected": score.rewards[choice.rejected]}
    return Pair(
        id=f"{line.id}/r{number}/{choice.chosen}-{choice.rejected}",
        images=line.question.images,
        prompt=line.question.messages(),
        chosen=message(choice.chosen),
        rejected=message(choice.rejected),
        margin=choice.margin,
        rewards={name: reward for name, reward in rewards.items() if reward is not None},
        question_id=line.id,
        responses={"chosen": choice.chosen, "rejected": choice.rejected},
        meta={} if line.question.source is None else {"source": line.question.source},
    )
