"""Questions, branched prompts and images in, bodies of chat completions out;
and an answer's choices as texts with their lengths.

Images become data URIs. A server tokenises by itself: text that looks like a special token (`<image>`) may be taken for
one there, which a model in this process never does.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from align.engines.base import SamplingSettings
from align.engines.server.endpoint import Abilities, RetryLaterError
from align.errors import UserError
from reward.judge_model import BranchedPrompt

# Seeds that every server takes, with room for 256 samples behind each.
SEED_RANGE = 2**31 - 256
# Where a server reports no counts at all, a token is taken to be this long.
BYTES_A_TOKEN = 4


@dataclass(frozen=True)
class Choice:
    """One generated text; `exact` is False where the number of tokens is a guess,
    `token_ids` is empty where not known."""

    text: str
    num_tokens: int
    finish_reason: str
    exact: bool = True
    token_ids: tuple[int, ...] = ()


def data_uri(image: Image.Image, *, max_pixels: int, image_format: str) -> tuple[str, bool]:
    """An image as a data URI, scaled down to `max_pixels` where it has more; the second value says whether it was."""
    image, smaller = scaled_down(image, max_pixels)
    buffer = io.BytesIO()
    if image_format == "jpeg":
        image.convert("RGB").save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}", smaller


def scaled_down(image: Image.Image, max_pixels: int) -> tuple[Image.Image, bool]:
    """The image with at most so many pixels, and whether it had more."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale >= 1:
        return image, False
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS), True


def chat_messages(messages: Sequence[dict[str, Any]], uris: Sequence[str]) -> list[dict[str, Any]]:
    """Messages with the images in the places of bare ``{"type": "image"}`` parts; those of text alone as strings.

    >>> chat_messages([{"role": "user", "content": [{"type": "image"}]}], ["data:,"])
    [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'data:,'}}]}]
    """
    rest = iter(uris)
    chat = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": next(rest)}} if part["type"] == "image" else part
                for part in content
            ]
            text_only = all(part["type"] == "text" for part in parts)
            content = "".join(part["text"] for part in parts) if text_only else parts
        chat.append({"role": message["role"], "content": content})
    return chat


def bare_messages(branched: BranchedPrompt, branch: int) -> list[dict[str, Any]]:
    """A branch of a prompt: parts for its images, then its text."""
    system = [] if branched.system is None else [{"role": "system", "content": branched.system}]
    user = [{"type": "image"} for _ in branched.images] + [{"type": "text", "text": branched.turn(branch)}]
    return [*system, {"role": "user", "content": user}]


def branch_messages(branched: BranchedPrompt, branch: int, uris: Sequence[str]) -> list[dict[str, Any]]:
    """A branch of a prompt as it is sent."""
    return chat_messages(bare_messages(branched, branch), uris)


def sampling_body(
    messages: list[dict[str, Any]], settings: SamplingSettings, can: Abilities, *, seed: int, num: int
) -> dict[str, Any]:
    """The body that asks for `num` samples of which the first has this seed.

    Raises:
        UserError: a setting cannot be had from this server.
    """
    body: dict[str, Any] = {
        "messages": messages,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": seed,
    }
    if can.extras:
        # Said even where they are off: servers take their defaults from the checkpoint's generation_config.json.
        body |= {"top_k": settings.top_k or -1, "repetition_penalty": settings.repetition_penalty}
    elif settings.top_k or settings.repetition_penalty != 1.0:
        raise UserError("the server takes neither top_k nor repetition_penalty", fix="set sample.top_k to 0")
    if can.token_ids:
        body["return_token_ids"] = True
    if num > 1:
        body["n"] = num
        # A server's usage is of all choices together.
        if can.token_log_probs and not can.token_ids:
            body["logprobs"] = True
    return body


def greedy_body(messages: list[dict[str, Any]], can: Abilities, max_tokens: int) -> dict[str, Any]:
    """The request for a greedy answer."""
    settings = SamplingSettings(temperature=0.0, max_new_tokens=max_tokens)
    return sampling_body(messages, settings, can, seed=0, num=1)


def sample_seed(seed: int, index: int) -> int:
    """The seed of a sample. vLLM gives choice i of `n` the seed of the request plus i; asked one by one, so do we."""
    return seed % SEED_RANGE + index


def read_choices(answer: dict[str, Any]) -> list[Choice]:
    """The choices in the order of their indices.

    Raises:
        RetryLaterError: the answer is not in the form of a chat completion, or was broken off by the server.
    """
    try:
        return _choices(answer)
    except (KeyError, TypeError, AttributeError):
        raise RetryLaterError("answered with choices that are not those of a chat completion") from None


def _choices(answer: dict[str, Any]) -> list[Choice]:
    choices = sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)
    texts = [choice["message"].get("content") or "" for choice in choices]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    reasons = [choice.get("finish_reason") for choice in choices]
    for reason in reasons:
        if reason in ("abort", "error"):
            raise RetryLaterError(f"broke off its answer (finish_reason {reason})")
    counts = [_num_tokens(choice) for choice in choices]
    if None in counts:
        total = (answer.get("usage") or {}).get("completion_tokens")
        counts, exact = _shares(texts, total if isinstance(total, int) else None)
    else:
        exact = True
    return [
        Choice(
            text, count or 0, "length" if reason == "length" else "stop", exact, tuple(choice.get("token_ids") or ())
        )
        for text, count, reason, choice in zip(texts, counts, reasons, choices, strict=True)
    ]


def num_prompt_tokens(answer: dict[str, Any]) -> int | None:
    """How many tokens the server read, images' ones included; None where it does not say.

    >>> num_prompt_tokens({"usage": {"prompt_tokens": 7}}), num_prompt_tokens({"usage": [7, 7]})
    (7, None)
    """
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _num_tokens(choice: dict[str, Any]) -> int | None:
    if choice.get("token_ids") is not None:
        return len(choice["token_ids"])
    content = (choice.get("logprobs") or {}).get("content")
    return None if content is None else len(content)


def _shares(texts: list[str], total: int | None) -> tuple[list[int | None], bool]:
    """Numbers of tokens by the texts' lengths in bytes, which is exact for a single one with a total.

    >>> _shares(["one"], 7), _shares(["1234", "12345678"], 6), _shares(["12345678"], None)
    (([7], True), ([2, 4], False), ([2], False))
    """
    if total is not None and len(texts) == 1:
        return [total], True
    sizes = [len(text.encode()) for text in texts]
    if total is None:
        return [math.ceil(size / BYTES_A_TOKEN) for size in sizes], False
    return [round(total * size / max(sum(sizes), 1)) for size in sizes], False
