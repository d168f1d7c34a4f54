"""What an evaluated round has left on the disk in, its held-out metrics out: of all questions, or of some.

No model and no critic is asked: what they said lies beside the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from align.evaluation.grading import hallucinates, is_right
from align.evaluation.image_dependence import Looked, dependence_differences, looked_on_disk, measure_looking
from align.evaluation.kl import divergence
from align.evaluation.win_rate import win_rates
from align.records import Compared, Evaluated, Evaluation, ResponseLogProbs, read_jsonl
from align.run.folder import RunDir
from align.run.parents import parent_of
from align.statistics import bootstrap_mean, bootstrap_share, distinct_n, is_refusal, repetition
from reward.intervals import Interval

LineT = TypeVar("LineT", Evaluation, ResponseLogProbs, Compared)


@dataclass(frozen=True)
class Answers:
    """An evaluated round's answers, and what was found of them.

    `looked` and `parent_looked` say what other pictures did to them and to the parent's; `own` and `first` weigh the
    sampled ones under the checkpoint and the first policy; each is empty where that was not measured.
    """

    lines: list[Evaluation]
    looked: dict[str, Looked]
    parent_looked: dict[str, Looked]
    own: list[ResponseLogProbs]
    first: list[ResponseLogProbs]
    compared: list[Compared]

    @classmethod
    def of(cls, run: RunDir, number: int) -> Answers:
        """Those of a round (0: the first policy)."""
        this = run.round(number)
        own, first = (
            read_jsonl(path, ResponseLogProbs) if path.is_file() else []
            for path in (this.own_log_probs, this.first_log_probs)
        )
        return cls(
            lines=read_jsonl(this.evaluation_lines, Evaluation),
            looked=looked_on_disk(this),
            parent_looked=looked_on_disk(run.round(parent_of(run, number))) if number else {},
            own=own,
            first=first,
            compared=read_jsonl(this.comparisons, Compared) if this.comparisons.is_file() else [],
        )

    def metrics(self, ids: Collection[str]) -> dict[str, Interval]:
        """The metrics over the questions with these ids."""
        looked = {name: one.of(ids) for name, one in self.looked.items()}
        found = measure(_some(self.lines, ids))
        found |= divergence(_some(self.own, ids), _some(self.first, ids))
        found |= measure_looking(looked)
        changes = dependence_differences(self.parent_looked, looked)
        found |= {f"{name}_change": change for name, change in changes.items()}
        won = win_rates(_some(self.compared, ids))
        return found | {f"win_rate_{name}": one.rate for name, one in won.items() if one.rate is not None}


def _some(lines: Sequence[LineT], ids: Collection[str]) -> list[LineT]:
    return [line for line in lines if line.id in ids]


def measure(lines: list[Evaluation]) -> dict[str, Interval]:
    """The held-out metrics, each with its 95 % interval from resampling questions."""
    metrics = {}
    answered = [line for line in lines if line.greedy.correct is not None]
    if answered:
        metrics["greedy_accuracy"] = bootstrap_share([float(bool(line.greedy.correct)) for line in answered])
        metrics["sampled_accuracy"] = _over_samples(answered, is_right)
    with_absent = [line for line in lines if line.question.absent_objects]
    if with_absent:
        metrics["hallucination"] = _over_samples(with_absent, hallucinates)
    metrics["response_tokens"] = bootstrap_mean([[float(one.num_tokens) for one in line.sampled] for line in lines])
    metrics["truncated"] = _over_samples(lines, lambda response: float(response.finish_reason == "length"))
    metrics["repetition"] = _over_samples(lines, lambda response: repetition(response.text))
    metrics["refusals"] = _over_samples(lines, lambda response: float(is_refusal(response.text)))
    texts = [response.text for line in lines for response in line.sampled]
    share = distinct_n(texts, 2)
    metrics["distinct_2"] = Interval(share, share, share, len(texts))
    return metrics


def _over_samples(lines: list[Evaluation], value: Callable[[Evaluated], float]) -> Interval:
    """The mean of a share from 0 to 1 over all sampled responses."""
    return bootstrap_share([[value(response) for response in line.sampled] for line in lines])
