"""Texts and pictures in; whether the same text about nearly the same pictures stood before, out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from align.data.fingerprint import Fingerprints, near_pairs, stack
from align.data.pictures import Picture

# Fewer than the bits by which a picture is kept away from the evaluation: a question is lost here for good.
MAX_BITS = 7


class _Asked:
    """The pictures of which one thing was asked; the fingerprints of the first of each stand in arrays that grow."""

    def __init__(self) -> None:
        self.pictures: list[tuple[Picture, ...]] = []
        self._prints = stack([])

    def add(self, pictures: tuple[Picture, ...]) -> None:
        place, room = len(self.pictures), len(self._prints)
        if place == room:
            more = stack([pictures[0].print] * max(room, 1))
            bits, colours = (self._prints.bits, more.bits), (self._prints.colours, more.colours)
            self._prints = Fingerprints(np.concatenate(bits), np.concatenate(colours))
        self._prints.bits[place], self._prints.colours[place] = pictures[0].print
        self.pictures.append(pictures)

    def holds(self, pictures: tuple[Picture, ...]) -> bool:
        count = len(self.pictures)
        known = Fingerprints(self._prints.bits[:count], self._prints.colours[:count])
        near = near_pairs(stack([pictures[0].print]), known, max_bits=MAX_BITS)
        return any(_same(pictures[1:], self.pictures[place][1:]) for _, place, _ in near)


class Duplicates:
    """Remembers what has been asked of which pictures."""

    def __init__(self) -> None:
        self._asked: dict[bytes, _Asked] = defaultdict(_Asked)
        self._texts: set[bytes] = set()

    def seen(self, texts: Sequence[str], pictures: tuple[Picture, ...]) -> bool:
        """Whether this stood before; remembers it if not."""
        text = "\0".join([str(len(pictures)), *(text.casefold() for text in texts)])
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = self._asked[key].holds(pictures) if pictures else key in self._texts
        if not known:
            self._asked[key].add(pictures) if pictures else self._texts.add(key)
        return known


def _same(ones: Sequence[Picture], others: Sequence[Picture]) -> bool:
    return all(
        next(near_pairs(stack([one.print]), stack([other.print]), max_bits=MAX_BITS), None) is not None
        for one, other in zip(ones, others, strict=True)
    )
