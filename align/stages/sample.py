"""Stage 1: questions in, samples.jsonl out: K responses of the round's policy to every image question.

A question's responses depend on the run's seed, the round and the question's id alone, not on the order of questions,
the batch or the number of processes. Finished questions are kept when the stage is interrupted; those whose text or
images have changed since are sampled again, and those that cannot be asked are left out and counted. With `until_pair`
questions whose responses are all the same get further ones (align.stages.until_pair).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from align.config import Config, SampleSettings
from align.distributed.ranks import is_main_process
from align.engines.open import arithmetic_settings, open_policy, served_as
from align.errors import UserError
from align.log import log
from align.media.decoding import Header
from align.media.images import ImageStore, question_images
from align.models.readable import readable_questions
from align.models.video_questions import pick_frames
from align.records import Question, Response, Samples
from align.run.folder import Round, RunDir
from align.run.hashes import content_hash, text_hash
from align.run.image_hashes import changed_images, forget_left_out, record_images
from align.run.parents import starts_from
from align.run.resumable import PartialFile, drop_changed
from align.run.sharding import OnRecord, begin, finish, map_resumable
from align.sources import count_by_source, questions_of_round
from align.stages.until_pair import can_make_pair, further_samples
from reward.judgement import Judgement

if TYPE_CHECKING:
    from align.engines.base import Engine, SampleResult

STAGE = "sample"


def run_sample(config: Config, number: int) -> None:
    """Sample a round; does nothing when the round has been sampled already.

    Raises:
        UserError: the round before is not complete; a question is bad, or an image when the stage begins
            (checked before weights are loaded); no question is left.
    """
    run = RunDir(config.run_dir)
    this = run.round(number)
    parent = starts_from(config, run, number)
    policy = run.checkpoint(parent, config.policy)
    check_settings(config)
    questions = questions_of_round(config, number)
    images = question_images(config)
    # What is wrong from the start is said at once; what breaks later is left out.
    begun = this.manifest.stage(STAGE) is not None
    served = bool(config.sample.servers)
    questions = pick_frames(questions, images, config, policy, served=served, leave_unreadable=begun)
    if not begun:
        check_images(questions, images)
    files = _question_files(config)
    inputs = files | {"policy": run.trained_hash(parent, policy)} | served_as(config.sample.servers, parent)
    if not begin(
        this.manifest,
        STAGE,
        settings=_settings(config),
        inputs=inputs,
        image_root=images.root,
        by_record=tuple(files),
    ):
        log.info("round %d is sampled already: %s", number, this.samples)
        return
    if is_main_process():
        _forget_changed(this, images, questions)
        record_images(this.image_hashes, images, questions, anew=True)

    def open_engine() -> Engine:
        return open_policy(
            config,
            policy,
            config.sample.servers,
            made_in_round=parent,
            open_image=images.open,
            engine=config.sample.engine,
            logs=this.server_logs / STAGE,
        )

    def work(todo: list[Question], on_record: OnRecord) -> dict[str, str]:
        readable = readable_questions(todo, images, lambda id_, fault: on_record(fault.left_out(id_)))
        return _sample(config, open_engine(), readable, number, on_record) if readable else {}

    done = map_resumable(this.samples, Samples, questions, work, label=f"round {number}: sample")
    if is_main_process():
        forget_left_out(this.image_hashes, images, questions, {line.id for line in done.left_out})
    counts = _counts(done.records, config.sample) | done.counts
    finish(this.manifest, STAGE, outputs=[this.samples], counts=counts, notes=done.notes)


def _forget_changed(this: Round, images: ImageStore, questions: list[Question]) -> None:
    """Drop finished samples of questions that are not asked like this any more, and what was judged of them."""
    changed = changed_images(this.image_hashes, images, questions)
    dropped = drop_changed(PartialFile(this.samples, Samples), questions, changed)
    PartialFile(this.scores, Judgement).keep(lambda line: line.id not in dropped)
    if dropped:
        log.info("%d questions have changed since they were sampled: they are sampled again", len(dropped))


def check_settings(config: Config) -> None:
    """Raise UserError for settings that leave nothing to sample, or no two responses to prefer between."""
    if config.questions is None:
        raise UserError("there are no questions to sample", fix="set questions, or train on pairs_file: align dpo")
    if config.sample.num_responses < 2:
        raise UserError(
            "sample.num_responses is 1: a preference needs two responses", fix="set it to 2 or more (5 is usual)"
        )
    if config.sample.temperature == 0:
        raise UserError(
            "sample.temperature is 0: all responses to a question would be the same, and none is preferred",
            fix="set it above 0 (0.7 is usual)",
        )
    if config.sample.until_pair and config.sample.max_responses <= config.sample.num_responses:
        raise UserError(
            f"sample.until_pair has nothing to draw: max_responses ({config.sample.max_responses}) is not above "
            f"num_responses ({config.sample.num_responses})",
            fix="raise sample.max_responses, or lower sample.num_responses",
        )


def check_images(questions: list[Question], images: ImageStore) -> dict[str, Header]:
    """The header of every image by its reference; raises one UserError that lists all that cannot be used."""
    problems = []
    headers: dict[str, Header] = {}
    for question in questions:
        for reference in question.images:
            try:
                if reference not in headers:
                    headers[reference] = images.header(reference)
            except UserError as error:
                problems.append(f"  - question {question.id!r}: {error}")
    if problems:
        shown = problems[:20] + ([f"  ... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError(f"{len(problems)} images cannot be used:\n" + "\n".join(shown))
    return headers


def question_seed(seed: int, number: int, question_id: str) -> int:
    """The seed of a question's responses in a round: of nothing but these three."""
    return int(text_hash(str(seed), str(number), question_id)[:15], 16)


