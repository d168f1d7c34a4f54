"""A family's processor in, the chat template out that makes vLLM write the prompts which that processor writes.

vLLM puts images on lines of their own unless its template places them (`--chat-template-content-format openai`). Ours
places them as the processor does, then renders the checkpoint's own template. Needs no vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import UserError
from align.models.messages import IMAGE_MARK
from align.models.valley1 import ValleyLlamaProcessor

if TYPE_CHECKING:
    from transformers import ProcessorMixin

TEMPLATES = Path(__file__).parent / "templates"
# Stands for an image where the tokenizer has no token for one: no chat contains the end of a document.
NO_TOKEN_MARK = "<|endoftext|>"


def image_mark(processor: ProcessorMixin) -> str:
    """The special token that stands for one image in a prompt that vLLM tokenises."""
    token = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    return token if processor.tokenizer.get_vocab().get(token) == processor.image_token_id else NO_TOKEN_MARK


def chat_template(processor: ProcessorMixin) -> str:
    """The text of the template.

    Raises UserError for a processor's setting that a template cannot follow.
    """
    if getattr(processor, "text_only_image", "none") != "none":
        raise UserError(
            "a server asks questions of text alone without an image; text_only_image: black is not possible there",
            fix="set model.processor.text_only_image to none",
        )
    settings = {"default_system": processor.default_system}
    placing = "place_pictures.jinja"
    if not isinstance(processor, ValleyLlamaProcessor):
        placing = "place_images.jinja"
        settings["image"] = processor._wrap(IMAGE_MARK).replace(IMAGE_MARK, image_mark(processor))
    lines = [f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in settings.items()]
    text = (TEMPLATES / placing).read_text(encoding="utf-8").rstrip("\n")
    return "".join([*lines, text, processor.chat_template])


def _literal(value: str | None) -> str:
    """As Jinja reads it: JSON's strings are its own, its null is not."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
