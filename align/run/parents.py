"""Which round's checkpoint a round starts from, or has started from: the one before, or the one that was chosen.

With `evaluate.select: best` every evaluation says which of the rounds so far is best (`SelectedRound` in its manifest);
the next round starts from that one, and the run results in it. Round 0 is the first policy.
"""

from __future__ import annotations

from align.config import Config
from align.errors import UserError
from align.run.folder import RunDir
from align.run.manifest import SelectedRound
from align.run.outdated import policy_hash


def name_of(number: int) -> str:
    """A round as people call it."""
    return f"round {number}" if number else "the first policy"


def starts_from(config: Config, run: RunDir, number: int) -> int:
    """The round whose checkpoint round `number` is to start from.

    Raises:
        UserError: the round before is not complete, or has not chosen yet.
    """
    if number < 1:
        raise UserError(f"there is no round {number}", fix="rounds count from 1")
    before = run.round(number - 1)
    if number > 1:
        before.need("dpo", f"round {number} starts from it", f"align dpo --round {number - 1}")
    if number == 1 or config.evaluate.select == "last":
        return number - 1
    selected = selected_by(run, number - 1)
    if selected is None or selected.by != config.evaluate.select_metric:
        raise UserError(
            f"it is not known which round is the best so far, and round {number} starts from it "
            "(evaluate.select: best)",
            where=str(before.path),
            fix=f"run `align evaluate --round {number - 1}` first; what is evaluated already is not asked again",
        )
    return selected.round


def selected_by(run: RunDir, number: int) -> SelectedRound | None:
    """What a round's evaluation has chosen among the rounds up to it; None where it has not."""
    entry = run.round(number).manifest.stage("evaluate")
    return entry.selected if entry is not None and entry.complete else None


def parent_of(run: RunDir, number: int) -> int:
    """The round whose checkpoint a round that has begun was made from; the one before where it has not begun."""
    if number < 2:
        return 0
    chosen = selected_by(run, number - 1)
    began_with = policy_hash(run.round(number).manifest.stages())
    return chosen.round if chosen is not None and chosen.checkpoint == began_with else number - 1


def result_of(config: Config, run: RunDir, last: int) -> int:
    """The round that a run whose last evaluated round is `last` results in."""
    selected = selected_by(run, last) if config.evaluate.select == "best" else None
    return last if selected is None else selected.round
