"""Small SVG charts for the page, without colours of their own: page.css gives them, by theme."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import markupsafe

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 8, 146  # of the plot within it
POINTS = 400  # more than one per pixel cannot be told apart

Point = tuple[float, float | None]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line chart over training steps.

    Attributes:
      key, title: what is shown.
      explanation: of it, "" where the title says enough.
      series: {name: points}; None is a gap.
      svg: drawn.
      scale: [x low, x high, y low, y high] of the plot's edges.
    """

    key: str
    title: str
    explanation: str
    series: dict[str, list[Point]]
    svg: markupsafe.Markup
    scale: tuple[float, float, float, float]

    @property
    def last(self) -> str:
        """The last value, where there is one line alone."""
        [points, *more] = self.series.values()
        values = [y for _, y in points if y is not None]
        return "" if more or not values else number(values[-1])


def number(value: float) -> str:
    """A value in few characters: "12,346", "0.0123", "5e-06"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def curve(
    key: str, title: str, series: dict[str, list[Point]], most: float | None = None, explanation: str = ""
) -> Curve | None:
    """Draws the series from zero; None where there is no value to draw.

    Args:
      key, title, explanation: see Curve.
      series: points in order of their steps.
      most: upper end of the axis; None takes the data's.
    """
    series = {name: thin(points) for name, points in series.items()}
    series = {name: points for name, points in series.items() if any(y is not None for _, y in points)}
    if not series:
        return None
    steps = [x for points in series.values() for x, _ in points]
    values = [y for points in series.values() for _, y in points if y is not None]
    y_ticks = ticks(min(0.0, *values, 0.0), most or max(*values, 0.0))
    low, high = min(steps), max(steps)
    if low == high:
        low, high = low - 1, high + 1
    scale = (low, high, y_ticks[0], y_ticks[-1])
    svg = _draw(title, series, scale, y_ticks)
    return Curve(key, title, explanation, series, _markup(svg), scale)


def _draw(
    title: str, series: dict[str, list[Point]], scale: tuple[float, float, float, float], y_ticks: Sequence[float]
) -> ElementTree.Element:
    low, high = scale[:2]

    def at_x(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - scale[0]) / (scale[1] - scale[0])

    def at_y(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (y - scale[2]) / (scale[3] - scale[2])

    svg = _element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="curve")
    ElementTree.SubElement(svg, "title").text = f"{title} over training steps"
    for value in y_ticks:
        _add(svg, "line", class_="grid", x1=LEFT, x2=RIGHT, y1=at_y(value), y2=at_y(value))
        _add(svg, "text", number(value), class_="tick end", x=LEFT - 6, y=at_y(value) + 4)
    for value in [tick for tick in ticks(low, high) if low <= tick <= high and tick == int(tick)]:
        _add(svg, "text", number(value), class_="tick middle", x=at_x(value), y=BOTTOM + 17)
    for index, points in enumerate(series.values()):
        for part in _unbroken(points):
            line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in part)
            _add(svg, "polyline", class_=f"line s{index}", points=line)
            if len(part) == 1:
                _add(svg, "circle", class_=f"dot s{index}", cx=at_x(part[0][0]), cy=at_y(part[0][1]), r=2.5)
    _add(svg, "line", class_="cursor", x1=LEFT, x2=LEFT, y1=TOP, y2=BOTTOM)
    return svg


def bars(entries: Sequence[tuple[str, float, float, float]]) -> markupsafe.Markup:
    """Horizontal bars from 0 to 1, one above the other, each with its interval; stretched to the width that there is.

    Args:
      entries: (CSS class, value, low, high).
    """
    height = 9 * len(entries) + 3
    svg = _element("svg", viewBox=f"0 0 100 {height}", preserveAspectRatio="none", class_="bars", aria_hidden="true")
    svg.set("height", str(2 * height))
    for tick in (0, 25, 50, 75, 100):
        _add(svg, "line", class_="grid", x1=tick, x2=tick, y1=0, y2=height)
    for index, (name, value, low, high) in enumerate(entries):
        top, middle = 9 * index + 2, 9 * index + 6
        _add(svg, "rect", class_=f"bar {name}", x=0, y=top, width=100 * value, height=8)
        _add(svg, "line", class_="whisker", x1=100 * low, x2=100 * high, y1=middle, y2=middle)
        for end in (low, high):
            _add(svg, "line", class_="whisker", x1=100 * end, x2=100 * end, y1=middle - 2, y2=middle + 2)
    return _markup(svg)


def thin(points: Sequence[Point]) -> list[Point]:
    """At most POINTS of them: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / POINTS)
    kept: list[Point] = []
    for first in range(0, len(points), size):
        known = [(y, x) for x, y in points[first : first + size] if y is not None]
        kept += (
            sorted({(x, y) for y, x in (min(known), max(known, key=lambda point: point[0]))})
            if known
            else [points[first]]
        )
    return kept


def ticks(low: float, high: float) -> list[float]:
    """Round values from at or below `low` to at or above `high`."""
    import matplotlib.ticker

    if low == high:
        high = low + 1
    return [float(tick) for tick in matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _unbroken(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None:
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _element(tag: str, **attributes: Any) -> ElementTree.Element:
    values = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    return ElementTree.Element(
        tag, {name: f"{value:.2f}" if isinstance(value, float) else str(value) for name, value in values.items()}
    )


def _add(parent: ElementTree.Element, tag: str, text: str = "", **attributes: Any) -> None:
    child = _element(tag, **attributes)
    child.text = text or None
    parent.append(child)


def _markup(svg: ElementTree.Element) -> markupsafe.Markup:
    return markupsafe.Markup(ElementTree.tostring(svg, encoding="unicode"))  # escaped by ElementTree
