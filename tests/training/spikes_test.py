"""A step whose loss or gradient is far beyond the usual is skipped by setting, as if the run had never come to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msd_jax.errors import UserError
from msd_jax.io import jsonl
from msd_jax.training import checkpoint, loop, spikes
from tests.training.conftest import set_up, train
from tests.training.watch_test import copied_state  # noqa: F401

FACTOR = 4.0


def with_spike_at(ready, *steps, scale=30.0):
    """A run whose last norm is scaled in the given steps' forward passes alone."""

    def train_step(state, frozen, packs):
        if int(jax.device_get(state.step)) + 1 in steps:
            params = state.params
            with jax.transfer_guard("allow"):
                broken = {**params, "final_norm": params["final_norm"] * scale}
                new, scalars = ready.train_step(dataclasses.replace(state, params=broken), frozen, packs)
                return dataclasses.replace(new, params=params if scalars["skip"] else new.params), scalars
        return ready.train_step(state, frozen, packs)

    return dataclasses.replace(ready, train_step=train_step)


@pytest.fixture
def steady(config):
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-4, "constant"  # whatever the number of steps
    config.teacher.kind, config.loss.divergence = "ema", "forward_kl"
    config.train.steps, config.train.checkpoints.every, config.train.skip_spikes = 24, 3, FACTOR
    return config


def state_of(run, step):
    initial, _ = loop.initial_state(run)
    return checkpoint.Checkpoints(run.workdir).restore(step, checkpoint.abstract(initial))[0]


def test_a_spike_moves_nothing_and_is_named(steady, tmp_path, capsys, copied_state):  # noqa: F811
    steady.train.steps, steady.train.checkpoints.every = 20, 1
    ready = set_up(steady, tmp_path / "run")
    loop.train(with_spike_at(ready, 20))
    row = jsonl.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["step"] == 20 and row["skip"] == row["skipped"] == 1
    assert np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]) and len(row["skipped_queries"]) == 8
    assert row["loss"] > FACTOR * row["median_loss"] or row["grad_norm"] > FACTOR * row["median_grad_norm"]
    assert "step 20 skipped: loss" in (said := " ".join(capsys.readouterr().out.split()))
    assert f"(medians {row['median_loss']:.4g} and {row['median_grad_norm']:.4g}); queries: " in said
    before, after = state_of(ready, 19), state_of(ready, 20)
    for part in ("params", "teacher", "opt_state", "recent"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(after, part))
    assert (int(after.step), int(after.skipped)) == (20, 1)
    assert np.isfinite(after.recent).sum() == 2 * 19


def test_without_the_setting_a_spike_is_a_step(steady, tmp_path, copied_state):  # noqa: F811
    steady.train.skip_spikes, steady.train.steps = 0.0, 20
    ready = set_up(steady, tmp_path / "run")
    loop.train(with_spike_at(ready, 20))
    row = jsonl.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["skip"] == 0 and "median_loss" not in row and state_of(ready, 20).recent is None


def test_the_statistic_belongs_to_the_state_bit_by_bit(steady, tmp_path, copied_state):  # noqa: F811
    """Resumed in the middle, a run skips the same spikes and ends with the same bits, the statistic's among them."""
    unbroken = set_up(steady, tmp_path / "unbroken")
    loop.train(with_spike_at(unbroken, 5, 19, 22))  # 5: before there are enough steps to tell
    steady.train.steps = 18
    loop.train(with_spike_at(set_up(steady, tmp_path / "run"), 5))
    steady.train.steps = 24
    resumed = set_up(steady, tmp_path / "run")
    loop.train(with_spike_at(resumed, 19, 22))
    jax.tree.map(np.testing.assert_array_equal, state_of(resumed, 24), state_of(unbroken, 24))
    rows = jsonl.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["skip"]] == [19, 22]


def test_spikes_without_end_end_the_run(steady, tmp_path, copied_state):  # noqa: F811
    steady.train.max_skipped = 3
    with pytest.raises(UserError, match=r"^3 steps in a row .* not finite, or more than 4 times the median \("):
        loop.train(with_spike_at(set_up(steady, tmp_path / "run"), *range(19, 25)))


def test_the_medians():
    recent = jnp.asarray(spikes.none_seen())
    for number in range(1, spikes.WINDOW + 9):
        seen_2 = jnp.array([1.0, float(number)])
        told = spikes.is_spike(recent, jnp.array([1e9, 1.0]), 5.0)
        assert bool(told) == (number - 1 > spikes.WINDOW / 2)
        recent = spikes.remember(recent, seen_2, jnp.array(True))
    np.testing.assert_array_equal(spikes.medians(recent), [1.0, 24.5])  # of 9 to 40
    for faulty in (jnp.nan, jnp.inf):
        seen_2 = jnp.array([faulty, 1.0])
        after = spikes.remember(recent, seen_2, jnp.isfinite(seen_2).all() & ~spikes.is_spike(recent, seen_2, 5.0))
        np.testing.assert_array_equal(after, recent)
    assert not spikes.is_spike(recent, jnp.array([4.9, 120.0]), 5.0)
    assert spikes.is_spike(recent, jnp.array([5.1, 1.0]), 5.0) and spikes.is_spike(recent, jnp.array([1.0, 123.0]), 5.0)
    assert not spikes.is_spike(jnp.zeros_like(recent), jnp.array([1.0, 1.0]), 5.0)  # batches without a response token


def test_a_checkpoint_of_a_run_that_skips_no_spikes_is_not_one_of_a_run_that_does(steady, tmp_path):
    steady.train.skip_spikes, steady.train.steps = 0.0, 2
    train(steady, tmp_path / "run")
    steady.train.skip_spikes = FACTOR
    with pytest.raises(UserError, match=r"config.train.skip_spikes: 0.0 -> 4.0"):
        set_up(steady, tmp_path / "run")
