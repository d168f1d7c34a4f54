"""A run's held-out numbers in, the sentence that stands first in the report out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from align.report.changes import MIN_QUESTIONS, Change, History, State, headline, history
from align.report.critic_quality import Figures
from align.report.diagnosis import find_diagnoses
from align.report.looking import looks_less
from align.report.metrics import metric
from align.report.read import RunData, number
from align.run.parents import name_of


@dataclass(frozen=True)
class Verdict:
    """`state` colours it, `title` says it, `detail` says how sure.

    `warnings` are rounds that are worse than their parent, look less or have none, `control` compares with the control,
    `diagnoses` say what was learned instead of being right, or besides.
    """

    state: State
    title: str
    detail: str
    warnings: list[str] = field(default_factory=list)
    control: str | None = None
    diagnoses: list[str] = field(default_factory=list)


def judge(run: RunData, changes: History, control: RunData | None, critics: Mapping[int, Figures]) -> Verdict:
    """The verdict on a run with these changes; `critics` holds its critic's figures by round."""
    name = headline(run)
    moved = changes.overall.get(name) if name else None
    improved = moved is not None and moved.state == "better"
    diagnoses = find_diagnoses(run, changes, critics, improved=improved)
    texts = [diagnosis.text for diagnosis in diagnoses]
    if name is None or moved is None:
        return Verdict("neutral", *(_nothing_measured(run) if name is None else _one_round(run, name)), diagnoses=texts)
    title, waiting, chosen = _title(moved), _waiting(run), _chosen(run)
    if waiting and not moved.too_few:
        title = title.replace(":", " so far:", 1)
    if run.result == 0:
        title = "No round was chosen: the run results in the first policy."
    if diagnoses:
        title = f"{title[:-1]}; {diagnoses[0].short}."
    warnings = [f"Round {data.number} {data.outdated}." for data in run.trained if data.outdated is not None]
    warnings += [_warning(step) for step in changes.steps[name] if step.state == "worse"]
    warnings += [
        f"Round {less.number} got better by looking less: {less.text}."
        if less.better
        else f"Round {less.number} looks at the picture less than its parent: {less.text}."
        for less in looks_less(run, changes)
    ]
    few = f"Below {MIN_QUESTIONS} held-out questions nothing is called better or worse." if moved.too_few else ""
    detail = " ".join(filter(None, [_detail(moved), few, chosen, waiting]))
    return Verdict(
        moved.state if run.result else "neutral", title, detail, warnings, _control(name, moved, control), texts
    )


def _waiting(run: RunData) -> str:
    """Says which rounds are still to come; empty when the last round that was asked for has been evaluated."""
    asked, last = number(run.setting("rounds")), run.evaluated[-1].number
    if asked is None or last >= asked:
        return ""
    return f"Of {asked:.0f} rounds {last} {'is' if last == 1 else 'are'} evaluated."


def _chosen(run: RunData) -> str:
    """Which round the verdict is on and why, and that other questions chose it; empty where none did."""
    chosen, apart = run.selected, run.evaluated[-1].num_deciding
    if not apart:
        return ""
    others = f"None of the {apart} questions that decide (gates, stopping, selection) is among these numbers."
    return others if chosen is None else f"Chosen: {chosen.why}. {others}"


def _nothing_measured(run: RunData) -> tuple[str, str]:
    if run.evaluated:
        return (
            "It is not known whether the model improved.",
            (
                "The held-out questions have no reference answers and no critic model compared the rounds, so nothing"
                " was measured that is good or bad. The curves below show how the responses changed."
            ),
        )
    if run.setting("evaluate", "questions"):
        return ("Not evaluated yet.", "No round has held-out numbers so far; the report fills as stages finish.")
    return (
        "Not evaluated: it is not known whether the model improved.",
        "The run has no held-out questions (evaluate.questions). Training curves alone cannot tell.",
    )


def _one_round(run: RunData, name: str) -> tuple[str, str]:
    data = next(data for data in run.rounds if name in data.metrics)
    known, value = metric(name), data.metrics[name]
    return (
        "Too early to say: one evaluation so far.",
        (
            f"{known.label}: {known.show(value.mean)} in round {data.number} "
            f"({known.show(value.low)} to {known.show(value.high)}, {value.count} held-out questions)."
        ),
    )


_NOUNS = {
    "sampled_accuracy": "right answers",
    "greedy_accuracy": "right answers",
    "hallucination": "responses naming what is not there",
}


def _title(moved: Change) -> str:
    if moved.too_few:
        numbers = f"{moved.metric.show(moved.first)} before, {moved.metric.show(moved.last)} after"
        return f"Too few held-out questions for a verdict: {moved.metric.label.lower()} {numbers}."
    if moved.metric.against:
        word = {"better": "Better", "worse": "Worse"}.get(moved.state, "No improvement shown")
        return f"{word}: it wins {moved.metric.show(moved.last)} against the first policy."
    noun = _NOUNS.get(moved.metric.name, moved.metric.label.lower())
    first, last = moved.metric.show(moved.first), moved.metric.show(moved.last)
    verb = "rose" if moved.difference.mean > 0 else "fell"
    if moved.state == "unclear":
        return f"No improvement shown: {noun} {first} before, {last} after."
    word = "Better" if moved.state == "better" else "Worse"
    return f"{word}: {noun} {verb} from {first} to {last}."


def _detail(moved: Change) -> str:
    if moved.metric.against:
        low, high = (moved.metric.show(0.5 + end) for end in (moved.difference.low, moved.difference.high))
        return (
            "The critic compared its responses with the first policy's in both orders; a tie is half, so 50\u00a0% is"
            f" no change. The 95\u00a0% interval is {low} to {high} ({moved.difference.count} held-out questions)."
        )
    how = "same questions, paired" if moved.paired else "unpaired: the responses of both rounds are not on disk"
    which = (
        "sampled responses"
        if moved.metric.name.startswith("sampled")
        else "greedy responses"
        if moved.metric.name.startswith("greedy")
        else "responses"
    )
    return (
        f"{moved.metric.show_change(moved.difference.mean)} {moved.metric.unit} from {name_of(moved.first_round)} "
        f"to {name_of(moved.last_round)}; the 95 % interval is {moved.span} "
        f"({moved.difference.count} held-out questions, {which}, {how})."
    ).replace("95 %", "95\u00a0%")


def _warning(step: Change) -> str:
    size = step.metric.show_change(step.difference.mean)
    return (
        f"Round {step.last_round} is worse than {name_of(step.first_round)}: {step.metric.label.lower()} "
        f"{step.metric.show(step.first)} to {step.metric.show(step.last)} ({size} {step.metric.unit}, "
        f"interval {step.span})."
    )


def _control(name: str, moved: Change, control: RunData | None) -> str | None:
    if control is None:
        return None
    beside = history(control).overall.get(name)
    if beside is None:
        return f"The control ({control.name}) has no two evaluations of this number to compare with."
    text = (
        f"The control ({control.name}) moved by {beside.metric.show_change(beside.difference.mean)} "
        f"{beside.metric.unit} ({beside.span})"
    )
    apart = moved.difference.low > beside.difference.high or moved.difference.high < beside.difference.low
    return text + ("; the two intervals do not touch." if apart else "; the two intervals overlap.")
