"""evaluation.json: the metrics of one round's checkpoint on held-out questions, written once and read by everybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from align.errors import UserError
from align.files import write_text
from reward.intervals import Interval


class Decision(BaseModel):
    """The held-out questions that decide (align.evaluation.split), by id, and the metrics over them alone."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    questions: list[str]
    metrics: dict[str, Interval]


class EvaluationSummary(BaseModel):
    """Metrics by name, each a mean with its 95 % interval and the number of questions it rests on;
    shares from 0 to 1.

    Where some questions decide, `questions` and `metrics` are those of the others.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    round: int
    questions: int
    metrics: dict[str, Interval]
    decision: Decision | None = None

    @property
    def deciding_metrics(self) -> dict[str, Interval]:
        """What gates, stopping and selection go by."""
        return self.metrics if self.decision is None else self.decision.metrics

    @property
    def deciding_questions(self) -> set[str]:
        """Their ids; none where no questions are set apart."""
        return set() if self.decision is None else set(self.decision.questions)

    def write(self, path: Path) -> None:
        """Write the file at once."""
        content: dict[str, Any] = {"round": self.round, "questions": self.questions, "metrics": _plain(self.metrics)}
        if self.decision is not None:
            metrics = _plain(self.decision.metrics)
            content["decision"] = {"questions": self.decision.questions, "metrics": metrics}
        write_text(path, json.dumps(content, indent=2) + "\n")


def _plain(metrics: dict[str, Interval]) -> dict[str, Any]:
    return {name: interval.as_dict() for name, interval in metrics.items()}


def read_summary(path: Path) -> EvaluationSummary:
    """The metrics of an evaluated round. Raises UserError where the file is damaged."""
    try:
        return EvaluationSummary.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        problem = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error.strerror)
        number = path.parent.name.removeprefix("round-")
        raise UserError(
            f"the metrics of the evaluation are damaged ({problem})",
            where=str(path),
            fix=f"restore the file from a copy, or evaluate again: align evaluate --round {number} --redo",
        ) from None
