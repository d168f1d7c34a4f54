"""Texts and pictures in; whether the same text about nearly the same pictures was seen before, out."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from align.data.fingerprint import HASH_BYTES, Fingerprints, near_pairs, stack
from align.data.pictures import Picture

# Fewer than the bits by which a picture is kept away from the evaluation: a question is lost here for good.
MAX_BITS = 7
# A hash is cut into one piece more than bits may differ, so that near hashes have a piece in common. Which bits go into
# a piece is drawn once: neighbouring bits often agree (a sky), and would make all pictures share a piece.
NUM_PIECES = MAX_BITS + 1
BITS_PER_PIECE = 8 * HASH_BYTES // NUM_PIECES
ORDER = np.random.default_rng(0).permutation(8 * HASH_BYTES)
# Up to so many pictures, comparing with all of them is faster than looking up which to compare with.
MAX_COMPARED = 256


class _PictureIndex:
    """The pictures of which one thing was asked, found again by the pieces of their first one's hash."""

    def __init__(self) -> None:
        self.pictures: list[tuple[Picture, ...]] = []
        self._prints = stack([])
        self._places: dict[int, array[int]] = defaultdict(lambda: array("I"))

    def add(self, pictures: tuple[Picture, ...]) -> None:
        """Remember pictures that are near to none of these."""
        place, capacity = len(self.pictures), len(self._prints)
        if place == capacity:
            more = stack([pictures[0].print] * max(capacity, 1))
            bits, colours = (self._prints.bits, more.bits), (self._prints.colours, more.colours)
            self._prints = Fingerprints(np.concatenate(bits), np.concatenate(colours))
        self._prints.bits[place], self._prints.colours[place] = pictures[0].print
        self.pictures.append(pictures)
        if place == MAX_COMPARED:
            for known in range(place + 1):
                self._enter(known)
        elif place > MAX_COMPARED:
            self._enter(place)

    def holds(self, pictures: tuple[Picture, ...]) -> bool:
        """Whether nearly the same pictures are here."""
        places = self._candidates(pictures[0])
        # Bits first: most candidates end there, and their colours need not be gathered.
        mine, theirs = (bits.view(np.uint64) for bits in (pictures[0].print[0], self._prints.bits[places]))
        places = places[np.bitwise_count(theirs ^ mine).sum(axis=1) <= MAX_BITS]
        if not len(places):
            return False
        known = Fingerprints(self._prints.bits[places], self._prints.colours[places])
        near = near_pairs(stack([pictures[0].print]), known, max_bits=MAX_BITS)
        return any(_same(pictures[1:], self.pictures[places[found]][1:]) for _, found, _ in near)

    def _candidates(self, picture: Picture) -> np.ndarray:
        """The places of all that may be near: those with a piece of the hash in common."""
        count = len(self.pictures)
        if count <= MAX_COMPARED:
            return np.arange(count)
        found = [self._places[key] for key in _keys(picture.print[0]) if key in self._places]
        if sum(map(len, found)) >= count:  # flat pictures, whose hashes are all alike
            return np.arange(count)
        none = np.empty(0, dtype=np.uint32)
        return np.concatenate([none, *(np.frombuffer(places, dtype=np.uint32) for places in found)])

    def _enter(self, place: int) -> None:
        for key in _keys(self._prints.bits[place]):
            self._places[key].append(place)


class Duplicates:
    """Remembers what has been asked of which pictures."""

    def __init__(self) -> None:
        # Most texts are asked of one picture: an index is made for those that are asked of another.
        self._first: dict[bytes, tuple[Picture, ...]] = {}
        self._asked: dict[bytes, _PictureIndex] = {}

    def seen(self, texts: Sequence[str], pictures: tuple[Picture, ...]) -> bool:
        """Whether these texts were seen with nearly these pictures; remembers them if not."""
        text = "\0".join([str(len(pictures)), *(text.casefold() for text in texts)])
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in self._first:
            self._first[key] = pictures
            return False
        if not pictures or self._first[key] == pictures:
            return True
        if key not in self._asked:
            self._asked[key] = _PictureIndex()
            self._asked[key].add(self._first[key])
        known = self._asked[key].holds(pictures)
        if not known:
            self._asked[key].add(pictures)
        return known


def _keys(bits: np.ndarray) -> list[int]:
    """The pieces of a hash, each as a number that no other piece has."""
    pieces = np.packbits(np.unpackbits(bits)[ORDER].reshape(NUM_PIECES, BITS_PER_PIECE), axis=1)
    numbers = pieces.astype(np.uint32) @ (256 ** np.arange(pieces.shape[1], dtype=np.uint32))
    return (numbers + (np.arange(NUM_PIECES, dtype=np.uint32) << BITS_PER_PIECE)).tolist()


def _same(ones: Sequence[Picture], others: Sequence[Picture]) -> bool:
    return all(
        next(near_pairs(stack([one.print]), stack([other.print]), max_bits=MAX_BITS), None) is not None
        for one, other in zip(ones, others, strict=True)
    )
