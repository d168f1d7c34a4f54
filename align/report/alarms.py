"""A run in, the warnings out: what looks wrong, by which rule, and where to look.

Each rule states its threshold in its own words, so that a reader can disagree with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from align.report.changes import overall, steps
from align.report.metrics import in_order, percent, plain
from align.report.read import RoundData, RunData, iter_objects, number
from align.report.trust import (
    LEAST_AGREEMENT,
    LEAST_CONSISTENCY,
    MOST_LENGTH_CORRELATION,
    MOST_POSITION_BIAS,
    Trust,
)

CHOSEN_FALL, WEAK_ACCURACY = 0.25, 0.55
LENGTH_DRIFT, MOST_TRUNCATED, MOST_UNSCORED, LEAST_PAIRS = 0.25, 0.05, 0.05, 0.2


@dataclass(frozen=True)
class Alarm:
    """`serious` ones say that a number may be wrong or the model worse; the others say where to look."""

    title: str
    detail: str
    serious: bool = False


def find_alarms(run: RunData, trust: dict[int, Trust]) -> list[Alarm]:
    """All warnings, serious ones first, otherwise in the order of the run; `trust` holds the critic's by round."""
    found = [*_worse_rounds(run), *_evaluation(run)]
    for data in run.trained:
        found += [
            *_training(data),
            *_critic(data.number, trust.get(data.number, Trust())),
            *_losses(data),
            *_fallbacks(data),
            *_unfinished(data),
        ]
    found += _leaks(run)
    return sorted(found, key=lambda item: not item.serious)


def _worse_rounds(run: RunData) -> Iterator[Alarm]:
    for name in in_order({name for data in run.rounds for name in data.metrics}):
        for step in steps(run, name):
            if step.state == "worse":
                yield Alarm(
                    f"Round {step.last_round}: {step.metric.label.lower()} is worse than before",
                    f"{step.metric.show(step.first)} in round {step.first_round}, {step.metric.show(step.last)} in round "
                    f"{step.last_round}; the change is {step.span} {step.metric.unit_of_change} (95 % interval).",
                    serious=name.endswith("accuracy") or name.startswith("win_rate"),
                )


def _evaluation(run: RunData) -> Iterator[Alarm]:
    length = overall(run, "response_tokens")
    if (
        length
        and length.first > 0
        and abs(length.last / length.first - 1) > LENGTH_DRIFT
        and length.difference.excludes_zero
    ):
        word = "longer" if length.last > length.first else "shorter"
        yield Alarm(
            f"Responses became {word}",
            f"{plain(length.first)} to {plain(length.last)} tokens a response ({percent(length.last / length.first - 1, 0)}). "
            f"More than {percent(LENGTH_DRIFT, 0)} either way suggests that length itself was rewarded.",
        )
    variety = overall(run, "distinct_2")
    if variety and variety.first > 0 and variety.last < 0.8 * variety.first:
        yield Alarm(
            "Wording became less varied",
            f"Distinct bigrams fell from {percent(variety.first)} to {percent(variety.last)}: responses resemble one another more.",
        )


def _training(data: RoundData) -> Iterator[Alarm]:
    chosen, margin = _end_of(data, "rewards/chosen"), _end_of(data, "rewards/margins")
    if (
        chosen is not None
        and margin is not None
        and chosen < 0
        and -chosen > CHOSEN_FALL * max(margin, 0.0)
        and -chosen > 0.05
    ):
        yield Alarm(
            f"Round {data.number}: the chosen reward fell",
            f"At the end of training it is {plain(chosen)} at a margin of {plain(margin)}: chosen responses became less likely "
            f"than under the reference. More than {percent(CHOSEN_FALL, 0)} of the margin is a lot; an SFT term on the chosen "
            "response or a smaller learning rate holds it.",
        )
    accuracy = _end_of(data, "rewards/accuracies")
    if accuracy is not None and accuracy < WEAK_ACCURACY:
        yield Alarm(
            f"Round {data.number}: the pairs taught hardly anything",
            f"At the end of training {percent(accuracy)} of pairs are ranked as wanted; a coin gives 50 %. "
            "The preferences may be random, or the learning rate too small.",
        )


