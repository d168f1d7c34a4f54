"""A chat completion that is streamed in, line by line (server-sent events); the same completion as one answer out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

# Gets what each choice says so far.
OnTexts = Callable[[tuple[str, ...]], None]
END = "[DONE]"


async def collect(lines: AsyncIterator[str], on_texts: OnTexts) -> dict[str, Any]:
    """The whole answer, `{"choices": [...]}`; `on_texts` gets the texts so far with every event that adds to them.

    Raises:
        ValueError: an event is not JSON, or not one of a chat completion. What the server says of an error is in it.
        EOFError: the lines end before every choice has.
    """
    choices: dict[int, dict[str, Any]] = {}
    async for line in lines:
        name, _, data = line.partition(":")
        data = data.strip()
        if name != "data" or not data:
            continue
        if data == END:
            break
        if _added(json.loads(data), choices):
            on_texts(tuple(choices[index]["message"]["content"] for index in sorted(choices)))
    if not choices or any(choice["finish_reason"] is None for choice in choices.values()):
        raise EOFError("the answer broke off")
    return {"choices": list(choices.values())}


def _added(event: Any, choices: dict[int, dict[str, Any]]) -> bool:
    """Whether an event adds text to the choices, with what it brings put there."""
    if not isinstance(event, dict) or event.get("error"):
        raise ValueError(json.dumps(event))
    grew = False
    for part in event.get("choices") or ():
        try:
            index, text = part.get("index") or 0, (part.get("delta") or {}).get("content") or ""
            empty = {"index": index, "message": {"role": "assistant", "content": ""}, "finish_reason": None}
            choice = choices.setdefault(index, empty)
            choice["message"]["content"] += text
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
        except (AttributeError, TypeError) as error:
            raise ValueError(f"no event of a chat completion ({error})") from None
        grew = grew or bool(text)
    return grew
