"""What a server with a checkpoint's own processor reads of the messages that it is sent."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

IMAGE = {"type": "image"}


def prompt_read(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a chat completion's messages, without a turn begun behind them."""
    chat, images = [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            images += [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            content = [IMAGE if part["type"] == "image_url" else part for part in content]
        chat.append({**message, "content": content})
    text = processor.apply_chat_template(chat, add_generation_prompt=False)
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in images]
    inputs = processor(text=[text], **({"images": [pictures]} if pictures else {}))
    return [int(token) for token in inputs["input_ids"][0]]
