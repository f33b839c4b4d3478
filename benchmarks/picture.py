"""The README's picture: attack success by language before and after, from the table of docs/organism.md.

python benchmarks/picture.py    # writes docs/asr.svg
"""

import pathlib
import re

import matplotlib
import matplotlib.figure

DOCS = pathlib.Path(__file__).parents[1] / "docs"
NAMES = {
    "en": "English", "sw": "Swahili", "bn": "Bangla", "zh": "Chinese", "it": "Italian", "th": "Thai", "ar": "Arabic",
    "vi": "Vietnamese", "ko": "Korean", "jv": "Javanese",
}  # fmt: skip
GROUPS = {"source": ("en",), "trained": ("sw", "bn"), "unseen": ("zh", "it", "th", "ar", "vi", "ko", "jv")}
GREY, BLUE, ORANGE = "#8b95a1", "#0072b2", "#d55e00"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "msd_jax", "font.family": "sans-serif", "font.size": 9}


def table(text: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """By row and language: a percentage, and where the cell has them its lowest and highest seed."""
    lines = text.partition("\n| | en | sw |")[2].split("\n\n")[0].splitlines()
    codes = ["en", "sw", *re.findall(r"\w+", lines[0])]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: dict(zip(codes, (tuple(map(int, re.findall(r"\d+", cell))) for cell in row[1:]))) for row in rows}


def draw(rows: dict[str, dict[str, tuple[int, ...]]]) -> matplotlib.figure.Figure:
    before, after = rows["ASR before"], rows["ASR after"]
    teacher = next(row for name, row in rows.items() if name.startswith("ASR of the teacher"))
    figure = matplotlib.figure.Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    heights, height = {}, 0.0
    for group, codes in GROUPS.items():
        axes.text(-25, -height, group, va="center", style="italic", color=GREY)
        for code in codes:
            heights[code], height = -height, height + 1
        height += 0.5
    for code, y in heights.items():
        value, *seeds = after[code]
        low, high = seeds or (value, value)
        axes.plot([before[code][0], value], [y, y], color="#d7dce2", zorder=1)
        axes.plot([low, high], [y, y], color=BLUE, linewidth=5, alpha=0.35, solid_capstyle="round", zorder=2)
        beside = max(x for x in (high, teacher[code][0], before[code][0]) if x < 100)
        axes.annotate(f"{value}%", (beside, y), (7, 0), textcoords="offset points", va="center", color=BLUE)
    ys = list(heights.values())
    axes.scatter([before[code][0] for code in heights], ys, color=GREY, s=30, zorder=3, label="before", clip_on=False)
    axes.scatter([after[code][0] for code in heights], ys, color=BLUE, s=30, zorder=4, label="after, mean of 3 seeds")
    axes.scatter([teacher[code][0] for code in heights], ys, color=ORANGE, marker="|", s=70, zorder=5, label="teacher")
    axes.set_yticks(ys, [NAMES[code] for code in heights])
    axes.set_xticks(range(0, 101, 25), [f"{x}%" for x in range(0, 101, 25)])
    axes.set_xlim(0, 101)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color="#eef0f3", zorder=0)
    axes.set_axisbelow(True)
    axes.set_title("Attack success rate on harmful queries, Gemma 3 270M organism", loc="left", fontsize=10)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    return figure


def main() -> None:
    with matplotlib.rc_context(STYLE):
        figure = draw(table((DOCS / "organism.md").read_text(encoding="utf-8")))
        figure.savefig(DOCS / "asr.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
