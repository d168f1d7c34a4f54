"""Stage 3: samples and scores in, pairs.jsonl out: rewards become preference pairs in TRL's format.

Cheap, and apart from the judging, so that other pair settings need no new judgement. Where `pairs_file` brings existing
preference pairs (off-policy), round 1 takes those instead. Pairs of earlier rounds may be replayed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config import Config
from align.data.pairs_file import read_pairs_file, text_of
from align.distributed.ranks import barrier, is_main_process
from align.errors import UserError, reward_faults
from align.log import log
from align.media.images import question_images
from align.records import Pair, Samples, iter_jsonl, read_jsonl, write_jsonl
from align.run.folder import Round, RunDir
from align.run.hashes import content_hash
from align.run.sharding import begin
from align.stages.critic_metrics import check_gates
from align.stages.join import join_scores, scores_by_id
from reward.judgement import Judgement
from reward.pairs import Chosen, PairChoice, PairSettings, choose_pairs
from reward.replay import balance_lengths, draw_replay, mean_log_ratio

STAGE = "pairs"
LOPSIDED = "dropped to balance lengths"
NOT_IN_SCORES = "no line in the scores"


@dataclass
class Made:
    """A round's own pairs; `lengths` are those of chosen and rejected, in tokens where they were sampled, else in characters."""

    pairs: list[Pair] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
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
        replayed = replay(made.pairs, earlier, config)
        counts = made.counts | {"pairs": len(made.pairs) + len(replayed)}
        counts |= {"replayed_pairs": len(replayed)} if earlier else {}
        write_jsonl(this.pairs, [*made.pairs, *replayed])
        this.manifest.finish(STAGE, outputs=[this.pairs], counts=counts)
    barrier()


def _own_pairs(config: Config, this: Round) -> Made:
    if config.pairs_file is not None and this.number == 1:
        pairs, counts = read_pairs_file(config.pairs_file, question_images(config))
        return Made(pairs, [(len(text_of(pair.chosen)), len(text_of(pair.rejected))) for pair in pairs], counts)
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
    return UserError(
        f"no pair is left of {counts['questions']} questions: {reasons}",
        where=str(this.scores),
        fix="look at the scores; change pairs.*, raise sample.temperature, or use another critic; then run again with --redo",
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
    for line, score in join_scores(samples, by_id, where):
        questions += 1
        if score is None:
            without[NOT_IN_SCORES] += 1
            continue
        scored += 1
        chosen = _choose(line, score, settings)
        responses += chosen.dropped_responses
        dropped += chosen.dropped_pairs
        if chosen.why_none:
            without[chosen.why_none] += 1
        for choice in chosen.pairs:
            made.pairs.append(_pair(line, score, choice, number))
            made.lengths.append((line.responses[choice.chosen].num_tokens, line.responses[choice.rejected].num_tokens))
    made.counts = {
        "questions": questions,
        "pairs": len(made.pairs),
        "dropped_responses": dict(responses),
        "dropped_pairs": dict(dropped),
        "questions_without_pair": dict(without),
    }
    if scored < len(by_id):
        made.counts["scores_without_samples"] = len(by_id) - scored
    return made


def balance(made: Made, limit: float | None) -> None:
    """Drop the pairs that keep lengths from balancing; counts how many, and the mean log ratio before and after."""
    before = mean_log_ratio(made.lengths)
    made.counts["mean_log_length_ratio"] = round(before or 0.0, 4)
    if limit is None:
        return
    kept = balance_lengths(made.lengths, limit=limit)
    num_dropped = len(made.pairs) - len(kept)
    if num_dropped:
        made.counts["dropped_pairs"] = made.counts["dropped_pairs"] | {LOPSIDED: num_dropped}
    made.pairs, made.lengths = [made.pairs[index] for index in kept], [made.lengths[index] for index in kept]
    made.counts["mean_log_length_ratio_balanced"] = round(mean_log_ratio(made.lengths) or 0.0, 4)


def replay(pairs: Sequence[Pair], earlier: Sequence[Pair], config: Config) -> list[Pair]:
    """The pairs of earlier rounds to train on again; what they say of samples holds for their own round only."""
    taken = {pair.id for pair in pairs}
    fresh = [pair for pair in earlier if pair.id not in taken]
    # A pair without a margin (from a file) counts as easy: it is taken when nothing harder is left.
    margins = [math.inf if pair.margin is None else pair.margin for pair in fresh]
    with reward_faults():
        indices = draw_replay(
            len(pairs),
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


def _choose(line: Samples, score: Judgement, settings: PairSettings) -> Chosen:
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
        correct=score.evidence.get("correct"),
        lengths=[response.num_tokens for response in line.responses],
    )


def _pair(line: Samples, score: Judgement, choice: PairChoice, number: int) -> Pair:
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
    )
