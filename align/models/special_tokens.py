"""A processor in, the texts that it reads as something else than text out, and where a message spells one.

A question that spells `<|im_end|>` ends its own turn; one that spells a placeholder asks for an image. A prompt is
rendered
as one text, in which nobody can tell the two apart, so such a record is not rendered at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.models.messages import MARKS
from align.models.record_faults import UnusableRecord

PLACEHOLDER_ATTRIBUTES = ("image_token_id", "video_token_id", "audio_token_id")
SPELLS_TOKENS = "its text spells a special token"


def special_tokens(processor: Any) -> dict[str, int]:
    """The texts that the tokenizer reads as special tokens or as placeholders of images, with their ids."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ids: set[int] = {getattr(processor, name) for name in PLACEHOLDER_ATTRIBUTES if getattr(processor, name, None)}
    ids.update(tokenizer.all_special_ids)
    ids.update(id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special)
    ordered = sorted(ids)
    # Ids beyond the tokenizer's own have no spelling, and no text leads to them.
    return {token: id_ for token, id_ in zip(tokenizer.convert_ids_to_tokens(ordered), ordered, strict=True) if token}


def reserved_texts(processor: Any) -> set[str]:
    """What no text of a prompt may spell: special tokens, and the marks that our families' processors replace by
    images."""
    marks = set(MARKS.values()) if getattr(processor, "replaces_marks", False) else set()
    return marks | set(special_tokens(processor))


def check_spelling(messages: Sequence[dict[str, Any]], reserved: set[str], who: str) -> None:
    """Raises UnusableRecord where a text of the messages holds a reserved one."""
    for message in messages:
        content = message.get("content")
        parts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
        for text in parts:
            found = next((token for token in reserved if isinstance(text, str) and token in text), None)
            if found is not None:
                raise UnusableRecord(
                    SPELLS_TOKENS,
                    f"{SPELLS_TOKENS} ({found!r}), which the model would not read as text",
                    where=who,
                    fix="write it differently to keep it",
                )
