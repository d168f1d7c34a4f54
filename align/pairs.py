"""Stage 3: samples and scores in, pairs.jsonl out: rewards become preference pairs in TRL's format.

Cheap, and apart from the judging, so that other pair settings need no new judgement.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from align.config import Config
from align.errors import UserError, reward_faults
from align.progress import log
from align.questionwise import begin
from align.ranks import barrier, is_main_process
from align.records import Pair, Samples, Scores, read_jsonl, write_jsonl
from align.rundir import RunDir, content_hash
from reward.pairs import Chosen, PairChoice, PairSettings, choose_pairs

STAGE = "pairs"


def run_pairs(config: Config, number: int) -> None:
    """Make a round's pairs; does nothing when that has been done.

    Raises:
        UserError: the round is not scored, the settings are wrong, or no pair is left (with the counts by reason).
    """
    this = RunDir(config.run_dir).round(number)
    this.need("score", "pairs are made from its scores", f"align score --round {number}")
    samples, scores = read_jsonl(this.samples, Samples), read_jsonl(this.scores, Scores)
    with reward_faults():
        settings = PairSettings(**config.pairs.model_dump(exclude={"keep_truncated"}))
    inputs = {"samples": content_hash(this.samples), "scores": content_hash(this.scores)}
    started = time.monotonic()
    if not begin(this.manifest, STAGE, settings={"pairs": config.pairs.model_dump()}, inputs=inputs):
        log.info("the pairs of round %d are made already: %s", number, this.pairs)
        return
    pairs, counts = make_pairs(samples, scores, settings, number, keep_truncated=config.pairs.keep_truncated)
    if not pairs:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts["questions_without_pair"].items())
        raise UserError(
            f"no pair is left of {len(samples)} questions: {reasons}",
            where=str(this.scores),
            fix="look at the scores; change pairs.*, raise sample.temperature, or use another critic; then run again with --redo",
        )
    if is_main_process():
        write_jsonl(this.pairs, pairs)
        seconds = time.monotonic() - started
        this.manifest.finish(STAGE, outputs=[this.pairs], counts=counts, seconds=seconds)
    barrier()


def make_pairs(
    samples: Sequence[Samples], scores: Sequence[Scores], settings: PairSettings, number: int, *, keep_truncated: bool
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


def _choose(line: Samples, score: Scores, settings: PairSettings, *, keep_truncated: bool) -> Chosen:
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


def _pair(line: Samples, score: Scores, choice: PairChoice, number: int) -> Pair:
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
