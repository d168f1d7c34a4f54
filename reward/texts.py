"""When two texts are the same, or nearly: normalising and comparing, for any language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

_SIGN = re.compile(r"[^\w\s]|_")
_GRAM = 3
# A question's responses are compared two by two: each is taken apart once.
_REMEMBERED = 1024


@lru_cache(maxsize=_REMEMBERED)
def normalise(text: str) -> str:
    """Fold what does not change a text's meaning: width, case, spaces, punctuation.

    Signs that carry meaning in a number stay: a point or a comma between digits, a minus before a digit, %.

    >>> normalise(" The  Cat,sat. ")
    'the cat sat'
    >>> normalise("是的，有３只猫。")
    '是的 有3只猫'
    >>> normalise("-1.50 %")
    '-1.50 %'
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    if text.replace(" ", "").isalnum():
        return " ".join(text.split())
    kept = _SIGN.sub(lambda sign: sign.group() if _carries_meaning(text, sign.start()) else " ", text)
    return " ".join(kept.split())


def _carries_meaning(text: str, place: int) -> bool:
    char = text[place]
    if char == "%" or not unicodedata.category(char).startswith("P"):
        return True
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    if char in ".,":
        return before.isdigit() and after.isdigit()
    return char == "-" and after.isdigit() and not before.isalnum()


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the character trigrams of two normalised texts, 0 to 1.

    >>> similarity("A red car.", "a red car"), round(similarity("a red car", "a red cat"), 2)
    (1.0, 0.75)
    """
    grams_one, grams_other = _grams(one), _grams(other)
    if not grams_one and not grams_other:
        return 1.0
    return len(grams_one & grams_other) / len(grams_one | grams_other)


@lru_cache(maxsize=_REMEMBERED)
def _grams(text: str) -> frozenset[str]:
    text = normalise(text)
    if 0 < len(text) < _GRAM:
        return frozenset({text})
    return frozenset(text[start : start + _GRAM] for start in range(len(text) - _GRAM + 1))


def first_occurrences(texts: Sequence[str]) -> list[int]:
    """For each text the index of the first one that is identical, surrounding spaces apart.

    >>> first_occurrences(["a", "b", "a ", "c", "b"])
    [0, 1, 0, 3, 1]
    """
    seen: dict[str, int] = {}
    return [seen.setdefault(text.strip(), index) for index, text in enumerate(texts)]
