"""Geometry of the charts, checked where a reader would notice a fault."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.report.figures import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    Panel,
    rounds_chart,
    running_mean,
    show_tick,
    thinned,
    training_chart,
    y_scale,
)
from align.report.metrics import percent
from reward.intervals import Interval

FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=1, max_size=30))
def test_the_scale_holds_all_values_and_has_round_ticks(values):
    scale = y_scale(values)
    for value in values:
        assert TOP - 0.2 <= scale(value) <= HEIGHT - BOTTOM + 0.2
    assert 1 <= len(scale.ticks) <= 8
    assert all(scale.low - 1e-9 * abs(scale.low) <= tick for tick in scale.ticks)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_shares_stay_between_zero_and_one(values):
    scale = y_scale(values, floor=0.0, ceiling=1.0, least=0.08)
    assert scale.low >= 0
    assert scale.high <= 1
    assert scale.high - scale.low >= 0.04


def test_ticks_are_written_as_exactly_as_they_are():
    scale = y_scale([0.0, 0.1], floor=0, ceiling=1)
    assert len({show_tick(tick, scale, True) for tick in scale.ticks}) == len(scale.ticks)
    scale = y_scale([1.0, 1.06])
    assert len({show_tick(tick, scale, False) for tick in scale.ticks}) == len(scale.ticks)


def test_higher_values_stand_higher():
    points = [(0, Interval(0.4, 0.35, 0.45, 10)), (1, Interval(0.8, 0.75, 0.85, 10))]
    chart = rounds_chart("t", [Curve("run", "run", points)], percent, share=True)
    first, last = chart.dots
    assert first.x < last.x
    assert first.y > last.y
    assert last.title == "run, round 1: 80.0\u00a0% (75.0\u00a0% to 85.0\u00a0%, 10 questions)"


def test_a_single_round_is_drawn_in_the_middle():
    chart = rounds_chart("t", [Curve("run", "run", [(0, Interval(0.4, 0.35, 0.45, 10))])], percent, share=True)
    assert chart.dots[0].x == pytest.approx((LEFT + WIDTH - RIGHT) / 2)
    assert chart.bands == []


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_every_round_keeps_to_its_panel():
    panels = [Panel(n, {"loss": [(s, 0.7 - 0.01 * s) for s in range(n * 5)]}) for n in (1, 2, 3)]
    chart = training_chart("Loss", panels)
    width = (WIDTH - LEFT - RIGHT) / 3
    for index, line in enumerate(chart.lines):
        xs = numbers(line.d)[::2]
        assert LEFT + index * width <= min(xs)
        assert max(xs) <= LEFT + (index + 1) * width
    assert len(chart.dividers) == 2


def test_one_step_alone_is_a_dot():
    chart = training_chart("Loss", [Panel(1, {"loss": [(1.0, 0.69)]})])
    assert len(chart.dots) == 1


def test_thinning_keeps_the_extremes():
    points = [(float(step), 1.0) for step in range(10_000)]
    points[7777] = (7777.0, 9.0)
    kept = thinned(points, 100)
    assert len(kept) <= 110
    assert (7777.0, 9.0) in kept
    assert kept == sorted(kept)


@given(st.lists(FINITE, min_size=20, max_size=200))
def test_a_running_mean_stays_within_the_values(values):
    smooth = running_mean([(float(index), value) for index, value in enumerate(values)])
    assert [step for step, _ in smooth] == list(range(len(values)))
    assert all(min(values) - 1e-4 <= value <= max(values) + 1e-4 for _, value in smooth)


def test_a_running_mean_of_a_line_is_the_line():
    points = [(float(step), 2.0 * step) for step in range(100)]
    assert running_mean(points)[50][1] == pytest.approx(100.0)
