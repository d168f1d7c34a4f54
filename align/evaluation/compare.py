"""Two run directories in, their held-out difference out, paired over the questions that both were asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from align.errors import UserError
from align.evaluation.image_dependence import dependence_differences, looked_on_disk
from align.evaluation.kl import kl_of_questions
from align.evaluation.summary import read_summary
from align.evaluation.table import COLUMNS, NOT_SHARES, columns_of, digits_of, metrics_by_round, with_interval
from align.records import Evaluation, read_jsonl
from align.run.folder import Round, RunDir
from align.run.parents import selected_by
from align.statistics import paired_difference
from reward.intervals import Interval


def compare_runs(one: Path, other: Path) -> dict[str, Interval]:
    """The last evaluated round of `other` minus that of `one`, by metric; positive means that `other` has more.

    Of a run that has chosen a round (`evaluate.select: best`) that one; questions that have chosen are left out.

    Raises:
        UserError: a folder has no evaluation, or the two share no held-out question.
    """
    last = [_result(path) for path in (one, other)]
    lines_one, lines_other = (_by_id(this) for this in last)
    # What has chosen a checkpoint of either run says nothing of it.
    apart = {
        id_ for this in last if this.evaluation.is_file() for id_ in read_summary(this.evaluation).deciding_questions
    }
    common = [id_ for id_ in lines_one if id_ in lines_other and id_ not in apart]
    if not common:
        raise UserError(
            f"{one} and {other} were evaluated on different questions", fix="evaluate both on the same file"
        )
    pairs = [(lines_one[id_], lines_other[id_]) for id_ in common]
    answered = [pair for pair in pairs if pair[0].greedy.correct is not None]
    found: dict[str, Interval] = {}
    if answered:
        found["greedy_accuracy"] = paired_difference(
            *_columns(answered, lambda line: [float(bool(line.greedy.correct))])
        )
        found["sampled_accuracy"] = paired_difference(
            *_columns(answered, lambda line: [float(bool(response.correct)) for response in line.sampled])
        )
    absent = [pair for pair in pairs if pair[0].question.absent_objects]
    if absent:
        found["hallucination"] = paired_difference(
            *_columns(absent, lambda line: [float(bool(response.absent_named)) for response in line.sampled])
        )
    moved_one, moved_other = (kl_of_questions(this) for this in last)
    moved = [id_ for id_ in common if id_ in moved_one and id_ in moved_other]
    if moved:
        found["kl"] = paired_difference([moved_one[id_] for id_ in moved], [moved_other[id_] for id_ in moved])
    looked = [{name: found.of(common) for name, found in looked_on_disk(this).items()} for this in last]
    found |= dependence_differences(*looked)
    found["response_tokens"] = paired_difference(
        *_columns(pairs, lambda line: [float(response.num_tokens) for response in line.sampled])
    )
    return found


def print_comparison(one: Path, other: Path) -> None:
    """Print the last rounds of two runs side by side, with their paired difference where it can be had.

    Raises:
        UserError: see `compare_runs`.
    """
    from rich.console import Console
    from rich.table import Table

    differences = compare_runs(one, other)
    last = [_result(path).number for path in (one, other)]
    rounds = [metrics_by_round(path).get(number, {}) for path, number in zip((one, other), last, strict=True)]
    title = "Held-out questions: mean, 95 % interval; differences over the questions that both were asked"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column()
    for path, number in zip((one, other), last, strict=True):
        table.add_column(f"{path.name}\nround {number}", justify="right")
    table.add_column("difference", justify="right")
    for name in columns_of(rounds):
        cells = [with_interval(name, metrics.get(name)).replace(" ", "\n", 1) for metrics in rounds]
        table.add_row(COLUMNS[name], *cells, _difference(name, differences.get(name)))
    Console().print(table)


def _difference(name: str, change: Interval | None) -> str:
    """
    >>> _difference("greedy_accuracy", Interval(0.1, -0.05, 0.25, 60))
    '+10.0, unclear\\n[-5.0, +25.0]'
    """
    if change is None:
        return "-"
    scale = 1.0 if name in NOT_SHARES else 100.0
    digits = digits_of(name, change.mean)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (change.mean, change.low, change.high))
    return f"{mean}{'' if change.excludes_zero else ', unclear'}\n[{low}, {high}]"


def _columns(
    pairs: list[tuple[Evaluation, Evaluation]], value: Callable[[Evaluation], list[float]]
) -> tuple[list[list[float]], list[list[float]]]:
    return [value(one) for one, _ in pairs], [value(other) for _, other in pairs]


def _result(path: Path) -> Round:
    """The round that a run results in: the last that was evaluated, or the one that it has chosen."""
    run = RunDir(path)
    rounds = [this for this in run.rounds() if this.evaluation_lines.is_file()]
    if not rounds:
        raise UserError("no evaluation is here", where=str(path), fix="run align evaluate first")
    chosen = selected_by(run, rounds[-1].number)
    return rounds[-1] if chosen is None else run.round(chosen.round)


def _by_id(this: Round) -> dict[str, Evaluation]:
    return {line.id: line for line in read_jsonl(this.evaluation_lines, Evaluation)}
