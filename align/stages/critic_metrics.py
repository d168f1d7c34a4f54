"""A round's judgements in; how far its critic can be relied on out: figures with intervals, and a person's gates.

A few questions are judged twice more: with a blank image of the same size, and with another question's image. What a
critic prefers then, it prefers without looking.
"""

from __future__ import annotations

from collections.abc import Sequence

from align.errors import UserError, reward_faults
from align.media.images import ImageStore
from align.records import Samples
from align.run.folder import Round, RunDir
from align.run.ratings import people_figures
from align.stages.join import judged_hash
from reward.controls import BLANK, SHUFFLED, ControlItem, control_items
from reward.critics.verifier import VerifierCritic
from reward.judgement import Item, Judgement
from reward.reliability import Figure, failed_gates, measure, read_figures


def critic_controls(items: Sequence[Item], images: ImageStore, *, number: int, seed: int) -> list[ControlItem]:
    """Controls of `number` questions with images and at least two different responses, drawn by `seed`."""
    fit = [item for item in items if len(set(item.responses)) > 1]
    return control_items(fit, images.blank, number=number, seed=seed)


def critic_figures(
    samples: Sequence[Samples], scores: Sequence[Judgement], controls: Sequence[Judgement]
) -> dict[str, Figure]:
    """Every measure that could be taken of a round's judgements; `controls` have the ids of `control_items`."""
    by_name: dict[str, list[Judgement]] = {BLANK: [], SHUFFLED: []}
    for line in controls:
        name, _, id_ = line.id.partition(":")
        by_name[name].append(line.model_copy(update={"id": id_}))
    return measure(
        scores,
        lengths={line.id: [response.num_tokens for response in line.responses] for line in samples},
        reference=reference_judgements(samples),
        controls=by_name,
    )


def reference_judgements(samples: Sequence[Samples]) -> dict[str, Judgement] | None:
    """What the verifier says of every question, by its id; None where no question has a reference answer."""
    if all(line.question.answer is None for line in samples):
        return None
    with reward_faults():
        judgements = VerifierCritic().judge([item_of(line) for line in samples])
    return {judgement.id: judgement for judgement in judgements}


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
        key=judged_hash(line),
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
        figures = read_figures(entry.counts.get("critic")) if entry else {}
        figures |= people_figures(RunDir(this.path.parent), this.number)
        failed = failed_gates(figures, gates)
    if failed:
        raise UserError(
            "the critic does not pass its gates: " + "; ".join(failed),
            where=str(this.scores),
            fix=(
                f"the scores are kept. {_to_label(this, failed)}Use another critic or prompt (align score --round "
                f"{this.number} --redo), or accept these by changing critic.gates (align pairs --round "
                f"{this.number} --set critic.gates={{}})"
            ),
        )


def _to_label(this: Round, failed: Sequence[str]) -> str:
    """What to do where people have said too little."""
    lacking = any("_people" in line and ("could not be" in line or "too few" in line) for line in failed)
    return f"Let people compare responses: align label --round {this.number}. " if lacking else ""
