"""Numbers in, the geometry of a line chart out: paths, ticks and labels that the template writes as inline SVG.

Only geometry is made here; every text is escaped by the template. Lengths are SVG user units, and a chart is drawn
about as wide as it is shown, so that its letters stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from reward.intervals import Interval

WIDTH, HEIGHT = 340, 208
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 18, 26


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    kind: str = ""
    anchor: str = "middle"


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    kind: str
    title: str


@dataclass(frozen=True)
class Path:
    d: str
    kind: str


@dataclass
class Chart:
    """A drawn chart: `lines` and `bands` are SVG paths, `kind` names the CSS class that colours a part."""

    title: str
    description: str
    width: int = WIDTH
    height: int = HEIGHT
    bands: list[Path] = field(default_factory=list)
    lines: list[Path] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    y_ticks: list[Label] = field(default_factory=list)
    dividers: list[float] = field(default_factory=list)
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Scale:
    """A linear map from values to positions; `ticks` lie inside the domain."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...] = ()

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def y_scale(
    values: Sequence[float], *, floor: float | None = None, ceiling: float | None = None, least: float = 0.0
) -> Scale:
    """A vertical scale over the values with round ticks.

    `floor` and `ceiling` bound the domain (0 and 1 for shares); `least` is the smallest span shown, so that noise
    looks like noise. Zero is taken in when the values come near it.

    >>> y_scale([0.41, 0.78], floor=0, ceiling=1).ticks
    (0.4, 0.6, 0.8)
    """
    low, high = min(values), max(values)
    span = max(high - low, least, 1e-9)
    middle = (low + high) / 2
    low, high = min(low, middle - span / 2), max(high, middle + span / 2)
    if 0 < low < span * 0.6:
        low = 0.0
    step = _nice_step((high - low) / 3)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if floor is not None:
        low = max(low, floor)
    if ceiling is not None:
        high = min(high, ceiling)
    count = math.floor((high - low) / step + 1e-6)
    ticks = tuple(round(low + index * step, 10) for index in range(count + 1))
    return Scale(low, high, HEIGHT - BOTTOM, TOP, ticks)


def _nice_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)


@dataclass(frozen=True)
class Curve:
    """One number over rounds: (round, interval) points in order; `kind` is `run` or `control`."""

    label: str
    kind: str
    points: list[tuple[int, Interval]]


def rounds_chart(
    title: str,
    curves: Sequence[Curve],
    show: Callable[[float], str],
    *,
    share: bool,
    baseline: float | None = None,
) -> Chart:
    """Curves over rounds with a band for the interval; the values of the first curve stand at its points."""
    numbers = sorted({number for curve in curves for number, _ in curve.points})
    bounds = [x for curve in curves for _, item in curve.points for x in (item.low, item.mean, item.high)]
    bounds += [] if baseline is None else [baseline]
    y = y_scale(bounds, floor=0.0 if share else None, ceiling=1.0 if share else None, least=0.08 if share else 0.0)
    inset = 18
    first, last = numbers[0], numbers[-1]
    x = (
        Scale(first, last, LEFT + inset, WIDTH - RIGHT - inset)
        if last > first
        else Scale(first - 1, first + 1, LEFT, WIDTH - RIGHT)
    )
    chart = Chart(title, _describe_rounds(curves, show))
    chart.y_ticks = [Label(LEFT - 8, y(tick), show_tick(tick, y, share), anchor="end") for tick in y.ticks]
    chart.labels = [
        Label(x(number), HEIGHT - 8, "start" if number == 0 else str(number), "axis") for number in _thin(numbers, 9)
    ]
    if baseline is not None:
        chart.lines.append(Path(f"M{LEFT},{y(baseline)}H{WIDTH - RIGHT}", "baseline"))
    for curve in reversed(curves):
        _draw_curve(chart, curve, x, y, show)
    if curves:
        chart.labels += _value_labels(curves, x, y, show)
    return chart


def _draw_curve(chart: Chart, curve: Curve, x: Scale, y: Scale, show: Callable[[float], str]) -> None:
    points = curve.points
    if len(points) > 1:
        upper = [(x(number), y(item.high)) for number, item in points]
        lower = [(x(number), y(item.low)) for number, item in reversed(points)]
        chart.bands.append(Path(path_of([*upper, *lower]) + "Z", curve.kind))
        chart.lines.append(Path(path_of([(x(number), y(item.mean)) for number, item in points]), curve.kind))
    for number, item in points:
        chart.lines.append(Path(f"M{x(number)},{y(item.low)}V{y(item.high)}", f"whisker {curve.kind}"))
        name = "first policy" if number == 0 else f"round {number}"
        title = (
            f"{curve.label}, {name}: {show(item.mean)} ({show(item.low)} to {show(item.high)}, {item.count} questions)"
        )
        chart.dots.append(Dot(x(number), y(item.mean), curve.kind, title))


