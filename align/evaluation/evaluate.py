"""Checkpoint in, held-out numbers out: evaluation.json with intervals and evaluation.jsonl with every response.

Asks every held-out question once greedily and `num_samples` times at a temperature, behind one prompt. Round 0 is the
first policy. Where the configured critic is a model, it also compares the greedy responses with those of the first
policy and of the round before. How far a round has moved from the first policy is estimated on its sampled responses
(align.evaluation.kl), and how far its answers depend on the picture by asking again with others
(align.evaluation.image_dependence).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from align.config import Config
from align.distributed.ranks import barrier, is_main_process
from align.engines.judge import plan_critic
from align.engines.open import arithmetic_settings, open_policy, served_as
from align.engines.vllm.hosting import choose
from align.errors import UserError
from align.evaluation.decide import Decided, decide, decide_again
from align.evaluation.gates import check_gate_names, check_gates
from align.evaluation.grading import evaluated
from align.evaluation.image_dependence import ask_again, image_controls, is_weighed, weigh_answers
from align.evaluation.kl import is_measured, log_probs_of_both, why_not_measured
from align.evaluation.log_probs import OneModel
from align.evaluation.split import split_of
from align.evaluation.win_rate import compare_answers, has_judge, win_rates
from align.log import log
from align.media.images import ImageStore, evaluation_images
from align.models.readable import readable_questions
from align.models.video_questions import pick_frames
from align.records import Evaluation, Question, read_jsonl, read_questions, write_jsonl
from align.run.folder import Round, RunDir
from align.run.hashes import checkpoint_hash, content_hash, text_hash
from align.run.image_hashes import changed_images, forget_left_out, record_images
from align.run.parents import parent_of
from align.run.resumable import PartialFile, drop_changed
from align.run.sharding import OnRecord, StageOutput, begin, finish, map_resumable
from align.sources import read_all_questions

if TYPE_CHECKING:
    from align.engines.base import Engine, SampleResult

STAGE = "evaluate"


def run_evaluate(config: Config, number: int) -> None:
    """Evaluate a round's checkpoint (0: the first policy); does nothing when that has been done.

    Raises:
        UserError: no held-out questions are named, the round has no checkpoint yet, a question or image is bad, or a
            gate does not hold (the evaluation is complete then).
    """
    if config.evaluate.questions is None:
        raise UserError("no held-out questions are named", fix="set evaluate.questions to a JSONL file")
    check_gate_names(config.evaluate.gates)
    run = RunDir(config.run_dir)
    this = run.round(number)
    checkpoint = run.checkpoint(number, config.policy)
    questions = read_questions(config.evaluate.questions)[: config.evaluate.limit]
    images = evaluation_images(config)
    check_overlap(config, questions)
    parts = split_of(config, questions)
    served, begun = bool(config.evaluate.servers), this.manifest.stage(STAGE) is not None
    questions = pick_frames(questions, images, config, checkpoint, served=served, leave_unreadable=begun)
    inputs = _inputs(config, run, number, checkpoint)
    this.manifest.check_unaltered(STAGE)
    if not begin(
        this.manifest,
        STAGE,
        settings=_settings(config),
        inputs=inputs,
        image_root=images.root,
        by_record=("questions",),
    ):
        log.info("round %d is evaluated already: %s", number, this.evaluation)
        if is_main_process():
            decide_again(config, run, number, parts)
        barrier()
        check_gates(this, config.evaluate.gates)
        return
    if is_main_process():
        _forget_changed(run, this, images, questions)

    open_engine = _opener(config, this, checkpoint, images)
    models = OneModel(open_engine)

    def work(todo: list[Question], on_record: OnRecord) -> dict[str, str]:
        readable = readable_questions(todo, images, lambda id_, fault: on_record(fault.left_out(id_)))
        if not readable:
            return {}
        return _answer(config, models.get(checkpoint), readable, on_record, keep=_kept_tokens(config, number))

    done = map_resumable(this.evaluation_lines, Evaluation, questions, work, label=f"round {number}: evaluate")
    measured = _measure_answers(config, run, number, images, models, done)
    models.close()
    decided = Decided({}, {}, {})
    if is_main_process():
        decided = decide(config, run, number, parts)
        _may_be_replaced(run, this, images, done, questions)
    outputs = [this.evaluation, this.evaluation_lines, *measured.outputs]
    counts, notes = measured.counts | decided.counts, done.notes | measured.notes
    finish(this.manifest, STAGE, outputs=outputs, counts=counts, notes=notes, **decided.facts)
    check_gates(this, config.evaluate.gates)


class _Measured(NamedTuple):
    """What answers gave beside themselves: further files, counts and notes."""

    outputs: list[Path]
    counts: dict[str, Any]
    notes: dict[str, str]


def _measure_answers(
    config: Config, run: RunDir, number: int, images: ImageStore, models: OneModel, done: StageOutput
) -> _Measured:
    """Weigh the answers and ask again with other images; on the main process also let the critic compare them.

    What it takes to measure is on the disk then (align.evaluation.measure).
    """
    this = run.round(number)
    checkpoint = run.checkpoint(number, config.policy)
    answered = [line.question for line in done.records]
    controls = image_controls(config, answered, images)
    again = ask_again(config, this, checkpoint, answered, controls, models) if controls else StageOutput([], {})
    hosted = not config.evaluate.servers and choose(config.evaluate.engine, checkpoint, config.vllm)[0]
    if _kept_tokens(config, number) and hosted:
        # Exactly, and for every token that was drawn; servers can neither (align.engines.server.prompt_log_probs).
        models.open_with(partial(_opener(config, this, checkpoint, images), engine="local"))
    weighed, notes = weigh_answers(config, this, checkpoint, done.records, controls, models, images)
    notes |= _weigh_under_both(config, this, checkpoint, done.records, models, images)
    counts = {"questions": len(answered), "questions_with_other_images": len({c.item.id for c in controls})}
    counts |= done.counts
    counts |= {"left_out_with_other_images": again.counts["left_out"]} if again.counts else {}
    outputs = [this.other_image_answers] if controls else []
    outputs += [this.image_log_probs] if weighed else []
    outputs += [this.own_log_probs, this.first_log_probs] if is_measured(config, number) else []
    if is_main_process():
        compared = _against_others(config, run, number, done.records)
        outputs += [this.comparisons] if compared else []
        counts |= compared
    return _Measured(outputs, counts, notes)


def _opener(config: Config, this: Round, checkpoint: str, images: ImageStore) -> Callable[..., Engine]:
    """What opens a checkpoint to be asked: on `evaluate.servers`, or on the engine that is configured or named."""

    def open_engine(name: str, engine: str = config.evaluate.engine) -> Engine:
        # The first policy beside a round's own checkpoint: for the KL.
        is_other = bool(config.evaluate.servers) and name != checkpoint
        return open_policy(
            config,
            name,
            config.evaluate.first_policy_servers if is_other else config.evaluate.servers,
            made_in_round=0 if is_other else this.number,
            open_image=images.open,
            engine=engine,
            logs=this.server_logs / STAGE,
        )

    return open_engine


def _kept_tokens(config: Config, number: int) -> set[str]:
    """Of which responses the tokens are kept, since they are weighed again."""
    weighed = {"greedy": is_weighed(config), "sampled": is_measured(config, number)}
    return {which for which, kept in weighed.items() if kept}


def _forget_changed(run: RunDir, this: Round, images: ImageStore, questions: list[Question]) -> None:
    """Drop finished answers to questions that are not asked like this any more.

    Raises:
        UserError: an image has changed that another round was shown: rounds are compared.
    """
    changed = set(changed_images(run.evaluation_hashes, images, questions))
    elsewhere = sorted(changed & _shown_elsewhere(run, this)) if changed else []
    if elsewhere:
        raise UserError(
            f"the image {elsewhere[0]!r} is not the one that was used so far, when other rounds were evaluated",
            where=str(run.evaluation_hashes),
            fix="put it back as it was, or give the run another name: its rounds are compared",
        )
    if drop_changed(PartialFile(this.evaluation_lines, Evaluation), questions, changed):
        for follows in (this.own_log_probs, this.first_log_probs, this.other_image_answers, this.image_log_probs):
            PartialFile(follows, BaseModel).discard()
    record_images(run.evaluation_hashes, images, questions, anew=True)


def _shown_elsewhere(run: RunDir, this: Round) -> set[str]:
    """The images that other rounds were evaluated with."""
    return {
        reference
        for other in run.rounds()
        if other.number != this.number and other.evaluation_lines.is_file()
        for line in read_jsonl(other.evaluation_lines, Evaluation)
        for reference in line.question.images
    }


def _may_be_replaced(run: RunDir, this: Round, images: ImageStore, done: StageOutput, asked: list[Question]) -> None:
    """Let go of the images of questions that were left out, where no other round was shown them."""
    absent = {line.id for line in done.left_out}
    elsewhere = _shown_elsewhere(run, this) if absent else set()
    absent -= {question.id for question in asked if not elsewhere.isdisjoint(question.images)}
    forget_left_out(run.evaluation_hashes, images, asked, absent)


def _settings(config: Config) -> dict[str, Any]:
    left_out = {"questions", "image_root", "servers", "first_policy_servers", "engine"}
    # What is decided by the numbers changes no answer.
    left_out |= {"stop_if_worse", "gates", "select", "select_metric", "patience", "decision_share"}
    return {
        "evaluate": config.evaluate.model_dump(exclude=left_out),
        "seed": config.seed,
        "processor": config.model.processor,
        "video_frames": config.model.video_frames,
        **arithmetic_settings(config),
    }


def _inputs(config: Config, run: RunDir, number: int, checkpoint: str) -> dict[str, str]:
    assert config.evaluate.questions is not None
    inputs = {
        "questions": content_hash(config.evaluate.questions),
        "checkpoint": run.trained_hash(number, checkpoint),
    }
    inputs |= served_as(config.evaluate.servers, number)
    if is_measured(config, number):
        inputs["first policy"] = checkpoint_hash(config.policy)
    if number and has_judge(config):
        inputs |= plan_critic(config).identities()
    return inputs


def _weigh_under_both(
    config: Config, this: Round, checkpoint: str, lines: list[Evaluation], models: OneModel, images: ImageStore
) -> dict[str, str]:
    """Weigh the sampled responses under the checkpoint and the first policy, where the KL divergence can be estimated;
    what the manifest should say of it."""
    if not is_measured(config, this.number):
        why = why_not_measured(config) if this.number else None
        return {"kl": why} if why else {}
    notes = log_probs_of_both(config, this, checkpoint, lines, models, images)
    return notes | {
        "kl": f"both policies at temperature {config.evaluate.temperature:g}, on the checkpoint's own samples"
    }


def _against_others(config: Config, run: RunDir, number: int, lines: list[Evaluation]) -> dict[str, int]:
    """Let the critic compare this round's answers with the first policy's and its parent's, where it can be asked.

    Writes `comparisons`; gives counts of ties and failures, none where nothing was compared.
    """
    parent = parent_of(run, number)
    earlier = {"initial": 0} | ({"parent": parent} if parent else {})
    opponents = {
        name: read_jsonl(run.round(before).evaluation_lines, Evaluation)
        for name, before in earlier.items()
        if run.round(before).evaluation_lines.is_file()
    }
    if not number or not opponents or not has_judge(config):
        return {}
    compared = compare_answers(config, lines, opponents, run.round(number).server_logs / "critic")
    write_jsonl(run.round(number).comparisons, compared)
    found = win_rates(compared)
    counts = {f"ties_{name}": won.num_ties for name, won in found.items()}
    return counts | {f"unjudged_{name}": won.num_unjudged for name, won in found.items()}


def _answer(
    config: Config, engine: Engine, todo: list[Question], on_record: OnRecord, *, keep: set[str]
) -> dict[str, str]:
    from align.engines.base import SampleRequest, SamplingSettings

    by_id = {question.id: question for question in todo}

    def keep_result(result: SampleResult) -> None:
        question = by_id[result.id]
        keep_tokens = ["greedy" in keep, *["sampled" in keep] * (len(result.texts) - 1)]
        greedy, *sampled = evaluated(result, question, keep_tokens=keep_tokens)
        on_record(Evaluation(id=result.id, question=question, greedy=greedy, sampled=sampled))

    requests = [
        SampleRequest(
            id=question.id,
            messages=question.messages(),
            images=tuple(question.images),
            num_samples=config.evaluate.num_samples,
            # The same seed in every round: rounds are compared on common random numbers.
            seed=int(text_hash("evaluate", str(config.seed), question.id)[:15], 16),
        )
        for question in todo
    ]
    settings = SamplingSettings(
        temperature=config.evaluate.temperature, max_new_tokens=config.evaluate.max_new_tokens, greedy_first=True
    )
    engine.sample(requests, settings, keep_result, on_unusable=lambda id_, fault: on_record(fault.left_out(id_)))
    return engine.notes


def check_overlap(config: Config, questions: list[Question]) -> None:
    """Refuse to evaluate on questions that are trained on."""
    if config.questions is None:
        return

    def shown(question: Question, root: Path) -> tuple[str, ...]:
        return (question.question, *(os.path.normpath(root / reference) for reference in question.images))

    train_root, root = config.question_images.resolve(), config.evaluation_images.resolve()
    trained = {shown(question, train_root) for question in read_all_questions(config)}
    both = [question.id for question in questions if question.images and shown(question, root) in trained]
    if both:
        raise UserError(
            f"{len(both)} held-out questions are also trained on ({', '.join(both[:5])}, ...)",
            where=str(config.evaluate.questions),
            fix="take them out of one of the two files",
        )
