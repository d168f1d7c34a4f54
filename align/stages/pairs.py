"""Stage 3: samples and scores in, pairs.jsonl out: rewards become preference pairs in TRL's format.

Cheap, and apart from the judging, so that other pair settings need no new judgement. Where `pairs_file` brings pairs
that exist already, round 1 takes those instead. Pairs of earlier rounds may be mixed in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from align.config import Config
from align.data.pairs_file import read_pairs_file, text_of
from align.distributed.ranks import barrier, is_main_process
from align.errors import UserError, reward_faults
from align.log import log
from align.media.images import ImageStore
from align.records import Pair, Samples, read_jsonl, write_jsonl
from align.run.folder import Round, RunDir
from align.run.hashes import content_hash
from align.run.sharding import begin
from align.stages.critic_metrics import check_gates
from reward.judgement import Judgement
from reward.pairs import Chosen, PairChoice, PairSettings, choose_pairs
from reward.replay import balance_lengths, mean_log_ratio, mix_earlier

STAGE = "pairs"
OF_ALL_QUESTIONS = {"keep_truncated", "balance_lengths", "mix_earlier", "mix_order"}
LOPSIDED = "dropped to balance lengths"


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
    settings = pair_settings(config)
    earlier: list[Pair] = []
    if config.pairs.mix_earlier:
        earlier = _earlier_pairs(run, number)
        inputs |= {f"pairs of round {before}": content_hash(run.round(before).pairs) for before in range(1, number)}
    if not begin(this.manifest, STAGE, settings={"pairs": config.pairs.model_dump()}, inputs=inputs):
        log.info("the pairs of round %d are made already: %s", number, this.pairs)
        return
    if is_main_process():
        pairs, counts = _own_pairs(config, this, settings)
        lengths = _lengths(pairs, this, sampled=given is None)
        pairs, balanced = balance(pairs, config.pairs.balance_lengths, lengths)
        counts = _with_dropped(counts, balanced.pop(LOPSIDED, 0)) | balanced
        if not pairs:
            this.manifest.note(STAGE, counts=counts)
            raise _nothing_left(config, this, counts)
        mixed = mix(pairs, earlier, config)
        counts |= {"pairs": len(pairs) + len(mixed)} | ({"earlier_pairs": len(mixed)} if earlier else {})
        write_jsonl(this.pairs, [*pairs, *mixed])
        this.manifest.finish(STAGE, outputs=[this.pairs], counts=counts)
    barrier()


def pair_settings(config: Config) -> PairSettings:
    """The settings that hold for each question by itself; raises UserError where they exclude each other."""
    with reward_faults():
        return PairSettings(**config.pairs.model_dump(exclude=OF_ALL_QUESTIONS))


def _own_pairs(config: Config, this: Round, settings: PairSettings) -> tuple[list[Pair], dict[str, Any]]:
    if config.pairs_file is not None and this.number == 1:
        return read_pairs_file(config.pairs_file, ImageStore(config.question_images, config.max_image_pixels))
    samples, scores = read_jsonl(this.samples, Samples), read_jsonl(this.scores, Judgement)
    return make_pairs(samples, scores, settings, this.number, keep_truncated=config.pairs.keep_truncated)


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
    samples: Sequence[Samples],
    scores: Sequence[Judgement],
    settings: PairSettings,
    number: int,
    *,
    keep_truncated: bool,
) -> tuple[list[Pair], dict[str, Any]]:
    """The round's pairs in question order, and what became of every response and pair, by reason."""
    pairs: list[Pair] = []
    responses: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    without: Counter[str] = Counter()
    for line, score in zip(samples, scores, strict=True):
        chosen = _choose(line, score, settings, keep_truncated=keep_truncated)
        responses += chosen.dropped_responses
        dropped += chosen.dropped_pairs
        if chosen.why_none:
            without[chosen.why_none] += 1
        pairs += [_pair(line, score, choice, number) for choice in chosen.pairs]
    return pairs, {
        "questions": len(samples),
        "pairs": len(pairs),
        "dropped_responses": dict(responses),
        "dropped_pairs": dict(dropped),
        "questions_without_pair": dict(without),
    }


def balance(
    pairs: list[Pair], limit: float | None, lengths: Sequence[tuple[int, int]]
) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs whose lengths balance, how many were dropped for it, and the mean log ratio before and after."""
    before = mean_log_ratio(lengths)
    counts: dict[str, Any] = {"mean_log_length_ratio": round(before or 0.0, 4)}
    if limit is None:
        return pairs, counts
    kept = balance_lengths(lengths, limit=limit)
    after = mean_log_ratio([lengths[index] for index in kept])
    counts |= {LOPSIDED: len(pairs) - len(kept), "mean_log_length_ratio_balanced": round(after or 0.0, 4)}
    return [pairs[index] for index in kept], counts


def mix(pairs: Sequence[Pair], earlier: Sequence[Pair], config: Config) -> list[Pair]:
    """The pairs of earlier rounds to train on again; what they say of samples holds for their own round only."""
    taken = {pair.id for pair in pairs}
    fresh = [pair for pair in earlier if pair.id not in taken]
    # A pair without a margin (from a file) counts as easy: it is taken when nothing harder is left.
    margins = [math.inf if pair.margin is None else pair.margin for pair in fresh]
    with reward_faults():
        indices = mix_earlier(
            len(pairs), margins, share=config.pairs.mix_earlier, order=config.pairs.mix_order, seed=config.seed
        )
    return [fresh[index] for index in indices]


def _earlier_pairs(run: RunDir, number: int) -> list[Pair]:
    """Every pair that an earlier round made itself, marked with its round."""
    found = []
    for earlier in range(1, number):
        before = run.round(earlier)
        before.need("pairs", "pairs of earlier rounds are mixed in", f"align pairs --round {earlier}")
        for pair in read_jsonl(before.pairs, Pair):
            if "from_round" not in pair.meta:
                meta = pair.meta | {"from_round": earlier, "responses": pair.responses}
                found.append(pair.model_copy(update={"meta": meta, "responses": {}}))
    return found


def _lengths(pairs: Sequence[Pair], this: Round, *, sampled: bool) -> list[tuple[int, int]]:
    """Lengths of chosen and rejected: in tokens where they were sampled, else in characters."""
    if not sampled:
        return [(len(text_of(pair.chosen)), len(text_of(pair.rejected))) for pair in pairs]
    tokens = {
        line.id: [response.num_tokens for response in line.responses] for line in read_jsonl(this.samples, Samples)
    }
    return [
        (
            tokens[str(pair.question_id)][pair.responses["chosen"]],
            tokens[str(pair.question_id)][pair.responses["rejected"]],
        )
        for pair in pairs
    ]


def _with_dropped(counts: dict[str, Any], lopsided: int) -> dict[str, Any]:
    return counts | {"dropped_pairs": counts["dropped_pairs"] | ({LOPSIDED: lopsided} if lopsided else {})}


def _choose(line: Samples, score: Judgement, settings: PairSettings, *, keep_truncated: bool) -> Chosen:
    excluded = {}
    for index, response in enumerate(line.responses):
        if not response.text.strip():
            excluded[index] = "empty response"
        elif response.finish_reason == "length" and not keep_truncated:
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
