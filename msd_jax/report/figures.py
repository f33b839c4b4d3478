"""Figures for papers: PNG at 300 dots per inch, as wide as a page's text."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.colors
import matplotlib.figure
import numpy as np

from msd_jax.evaluation import rates
from msd_jax.report import untrusted
from msd_jax.report.results import Results
from msd_jax.report.rows import RATES, RateRow

_WIDTH = 6.5  # inches
_BEFORE, _AFTER = "#a3adb9", "#0072b2"  # as page.css has them, and the next line too
_HEAT = matplotlib.colors.LinearSegmentedColormap.from_list("heat", ["#fdf6ea", "#9c2a00"])
_STYLE: dict[Any, Any] = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}


def write(results: Results, directory: pathlib.Path) -> list[pathlib.Path]:
    """asr.png, utility.png and training.png, as far as there is something to draw."""
    written = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in (("asr", _asr), ("utility", _utility), ("training", _training)):
            if (figure := draw(results)) is not None:
                written.append(directory / f"{name}.png")
                figure.savefig(written[-1], dpi=300, bbox_inches="tight")
    return written


def _text(text: str) -> str:
    """The text on one line, in which no dollar sign begins a formula."""
    return untrusted.visible(text, 40).replace("$", r"\$")


def _asr(results: Results) -> matplotlib.figure.Figure | None:
    tables = results.rows("asr")
    if not tables:
        return None
    sides = ["before", "after"] if results.before else ["after"]
    names = list(dict.fromkeys((row.pooled, row.label) for rows in tables.values() for row in rows))
    columns = [(benchmark, side) for benchmark in tables for side in sides]
    shown = np.full((len(names), len(columns)), np.nan)
    for j, (benchmark, side) in enumerate(columns):
        for row in tables[benchmark]:
            entry = getattr(row, side)
            if entry and entry.get("asr") is not None:
                shown[names.index((row.pooled, row.label)), j] = 100 * entry["asr"]
    figure = matplotlib.figure.Figure(figsize=(min(_WIDTH, 1.5 + 0.7 * len(columns)), 0.8 + 0.22 * len(names)))
    axes = figure.add_subplot()
    image = axes.imshow(shown, cmap=_HEAT, vmin=0, vmax=100, aspect="auto")
    for i, j in np.argwhere(~np.isnan(shown)):
        axes.text(j, i, f"{shown[i, j]:.0f}", ha="center", va="center", color="white" if shown[i, j] > 65 else "black")
    axes.set_xticks(range(len(columns)), [side for _, side in columns] if len(sides) > 1 else [""] * len(columns))
    for index, benchmark in enumerate(tables):  # over all of its columns
        middle = (len(sides) * (2 * index + 1) - 1) / 2
        axes.annotate(
            _text(benchmark),
            (middle, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 16 if len(sides) > 1 else 5),
            textcoords="offset points",
            ha="center",
            weight="bold",
        )
    axes.set_yticks(range(len(names)), [_text(label) for _, label in names])
    for tick, (pooled, _) in zip(axes.get_yticklabels(), names):
        tick.set_fontweight("bold" if pooled else "normal")
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, label="attack success rate, %", fraction=0.05, pad=0.03).outline.set_visible(False)
    return figure


def _utility(results: Results) -> matplotlib.figure.Figure | None:
    panels = [
        (f"{rate.title}\n{_text(benchmark)}", rate.key, rows)
        for rate in RATES
        if rate.key in ("over_refusal", "exact_match", "accuracy")
        for benchmark, rows in results.rows(rate.key).items()
    ]
    if not panels or results.after is None:
        return None
    panels.sort(key=lambda panel: -len(panel[2]))
    alike = [list(group) for _, group in itertools.groupby(panels, key=lambda panel: len(panel[2]))]
    lines = [
        group[i : i + 3] for group in alike for i in range(0, len(group), 3)
    ]  # of one height, so that none is empty
    columns = max(map(len, lines))
    heights = [0.7 + 0.2 * max(len(rows) for _, _, rows in line) for line in lines]
    figure = matplotlib.figure.Figure(figsize=(_WIDTH, sum(heights) + 0.35), layout="constrained")  # and a legend
    grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
    for i, line in enumerate(lines):
        for j, (title, rate, rows) in enumerate(line):
            axes = figure.add_subplot(grid[i, j])
            axes.set_title(title, fontsize=8)
            _bars(axes, rate, rows)
            axes.set_ylim(max(len(rows) for _, _, rows in line) - 0.4, -0.6)  # bars of one thickness
    handles = [matplotlib.patches.Patch(color=_AFTER, label=results.after.label)]
    if results.before:
        handles.insert(0, matplotlib.patches.Patch(color=_BEFORE, label=results.before.label))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bars(axes: matplotlib.axes.Axes, rate: str, rows: Sequence[RateRow]) -> None:
    for side, colour, offset in (("before", _BEFORE, -0.2), ("after", _AFTER, 0.2)):
        for i, row in enumerate(rows):
            entry = getattr(row, side)
            if entry and entry.get(rate) is not None:
                value, (low, high) = entry[rate], entry[rate + "_interval"]
                error = [[100 * max(value - low, 0)], [100 * max(high - value, 0)]]
                axes.barh(i + offset, 100 * value, 0.38, color=colour, xerr=error, error_kw={"lw": 0.7, "capsize": 1.5})
    axes.set_yticks(range(len(rows)), [_text(row.label) for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows):
        tick.set_fontweight("bold" if row.pooled else "normal")
    axes.set_xlim(0, 100 if rates.BY_KEY[rate].better > 0 else _end(rate, rows))
    axes.set_xlabel("%")


def _end(rate: str, rows: Sequence[RateRow]) -> float:
    """Of the axis of a rate that is to be low, in percent: such bars would be lost on one that goes to 100."""
    entries = [entry for row in rows for entry in (row.before, row.after) if entry and entry.get(rate) is not None]
    return min(max(10.0, *(115 * entry[rate + "_interval"][1] for entry in entries)), 100.0)


def _training(results: Results) -> matplotlib.figure.Figure | None:
    rows = results.run.metrics
    panels = [panel for panel in _curves() if any(row.get(panel[0]) is not None for row in rows)]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = matplotlib.figure.Figure(figsize=(_WIDTH, 1.5 * lines), layout="constrained")
    steps = [row["step"] for row in rows]
    for index, (key, title) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        values = [np.nan if row.get(key) is None else row[key] for row in rows]
        axes.plot(steps, values, color=_AFTER, lw=1, marker="." if len(rows) == 1 else None)
        axes.set_title(title, fontsize=8)
        axes.set_ylim(bottom=min(0, np.nanmin(values)))
        axes.set_xlabel("step")
    return figure


def _curves() -> Iterator[tuple[str, str]]:
    yield "loss", "loss"
    yield "kl", "divergence, nats per token"
    yield "grad_norm", "gradient norm"
    yield "learning_rate", "learning rate"
    yield "response_length", "response length, tokens"
    yield "stopped", "share that finish (EOS)"
