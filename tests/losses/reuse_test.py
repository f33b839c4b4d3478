"""The losses in other people's programs: the files of examples/, and what importing them costs."""

import doctest
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from examples import data
from msd_jax import losses
from tests.conftest import REPOSITORY

EXAMPLES = sorted(path.stem for path in (REPOSITORY / "examples").glob("*.py") if path.stem != "data")


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_brings_the_student_to_the_teacher(name, divergence):
    """The loss falls to a hundredth, and the student's distribution has moved to the teacher's."""
    features, teacher_logits, mask = data.make(7)
    options = {"divergence": divergence, "weight_top_k": 6}
    train = importlib.import_module(f"examples.{name}").train
    before, after = train(features, teacher_logits, mask, **options)

    def loss(student_logits):
        return losses.mean_loss(*losses.dpsw_loss(student_logits, teacher_logits, None, mask, **options)[:2])

    def total_variation(student_logits):
        gap = jax.nn.softmax(student_logits) - jax.nn.softmax(teacher_logits)
        return 0.5 * jnp.abs(gap).sum(-1)[mask].mean()

    assert loss(before) > 0.5 and loss(after) < 0.01 * loss(before)
    assert total_variation(before) > 0.4 and total_variation(after) < 0.06


def test_an_example_runs_by_itself():
    code = "import runpy; runpy.run_module('examples.optax_loop', run_name='__main__')"
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    before, after = (float(line.split()[1]) for line in shown.stdout.splitlines())
    assert after < 0.05 * before


def test_the_readme_shows_what_the_loss_gives():
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Only the loss")[1].split("\n## ")[0]
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    example = parser.get_doctest(section.replace("```", ""), {}, "README", None, None)
    assert len(example.examples) > 8 and runner.run(example).failed == 0


def test_import_brings_in_the_losses_and_nothing_heavy():
    code = """if True:
        import json, sys
        import jax, jax.numpy, jax.nn
        before = set(sys.modules)
        import msd_jax
        assert all(hasattr(msd_jax, name) for name in msd_jax.__all__)
        imported = {name.split(".")[0] for name in set(sys.modules) - before}
        print(json.dumps([sorted(imported), msd_jax.__all__]))
    """
    root = REPOSITORY
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    imported, public = json.loads(result.stdout)
    assert imported == ["msd_jax"]  # nothing that JAX has not imported itself
    assert {"dpsw_loss", "dpsw_weights", "forward_kl", "jsd", "mean_loss", "reverse_kl"} <= set(public)
