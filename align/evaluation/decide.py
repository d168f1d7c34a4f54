"""An evaluated round's answers in; evaluation.json, and which of the rounds so far is best, out.

Both follow from what lies on the disk, so that other gates, another share of deciding questions or another metric need
no answer again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align.config import Config
from align.errors import UserError
from align.evaluation.measure import Answers
from align.evaluation.selection import select_round
from align.evaluation.split import PARTS, part_notes
from align.evaluation.summary import Decision, EvaluationSummary, read_summary
from align.log import log
from align.records import Evaluation, read_jsonl
from align.run.folder import Round, RunDir

STAGE = "evaluate"


@dataclass(frozen=True)
class Decided:
    """What the manifest's entry says of it; facts are `notes`, and `selected` where a round was chosen."""

    counts: dict[str, int]
    notes: dict[str, str]
    facts: dict[str, Any]


def decide(config: Config, run: RunDir, number: int, deciding: set[str] | None) -> Decided:
    """Write evaluation.json of a round that has answered, and choose among the rounds so far where that is asked for.

    `deciding`: the ids of the questions that decide, None where none are set apart (`align.evaluation.split.split_of`).

    Raises:
        UserError: the rounds cannot be told apart by the metric that is to choose.
    """
    answers = Answers.of(run, number)
    asked = [line.id for line in answers.lines]
    apart = [] if deciding is None else [id_ for id_ in asked if id_ in deciding]
    reported = set(asked).difference(apart)
    if deciding is not None and not (apart and reported):
        raise UserError(
            "all held-out questions that could be asked are in one part: "
            + ("none is left to decide" if not apart else "none is left to report on"),
            where=str(run.round(number).path),
            fix="see which questions were left out, or take evaluate.gates, stop_if_worse and select out",
        )
    summary = EvaluationSummary(round=number, questions=len(reported), metrics=answers.metrics(reported))
    if deciding is not None:
        summary.decision = Decision(questions=apart, metrics=answers.metrics(set(apart)))
    summary.write(run.round(number).evaluation)
    return _decided(config, run, summary)


def decide_again(config: Config, run: RunDir, number: int, deciding: set[str] | None) -> None:
    """Bring evaluation.json and the manifest of an evaluated round up to the settings that decide.

    Raises:
        UserError: see `decide`; or the round was evaluated by an older version, which kept no verdicts of the critic.
    """
    this = run.round(number)
    entry = this.manifest.stage(STAGE)
    assert entry is not None
    summary = read_summary(this.evaluation)
    fits = (summary.decision is None) == (deciding is None)
    if fits and deciding is not None:
        asked = {line.id for line in read_jsonl(this.evaluation_lines, Evaluation)}
        fits = summary.deciding_questions == asked & deciding
    if fits:
        decided = _decided(config, run, summary)
    else:
        _check_comparisons(this, summary)
        decided = decide(config, run, number, deciding)
        log.info("round %d: its numbers are divided anew into those that decide and those that are reported", number)
    names = {"deciding_questions", "reported_questions"}
    counts = {name: count for name, count in entry.counts.items() if name not in names} | decided.counts
    notes = {name: note for name, note in entry.notes.items() if name != PARTS} | decided.notes
    selected = decided.facts.get("selected")
    if not fits or (counts, notes, selected) != (entry.counts, entry.notes, entry.selected):
        this.manifest.amend(STAGE, outputs=[this.evaluation], counts=counts, notes=notes, selected=selected)


def _decided(config: Config, run: RunDir, summary: EvaluationSummary) -> Decided:
    counts, notes, facts = {}, {}, {}
    if summary.decision is not None:
        num_deciding = len(summary.decision.questions)
        counts = {"deciding_questions": num_deciding, "reported_questions": summary.questions}
        notes = part_notes(num_deciding, summary.questions)
        log.info("round %d: %s", summary.round, *notes.values())
    if config.evaluate.select == "best" and summary.round:
        facts["selected"] = select_round(config, run, summary.round)
        log.info("the best so far: %s", facts["selected"].why)
    return Decided(counts, notes, facts)


def _check_comparisons(this: Round, summary: EvaluationSummary) -> None:
    """Refuse to lose win rates of an evaluation that kept no verdicts of the critic."""
    won = [name for name in {**summary.metrics, **summary.deciding_metrics} if name.startswith("win_rate_")]
    if won and not this.comparisons.is_file():
        raise UserError(
            f"the win rates of round {this.number} cannot be divided: it was evaluated by a version that kept no "
            "verdicts of the critic",
            where=str(this.path),
            fix=f"evaluate it again (align evaluate --round {this.number} --redo), or set evaluate.win_rate: false",
        )