def _end_of(data: RoundData, key: str) -> float | None:
    """Mean over the last fifth of the course."""
    values = [entry[key] for entry in data.log if key in entry]
    tail = values[-max(1, len(values) // 5) :]
    return sum(tail) / len(tail) if tail else None


def _critic(round_: int, trust: Trust) -> Iterator[Alarm]:
    figures = trust.figures
    consistency, bias = figures.get("consistency"), figures.get("position_bias")
    length, agreement = figures.get("reward_length_correlation"), figures.get("agreement")
    if consistency is not None and consistency < LEAST_CONSISTENCY:
        yield Alarm(
            f"Round {round_}: the critic contradicts itself",
            f"It says the same in both orders for {percent(consistency)} of pairs; below {percent(LEAST_CONSISTENCY, 0)} "
            "much of what it says is noise.",
            serious=consistency < 0.5,
        )
    if bias is not None and abs(bias) > MOST_POSITION_BIAS:
        place = "first" if bias > 0 else "second"
        yield Alarm(
            f"Round {round_}: the critic prefers the response shown {place}",
            f"Position bias {plain(bias)} (0 is none, 1 always the first). Judging both orders cancels it, at the price of ties.",
        )
    if length is not None and abs(length) > MOST_LENGTH_CORRELATION:
        kind = "longer" if length > 0 else "shorter"
        yield Alarm(
            f"Round {round_}: the critic likes {kind} responses",
            f"Within a question, reward and length correlate by {plain(length)}; beyond {plain(MOST_LENGTH_CORRELATION)} "
            "length may be what is learned.",
        )
    if agreement is not None and agreement < LEAST_AGREEMENT:
        yield Alarm(
            f"Round {round_}: the critic disagrees with the reference answers",
            f"Where a pair sets a right response against a wrong one, the right one was chosen in {percent(agreement)} of "
            f"cases; a coin gives 50 %, and below {percent(LEAST_AGREEMENT, 0)} the pairs teach little that is true.",
            serious=agreement < 0.5,
        )


def _losses(data: RoundData) -> Iterator[Alarm]:
    sample, score = data.counts("sample"), data.counts("score")
    responses = number(sample.get("responses"))
    truncated = number(sample.get("truncated"))
    if responses and truncated and truncated / responses > MOST_TRUNCATED:
        yield Alarm(
            f"Round {data.number}: many responses were cut off",
            f"{truncated:,.0f} of {responses:,.0f} ran into sample.max_new_tokens; what is cut off is judged unfairly.",
        )
    unscored = total(score.get("unscored"))
    if responses and unscored and unscored / responses > MOST_UNSCORED:
        yield Alarm(
            f"Round {data.number}: the critic could not score much",
            f"{unscored:,.0f} of {responses:,.0f} responses have no reward; the reasons stand in the data section.",
            serious=True,
        )
    questions, pairs = number(sample.get("questions")), number(score.get("pairs"))
    if questions and pairs is not None and pairs / questions < LEAST_PAIRS:
        yield Alarm(
            f"Round {data.number}: few questions gave a pair",
            f"{pairs:,.0f} pairs from {questions:,.0f} questions. More responses a question or a higher temperature gives more.",
        )


def total(value: Any) -> float:
    """A count that is a number or a table by reason, added up."""
    if isinstance(value, dict):
        return sum(total(item) for item in value.values())
    return number(value) or 0.0


def _fallbacks(data: RoundData) -> Iterator[Alarm]:
    for stage in data.stages.values():
        note = str(stage.notes.get("shared_prefix", ""))
        if note and not note.startswith(("exact", "off")):
            yield Alarm(
                f"Round {data.number}, {stage.name}: fell back to the plain path",
                f"{note}. Results are the same; every question is encoded again for every response.",
            )


def _unfinished(data: RoundData) -> Iterator[Alarm]:
    for stage in data.stages.values():
        if not stage.complete:
            done = f" {stage.progress:,} questions are finished." if stage.progress else ""
            yield Alarm(
                f"Round {data.number}: {stage.name} is not finished", f"Its manifest says {stage.status!r}.{done}"
            )


def _leaks(run: RunData) -> Iterator[Alarm]:
    """Held-out images that were also trained on; only told apart where both lie in one folder."""
    if run.question_images is None or run.question_images != run.evaluation_images:
        return
    held_out = {image for data in run.evaluated for line in data.lines for image in line.question.images}
    trained = {image for data in run.trained for image in _trained_images(data, run)}
    shared = held_out & trained
    if shared:
        yield Alarm(
            "Held-out images were trained on",
            f"{len(shared):,} of {len(held_out):,} held-out images also belong to training questions: the held-out numbers flatter.",
            serious=True,
        )


def _trained_images(data: RoundData, run: RunData) -> set[str]:
    pairs = iter_objects(data.folder.pairs, run.problems)
    return {str(image) for pair in pairs for image in pair.get("images") or []}
