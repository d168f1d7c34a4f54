"""A run in, the warnings out: what looks wrong, by which rule, and where to look.

Each rule states its threshold in its own words, so that a reader can disagree with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report.changes import Change, History
from align.report.critic_quality import Figures
from align.report.looking import looks_less
from align.report.metrics import percent, plain
from align.report.read import RoundData, RunData, number
from align.report.training_curves import end_of
from reward.critics.base import NOTHING_TO_COMPARE
from reward.reliability import MIN_COUNT
from reward.warnings import critic_warnings

CHOSEN_FALL, WEAK_ACCURACY = 0.25, 0.55
LESS_VARIED, MAX_TRUNCATED, MAX_UNSCORED, MIN_PAIRS = 0.2, 0.05, 0.05, 0.2


@dataclass(frozen=True)
class RunWarning:
    """`finding` is what was seen in one round (None: in the run as a whole), `advice` what it means in general.

    Serious ones say that the model is worse or that a number may be wrong; the others say where to look.
    """

    title: str
    finding: str
    advice: str = ""
    number: int | None = None
    serious: bool = False


@dataclass(frozen=True)
class Warned:
    """Alarms of one title, in the order of rounds."""

    title: str
    advice: str
    serious: bool
    findings: list[tuple[int | None, str]]


def find_warnings(
    run: RunData, history: History, critics: Mapping[int, Figures], others: Sequence[RunWarning] = ()
) -> list[Warned]:
    """All warnings, `others` with them, serious ones first, otherwise in the order of the run.

    `critics` holds the critic's figures by round.
    """
    found = [*_worse_rounds(history), *_looking(run, history), *_evaluation(history)]
    for data in run.trained:
        found += [*_training(data), *_critic(data.number, critics.get(data.number, {})), *_losses(data)]
    found += [warning for data in run.rounds for warning in _fallbacks(run, data)]
    found += [warning for data in run.rounds for warning in _unfinished(data)]
    found += [*_small_parts(run), *_outdated(run), *_not_pushed(run), *others]
    return sorted(_by_title(found), key=lambda item: not item.serious)


def _by_title(warnings: list[RunWarning]) -> list[Warned]:
    groups: dict[str, list[RunWarning]] = {}
    for warning in warnings:
        groups.setdefault(warning.title, []).append(warning)
    return [
        Warned(title, group[0].advice, any(a.serious for a in group), [(a.number, a.finding) for a in group])
        for title, group in groups.items()
    ]


def _worse_rounds(history: History) -> Iterator[RunWarning]:
    for name, steps in history.steps.items():
        for step in steps:
            if step.state == "worse":
                yield RunWarning(
                    f"Worse than the round before: {step.metric.label.lower()}",
                    _how_worse(step),
                    number=step.last_round,
                    serious=name.endswith("accuracy") or name.startswith("win_rate"),
                )


def _looking(run: RunData, history: History) -> Iterator[RunWarning]:
    for less in looks_less(run, history):
        better = " Right answers became more meanwhile: it got better by looking less." if less.better else ""
        yield RunWarning(
            "Looks at the picture less than the round before",
            f"{less.text[0].upper()}{less.text[1:]}; the 95 % interval in brackets.{better}",
            "Preferences can teach to answer from the question alone. A critic that looks (its own image dependence "
            "stands below) and pairs that need the picture teach to look.",
            less.number,
            serious=less.better,
        )


def _how_worse(step: Change) -> str:
    show, span = step.metric.show, f"{step.span} {step.metric.unit}"
    if step.metric.against == "before":
        return f"It wins {show(step.last)} of the comparisons, {span} from the half that is no change (95 % interval)."
    return (
        f"{show(step.first)} in round {step.first_round}, {show(step.last)} in round {step.last_round}; the 95 %"
        f" interval of the change is {span}."
    )


def _evaluation(history: History) -> Iterator[RunWarning]:
    length = history.length_drift
    if length is not None:
        yield RunWarning(
            f"Responses became {'longer' if length.last > length.first else 'shorter'}",
            f"{plain(length.first)} tokens per response at first, {plain(length.last)} at last "
            f"({percent(length.last / length.first - 1, 0)}).",
            "A quarter more or less suggests that length itself was rewarded.",
        )
    variety = history.overall.get("distinct_2")
    if variety and variety.first > 0 and variety.last < (1 - LESS_VARIED) * variety.first:
        yield RunWarning(
            "Wording became less varied",
            f"Distinct bigrams fell from {percent(variety.first)} to {percent(variety.last)}.",
            "Responses to different questions resemble one another more than they did.",
        )


def enough_pairs(data: RoundData) -> bool:
    """Whether a training says anything: not on fewer than `MIN_COUNT` pairs, where it is known how many there were."""
    pairs = number(data.counts("dpo").get("pairs"))
    return pairs is None or pairs >= MIN_COUNT


def _training(data: RoundData) -> Iterator[RunWarning]:
    if not enough_pairs(data):
        return
    chosen, margin = end_of(data, "rewards/chosen"), end_of(data, "rewards/margins")
    if chosen is not None and margin is not None and -chosen > max(0.05, CHOSEN_FALL * margin):
        yield RunWarning(
            "The chosen reward fell",
            f"{plain(chosen)} at the end of training, at a margin of {plain(margin)}.",
            f"Chosen responses became less likely than under the reference, by more than {percent(CHOSEN_FALL, 0)} of"
            " the margin. An SFT term on the chosen response or a smaller learning rate holds them.",
            data.number,
        )
    accuracy = end_of(data, "rewards/accuracies")
    if accuracy is not None and accuracy < WEAK_ACCURACY:
        yield RunWarning(
            "The pairs taught hardly anything",
            f"{percent(accuracy)} of pairs are ranked as wanted at the end of training.",
            "Random preferences give 50 %. The preferences may be random, or the learning rate too small.",
            data.number,
        )


def _critic(round_: int, figures: Figures) -> Iterator[RunWarning]:
    for warned in critic_warnings(figures):
        yield RunWarning(warned.title, warned.finding, warned.advice, round_, serious=warned.serious)


def _losses(data: RoundData) -> Iterator[RunWarning]:
    sample, judged = data.counts("sample"), data.judged
    responses, truncated = number(sample.get("responses")), number(sample.get("truncated"))
    if responses and truncated and truncated / responses > MAX_TRUNCATED:
        yield RunWarning(
            "Many responses were cut off",
            f"{truncated:,.0f} of {responses:,.0f} ran into sample.max_new_tokens.",
            "What is cut off is judged unfairly, and is left out of pairs unless pairs.keep_truncated is set.",
            data.number,
        )
    unscored = total(_failures(judged.get("unscored")))
    if responses and unscored / responses > MAX_UNSCORED:
        yield RunWarning(
            "The critic could not score much",
            f"{unscored:,.0f} of {responses:,.0f} responses have no reward though there was something to judge.",
            "The reasons stand under Data.",
            data.number,
            serious=True,
        )
    questions, pairs = number(sample.get("questions")), number(judged.get("pairs"))
    if questions and pairs is not None and pairs / questions < MIN_PAIRS:
        yield RunWarning(
            "Few questions gave a pair",
            f"{pairs:,.0f} pairs from {questions:,.0f} questions.",
            "More responses per question or a higher temperature gives more.",
            data.number,
        )


def _failures(unscored: Any) -> Any:
    """Without the responses that the critic had nothing to compare with: all of their question's were the same."""
    if not isinstance(unscored, dict):
        return unscored
    return {reason: count for reason, count in unscored.items() if reason != NOTHING_TO_COMPARE}


