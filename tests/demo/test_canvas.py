import random
from itertools import pairwise

import numpy as np
import pytest

from align.demo.canvas import CANVAS_PX, MIN_GAP_PX, PARTS, draw

pytest.importorskip("sklearn")


def test_equal_seeds_draw_equal_pictures():
    one, other = (draw(random.Random(3), "policy") for _ in range(2))
    assert one.placed == other.placed
    assert np.array_equal(one.pixels, other.pixels)
    assert not np.array_equal(one.pixels, draw(random.Random(4), "policy").pixels)


def test_parts_share_no_scan():
    scans = [set(range(*bounds)) for bounds in PARTS.values()]
    assert sum(map(len, scans)) == len(set().union(*scans)) == 1797


def test_digits_stand_apart_from_left_to_right_inside_the_canvas():
    rng = random.Random(0)
    counts = set()
    for _ in range(200):
        placed = draw(rng, "train").placed
        counts.add(len(placed))
        gaps = [right.x_px - left.x_px for left, right in pairwise(placed)]
        assert all(gap >= MIN_GAP_PX - 1e-9 for gap in gaps)
        assert all(item.size_px / 2 <= item.y_px <= CANVAS_PX - item.size_px / 2 for item in placed)
    assert counts == {1, 2, 3, 4}


def test_a_digit_is_brighter_than_the_ground_where_it_stands():
    canvas = draw(random.Random(1), "eval")
    for item in canvas.placed:
        x, y = round(item.x_px), round(item.y_px)
        around = canvas.pixels[max(0, y - 12) : y + 12, max(0, x - 12) : x + 12]
        assert around.max() > 180
    assert np.median(canvas.pixels) < 60


def test_a_picture_can_show_digits_that_were_asked_for():
    assert draw(random.Random(2), "train", (3, 3, 0)).digits == [3, 3, 0]
