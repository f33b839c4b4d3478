"""What readers are shown: the notebook runs, the README's picture shows the table. `.ci/run` builds the site."""

import os
import pathlib
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib

from benchmarks import picture
from tests.conftest import REPOSITORY


def texts(svg: pathlib.Path) -> list[str]:
    return [element.text for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_notebook_runs():
    """Two steps instead of thirty, and eight records of the evaluation: that it runs, not what it learns."""
    done = subprocess.run(
        [sys.executable, "notebooks/quickstart.py"],
        cwd=REPOSITORY,
        env=os.environ | {"MSD_JAX_STEPS": "2", "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    divergence = re.search(r"KL\(teacher \|\| student\): ([\d.]+) nats per token, then ([\d.]+)", done.stdout)
    assert divergence and float(divergence[2]) < 0.05 * float(divergence[1])
    assert done.stdout.count("  before ") == done.stdout.count("  after  ") == 3
    sure, unsure = map(float, re.findall(r"sure ([\d.]+), elsewhere ([\d.]+)", done.stdout)[0])
    assert sure > 10 * unsure


def test_the_picture_shows_the_table(tmp_path):
    with matplotlib.rc_context(picture.STYLE):
        picture.draw(picture.table((REPOSITORY / "docs/organism.md").read_text(encoding="utf-8"))).savefig(
            tmp_path / "asr.svg"
        )
    shown = texts(REPOSITORY / "docs/asr.svg")
    assert shown == texts(tmp_path / "asr.svg")  # after a change: python benchmarks/picture.py
    assert {"Swahili", "9%", "54%"} <= set(shown)


def test_the_pages_are_in_the_navigation_and_the_readme_links_to_files():
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", (REPOSITORY / "README.md").read_text(encoding="utf-8")):
        assert (REPOSITORY / link).is_file(), link
