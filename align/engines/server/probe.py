"""What an endpoint can do, found out by asking it: once, before its first real request, with a few words of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.config import ServerSettings
from align.engines.server.chat import greedy_body
from align.engines.server.endpoint import Abilities, Endpoint, RefusedError
from align.engines.server.options import Step, read_steps

if TYPE_CHECKING:
    import httpx

GREETING = [{"role": "user", "content": "Say hello."}]
COUNTING = [{"role": "user", "content": "Count from one to five in words."}]
# Two runs of one server differ by this much in half precision; another turn's first token, by far more.
SAME_LOG_PROB = 0.15

EXTRAS = {"top_k": -1, "repetition_penalty": 1.0}
# From the most that a server may take to the bare protocol; the first that is not refused counts.
SAMPLE_FORMS: tuple[dict[str, Any], ...] = (
    {"n": 2, "logprobs": True, "return_token_ids": True} | EXTRAS,
    {"n": 2, "logprobs": True} | EXTRAS,
    {"n": 2, "logprobs": True},
    {"n": 2},
    {},
)


async def probe(endpoint: Endpoint, client: httpx.AsyncClient, settings: ServerSettings) -> None:
    """Fill in `endpoint.abilities`.

    Raises:
        RetryLaterError: the network. RefusedError: not even the bare protocol is taken.
    """
    can = await _sampling(endpoint, client, settings.timeout_s)
    can.top_log_probs, steps = await _alternatives(endpoint, client, can, settings)
    if can.top_log_probs:
        can.continues = await _continues(endpoint, client, can, settings, steps)
    endpoint.abilities = can
    endpoint.probed = True


async def _sampling(endpoint: Endpoint, client: httpx.AsyncClient, timeout_s: float) -> Abilities:
    body = {"messages": GREETING, "max_tokens": 2, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    for form in SAMPLE_FORMS:
        try:
            answer = await endpoint.post(client, body | form, timeout_s)
        except RefusedError:
            if not form:
                raise
            continue
        first = answer["choices"][0]
        choice = first if isinstance(first, dict) else {}
        log_probs = choice.get("logprobs")
        return Abilities(
            several=len(answer["choices"]) == 2,
            extras="top_k" in form,
            token_ids=choice.get("token_ids") is not None,
            token_log_probs=isinstance(log_probs, dict) and bool(log_probs.get("content")),
        )
    raise AssertionError("the last form is tried or raises")


async def _alternatives(
    endpoint: Endpoint, client: httpx.AsyncClient, can: Abilities, settings: ServerSettings
) -> tuple[int, list[Step]]:
    """The most alternatives a token that the server shows, and what it wrote with them."""
    body = greedy_body(COUNTING, can, max_tokens=4)
    for count in sorted({settings.top_logprobs, min(settings.top_logprobs, 5)}, reverse=True):
        try:
            answer = await endpoint.post(client, body | {"logprobs": True, "top_logprobs": count}, settings.timeout_s)
        except RefusedError:
            continue
        steps = read_steps(answer["choices"][0])
        return (count, steps) if steps else (0, [])
    return 0, []


async def _continues(
    endpoint: Endpoint, client: httpx.AsyncClient, can: Abilities, settings: ServerSettings, steps: list[Step]
) -> bool:
    """Whether the server, given the beginning of its own answer, writes the same next token with the same probability.

    A server that takes the fields and ignores them would begin a new turn.
    """
    for cut in range(1, len(steps)):
        begun = b"".join(step.text for step in steps[:cut]).decode(errors="replace")
        if begun.strip() and begun == begun.strip() and "\ufffd" not in begun:
            break
    else:
        return False
    body = greedy_body(continued(COUNTING, begun), can, max_tokens=1)
    body |= CONTINUE | {"logprobs": True, "top_logprobs": can.top_log_probs}
    try:
        answer = await endpoint.post(client, body, settings.timeout_s)
    except RefusedError:
        return False
    after = read_steps(answer["choices"][0])
    if not after or after[0].text != steps[cut].text:
        return False
    text = steps[cut].text
    return abs(after[0].log_probs[text] - steps[cut].log_probs[text]) < SAME_LOG_PROB


CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}


def continued(messages: list[dict[str, Any]], begun: str) -> list[dict[str, Any]]:
    """Messages with an assistant turn that has begun; goes with the fields of `CONTINUE`."""
    return [*messages, {"role": "assistant", "content": begun}]
