"""A checkpoint's held-out answers in; how far they depend on the picture out.

A sample of the held-out questions, the same ones in every round and run, is asked again greedily with a blank picture
of the same size and with another question's picture. An answer that stays the same was given without looking. The
answer under the real picture is also weighed under the other two: by how much does the real one make each of its tokens
likelier (nats)? That is the pointwise mutual information of answer and picture with the control in the place of "no
picture", per token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from align.config import Config
from align.errors import UserError
from align.evaluation.grading import evaluated
from align.evaluation.log_probs import OneModel, weigh
from align.log import log
from align.media.images import ImageStore
from align.records import Evaluation, OtherImageAnswer, Question, ResponseLogProbs, read_jsonl
from align.run.folder import Round
from align.run.sharding import OnRecord, StageOutput, map_resumable
from align.statistics import bootstrap_mean, paired_difference
from reward.controls import BLANK, SHUFFLED, ControlItem, control_items
from reward.intervals import Interval, wilson
from reward.judgement import Item
from reward.texts import normalise

if TYPE_CHECKING:
    from align.engines.base import SampleRequest, SampleResult

ValueT = TypeVar("ValueT")
CONTROLS = (BLANK, SHUFFLED)
REAL = "real"
SERVED = "answers only: servers are not asked for the log-probabilities (evaluate.servers)"


def is_weighed(config: Config) -> bool:
    """Whether log-probabilities of the answers are compared, too: not on servers."""
    return config.evaluate.image_dependence > 0 and not config.evaluate.servers


def image_controls(config: Config, questions: Sequence[Question], images: ImageStore) -> list[ControlItem]:
    """The questions that are asked again, with their other pictures; the same ones in every round and run."""
    items = [
        Item(id=question.id, question=question.as_text(), images=tuple(question.images), responses=())
        for question in questions
    ]

    def blank(reference: str) -> object:
        try:
            return images.blank(reference)
        except UserError:  # found when it is asked about, and left out then
            return reference

    return control_items(items, blank, number=config.evaluate.image_dependence, seed=0)


def ask_again(
    config: Config,
    this: Round,
    checkpoint: str,
    questions: Sequence[Question],
    controls: Sequence[ControlItem],
    models: OneModel,
) -> StageOutput:
    """Greedy answers under the other pictures; what is finished is kept."""
    from align.engines.base import SampleRequest, SamplingSettings

    by_id = {question.id: question for question in questions}
    settings = SamplingSettings(temperature=0.0, max_new_tokens=config.evaluate.max_new_tokens)

    def request_of(control: ControlItem) -> SampleRequest:
        messages = by_id[control.item.id].messages()
        return SampleRequest(control.id, messages, tuple(control.item.images), num_samples=1, seed=config.seed)

    def work(todo: list[ControlItem], on_record: OnRecord) -> dict[str, str]:
        asked = {control.id: by_id[control.item.id] for control in todo}

        def keep(result: SampleResult) -> None:
            (answer,) = evaluated(result, asked[result.id])
            on_record(OtherImageAnswer(id=result.id, answer=answer))

        engine = models.get(checkpoint)
        engine.sample(
            [request_of(control) for control in todo],
            settings,
            keep,
            on_unusable=lambda id_, fault: on_record(fault.left_out(id_)),
        )
        return engine.notes

    label = f"round {this.number}: evaluate, other images"
    return map_resumable(this.other_image_answers, OtherImageAnswer, controls, work, label=label)


def weigh_answers(
    config: Config,
    this: Round,
    checkpoint: str,
    lines: Sequence[Evaluation],
    controls: Sequence[ControlItem],
    models: OneModel,
    images: ImageStore,
) -> tuple[list[ResponseLogProbs], dict[str, str]]:
    """The greedy answers' log-probabilities under the real picture and the others, at temperature 1; and notes."""
    if not controls or not is_weighed(config):
        return [], {"image_dependence": SERVED} if controls else {}
    from align.engines.base import GivenResponses

    by_id = {line.id: line for line in lines}

    def given(id_: str, line: Evaluation, shown: Sequence[object]) -> GivenResponses:
        return GivenResponses(id_, line.question.messages(), tuple(shown), (tuple(line.greedy.token_ids),))

    asked = dict.fromkeys(control.item.id for control in controls)
    real = [given(f"{REAL}:{id_}", by_id[id_], by_id[id_].question.images) for id_ in asked]
    other = [given(control.id, by_id[control.item.id], control.item.images) for control in controls]
    label = f"round {this.number}: answers under other images"
    return weigh(this.image_log_probs, [*real, *other], checkpoint, models, images=images, label=label).records, {}


