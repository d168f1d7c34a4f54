"""Log-probabilities of whole options from a server that shows, for every token it writes, the likeliest alternatives.

The server writes its answer greedily. An option shares its first tokens with that answer, then leaves it by one of the
alternatives; what comes after is learnt by letting the server continue from there. So every option gets the sum over
all its tokens, as from a model in this process, and an option outside of the alternatives gets -inf.

Left out on purpose: `prompt_logprobs`, which would do it in one request but returns a line for every image token and
switches the server's prefix cache off.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward.critics.reading import chosen_option


@dataclass(frozen=True)
class Step:
    """A written token: its bytes, and log-probabilities of the alternatives by their bytes, itself among them."""

    text: bytes
    log_probs: dict[bytes, float]


# What the server writes after a begun answer; None where it cannot be asked to continue.
After = Callable[[bytes], Awaitable[list[Step] | None]]


def read_steps(choice: dict[str, Any]) -> list[Step] | None:
    """The steps of a choice; None where it has no alternatives, or has them in another form.

    >>> token = {"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "b", "logprob": -2.0}]}
    >>> read_steps({"logprobs": {"content": [token]}})
    [Step(text=b'a', log_probs={b'b': -2.0, b'a': -0.1})]
    """
    try:
        return _steps(choice)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _steps(choice: dict[str, Any]) -> list[Step] | None:
    content = (choice.get("logprobs") or {}).get("content")
    if content is None or not all(token.get("top_logprobs") for token in content):
        return None
    return [
        Step(
            _bytes(token),
            {_bytes(other): float(other["logprob"]) for other in reversed(token["top_logprobs"])}
            | {_bytes(token): float(token["logprob"])},
        )
        for token in content
    ]


async def option_log_probs(options: Sequence[str], after: After) -> tuple[np.ndarray, bool]:
    """`(num_options,)` float64, and whether all are sums over whole options.

    Where the server cannot continue, options that left its answer by the same token share that token's probability
    evenly, which is exact up to the token and a bound for the rest.
    """
    found = np.full(len(options), -math.inf)
    whole = True

    async def walk(begun: bytes, log_prob: float, open_: dict[int, bytes]) -> None:
        nonlocal whole
        steps = await after(begun)
        if steps is None:
            whole = False
            found[list(open_)] = log_prob - math.log(len(open_))
            return
        done, left = follow(steps, begun, log_prob, open_)
        for index, value in done.items():
            found[index] = value
        await asyncio.gather(*(walk(text, value, rest) for (text, value), rest in left.items()))

    await walk(b"", 0.0, {index: option.encode() for index, option in enumerate(options)})
    return found, whole


def follow(
    steps: Sequence[Step], begun: bytes, log_prob: float, open_: dict[int, bytes]
) -> tuple[dict[int, float], dict[tuple[bytes, float], dict[int, bytes]]]:
    """Follow options (index -> what is left of them) along a written answer.

    Returns the log-probabilities of those that ended, and for each place where others left the answer (text so far and
    its log-probability) what is left of them. Options that no alternative begins are in neither.

    >>> steps = [Step(b"The", {b"The": -0.1, b"Both": -3.0}), Step(b" first", {b" first": -0.2, b" second": -1.5})]
    >>> done, left = follow(steps, b"", 0.0, {0: b"The first", 1: b"The second one", 2: b"Neither"})
    >>> {index: round(value, 6) for index, value in done.items()}
    {0: -0.3}
    >>> [(text, round(value, 6), rest) for (text, value), rest in left.items()]
    [(b'The second', -1.6, {1: b' one'})]
    """
    done: dict[int, float] = {}
    left: dict[tuple[bytes, float], dict[int, bytes]] = {}
    for step in steps:
        staying = {}
        for index, rest in open_.items():
            # As a tokeniser would: the longest token that the rest begins with.
            text = max((text for text in step.log_probs if text and rest.startswith(text)), key=len, default=None)
            if text is None:
                continue
            value = log_prob + step.log_probs[text]
            if text == rest:
                done[index] = value
            elif text == step.text:
                staying[index] = rest[len(text) :]
            else:
                left.setdefault((begun + text, value), {})[index] = rest[len(text) :]
        begun += step.text
        log_prob += step.log_probs[step.text]
        open_ = staying
    if open_ and steps:
        left[begun, log_prob] = open_
    return done, left


def from_text(options: Sequence[str], text: str) -> np.ndarray:
    """0 for the option that a written answer chooses and -inf for the others; all -inf where that is not clear.

    >>> from_text(["first", "second"], "First, since it names the colour.")
    array([  0., -inf])
    """
    chosen = chosen_option(text, {str(index): option for index, option in enumerate(options)})
    return np.array([0.0 if str(index) == chosen else -math.inf for index in range(len(options))])


def num_tokens_to_see(options: Sequence[str]) -> int:
    """How far the server writes at first: enough for most options to end; it is asked to continue for longer ones."""
    return max(len(option.encode()) for option in options) // 2 + 1


def _bytes(token: dict[str, Any]) -> bytes:
    """A token's bytes, which servers give beside its text since a character may be cut in two."""
    return bytes(token["bytes"]) if token.get("bytes") else str(token["token"]).encode()
