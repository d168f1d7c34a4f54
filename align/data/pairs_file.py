"""A JSONL file of pairs that exist already in; the pairs that can be trained on out,
and a count of the others by reason.

A bad line is reported with file and line and left out; the rest is used.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.log import log
from align.media.images import ImageStore
from align.records import Pair, parse_line

SHOWN = 20


def read_pairs_file(path: Path, images: ImageStore) -> tuple[list[Pair], dict[str, Any]]:
    """The usable pairs in file order, and counts as the pairs stage keeps them.

    Dropped: lines that are no pair, ids that are duplicated, messages without a role or text, prompts that do not end
    with the user's turn or whose image parts are not as many as the images, responses that are empty or anything but
    one turn of the assistant, and pairs with an image that cannot be opened.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    total = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            total += 1
            where = f"{path}:{number}"
            try:
                pair = parse_line(line.decode("utf-8-sig"), Pair, where)
                reason = _why_not(pair, seen, images, where)
            except UnicodeDecodeError as error:
                reason = ("not UTF-8 text", f"{where}: not UTF-8 text (byte {error.start})")
            except UserError as error:
                reason = ("no valid pair", str(error))
            if reason is None:
                seen.add(pair.id)
                pairs.append(pair)
                continue
            dropped[reason[0]] += 1
            if dropped.total() <= SHOWN:
                log.warning("left out: %s", reason[1])
    if dropped.total() > SHOWN:
        log.warning("and %d more are left out", dropped.total() - SHOWN)
    return pairs, {
        "questions": total,
        "pairs": len(pairs),
        "dropped_responses": {},
        "dropped_pairs": dict(dropped),
        "questions_without_pair": {},
    }


def text_of(messages: list[dict[str, Any]]) -> str:
    """All text of some messages.

    >>> text_of([{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}])
    'A cat.'
    """
    return "".join(part.get("text") or "" for message in messages for part in _parts(message))


def _why_not(pair: Pair, seen: set[str], images: ImageStore, where: str) -> tuple[str, str] | None:
    """Why a pair cannot be used, in short and with its place; None where it can."""
    if pair.id in seen:
        return "id is duplicated", f"{where}: the id {pair.id!r} is duplicated"
    if not all(map(_is_message, [*pair.prompt, *pair.chosen, *pair.rejected])):
        return (
            "a message without a role or text",
            f"{where}: a message needs a role, and text or parts (pair {pair.id})",
        )
    if pair.prompt[-1]["role"] != "user":
        return "the prompt does not end with a question", f"{where}: the last turn of the prompt is not the user's"
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if [turn["role"] for turn in side] != ["assistant"] or any(
            part.get("type") == "image" for part in _parts(side[0])
        ):
            found = f"the {name} response is not one turn of the assistant in text alone"
            return "a response that is no answer", f"{where}: {found} (pair {pair.id})"
    wanted = sum(part.get("type") == "image" for turn in pair.prompt for part in _parts(turn))
    if wanted != len(pair.images):
        found = f"the prompt has {wanted} image parts, but there are {len(pair.images)} images"
        return "image parts and images differ", f"{where}: {found} (pair {pair.id})"
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not text_of(side).strip():
            return "empty response", f"{where}: the {name} response is empty (pair {pair.id})"
    for reference in pair.images:
        try:
            images.size(reference)
        except UserError as error:
            return "image cannot be read", f"{where}: {error} (pair {pair.id})"
    return None


def _is_message(message: dict[str, Any]) -> bool:
    content = message.get("content")
    is_content = isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))
    return isinstance(message.get("role"), str) and is_content


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and (part.get("type") == "image" or isinstance(part.get("text"), str))


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
