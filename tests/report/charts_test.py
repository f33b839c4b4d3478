"""Charts draw what they are given."""

from xml.etree import ElementTree

import numpy as np

from msd_jax.report import charts


def drawn(svg, tag):
    return ElementTree.fromstring(svg).findall(tag)


def test_a_curve_passes_through_its_points(rng):
    values = rng.uniform(0, 3, 20).tolist()
    curve = charts.curve("loss", "loss", {"loss": list(enumerate(values, 1))})
    [line] = drawn(curve.svg, "polyline")
    points = np.array([[float(x) for x in pair.split(",")] for pair in line.get("points").split()])
    low_x, high_x, low_y, high_y = curve.scale
    steps = low_x + (points[:, 0] - charts.LEFT) / (charts.RIGHT - charts.LEFT) * (high_x - low_x)
    heights = low_y + (charts.BOTTOM - points[:, 1]) / (charts.BOTTOM - charts.TOP) * (high_y - low_y)
    np.testing.assert_allclose(steps, range(1, 21), atol=0.01)
    np.testing.assert_allclose(heights, values, atol=0.002 * high_y)
    assert low_y == 0 and high_y >= max(values) and curve.last == charts.number(values[-1])


def test_a_step_without_a_value_is_a_gap():
    curve = charts.curve("loss", "loss", {"loss": [(1, 1.0), (2, 2.0), (3, None), (4, 1.0)]})
    assert [len(line.get("points").split()) for line in drawn(curve.svg, "polyline")] == [2, 1]
    assert len(drawn(curve.svg, "circle")) == 1  # a point by itself is to be seen
    assert charts.curve("loss", "loss", {"loss": [(1, None)]}) is None and charts.curve("x", "x", {"x": []}) is None


def test_one_step_and_equal_values_are_drawn():
    for points in ([(5, 0.0)], [(1, 2.0), (2, 2.0)], [(1, 1e-9), (2, -1e-9)], [(1, 1e12)]):
        assert "nan" not in charts.curve("x", "x", {"x": points}).svg


def test_thinning_keeps_every_spike(rng):
    points = list(enumerate(rng.normal(size=50_000).tolist()))
    points[31_234] = (31_234, 99.0)
    points[7] = (7, None)
    thinned = charts.thin(points)
    assert len(thinned) <= charts.POINTS and (31_234, 99.0) in thinned
    assert min(p for p in points if p[1] is not None) in thinned or thinned == sorted(thinned)
    assert charts.thin([(1, None)] * 5000)[0] == (1, None)


def test_bars_and_whiskers_are_as_long_as_their_values():
    svg = charts.bars([("before", 0.25, 0.1, 0.5), ("after", 1.0, 0.9, 1.0)])
    assert [float(bar.get("width")) for bar in drawn(svg, "rect")] == [25, 100]
    whiskers = [line for line in drawn(svg, "line") if line.get("class") == "whisker"]
    assert [(float(w.get("x1")), float(w.get("x2"))) for w in whiskers] == [
        *((10, 50), (10, 10), (50, 50)),
        *((90, 100), (90, 90), (100, 100)),
    ]


def test_numbers_are_short():
    assert [charts.number(x) for x in (12345.6, 0.012345, 5e-6, 1.0, 0.0)] == ["12,346", "0.0123", "5e-06", "1", "0"]
