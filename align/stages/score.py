"""Stage 2: samples in, scores.jsonl out: a critic judges the responses of every question.

What the critic could not judge is unscored with its reason and never 0; so is a question whose image can no longer be
read. Finished questions are kept when the stage is interrupted; where responses have changed, they are judged again.
A few questions are judged again with other images (controls.jsonl), to see how far the critic can be
trusted; a gate that does not hold stops here, with the scores kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from align.config import Config, CriticSettings
from align.distributed.ranks import is_main_process
from align.engines.judge import CriticPlan, judge_each, open_critic, open_judged, plan_critic
from align.engines.open import arithmetic_settings
from align.errors import UserError, reward_faults
from align.log import log
from align.media.images import ImageStore, question_images
from align.models.record_faults import CANNOT_READ
from align.records import Samples, read_jsonl
from align.run.folder import Round, RunDir
from align.run.hashes import content_hash
from align.run.image_hashes import record_or_verify_images
from align.run.resumable import PartialFile
from align.run.sharding import OnRecord, StageOutput, batches, begin, finish, map_resumable
from align.stages.critic_inputs import check_same_samples, critic_files, critic_settings
from align.stages.critic_metrics import check_gates, critic_controls, critic_figures, item_of
from align.stages.join import is_about, judged_hash
from reward.critics import Critic, Item, Judgement
from reward.reliability import check_gates as check_gate_names
from reward.warnings import critic_warnings

STAGE = "score"
DEFAULT_BATCH = 16

OpenCritic = Callable[[], tuple[Critic, Callable[[], dict[str, str]]]]


def run_score(config: Config, number: int, critic: Callable[..., Any] | None = None) -> None:
    """Score a round; does nothing when that has been done.

    `critic`, a function of question, images and responses that returns rewards, judges instead of the configured one.

    Raises:
        UserError: the round is not sampled, the critic's settings are wrong, nothing could be scored, or the critic
            does not pass its gates.
    """
    if critic is not None:
        settings = CriticSettings(kind="python", gates=config.critic.gates, options={"function": critic})
        config = config.model_copy(update={"critic": settings})
    this = RunDir(config.run_dir).round(number)
    this.need("sample", "scores are made from its samples", f"align sample --round {number}")
    samples = read_jsonl(this.samples, Samples)
    if not samples:
        raise UserError(
            "there are no samples: the file is empty",
            where=str(this.samples),
            fix=f"restore it from a copy, or sample again: align sample --round {number} --redo",
        )
    images = question_images(config)
    plan = plan_critic(config)
    with reward_faults():
        check_gate_names(config.critic.gates)
    inputs = {"samples": content_hash(this.samples)} | plan.identities() | critic_files(config.critic)
    check_same_samples(config.critic, inputs["samples"])
    compared = {"critic": critic_settings(config.critic), "seed": config.seed} | arithmetic_settings(config)
    if begin(this.manifest, STAGE, settings=compared, inputs=inputs, by_record=("samples",)):
        if is_main_process():
            record_or_verify_images(
                this.image_hashes,
                images,
                [line.question for line in samples],
                otherwise=f"sample its questions again: align sample --round {number} --redo --keep-unchanged",
            )
            _forget_changed(this, samples)
        _score_round(config, plan, this, samples, images)
    else:
        log.info("round %d is scored already: %s", number, this.scores)
    check_gates(this, config.critic.gates)


def _forget_changed(this: Round, samples: list[Samples]) -> None:
    """Drop finished judgements of responses that have changed since; those of the controls with them."""
    now = {line.id: line for line in samples}
    num_dropped = PartialFile(this.scores, Judgement).keep(lambda line: line.id in now and is_about(line, now[line.id]))
    if num_dropped:
        PartialFile(this.controls, Judgement).discard()
        log.info("%d questions have changed since they were scored: they are scored again", num_dropped)


def _score_round(config: Config, plan: CriticPlan, this: Round, samples: list[Samples], images: ImageStore) -> None:
    @cache
    def opened() -> tuple[Critic, Callable[[], dict[str, str]]]:
        return open_critic(plan, config, open_judged(images.open), logs=this.server_logs / "critic")

    size = config.critic.batch_size or DEFAULT_BATCH
    label = f"round {this.number}: score"
    hashes = {line.id: judged_hash(line) for line in samples}
    work = _judge(opened, item_of, size, hashes)
    done = map_resumable(this.scores, Judgement, samples, work, label=label)
    counts = _counts(done.records)
    if not counts["scored"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts["unscored"].items())
        raise UserError(
            f"the critic could score none of {len(samples)} questions: {reasons}",
            where=str(this.scores),
            fix=f"check critic.kind, critic.model and its prompt, then align score --round {this.number} --redo",
        )
    outputs, controls = [this.scores], StageOutput([], {})
    if plan.looks and config.critic.reliability_sample:
        unreadable = {judgement.id for judgement in done.records if CANNOT_READ in judgement.unscored.values()}
        readable = [item_of(line) for line in samples if line.id not in unreadable]
        items = critic_controls(readable, images, number=config.critic.reliability_sample, seed=config.seed)
        if items:
            work = _judge(opened, lambda control: control.item, size, {})
            controls = map_resumable(this.controls, Judgement, items, work, label=f"{label}, other images")
            outputs = [*outputs, this.controls]
    figures = critic_figures(samples, done.records, controls.records)
    counts["critic"] = {name: figure.model_dump(exclude_none=True) for name, figure in figures.items()}
    for warned in critic_warnings(figures):
        log.warning("%s: %s", warned.title, warned.finding)
    finish(this.manifest, STAGE, outputs=outputs, counts=counts, notes=done.notes | controls.notes)


def _judge(
    opened: OpenCritic, item: Callable[[Any], Item], size: int, hashes: Mapping[str, str]
) -> Callable[[list[Any], OnRecord], dict[str, str]]:
    """What `map_resumable` calls: judge things with ids, `size` at a time; `hashes` by id say what was judged."""

    def work(todo: list[Any], on_record: OnRecord) -> dict[str, str]:
        critic, notes = opened()
        for things in batches(todo, size):
            for thing, judgement in zip(things, judge_each(critic, [item(thing) for thing in things]), strict=True):
                on_record(judgement.model_copy(update={"id": thing.id, "judged": hashes.get(thing.id)}))
        return notes()

    return work


def _counts(scores: Sequence[Judgement]) -> dict[str, Any]:
    return {
        "questions": len(scores),
        "scored": sum(reward is not None for score in scores for reward in score.rewards),
        "unscored": dict(Counter(reason for score in scores for reason in score.unscored.values())),
        "verdicts": sum(len(score.verdicts) for score in scores),
    }
