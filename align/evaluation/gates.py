"""A round's held-out metrics in, a person's gates on them: a round that does not pass ends the run."""

from __future__ import annotations

from collections.abc import Mapping

from align.errors import UserError, reward_faults
from align.evaluation.summary import read_summary
from align.run.folder import Round
from reward.intervals import Interval
from reward.reliability import Figure, Measure, failed_gates
from reward.reliability import check_gates as check_names

_COUNTED = "held-out questions"
MEASURES = {
    name: Measure(name, meaning, _COUNTED)
    for name, meaning in {
        "sampled_accuracy": "sampled responses that are right",
        "greedy_accuracy": "greedy responses that are right",
        "win_rate_initial": "wins over the first policy",
        "win_rate_parent": "wins over the round before",
        "hallucination": "sampled responses that name what is not there",
        "response_tokens": "tokens per response",
        "truncated": "responses cut at the token limit",
        "repetition": "4-grams that stood before",
        "refusals": "responses that decline",
        "kl": "nats per response from the first policy",
        "image_dependence": "answers that change with the picture",
        "image_dependence_change": "the same against the round before",
        "image_log_ratio": "nats per token that the picture adds to an answer",
        "image_log_ratio_change": "the same against the round before",
    }.items()
}


def check_gate_names(gates: Mapping[str, float]) -> None:
    """Raise UserError unless every gate is `max_` or `min_` before the name of a metric."""
    with reward_faults():
        check_names(gates, MEASURES)


def check_gates(this: Round, gates: Mapping[str, float]) -> None:
    """Hold an evaluated round against the gates, by the questions that decide; the first policy (round 0) passes,
    whatever it is like.

    Raises:
        UserError: a gate does not hold. The numbers are kept: other gates need no new evaluation.
    """
    if not gates or not this.number:
        return
    metrics = read_summary(this.evaluation).deciding_metrics
    with reward_faults():
        failed = failed_gates({name: _figure(interval) for name, interval in metrics.items()}, gates, MEASURES)
    if failed:
        raise UserError(
            f"round {this.number} does not pass its gates: " + "; ".join(failed),
            where=str(this.evaluation),
            fix="the checkpoint and its numbers are kept. Train it otherwise (align dpo --round "
            f"{this.number} --redo), or accept it by changing evaluate.gates",
        )


def _figure(interval: Interval) -> Figure:
    return Figure(
        value=interval.mean, low=interval.low, high=interval.high, count=interval.count, questions=interval.count
    )
