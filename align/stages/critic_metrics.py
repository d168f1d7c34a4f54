"""A round's judgements in; how far its critic can be trusted out: figures with intervals, and a person's gates.

A few questions are judged twice more: with a blank image of the same size, and with another question's image. What a
critic prefers then, it prefers without looking.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from align.errors import UserError, reward_faults
from align.media.images import ImageStore
from align.records import Samples
from align.run.folder import Round
from align.statistics import bootstrap_ratio
from reward.critics import Item, Judgement, Verdict
from reward.critics.verifier import VerifierCritic
from reward.ranking import both_orders, consistency, position_bias, tie_rate
from reward.reliability import (
    ImageDependence,
    agreement,
    blank_images,
    failed_gates,
    image_dependence,
    measure_trust,
    shuffle_images,
)

BLANK, SHUFFLED = "blank", "shuffled"
GREY = (127, 127, 127)
MOST_POSITION_BIAS, LEAST_IMAGE_DEPENDENCE, LEAST_OPTION_MASS = 0.5, 0.05, 0.1

# One question's judgement in; its share and the number of comparisons behind it out.
PerQuestion = Callable[[int], tuple[float | None, int]]


@dataclass(frozen=True)
class ControlItem:
    """A question with other images than its own; `id` says which control and which question."""

    id: str
    item: Item


def control_items(items: Sequence[Item], images: ImageStore, *, number: int, seed: int) -> list[ControlItem]:
    """Controls of `number` questions with images and at least two different responses, drawn by `seed`."""
    fit = [item for item in items if item.images and len(set(item.responses)) > 1]
    drawn = sorted(random.Random(seed).sample(range(len(fit)), min(number, len(fit))))
    chosen = [fit[place] for place in drawn]

    def blank(reference: Any) -> Image.Image:
        return Image.new("RGB", images.size(reference), GREY)

    controls = {BLANK: blank_images(chosen, blank), SHUFFLED: shuffle_images(chosen)}
    return [ControlItem(f"{name}:{item.id}", item) for name, control in controls.items() for item in control.items]


def critic_figures(
    samples: Sequence[Samples], scores: Sequence[Judgement], controls: Sequence[Judgement]
) -> dict[str, Any]:
    """Every measure that could be taken, their intervals, and how many questions and comparisons the controls had."""
    judgements = list(scores)
    by_id = {line.id: place for place, line in enumerate(scores)}
    reference = reference_judgements(samples)
    lengths = [[response.num_tokens for response in line.responses] for line in samples]
    real: dict[str, list[Judgement]] = {BLANK: [], SHUFFLED: []}
    shown: dict[str, list[Judgement]] = {BLANK: [], SHUFFLED: []}
    for line in controls:
        name, _, id_ = line.id.partition(":")
        real[name].append(judgements[by_id[id_]])
        shown[name].append(line)
    measured = measure_trust(
        judgements,
        lengths=lengths,
        reference=reference,
        blank=image_dependence(real[BLANK], shown[BLANK]),
        shuffled=image_dependence(real[SHUFFLED], shown[SHUFFLED]),
    )
    figures: dict[str, Any] = {name: round(value, 4) for name, value in measured.items() if value is not None}
    figures["intervals"] = _intervals(judgements, reference, real, shown)
    if controls:
        figures["controls"] = {name: _size(image_dependence(real[name], shown[name]), shown[name]) for name in real}
    return figures


def reference_judgements(samples: Sequence[Samples]) -> list[Judgement] | None:
    """What the verifier says of every question with a reference answer; None where no question has one."""
    if all(line.question.answer is None for line in samples):
        return None
    with reward_faults():
        return VerifierCritic().judge([item_of(line) for line in samples])


def item_of(line: Samples) -> Item:
    """A question with its responses as a critic takes it."""
    question = line.question
    return Item(
        id=line.id,
        question=question.as_text(),
        images=tuple(question.images),
        responses=tuple(response.text for response in line.responses),
        answer=question.answer,
        answer_kind=question.answer_kind,
    )


def check_gates(this: Round, gates: dict[str, float]) -> None:
    """Hold the critic of a scored round against the gates of the configuration.

    Raises:
        UserError: a gate does not hold. The scores are kept: other gates need no new judgement.
    """
    if not gates:
        return
    entry = this.manifest.stage("score")
    with reward_faults():
        failed = failed_gates(entry.counts.get("critic", {}) if entry else {}, gates)
    if failed:
        raise UserError(
            "the critic does not pass its gates: " + "; ".join(failed),
            where=str(this.scores),
            fix=(
                f"the scores are kept. Use another critic or prompt (align score --round {this.number} --redo), or go "
                f"on with these by changing critic.gates (align pairs --round {this.number} --set critic.gates={{}})"
            ),
        )


def doubts(figures: Mapping[str, Any]) -> list[str]:
    """What a person should be told at once about a critic with these figures.

    >>> doubts({"position_bias": 0.9, "consistency": 0.9})
    ['the critic prefers the response shown first (position bias 0.90)']
    """
    lines = []
    bias = figures.get("position_bias")
    if bias is not None and abs(bias) > MOST_POSITION_BIAS:
        lines.append(
            f"the critic prefers the response shown {'first' if bias > 0 else 'second'} (position bias {bias:.2f})"
        )
    dependence = figures.get("image_dependence")
    if dependence is not None and dependence < LEAST_IMAGE_DEPENDENCE:
        lines.append(f"the critic hardly looks: {dependence:.0%} of its preferences change with another image")
    mass = figures.get("mean_option_mass")
    if mass is not None and mass < LEAST_OPTION_MASS:
        lines.append(
            f"the answers that the critic is offered have {mass:.2g} of its probability: look at critic.prompt"
        )
    return lines


def _size(found: ImageDependence | None, shown: Sequence[Judgement]) -> dict[str, int]:
    return {"questions": len(shown), "compared": found.num_compared if found else 0}


def _intervals(
    judgements: Sequence[Judgement],
    reference: Sequence[Judgement] | None,
    real: dict[str, list[Judgement]],
    shown: dict[str, list[Judgement]],
) -> dict[str, dict[str, float]]:
    """95 % intervals over questions, for the measures that are means of something a question."""

    def of_verdicts(measure: Callable[[list[list[Verdict]]], float | None]) -> PerQuestion:
        return lambda i: (measure([judgements[i].verdicts]), len(judgements[i].verdicts))

    def of_pairs(measure: Callable[[list[list[Verdict]]], float | None]) -> PerQuestion:
        return lambda i: (measure([judgements[i].verdicts]), len(list(both_orders([judgements[i].verdicts]))))

    def of_control(name: str) -> PerQuestion:
        def look(i: int) -> tuple[float | None, int]:
            found = image_dependence([real[name][i]], [shown[name][i]])
            return (found.changed, found.num_compared) if found else (None, 0)

        return look

    def of_reference(i: int) -> tuple[float | None, int]:
        assert reference is not None
        found = agreement([judgements[i]], [reference[i]])
        return found.rate, found.num_pairs

    measures: dict[str, tuple[PerQuestion, int]] = {
        "consistency": (of_pairs(consistency), len(judgements)),
        "position_bias": (of_pairs(position_bias), len(judgements)),
        "tie_rate": (of_verdicts(tie_rate), len(judgements)),
        "image_dependence_blank": (of_control(BLANK), len(shown[BLANK])),
        "image_dependence_shuffled": (of_control(SHUFFLED), len(shown[SHUFFLED])),
    }
    if reference is not None:
        measures["agreement_with_reference"] = (of_reference, len(judgements))
    intervals = {name: _interval(look, number) for name, (look, number) in measures.items()}
    return {name: interval for name, interval in intervals.items() if interval}


def _interval(look: PerQuestion, number: int) -> dict[str, float] | None:
    found = [(share * weight, weight) for share, weight in map(look, range(number)) if share is not None and weight]
    if not found:
        return None
    interval = bootstrap_ratio(*zip(*found, strict=True))
    return {"low": round(interval.low, 4), "high": round(interval.high, 4), "questions": interval.count}
