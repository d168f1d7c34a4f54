"""How likely a server finds a given response: its prompt log-probabilities in, those of the response's tokens out.

vLLM says with `prompt_logprobs: k` for every place of a prompt how likely its token was there, and how likely the k
likeliest were. So the response is sent as an assistant's turn. The server tokenises that turn by itself; only where its
tokens are those that were drawn is the response weighed.

Its numbers are those of temperature 1. At temperature T a token of log-probability l has
l / T - log sum_u exp(l_u / T), where u runs over the whole vocabulary. Below 1 the few likeliest tokens decide that
sum: what is not shown has the mass r in all and at most m each, and adds at most r * m^(1/T - 1). Half of that is
taken, and how far the truth may be off is reported. Above 1 there is no such bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A little more than 1 is rounding; much more, and the numbers are no log-probabilities.
MAX_MASS = 1.01


@dataclass(frozen=True)
class Weighed:
    """Log-probabilities of a response's tokens, in nats, and how far their sum may be off."""

    log_probs: list[float]
    uncertainty: float


def given_body(messages: list[dict[str, Any]], text: str, num_alternatives: int) -> dict[str, Any]:
    """The request that has a response weighed: a whole assistant's turn, behind which one token is written."""
    return {
        "messages": [*messages, {"role": "assistant", "content": text}],
        "add_generation_prompt": False,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": num_alternatives,
        "return_token_ids": True,
    }


def weigh(
    answer: dict[str, Any], prompt_tokens: Sequence[int], token_ids: Sequence[int], temperature: float
) -> Weighed | None:
    """The response `token_ids` behind `prompt_tokens`; None where the server reads other tokens.

    Raises KeyError, TypeError or ValueError where the answer has no prompt log-probabilities.
    """
    read, entries = answer["prompt_token_ids"], answer["prompt_logprobs"]
    start, end = len(prompt_tokens), len(prompt_tokens) + len(token_ids)
    if read[:end] != [*prompt_tokens, *token_ids]:
        return None
    log_probs, uncertainty = [], 0.0
    for token, entry in zip(token_ids, entries[start:end], strict=True):
        shown = {int(other): float(found["logprob"]) for other, found in entry.items()}
        value, off = at_temperature(shown, token, temperature)
        log_probs.append(value)
        uncertainty += off
    return Weighed(log_probs, uncertainty)


def at_temperature(shown: dict[int, float], token: int, temperature: float) -> tuple[float, float]:
    """A token's log-probability at a temperature of at most 1, and how far it may be off.

    `shown`: log-probabilities at temperature 1 of the likeliest tokens, and of this one.

    >>> at_temperature({5: math.log(0.25)}, 5, 1.0) == (math.log(0.25), 0.0)
    True
    >>> value, off = at_temperature({5: math.log(0.8), 6: math.log(0.2)}, 5, 0.5)
    >>> round(math.exp(value), 6), off < 1e-12
    (0.941176, True)
    """
    if temperature == 1.0:
        return shown[token], 0.0
    mass = sum(map(math.exp, shown.values()))
    if mass > MAX_MASS:
        raise ValueError(f"probabilities that add up to {mass:.3g}")
    inverse = 1 / temperature
    total = sum(math.exp(inverse * value) for value in shown.values())
    # The likeliest are shown, and this token beside them: no other is likelier than the second least of those shown.
    likeliest = sorted(shown.values(), reverse=True)
    least = likeliest[-2] if shown[token] == likeliest[-1] and len(shown) > 1 else likeliest[-1]
    missing = max(1 - mass, 0.0) * math.exp((inverse - 1) * least)
    half = math.log1p(missing / total) / 2
    return inverse * shown[token] - math.log(total) - half, half
