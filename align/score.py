"""Stage 2: samples in, scores.jsonl out: a critic judges the responses of every question.

What the critic could not judge is unscored with its reason and never 0. Finished questions are kept when the stage is
interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from align.config import Config
from align.errors import UserError, reward_faults
from align.images import ImageStore
from align.progress import log
from align.questionwise import Keep, begin, finish, work_through
from align.records import IMAGE_TAG, Question, Samples, Scores, VerdictRecord, read_jsonl
from align.rundir import RunDir, checkpoint_hash, content_hash
from reward.critics import Critic, Item, Judgement, Verdict, make_critic, needs, settings_of
from reward.ranking import consistency, position_bias, tie_rate

STAGE = "score"
DEFAULT_BATCH = 16


def run_score(config: Config, number: int) -> None:
    """Score a round; does nothing when that has been done.

    Raises:
        UserError: the round is not sampled, the critic's settings are wrong, or nothing could be scored.
    """
    this = RunDir(config.run_dir).round(number)
    this.need("sample", "scores are made from its samples", f"align sample --round {number}")
    samples = read_jsonl(this.samples, Samples)
    images = ImageStore(config.question_images, config.max_image_pixels)
    with reward_faults():
        _check_critic(config)
    if not begin(this.manifest, STAGE, settings=_settings(config), inputs=_inputs(config, this.samples)):
        log.info("round %d is scored already: %s", number, this.scores)
        return

    def work(todo: list[Samples], keep: Keep) -> dict[str, str]:
        return _judge(config, todo, images, keep)

    done = work_through(this.scores, Scores, samples, work, label=f"round {number}: score")
    counts = _counts(done.records)
    if not counts["scored"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts["unscored"].items())
        raise UserError(
            f"the critic could score none of {len(samples)} questions: {reasons}",
            where=str(this.scores),
            fix="check critic.kind, critic.model and its prompt, then run with --redo",
        )
    finish(this.manifest, STAGE, outputs=[this.scores], counts=counts, done=done)


def _counts(scores: Sequence[Scores]) -> dict[str, Any]:
    return {
        "questions": len(scores),
        "scored": sum(reward is not None for score in scores for reward in score.rewards),
        "unscored": dict(Counter(reason for score in scores for reason in score.unscored.values())),
        "verdicts": sum(len(score.verdicts) for score in scores),
        "critic": critic_figures(scores),
    }


def critic_figures(scores: Sequence[Scores]) -> dict[str, float]:
    """How far the critic can be trusted: agreement of both orders, bias for a position, ties."""
    verdicts = [[_verdict(record) for record in score.verdicts] for score in scores]
    figures = {
        "consistency": consistency(verdicts),
        "position_bias": position_bias(verdicts),
        "tie_rate": tie_rate(verdicts),
    }
    return {name: round(value, 4) for name, value in figures.items() if value is not None}


def _verdict(record: VerdictRecord) -> Verdict:
    p_first, p_second = record.p_first or 0.0, record.p_second or 0.0
    return Verdict(record.first, record.second, p_first, p_second, record.p_tie, record.winner, record.rationale)


def _judge(config: Config, todo: list[Samples], images: ImageStore, keep: Keep) -> dict[str, str]:
    critic, notes = _open_critic(config, images)
    for lines in _batches(todo, config.critic.batch_size or DEFAULT_BATCH):
        with reward_faults():
            judgements = critic.judge([_item(line) for line in lines])
        for line, judgement in zip(lines, judgements, strict=True):
            keep(_scores(line.id, judgement))
    return notes()


def _batches(lines: list[Samples], size: int) -> Iterator[list[Samples]]:
    source = iter(lines)
    while batch := list(islice(source, size)):
        yield batch


def _open_critic(config: Config, images: ImageStore) -> tuple[Critic, Callable[[], dict[str, str]]]:
    settings = _critic_options(config)
    if needs(config.critic.kind) is None:
        with reward_faults():
            return make_critic(config.critic.kind, settings), dict
    from align.engines.open import open_engine

    assert config.critic.model is not None
    engine = open_engine(
        config.critic.model,
        config.model,
        open_image=images.open,
        processor=config.critic.processor,
        shared_prefix=config.shared_prefix,
        batch_size=config.critic.batch_size,
    )
    with reward_faults():
        return make_critic(config.critic.kind, settings, asker=engine), lambda: engine.notes


def _check_critic(config: Config) -> None:
    """Find faults in the critic's settings and prompt before any weights are loaded."""
    asker = None
    if needs(config.critic.kind) is not None:
        if config.critic.model is None:
            raise UserError(f"the {config.critic.kind} critic needs a model", fix="set critic.model to its checkpoint")
        asker = _NoAsker()
    make_critic(config.critic.kind, _critic_options(config), asker=asker)


class _NoAsker:
    """Stands where the engine will be while settings are checked; never asked."""

    def log_probs(self, asks: Any) -> list[Any]:
        raise AssertionError("asked before the engine was opened")

    def generate(self, asks: Any, *, max_new_tokens: int) -> list[list[str | None]]:
        raise AssertionError("asked before the engine was opened")


def _critic_options(config: Config) -> dict[str, Any]:
    options = dict(config.critic.options)
    if config.critic.prompt is not None and "prompt" in settings_of(config.critic.kind):
        options["prompt"] = config.critic.prompt
    if config.critic.kind == "random":
        options.setdefault("seed", config.seed)
    return options


def _item(line: Samples) -> Item:
    question = line.question
    return Item(
        id=line.id,
        question=_question_text(question),
        images=tuple(question.images),
        responses=tuple(response.text for response in line.responses),
        answer=question.answer,
        answer_kind=question.answer_kind,
    )


def _question_text(question: Question) -> str:
    """What the critic reads as the question: the dialogue up to it, without image tags."""
    turns = [f"{turn.role}: {turn.content}" for turn in question.history] + [question.question]
    return "\n".join(turns).replace(IMAGE_TAG, "").strip()


def _scores(id_: str, judgement: Judgement) -> Scores:
    verdicts = [
        VerdictRecord(
            first=verdict.first,
            second=verdict.second,
            p_first=round(verdict.p_first, 6),
            p_second=round(verdict.p_second, 6),
            p_tie=None if verdict.p_tie is None else round(verdict.p_tie, 6),
            winner=verdict.winner,
            rationale=verdict.rationale,
        )
        for verdict in judgement.verdicts
    ]
    ratings = judgement.ratings if any(rating is not None for rating in judgement.ratings) else []
    return Scores(
        id=id_,
        rewards=judgement.rewards,
        verdicts=verdicts,
        ratings=ratings,
        unscored=judgement.unscored,
        evidence=judgement.evidence,
    )


def _settings(config: Config) -> dict[str, Any]:
    critic = config.critic.model_dump(exclude={"model", "batch_size", "prompt"})
    return {"critic": critic, "seed": config.seed}


def _inputs(config: Config, samples: Any) -> dict[str, str]:
    inputs = {"samples": content_hash(samples)}
    if config.critic.model is not None and needs(config.critic.kind) is not None:
        inputs["critic"] = checkpoint_hash(config.critic.model)
    if config.critic.prompt is not None:
        inputs["prompt"] = _prompt_hash(config.critic.prompt)
    return inputs


def _prompt_hash(prompt: str) -> str:
    from pathlib import Path

    path = Path(prompt)
    return content_hash(path) if path.is_file() else prompt