def _sample(config: Config, engine: Engine, todo: list[Question], number: int, on_record: OnRecord) -> dict[str, str]:
    from align.engines.base import SampleRequest, SamplingSettings

    requests = [
        SampleRequest(
            id=question.id,
            messages=question.messages(),
            images=tuple(question.images),
            num_samples=config.sample.num_responses,
            seed=question_seed(config.seed, number, question.id),
        )
        for question in todo
    ]
    by_id = {question.id: (question, request.seed) for question, request in zip(todo, requests, strict=True)}
    settings = SamplingSettings(
        temperature=config.sample.temperature,
        top_p=config.sample.top_p,
        top_k=config.sample.top_k,
        max_new_tokens=config.sample.max_new_tokens,
    )

    def on_result(result: SampleResult) -> None:
        question, seed = by_id[result.id]
        on_record(Samples(id=result.id, question=question, responses=responses_of(result), seed=seed))

    engine.sample(
        requests,
        settings,
        on_result,
        further=further_samples(config.sample),
        on_unusable=lambda id_, fault: on_record(fault.left_out(id_)),
    )
    return engine.notes


def responses_of(result: SampleResult) -> list[Response]:
    """An engine's answer as records."""
    return [
        Response(text=text, num_tokens=num_tokens, finish_reason=reason)
        for text, num_tokens, reason in zip(result.texts, result.num_tokens, result.finish_reasons, strict=True)
    ]


def _counts(samples: list[Samples], settings: SampleSettings) -> dict[str, Any]:
    counts: Counter[str] = Counter(questions=len(samples))
    if settings.until_pair:
        further = [len(line.responses) - settings.num_responses for line in samples]
        counts["further_responses"] = sum(further)
        counts["questions_with_further_responses"] = sum(number > 0 for number in further)
        counts["questions_without_two_different"] = sum(
            not can_make_pair((response.text, response.finish_reason) for response in line.responses)
            for line in samples
        )
    for line in samples:
        counts["responses"] += len(line.responses)
        counts["tokens"] += sum(response.num_tokens for response in line.responses)
        counts["truncated"] += sum(response.finish_reason == "length" for response in line.responses)
        counts["undecodable"] += sum("\ufffd" in response.text for response in line.responses)
        counts["empty"] += sum(not response.text.strip() for response in line.responses)
        counts["identical"] += len(line.responses) - len({response.text for response in line.responses})
    by_source = count_by_source([line.question.source for line in samples])
    return dict(counts) | ({"questions_by_source": by_source} if by_source else {})


def _settings(config: Config) -> dict[str, object]:
    left_out = {"batch_size", "servers", "engine"}
    if not config.sample.until_pair:
        left_out |= {"until_pair", "max_responses", "further_temperature"}
    sample = config.sample.model_dump(exclude=left_out)
    shares = {one.label: {"weight": one.weight, "limit": one.limit} for one in config.sources}
    return ({"sources": shares} if len(shares) > 1 else {}) | {
        "sample": sample,
        "seed": config.seed,
        "processor": config.model.processor,
        "video_frames": config.model.video_frames,
        **arithmetic_settings(config),
    }


def _question_files(config: Config) -> dict[str, str]:
    """The content of every file of questions, for a manifest's inputs."""
    several = len(config.sources) > 1
    return {f"questions {one.label}" if several else "questions": content_hash(one.file) for one in config.sources}