def total(value: Any) -> float:
    """A count that is a number or a table by reason, added up."""
    if isinstance(value, dict):
        return sum(total(item) for item in value.values())
    return number(value) or 0.0


def _fallbacks(run: RunData, data: RoundData) -> Iterator[RunWarning]:
    for stage in data.stages.values():
        if (data.setting(stage.name, "shared_prefix") or run.setting("shared_prefix")) == "off":
            continue
        note = str(stage.notes.get("shared_prefix", ""))
        if note.startswith(("not used", "plain")):
            yield RunWarning(
                "The shared prefix was not used",
                f"{stage.name}: {note}.",
                "Results are the same; it takes longer, since every question is encoded again for every response.",
                data.number,
            )


def _small_parts(run: RunData) -> Iterator[RunWarning]:
    counts = run.evaluated[-1].counts("evaluate") if run.evaluated else {}
    parts = {
        "decide": number(counts.get("deciding_questions")),
        "are reported": number(counts.get("reported_questions")),
    }
    small = [f"{count:.0f} held-out questions {what}" for what, count in parts.items() if count and count < MIN_COUNT]
    if small:
        yield RunWarning(
            "Too few held-out questions in a part",
            f"{' and '.join(small)}: below {MIN_COUNT} a difference is mostly chance.",
            "Gates on so few do not hold, stop_if_worse never stops, and the best round may be any. More held-out "
            "questions help, or another evaluate.decision_share.",
        )


def _outdated(run: RunData) -> Iterator[RunWarning]:
    for data in run.trained:
        if data.outdated is not None:
            yield RunWarning(
                "The round before was done again",
                f"Round {data.number} {data.outdated}.",
                "Its numbers belong to no chain of rounds. Do it again from its first stage on: "
                f"align sample --round {data.number} --redo.",
                data.number,
                serious=True,
            )


def _not_pushed(run: RunData) -> Iterator[RunWarning]:
    for round_, failures in run.pushes.open_failures().items():
        yield RunWarning(
            "Not on the Hub",
            f"{len(failures)} {'push' if len(failures) == 1 else 'pushes'} failed, the last: {failures[-1].error}",
            "The checkpoint is complete here; align run tries again, and align push does by hand.",
            round_,
        )


def _unfinished(data: RoundData) -> Iterator[RunWarning]:
    for stage in data.stages.values():
        if not stage.complete:
            done = f"; {stage.progress:,} questions are finished" if stage.progress else ""
            if stage.refused is not None:
                yield RunWarning("Refused", f"{stage.name}{done}: {stage.refused}", number=data.number, serious=True)
                continue
            yield RunWarning(
                "Not finished",
                f"{stage.name} has begun and not ended{done}.",
                "The same command resumes where it stopped.",
                data.number,
            )
