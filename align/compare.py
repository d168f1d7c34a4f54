"""Two run directories in, their held-out difference out, paired over the questions that both were asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from align.errors import UserError
from align.records import Evaluation, read_jsonl
from align.rundir import Round, RunDir
from align.statistics import Interval, paired_difference


def compare_runs(one: Path, other: Path) -> dict[str, Interval]:
    """The last evaluated round of `other` minus that of `one`, by metric; positive means that `other` has more.

    Raises:
        UserError: a folder has no evaluation, or the two share no held-out question.
    """
    lines_one, lines_other = (_by_id(_last_evaluated(path)) for path in (one, other))
    common = [id_ for id_ in lines_one if id_ in lines_other]
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
    absent = [pair for pair in pairs if pair[0].question.absent]
    if absent:
        found["hallucination"] = paired_difference(
            *_columns(absent, lambda line: [float(bool(response.absent_named)) for response in line.sampled])
        )
    found["response_tokens"] = paired_difference(
        *_columns(pairs, lambda line: [float(response.num_tokens) for response in line.sampled])
    )
    return found


def _columns(
    pairs: list[tuple[Evaluation, Evaluation]], value: Callable[[Evaluation], list[float]]
) -> tuple[list[list[float]], list[list[float]]]:
    return [value(one) for one, _ in pairs], [value(other) for _, other in pairs]


def _last_evaluated(path: Path) -> Round:
    rounds = [this for this in RunDir(path).rounds() if this.evaluation_lines.is_file()]
    if not rounds:
        raise UserError("no evaluation is here", where=str(path), fix="run align evaluate first")
    return rounds[-1]


def _by_id(this: Round) -> dict[str, Evaluation]:
    return {line.id: line for line in read_jsonl(this.evaluation_lines, Evaluation)}