@dataclass(frozen=True)
class Looked:
    """What the other picture of one kind did to each question's answer, by question id.

    `changed`: 1 where the answer is another one; `log_ratios`: nats per token by which the real picture makes the
    answer likelier; `correct`: whether the answer without the picture is right, where that is known.
    """

    changed: dict[str, float]
    log_ratios: dict[str, float]
    correct: dict[str, bool]

    def of(self, ids: Collection[str]) -> Looked:
        """The same of the questions with these ids alone."""
        return Looked(_some(self.changed, ids), _some(self.log_ratios, ids), _some(self.correct, ids))


def looked(
    lines: Sequence[Evaluation], answers: Sequence[OtherImageAnswer], log_probs: Sequence[ResponseLogProbs]
) -> dict[str, Looked]:
    """Per control what became of the answers that were asked again."""
    greedy = {line.id: line.greedy for line in lines}
    weighed = {line.id: (line.log_probs[0], line.num_tokens[0]) for line in log_probs}
    found = {name: Looked({}, {}, {}) for name in CONTROLS}
    for again in answers:
        name, _, id_ = again.id.partition(":")
        if id_ not in greedy:
            continue
        found[name].changed[id_] = float(normalise(again.answer.text) != normalise(greedy[id_].text))
        if again.answer.correct is not None:
            found[name].correct[id_] = again.answer.correct
        own, other = weighed.get(f"{REAL}:{id_}"), weighed.get(again.id)
        if own is not None and other is not None and own[1] and math.isfinite(own[0] - other[0]):
            found[name].log_ratios[id_] = (own[0] - other[0]) / own[1]
    return found


def looked_on_disk(this: Round) -> dict[str, Looked]:
    """The same from a round's files; empty where it was not measured."""
    if not (this.evaluation_lines.is_file() and this.other_image_answers.is_file()):
        return {}
    log_probs = read_jsonl(this.image_log_probs, ResponseLogProbs) if this.image_log_probs.is_file() else []
    answers = read_jsonl(this.other_image_answers, OtherImageAnswer)
    return looked(read_jsonl(this.evaluation_lines, Evaluation), answers, log_probs)


def measure_looking(found: Mapping[str, Looked]) -> dict[str, Interval]:
    """The metrics with 95 % intervals: Wilson's for shares of answers, bootstrap over questions for log ratios.

    `image_dependence`: answers that change with the picture, the lower share of the two controls. `image_log_ratio`:
    nats per token, the lower of the two. `greedy_accuracy_blank` and `_shuffled`: what is right without the picture.
    """
    metrics: dict[str, Interval] = {}
    for name, one in found.items():
        if one.changed:
            metrics[f"image_dependence_{name}"] = _share(list(one.changed.values()))
        if one.log_ratios:
            metrics[f"image_log_ratio_{name}"] = bootstrap_mean(list(one.log_ratios.values()))
            if len(one.log_ratios) < len(one.changed):
                left_out = len(one.changed) - len(one.log_ratios)
                log.warning("image log ratio, %s: %d answers cannot be weighed and are left out", name, left_out)
        if one.correct:
            metrics[f"greedy_accuracy_{name}"] = _share(list(one.correct.values()))
    for metric in ("image_dependence", "image_log_ratio"):
        both = [metrics[f"{metric}_{name}"] for name in found if f"{metric}_{name}" in metrics]
        if both:
            metrics[metric] = min(both, key=lambda interval: interval.mean)
    return metrics


def dependence_differences(before: Mapping[str, Looked], now: Mapping[str, Looked]) -> dict[str, Interval]:
    """How much more the answers of one evaluated round depend on the picture than those of another, by metric.

    Paired over the questions of both, over both controls together; empty where one of them was not measured.
    """
    found = {}
    for metric, what in {"image_dependence": "changed", "image_log_ratio": "log_ratios"}.items():
        old, new = ([getattr(side[name], what) for name in CONTROLS if name in side] for side in (before, now))
        ids = sorted({id_ for values in old for id_ in values} & {id_ for values in new for id_ in values})
        if ids:
            rows = [[[values[id_] for values in side if id_ in values] for id_ in ids] for side in (old, new)]
            found[metric] = paired_difference(*rows)
    return found


def _some(values: Mapping[str, ValueT], ids: Collection[str]) -> dict[str, ValueT]:
    return {id_: value for id_, value in values.items() if id_ in ids}


def _share(flags: Sequence[float]) -> Interval:
    return wilson(round(sum(flags)), len(flags))
