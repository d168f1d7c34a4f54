"""What a stage asks of an engine: responses to questions, and log-probabilities of given continuations.

Stages do not know which engine they talk to. Images are handles (paths inside the image root, or PIL images); the
engine was given a function that opens them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from align.models.record_faults import UnusableRecord
from reward.judge_model import JudgeModel

# Hears the id of a question that cannot be asked, and why.
OnUnusable = Callable[[str, UnusableRecord], None]


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn: temperature 0 is greedy, top_k 0 keeps all tokens, top_p 1.0 keeps all probability.

    `greedy_first`: before its samples, which are the same without it, every question gets its greedy response, behind
    the same prompt.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    greedy_first: bool = False


@dataclass(frozen=True)
class SampleRequest:
    """One question asked `num_samples` times.

    `messages` are chat messages with bare ``{"type": "image"}`` parts, in the order of `images`. `seed` decides the
    samples together with their index, and nothing else does.
    """

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Any, ...]
    num_samples: int
    seed: int


@dataclass(frozen=True)
class SampleResult:
    """The responses of a request, a greedy one that was asked for before the others: texts without special tokens,
    their lengths in tokens (the end token counted), and whether each ended by itself ("stop") or was cut at
    max_new_tokens ("length").

    `token_ids` are the tokens as they were drawn (a text may be cut into others); empty where a server drew them."""

    id: str
    texts: tuple[str, ...]
    num_tokens: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class FurtherSamples:
    """What is drawn beyond `SampleRequest.num_samples`, behind the same prompt:
    the next samples of the question's seed.

    `wanted` gets the samples so far and says how many further ones to draw; it is asked again until it says 0.
    `temperature` is theirs; None: that of the settings.
    """

    wanted: Callable[[SampleResult], int]
    temperature: float | None = None


@dataclass(frozen=True)
class GivenResponses:
    """Given responses to a question, as tokens; `messages` and `images` as in `SampleRequest`."""

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Any, ...]
    token_ids: tuple[tuple[int, ...], ...]


class Engine(JudgeModel, Protocol):
    """`JudgeModel` (log_probs, generate: what critics need) and sampling."""

    notes: dict[str, str]
    """What the manifest and the report should say, e.g. {"shared_prefix": "exact, max error 1e-6"} or the reason for
    the unshared path, and how often the batch was halved when memory ran out."""

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        on_result: Callable[[SampleResult], None],
        *,
        further: FurtherSamples | None = None,
        on_unusable: OnUnusable | None = None,
    ) -> None:
        """Answer all requests, calling `on_result` as soon as one question is finished (in any order).

        A question whose image cannot be read, or that template or processor refuse, goes to `on_unusable`.

        Raises:
            UnusableRecord: there is such a question, and no `on_unusable`.
        """
        ...

    def loglikelihood(
        self,
        given: Sequence[GivenResponses],
        on_result: Callable[[str, list[list[float]]], None],
        *,
        temperature: float = 1.0,
    ) -> None:
        """Give `on_result` each question's id and, per response, the natural-log probability of every token of it
        when drawn at this temperature. A token that stands for an image ends what can be weighed of a response.

        Raises:
            UserError: the engine cannot tell, as on servers.
        """
        ...