def _value_labels(curves: Sequence[Curve], x: Scale, y: Scale, show: Callable[[float], str]) -> list[Label]:
    """The first curve's values beside their points, away from the other curve; only the ends when there are many."""
    points = curves[0].points
    points = points if len(points) <= 5 else [points[0], points[-1]]
    others = {number: item.mean for curve in curves[1:] for number, item in curve.points}
    labels = []
    for number, item in points:
        above, below = y(item.high) - 7, y(item.low) + 15
        fits_above, fits_below = above > TOP - 6, below < HEIGHT - BOTTOM - 2
        crowded = others.get(number, item.mean) > item.mean
        place = below if fits_below and (crowded or not fits_above) else above
        labels.append(Label(x(number), place, show(item.mean), "value"))
    return labels


def show_tick(tick: float, scale: Scale, share: bool) -> str:
    """A label of an axis."""
    step = scale.ticks[1] - scale.ticks[0] if len(scale.ticks) > 1 else max(abs(tick), 1)
    if share:
        return f"{tick * 100:.{0 if step >= 0.00999 else 1}f}\u00a0%"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits and not math.isclose(step * 10**digits, round(step * 10**digits), abs_tol=1e-6):
        digits += 1
    return f"{tick:,.{digits}f}".replace("-", "\u2212")


def _describe_rounds(curves: Sequence[Curve], show: Callable[[float], str]) -> str:
    def one(curve: Curve) -> str:
        values = ", ".join(f"round {number} {show(item.mean)}" for number, item in curve.points)
        return f"{curve.label}: {values}"

    return "; ".join(one(curve) for curve in curves)


@dataclass(frozen=True)
class Panel:
    """One round's training: `series` holds (step, value) points by kind, `reference_curve` (share of the round,
    value)."""

    number: int
    series: dict[str, list[tuple[float, float]]]
    reference_curve: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def training_chart(
    title: str, panels: Sequence[Panel], *, reference_curve: bool = False, baseline: float | None = None
) -> Chart:
    """The training curves of the rounds side by side, each in a panel of its own: raw values faint,
    running mean strong."""
    values = [v for panel in panels for points in panel.series.values() for _, v in points]
    values += (
        [v for panel in panels for points in panel.reference_curve.values() for _, v in points]
        if reference_curve
        else []
    )
    values += [] if baseline is None else [baseline]
    y = y_scale(values)
    chart = Chart(title, _describe_training(panels))
    chart.y_ticks = [Label(LEFT - 8, y(tick), show_tick(tick, y, False), anchor="end") for tick in y.ticks]
    if baseline is not None:
        chart.lines.append(Path(f"M{LEFT},{y(baseline)}H{WIDTH - RIGHT}", "baseline"))
    panel_width = (WIDTH - RIGHT - LEFT) / len(panels)
    for index, panel in enumerate(panels):
        start, end = LEFT + index * panel_width, LEFT + (index + 1) * panel_width
        if index:
            chart.dividers.append(round(start, 1))
        chart.labels.append(
            Label(round((start + end) / 2, 1), HEIGHT - 8, _panel_name(panel.number, len(panels)), "axis")
        )
        if reference_curve:
            share = Scale(0, 1, start + 3, end - 3)
            for kind, points in panel.reference_curve.items():
                chart.lines.append(Path(path_of([(share(s), y(v)) for s, v in points]), f"reference-curve {kind}"))
        _draw_panel(chart, panel, Scale(*_steps_of(panel), start + 3, end - 3), y)
    return chart


def _draw_panel(chart: Chart, panel: Panel, x: Scale, y: Scale) -> None:
    for kind, points in panel.series.items():
        if not points:
            continue
        if len(points) == 1:
            chart.dots.append(Dot(x(points[0][0]), y(points[0][1]), kind, f"step {points[0][0]:g}: {points[0][1]:.4g}"))
            continue
        smooth = running_mean(points)
        if smooth != points:
            chart.lines.append(Path(path_of([(x(s), y(v)) for s, v in thinned(points, 160)]), f"raw {kind}"))
        chart.lines.append(Path(path_of([(x(s), y(v)) for s, v in thinned(smooth, 160)]), kind))


def _steps_of(panel: Panel) -> tuple[float, float]:
    steps = [step for points in panel.series.values() for step, _ in points]
    low, high = min(steps, default=0.0), max(steps, default=1.0)
    return (low, high) if high > low else (low - 1, low + 1)


def _panel_name(number: int, count: int) -> str:
    return f"round {number}" if count <= 4 else str(number)


def _describe_training(panels: Sequence[Panel]) -> str:
    parts = []
    for panel in panels:
        ends = [f"{kind} {points[0][1]:.3f} to {points[-1][1]:.3f}" for kind, points in panel.series.items() if points]
        parts.append(f"round {panel.number}: {', '.join(ends) or 'no values'}")
    return "; ".join(parts)


def running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred mean over about a tenth of the points; a short curve is left as it is."""
    half = len(points) // 20
    if half < 1:
        return points
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smooth = []
    for index, (step, _) in enumerate(points):
        start, end = max(0, index - half), min(len(points), index + half + 1)
        smooth.append((step, (sums[end] - sums[start]) / (end - start)))
    return smooth


def thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about `most` points: of each stretch its lowest and highest, so that spikes stay visible."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most / 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """SVG path data.

    >>> path_of([(0, 1), (2.5, 3)])
    'M0,1L2.5,3'
    """
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


def _thin(numbers: list[int], most: int) -> list[int]:
    every = math.ceil(len(numbers) / most)
    return numbers[::every]
