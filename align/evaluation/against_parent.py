"""A round's evaluation and that of its parent in; what a person must be told of the two out.

Differences are paired over questions; nothing is said that lies within chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from align.evaluation.grading import hallucinates, is_right
from align.evaluation.image_dependence import Looked, dependence_differences, looked_on_disk
from align.evaluation.summary import read_summary
from align.records import Evaluated, Evaluation, read_jsonl
from align.run.folder import Round, RunDir
from align.statistics import paired_difference
from reward.intervals import Interval
from reward.reliability import MIN_COUNT

CHANGES = ("image_dependence_change", "image_log_ratio_change")


def worse_than_parent(run: RunDir, number: int) -> str | None:
    """Says so when a round's held-out metric lies below its parent's by more than chance; None otherwise.

    The metric is the accuracy of the sampled responses; where there are no reference answers, the critic's win rate
    against the parent; where no critic was asked, hallucination. Differences are paired over questions.
    """
    now, before = run.round(number), run.round(number - 1)
    if not (now.evaluation_lines.is_file() and before.evaluation_lines.is_file()):
        return None
    pairs = _same_questions(now, before)
    answered = [pair for pair in pairs if pair[0].greedy.correct is not None]
    with_absent = [pair for pair in pairs if pair[0].question.absent_objects]
    won = _win_rate_against_parent(now)
    if answered:
        change = _paired(answered, is_right)
        worse, text = change.high < 0, f"right answers {_points(change)}"
    elif won is not None:
        worse, text = won.high < 0.5, f"win rate {won.mean:.1%} [{won.low:.1%}, {won.high:.1%}]"
    elif with_absent:
        change = _paired(with_absent, hallucinates)
        worse, text = change.low > 0, f"responses that name what is not there {_points(change)}"
    else:
        return None
    return f"round {number} is worse than {_parent(number)}: {text}" if worse else None


def image_dependence_changes(run: RunDir, number: int, now: Mapping[str, Looked]) -> dict[str, Interval]:
    """By how much a round's answers (`now`) depend on the picture more than its parent's (negative: less).

    `image_dependence_change` is in shares of answers, `image_log_ratio_change` in nats per token; a round without a
    parent, or one that was not measured, has neither.
    """
    if not number:
        return {}
    found = dependence_differences(looked_on_disk(run.round(number - 1)), now)
    return {f"{name}_change": change for name, change in found.items()}


def looks_less_than_parent(run: RunDir, number: int) -> str | None:
    """Says so when a round's answers depend on the picture less than its parent's, beyond chance; None otherwise.

    Where right answers became more at the same time, the round got better by looking less.
    """
    now, before = run.round(number), run.round(number - 1)
    if not (number and now.evaluation.is_file() and before.evaluation_lines.is_file()):
        return None
    metrics = read_summary(now.evaluation).metrics
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
    answered = [pair for pair in _same_questions(now, before) if pair[0].greedy.correct is not None]
    right = _paired(answered, is_right) if answered else None
    if right is not None and right.low > 0:
        text += f"; right answers {_points(right)}: it got better by looking less"
    return f"round {number} looks at the picture less than {_parent(number)}: {text}"


def _parent(number: int) -> str:
    return "the first policy" if number == 1 else f"round {number - 1}"


def _same_questions(now: Round, before: Round) -> list[tuple[Evaluation, Evaluation]]:
    parent = {line.id: line for line in read_jsonl(before.evaluation_lines, Evaluation)}
    lines = read_jsonl(now.evaluation_lines, Evaluation)
    return [(parent[line.id], line) for line in lines if line.id in parent]


def _win_rate_against_parent(this: Round) -> Interval | None:
    metrics = read_summary(this.evaluation).metrics if this.evaluation.is_file() else {}
    return metrics.get("win_rate_initial" if this.number == 1 else "win_rate_parent")


def _paired(pairs: list[tuple[Evaluation, Evaluation]], value: Callable[[Evaluated], float]) -> Interval:
    before, now = (
        [[value(response) for response in line.sampled] for line in side] for side in zip(*pairs, strict=True)
    )
    return paired_difference(before, now)


def _points(change: Interval) -> str:
    """
    >>> _points(Interval(-0.12, -0.2, -0.04, 60))
    '-12.0 points [-20.0, -4.0]'
    """
    return f"{100 * change.mean:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
