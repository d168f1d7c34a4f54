"""Texts and pictures in; whether the same text about nearly the same pictures stood before, out.

Two hashes of 128 bits that differ in at most 7 agree in one of their eight 16-bit bands at least, so only pictures that
share a band with an earlier one of the same text are compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from align.data.fingerprint import HASH_BYTES, near_pairs, stack
from align.data.pictures import Picture

BAND_BYTES = 2
MAX_BITS = HASH_BYTES // BAND_BYTES - 1


class Duplicates:
    """Remembers what has been asked of which pictures."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._bands: dict[tuple[str, int, bytes], list[tuple[Picture, ...]]] = defaultdict(list)

    def seen(self, texts: Sequence[str], pictures: tuple[Picture, ...]) -> bool:
        """Whether this stood before; remembers it if not."""
        key = "\0".join(text.casefold() for text in texts)
        if not pictures:
            known = key in self._texts
            self._texts.add(key)
            return known
        key = f"{len(pictures)}\0{key}"
        bits = pictures[0].print[0].tobytes()
        bands = [(key, start, bits[start : start + BAND_BYTES]) for start in range(0, HASH_BYTES, BAND_BYTES)]
        if any(_same(pictures, before) for band in bands for before in self._bands.get(band, ())):
            return True
        for band in bands:
            self._bands[band].append(pictures)
        return False


def _same(ones: Sequence[Picture], others: Sequence[Picture]) -> bool:
    return all(
        one.reference == other.reference
        or next(near_pairs(stack([one.print]), stack([other.print]), max_bits=MAX_BITS), None) is not None
        for one, other in zip(ones, others, strict=True)
    )
