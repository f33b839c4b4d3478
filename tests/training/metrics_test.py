"""Rows a step late: which are written when, and what their times mean."""

import jax.numpy as jnp
import numpy as np
import pytest

from msd_jax.generation.responses import Responses
from msd_jax.training import metrics, packing
from msd_jax.training.generate import Generated
from msd_jax.training.packing import TrainBatch


def dispatched(step: int, free: float | None, had: float, R: int = 4) -> metrics.Dispatched:
    """A step of two queries with prompts of 3 and 5 tokens, and 2 + 4 response tokens, in rows with room for R."""
    length_B = np.array([2, 4], np.int32)
    batch = TrainBatch(
        np.zeros((2, 8), np.int32), np.array([3, 3]), np.zeros((2, 8), np.int32), np.array([5, 5]),
        np.zeros((2, R), np.int32), length_B,
    )  # fmt: skip
    generated = 6 if free else 0
    stopped_B, on_policy_B, prompt_B = np.array([True, False]), np.array([True, True]), np.array([3, 3])
    responses = Responses(batch.response_BxR, length_B, stopped_B, on_policy_B, generated, prompt_B, 4)
    scalars = {"loss": jnp.float32(step), "kl": jnp.float32(0.5)}
    packs = packing.pack(batch, packing.Shape(parts=1, rows=2, lengths=(3 + R, 5 + R)))
    written = Generated(None, responses, batch, packs, free, had)
    return metrics.Dispatched(step, scalars, 0.1, written, step, 0.5)


class Files:
    def __init__(self):
        self.rows = {}

    def scalars(self, step, row, notes):
        self.rows[step] = row | notes


class Unwatched:
    def notes(self, dispatched, row):
        return {}

    def check(self, dispatched):
        pass


@pytest.fixture
def files() -> Files:
    return Files()


def test_a_row_is_written_when_the_next_step_is_added(files):
    shown = []
    rows = metrics.LateRows(files, 1, 9, lambda step, status: shown.append(step), Unwatched(), lambda *_: {})
    rows.add(dispatched(1, free=1.0, had=2.0))
    assert not files.rows
    rows.add(dispatched(2, free=5.0, had=6.0))
    assert list(files.rows) == [1] == shown
    assert rows.flush()["loss"] == 2 and list(files.rows) == [1, 2] == shown
    assert rows.flush() == {} and list(files.rows) == [1, 2]


def test_times_add_up_to_those_of_the_run(files):
    rows = metrics.LateRows(files, 1, 9, lambda *_: None, Unwatched(), lambda *_: {})
    rows.add(dispatched(1, free=1.0, had=2.0))
    rows.add(dispatched(2, free=5.0, had=7.0))
    rows.flush(done=11.0)
    seconds = [(files.rows[step]["rollout_seconds"], files.rows[step]["train_seconds"]) for step in (1, 2)]
    assert seconds == [(1.0, 3.0), (2.0, 4.0)]
    assert files.rows[2]["rollout_tokens_per_second"] == 6 / 2
    assert files.rows[2]["train_tokens_per_second"] == (4 + 6 + 6 + 8) / 4
    assert files.rows[2]["padding"] == 1 - 24 / (2 * 7 + 2 * 9)


def test_stored_responses_take_no_time_and_the_step_begins_when_the_one_before_is_done(files):
    rows = metrics.LateRows(files, 1, 9, lambda *_: None, Unwatched(), lambda *_: {})
    rows.add(dispatched(1, free=None, had=2.0))
    rows.flush(done=5.0)
    rows.add(dispatched(2, free=None, had=2.5))
    rows.flush(done=9.0)
    assert [files.rows[step]["train_seconds"] for step in (1, 2)] == [3.0, 4.0]
    assert files.rows[2]["rollout_seconds"] == files.rows[2]["rollout_tokens_per_second"] == 0


def test_what_was_measured_is_written_whatever_the_step(files):
    rows = metrics.LateRows(files, 3, 7, lambda *_: None, Unwatched(), lambda *_: {})
    for step in range(1, 8):
        rows.add(dispatched(step, free=float(step), had=step + 0.5))
        if step == 4:
            assert rows.flush({"slice_utility": 1.0}, rows.wait())["slice_utility"] == 1
    rows.flush()
    assert list(files.rows) == [3, 4, 6, 7]


def test_each_shape_of_a_pack_is_one_compilation(files):
    rows = metrics.LateRows(files, 1, 9, lambda *_: None, Unwatched(), lambda *_: {})
    for step, R in enumerate((4, 8, 4, 16), start=1):
        rows.add(dispatched(step, free=float(step), had=step + 0.5, R=R))
    rows.flush()
    assert [row["train_compilations"] for row in files.rows.values()] == [1, 2, 2, 3]
    assert [row["rollout_compilations"] for row in files.rows.values()] == [1, 2, 3, 4]


def test_status_leads_with_the_kl_and_keeps_short():
    row = dispatched(3, free=1.0, had=2.0).row(2.0, 3.0)
    assert metrics.describe(row) == "kl 0.5000  loss 3.0000  gen 6, train 24 tok/s"
    fast = row | {"rollout_tokens_per_second": 23_456.0, "train_tokens_per_second": 120_000.0}
    assert metrics.describe(fast).endswith("gen 23k, train 120k tok/s")
