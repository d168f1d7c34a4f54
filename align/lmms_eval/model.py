"""Our answers as a model of lmms-eval: the class that its evaluator asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align import accelerator
from align.errors import UserError
from align.lmms_eval.instances import Answered
from align.lmms_eval.requests import Answerer


def as_model(answerer: Answerer) -> Any:
    """A `lmms_eval.api.model.lmms` that answers through `answerer`, whose `datasets` lmms-eval fills."""
    from accelerate import Accelerator
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms

    class AlignModel(lmms):
        def __init__(self) -> None:
            super().__init__()
            self.task_dict = answerer.datasets
            self.accelerator = Accelerator(cpu=accelerator.kind() == "cpu")
            self.device = self.accelerator.device

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [answer.text if answer else "" for answer in _all_but_padding(requests, answerer.generate)]

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            answers = _all_but_padding(requests, answerer.score)
            pairs = [
                as_lmms_eval_wants(answer, callable(request.args[1])) if answer else (0.0, False)
                for request, answer in zip(requests, answers, strict=True)
            ]
            # The evaluator of 0.7.3 turns a bare pair into text, which its metrics cannot read
            # (unwrap_generation_output); what is wrapped it hands on as it is.
            return [GenerationResult(text=pair) for pair in pairs]

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise UserError("tasks of several rounds are not supported", where=requests[0].task_name)

        def clean(self) -> None:
            """Nothing: the evaluator would delete the model after each task."""

    return AlignModel()


def as_lmms_eval_wants(answer: Answered, whole: bool) -> tuple[float, bool]:
    """What lmms-eval's metrics take for a log-likelihood.

    Of tasks that choose between continuations they take the smallest number
    (`multiple_choice` in its api/task.py), since
    its models hand out the loss: the mean negative log-probability of a token. Of tasks with one continuation (`whole`)
    they take the log-probability, for perplexity.

    >>> answer = Answered(id="a", task="t", doc_id=0, prompt="?", continuation=" A", num_tokens=2, log_prob=-3.0)
    >>> as_lmms_eval_wants(answer, whole=False), as_lmms_eval_wants(answer, whole=True)
    ((1.5, False), (-3.0, False))
    """
    assert answer.log_prob is not None
    return (answer.log_prob if whole else -answer.log_prob / answer.num_tokens), answer.is_greedy


def _all_but_padding(requests: Sequence[Any], answer: Any) -> list[Answered | None]:
    """Answers in order, None for what only keeps the processes in step."""
    real = [not (request.metadata or {}).get("__padding_only__") for request in requests]
    found = iter(answer([request for request, wanted in zip(requests, real, strict=True) if wanted]))
    return [next(found) if wanted else None for wanted in real]
