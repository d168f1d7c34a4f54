"""A round's evaluation and that of its parent in; what a person must be told of the two out.

Differences are paired over questions; nothing is said that lies within chance. What is told comes from the questions
that are reported; what ends a run (`evaluate.stop_if_worse`) from those that decide, where some are set apart.
"""

from __future__ import annotations

from collections.abc import Callable

from align.evaluation.grading import hallucinates, is_right
from align.evaluation.summary import EvaluationSummary, read_summary
from align.records import Evaluated, Evaluation, read_jsonl
from align.run.folder import Round, RunDir
from align.run.parents import name_of, parent_of
from align.statistics import paired_difference
from reward.intervals import Interval
from reward.reliability import MIN_COUNT

CHANGES = ("image_dependence_change", "image_log_ratio_change")


def worse_than_parent(run: RunDir, number: int, *, by: str = "auto", deciding: bool = False) -> str | None:
    """Says so when a round's held-out metric lies below its parent's by more than chance; None otherwise.

    The metric is `by` (`evaluate.select_metric`); with `auto` the accuracy of the sampled responses, where there are no
    reference answers the critic's win rate against the parent, where no critic was asked hallucination. Differences are
    paired over questions: those that decide with `deciding`, else those that are reported. Fewer than 20 say nothing.
    """
    parent = parent_of(run, number)
    now, before = run.round(number), run.round(parent)
    if not (now.evaluation_lines.is_file() and before.evaluation_lines.is_file()):
        return None
    summary = read_summary(now.evaluation) if now.evaluation.is_file() else None
    pairs = _same_questions(now, before, summary, deciding=deciding)
    answered = [pair for pair in pairs if pair[0].greedy.correct is not None]
    with_absent = [pair for pair in pairs if pair[0].question.absent_objects]
    won = _win_rate_against_parent(summary, parent, deciding=deciding)
    if answered and by in ("auto", "sampled_accuracy"):
        change = _paired(answered, is_right)
        worse, text = change.high < 0, f"right answers {_points(change)}"
    elif answered and by == "greedy_accuracy":
        change = _paired(answered, is_right, greedy=True)
        worse, text = change.high < 0, f"right greedy answers {_points(change)}"
    elif won is not None and by in ("auto", "win_rate"):
        change = won
        worse, text = won.high < 0.5, f"win rate {won.mean:.1%} [{won.low:.1%}, {won.high:.1%}]"
    elif with_absent and by in ("auto", "hallucination"):
        change = _paired(with_absent, hallucinates)
        worse, text = change.low > 0, f"responses that name what is not there {_points(change)}"
    else:
        return None
    worse = worse and change.count >= MIN_COUNT
    apart = f" on {len(pairs)} questions set apart for decisions" if deciding and summary and summary.decision else ""
    return f"round {number} is worse than {name_of(parent)}{apart}: {text}" if worse else None


def looks_less_than_parent(run: RunDir, number: int) -> str | None:
    """Says so when a round's answers depend on the picture less than its parent's, beyond chance; None otherwise.

    Where right answers became more at the same time, the round got better by looking less.
    """
    parent = parent_of(run, number)
    now, before = run.round(number), run.round(parent)
    if not (number and now.evaluation.is_file() and before.evaluation_lines.is_file()):
        return None
    summary = read_summary(now.evaluation)
    metrics = summary.metrics
    less = {name: metrics[name] for name in CHANGES if name in metrics}
    less = {name: change for name, change in less.items() if change.high < 0 and change.count >= MIN_COUNT}
    if not less:
        return None
    said = {
        "image_dependence_change": lambda change: f"answers that change with the picture {_points(change)}",
        "image_log_ratio_change": lambda change: (
            f"what the picture adds to an answer {change.mean:+.3f} nats per token "
            f"[{change.low:+.3f}, {change.high:+.3f}]"
        ),
    }
    text = ", ".join(said[name](change) for name, change in less.items())
    answered = [pair for pair in _same_questions(now, before, summary) if pair[0].greedy.correct is not None]
    right = _paired(answered, is_right) if answered else None
    if right is not None and right.low > 0:
        text += f"; right answers {_points(right)}: it got better by looking less"
    return f"round {number} looks at the picture less than {name_of(parent)}: {text}"


def _same_questions(
    now: Round, before: Round, summary: EvaluationSummary | None, *, deciding: bool = False
) -> list[tuple[Evaluation, Evaluation]]:
    """The answers of both rounds to the questions that decide, or to the others; to all where none are set apart."""
    apart = summary.deciding_questions if summary is not None else set()
    parent = {line.id: line for line in read_jsonl(before.evaluation_lines, Evaluation)}
    lines = read_jsonl(now.evaluation_lines, Evaluation)
    wanted = [line for line in lines if not apart or (line.id in apart) == deciding]
    return [(parent[line.id], line) for line in wanted if line.id in parent]


def _win_rate_against_parent(summary: EvaluationSummary | None, parent: int, *, deciding: bool) -> Interval | None:
    if summary is None:
        return None
    metrics = summary.deciding_metrics if deciding else summary.metrics
    return metrics.get("win_rate_parent" if parent else "win_rate_initial")


def _paired(
    pairs: list[tuple[Evaluation, Evaluation]], value: Callable[[Evaluated], float], *, greedy: bool = False
) -> Interval:
    before, now = (
        [[value(response) for response in ([line.greedy] if greedy else line.sampled)] for line in side]
        for side in zip(*pairs, strict=True)
    )
    return paired_difference(before, now)


def _points(change: Interval) -> str:
    """
    >>> _points(Interval(-0.12, -0.2, -0.04, 60))
    '-12.0 points [-20.0, -4.0]'
    """
    return f"{100 * change.mean:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
