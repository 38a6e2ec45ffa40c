"""One panel over time as SVG: axes, lines, steps and stacked areas. Colours of text and grid are the page's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from loadtest.traffic.run import Floats

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1100, 52, 8, 8, 20
PLOT = WIDTH - LEFT - RIGHT
TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200)
MOST_TIME_TICKS = 13
# Panels under this height have half as many levels.
LOW_PX = 100
# A line goes on over seconds without a value, up to so many points.
GAP_POINTS = 15

Style = Literal["line", "step", "dashed step", "area"]


@dataclass(frozen=True)
class Series:
    """Values [T], NaN where there is none; areas are stacked in their order."""

    name: str
    colour: str
    values: Floats
    style: Style = "line"


@dataclass(frozen=True)
class Mark:
    """A moment that is worth a line through all panels."""

    at_s: float
    text: str


@dataclass(frozen=True)
class Panel:
    """One quantity over time; `limits` are levels to be kept under, as (value, colour)."""

    title: str
    unit: str
    series: Sequence[Series]
    height: int = 110
    log: bool = False
    limits: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to heights."""

    low: float
    high: float
    height: int
    log: bool

    def y(self, value: float) -> float:
        if self.log:
            value, low, high = (math.log(max(each, self.low)) for each in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return TOP + (self.height - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    def ticks(self) -> list[float]:
        if self.log:
            return log_ticks(self.low, self.high)
        step = nice_under(self.high / (2 if self.height < LOW_PX else 3))
        if self.high > 1:  # users and replicas come whole
            step = max(1.0, step)
        return [step * number for number in range(int(self.high / step + 1e-9) + 1)]


def draw(panel: Panel, at_s: Floats, until_s: float, marks: Iterable[Mark] = ()) -> str:
    """The panel as an `svg` element; `at_s` are the times of the values [T]."""
    scale = _scale(panel)
    bottom = panel.height - BOTTOM
    parts = [f'<svg class="panel" viewBox="0 0 {WIDTH} {panel.height}" role="img" aria-label="{escape(panel.title)}">']
    for tick in scale.ticks():
        y = scale.y(tick)
        parts.append(_level("grid", y))
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in time_ticks(until_s):
        x = _x(tick, until_s)
        parts.append(_moment("grid", x, bottom))
        # The first and the last stay within the picture.
        anchor = "start" if tick == 0 else "end" if x > WIDTH - RIGHT - 20 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 13}" text-anchor="{anchor}">{clock(tick)}</text>')
    for level, colour in panel.limits:
        if scale.low <= level <= scale.high:
            parts.append(_level("limit", scale.y(level), f' stroke="{colour}"'))
    parts += _areas(panel, scale, at_s, until_s)
    for series in panel.series:
        if series.style != "area":
            dash = ' stroke-dasharray="5 3"' if series.style.startswith("dashed") else ""
            path = _path(series, scale, at_s, until_s)
            parts.append(f'<path class="line" stroke="{series.colour}"{dash} d="{path}"/>')
    for mark in marks:
        parts.append(_moment("mark", _x(mark.at_s, until_s), bottom, f"<title>{escape(mark.text)}</title>"))
    # Where the pointer is, which the page's script says; until then outside of the picture.
    return "".join([*parts, _moment("cross", -WIDTH, bottom), "</svg>"])


def _level(kind: str, y: float, more: str = "") -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"{more}/>'


def _moment(kind: str, x: float, bottom: int, content: str = "") -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}">{content}</line>'


def _scale(panel: Panel) -> _Scale:
    stacked = [series.values for series in panel.series if series.style == "area"]
    single = [series.values for series in panel.series if series.style != "area"]
    tops = single + ([np.nansum(stacked, axis=0)] if stacked else [])
    values = np.concatenate([*tops, [level for level, _ in panel.limits], np.empty(0)])
    values = values[np.isfinite(values)]
    high = float(values.max(initial=0.0))
    if panel.log:
        above = values[values > 0]
        low = float(above.min()) if above.size else 1.0
        return _Scale(low * 0.8, max(high, low * 10) * 1.2, panel.height, True)
    return _Scale(0.0, high * 1.08 if high > 0 else 1.0, panel.height, False)


def _x(at_s: float, until_s: float) -> float:
    return LEFT + PLOT * at_s / until_s


def _areas(panel: Panel, scale: _Scale, at_s: Floats, until_s: float) -> list[str]:
    """Stacked from the bottom up; drawn as steps, since a bucket's rate holds for all of it."""
    parts = []
    base = np.zeros(len(at_s))
    starts_ends = list(zip(at_s, np.append(at_s[1:], until_s), strict=True))

    def corners(values: Floats) -> list[str]:
        both = zip(starts_ends, values, strict=True)
        return [f"{_x(x, until_s):.1f} {scale.y(y):.1f}" for edges, y in both for x in edges]

    for series in panel.series:
        if series.style == "area":
            top = base + np.nan_to_num(series.values)
            outline = [*corners(top), *corners(base)[::-1]]
            parts.append(f'<path class="area" fill="{series.colour}" d="M{"L".join(outline)}Z"/>')
            base = top
    return parts


def _path(series: Series, scale: _Scale, at_s: Floats, until_s: float) -> str:
    """Through the values that there are; across a long gap there is no line, and a value alone is a dot."""
    middle = (at_s[1] - at_s[0]) / 2 if len(at_s) > 1 else until_s / 2
    commands = []
    last, drawn = -GAP_POINTS - 1, 0
    steps = series.style.endswith("step")
    for place in np.flatnonzero(np.isfinite(series.values)).tolist():
        x, y = _x(at_s[place] + middle, until_s), scale.y(series.values[place])
        if place - last > GAP_POINTS:
            if drawn == 1:
                commands.append("h.1")
            commands.append(f"M{x:.1f} {y:.1f}")
            drawn = 0
        else:
            commands.append(f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}")
        last, drawn = place, drawn + 1
    return "".join(commands) + ("h.1" if drawn == 1 else "")


def nice_under(step: float) -> float:
    """The last of 1, 2, 5, 10, ... that is not over a step.

    >>> nice_under(3), nice_under(0.12), nice_under(70)
    (2.0, 0.1, 50.0)
    """
    power = 10.0 ** math.floor(math.log10(step))
    return next(round(factor * power, 9) for factor in (5, 2, 1) if factor * power <= step * (1 + 1e-9))


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... within; where they would be many, fewer to each power of ten.

    >>> log_ticks(3, 120), log_ticks(3, 1200)
    ([5.0, 10.0, 20.0, 50.0, 100.0], [3.0, 10.0, 30.0, 100.0, 300.0, 1000.0])
    """
    factors = (1, 2, 5) if high / low < 200 else (1, 3) if high / low < 20_000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [round(factor * 10.0**power, 9) for power in powers for factor in factors]
    return [tick for tick in found if low <= tick <= high]


def time_ticks(until_s: float) -> list[float]:
    """Round moments from 0 on.

    >>> time_ticks(60)
    [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60]
    """
    step = next((each for each in TIME_STEPS_S if until_s / each < MOST_TIME_TICKS), TIME_STEPS_S[-1])
    return [step * number for number in range(int(until_s / step) + 1)]


def clock(seconds: float) -> str:
    """Seconds into a run as minutes and seconds, or hours.

    >>> clock(5), clock(75), clock(3600)
    ('0:05', '1:15', '1:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(value: float) -> str:
    """A tick's number.

    >>> short(0), short(0.2), short(1500), short(20000)
    ('0', '0.2', '1,500', '20k')
    """
    return f"{value / 1000:,g}k" if value >= 10_000 else f"{value:,g}"
