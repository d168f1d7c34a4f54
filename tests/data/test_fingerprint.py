"""Fingerprints: near after scaling, recompression and small edits; far for other pictures, flat ones included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from align.data.fingerprint import MAX_BITS, Fingerprints, fingerprint, near_pairs, stack
from tests.data.sources import picture


def distance(one, other):
    found = list(near_pairs(stack([fingerprint(one)]), stack([fingerprint(other)]), max_bits=128, max_colour=255))
    return found[0][2]


def are_near(one, other):
    return bool(list(near_pairs(stack([fingerprint(one)]), stack([fingerprint(other)]))))


@pytest.mark.parametrize("number", range(8))
def test_a_picture_stays_near_when_scaled_recompressed_or_brightened(number, tmp_path):
    image = picture(number, 160, 120)
    image.save(tmp_path / "a.jpg", quality=50)
    changed = [
        image.resize((80, 60), Image.Resampling.BILINEAR),
        Image.open(tmp_path / "a.jpg"),
        ImageEnhance.Brightness(image).enhance(1.05),
    ]
    assert all(are_near(image, other) for other in changed)


def test_different_pictures_are_far():
    prints = stack([fingerprint(picture(number)) for number in range(30)])
    assert {(i, j) for i, j, _ in near_pairs(prints, prints)} == {(i, i) for i in range(30)}


def test_flat_pictures_hash_alike_and_are_told_apart_by_colour():
    white, black = (Image.new("RGB", (50, 50), colour) for colour in ("white", "black"))
    assert distance(white, black) == 0
    assert not are_near(white, black)
    assert are_near(white, Image.new("RGB", (80, 30), (250, 250, 250)))


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
@settings(max_examples=30)
def test_near_pairs_finds_what_a_plain_double_loop_finds(seed, flips):
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 256, size=(5, 16), dtype=np.uint8)
    others = bits.copy()
    for row, place in zip(generator.integers(0, 5, flips), generator.integers(0, 128, flips), strict=True):
        others[row, place // 8] ^= np.uint8(1 << (place % 8))
    colours = np.zeros((5, 192), dtype=np.uint8)
    found = {(i, j): d for i, j, d in near_pairs(Fingerprints(bits, colours), Fingerprints(others, colours))}
    unpacked, unpacked_others = np.unpackbits(bits, axis=1), np.unpackbits(others, axis=1)
    expected = {
        (i, j): int((unpacked[i] != unpacked_others[j]).sum())
        for i in range(5)
        for j in range(5)
        if (unpacked[i] != unpacked_others[j]).sum() <= MAX_BITS
    }
    assert found == expected
