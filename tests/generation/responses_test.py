"""Who writes the response, and that the frozen teacher writes each only once."""

import jax
import ml_collections
import numpy as np
import pytest

from msd_jax.data import batches, prompts
from msd_jax.generation import refill, responses, rollout
from msd_jax.models import config as model_config
from msd_jax.models import decoder
from msd_jax.parallel import sharding
from tests.conftest import LLAMA


@pytest.fixture(scope="module")
def generator():
    return rollout.Generator(*model(), rollout.Sampling(6), stop_ids=(3,), pad_id=0)


@pytest.fixture(scope="module")
def refilling():
    options = *model(), rollout.Sampling(6)
    return refill.Refilling(refill.PoolGenerator(*options, stop_ids=(3,), pad_id=0, rows=4, limit=7))


def model():
    graphdef, _ = decoder.init(model_config.from_dict(LLAMA), jax.random.key(0))
    return graphdef, sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def student():
    return decoder.init(model_config.from_dict(LLAMA), jax.random.key(1))[1]


@pytest.fixture(scope="module")
def teacher():
    return decoder.init(model_config.from_dict(LLAMA), jax.random.key(2))[1]


def make_batch(rng, B=12):
    student, teacher = rng.integers(0, 40, (B, 5)).astype(np.int32), rng.integers(0, 40, (B, 7)).astype(np.int32)
    examples = tuple(prompts.Example(str(i), "sw", True, student[i], teacher[i]) for i in range(B))
    hashes = np.array([batches.query_hash(e.query_id, e.language) for e in examples], np.uint32)
    full = [np.full(B, P, np.int32) for P in (5, 7)]
    return batches.Batch(student, full[0], teacher, full[1], hashes, examples, (5, 7))


def config(policy, **options):
    return ml_collections.ConfigDict({"seed": 3, "rollout": {"policy": policy, "on_policy_fraction": 0.5} | options})


def never():
    raise AssertionError("these weights are not needed")


def test_on_policy_asks_the_student_alone(generator, student, rng):
    batch = make_batch(rng)
    respond = responses.Responder(config("on_policy"), generator, None)
    out = respond(4, batch, lambda: student, never)
    assert out.on_policy_B.all() and out.generated == out.length_B.sum() > 0
    again = respond(4, batch, lambda: student, never)
    np.testing.assert_array_equal(out.response_BxR, again.response_BxR)
    later = respond(5, batch, lambda: student, never)
    assert (out.response_BxR != later.response_BxR).any()


def test_off_policy_draws_once_a_query_and_survives_a_restart(generator, teacher, rng, tmp_path):
    batch, path = make_batch(rng), tmp_path / "store.jsonl"
    respond = responses.Responder(config("off_policy"), generator, responses.Store(path, "mark"))
    first = respond(0, batch, never, lambda: teacher)
    assert not first.on_policy_B.any() and first.generated == first.length_B.sum()
    second = respond(1, batch, never, never)
    with path.open("a") as file:
        file.write('{"id": "0", "langu')  # cut short by a kill
    restarted = responses.Responder(config("off_policy"), generator, responses.Store(path, "mark"))
    third = restarted(2, batch, never, never)
    for later in (second, third):
        assert later.generated == 0
        np.testing.assert_array_equal(later.length_B, first.length_B)
        np.testing.assert_array_equal(later.stopped_B, first.stopped_B)
        np.testing.assert_array_equal(later.response_BxR, first.response_BxR)


@pytest.mark.parametrize("policy", ["on_policy", "off_policy", "mixed"])
def test_fewer_rows_than_queries_give_the_same_responses(policy, generator, refilling, student, teacher, rng):
    batch = make_batch(rng)
    whole, refilled = (
        responses.Responder(config(policy), writer, None)(2, batch, lambda: student, lambda: teacher)
        for writer in (generator, refilling)
    )
    for name in ("response_BxR", "length_B", "stopped_B", "on_policy_B", "prompt_length_B"):
        np.testing.assert_array_equal(getattr(refilled, name), getattr(whole, name), err_msg=name)
    assert len(set(whole.length_B.tolist())) > 1
    assert refilled.generated == whole.generated and refilled.decoded > whole.decoded


def test_another_teacher_misses_the_store(generator, teacher, rng, tmp_path):
    batch, path = make_batch(rng), tmp_path / "store.jsonl"
    responses.Responder(config("off_policy"), generator, responses.Store(path, "a"))(0, batch, never, lambda: teacher)
    other = responses.Responder(config("off_policy"), generator, responses.Store(path, "b"))
    with pytest.raises(AssertionError, match="not needed"):
        other(0, batch, never, never)


def test_mixed_asks_each_for_its_rows(generator, student, teacher, rng):
    batch = make_batch(rng)
    out = responses.Responder(config("mixed"), generator, None)(1, batch, lambda: student, lambda: teacher)
    assert 0 < out.on_policy_B.sum() < 12
    on = responses.Responder(config("on_policy"), generator, None)(1, batch, lambda: student, never)
    off = responses.Responder(config("off_policy"), generator, None)(1, batch, never, lambda: teacher)
    expected = np.where(out.on_policy_B[:, None], on.response_BxR, off.response_BxR)
    np.testing.assert_array_equal(out.response_BxR, expected)
    np.testing.assert_array_equal(out.length_B, np.where(out.on_policy_B, on.length_B, off.length_B))
    everyone = responses.Responder(config("mixed", on_policy_fraction=1.0), generator, None)
    assert everyone(1, batch, lambda: student, never).on_policy_B.all()


def test_mixed_with_a_store_still_asks_the_student(generator, student, teacher, rng, tmp_path):
    """A stored response is the teacher's: a query that falls to the student this time does not get it."""
    batch = make_batch(rng)
    respond = responses.Responder(config("mixed"), generator, responses.Store(tmp_path / "store.jsonl", "mark"))
    outs = [respond(step, batch, lambda: student, lambda: teacher) for step in range(4)]
    assert any((a.on_policy_B > b.on_policy_B).any() for a, b in zip(outs[1:], outs))
    for step, out in enumerate(outs):
        on = responses.Responder(config("on_policy"), generator, None)(step, batch, lambda: student, never)
        np.testing.assert_array_equal(out.response_BxR[out.on_policy_B], on.response_BxR[out.on_policy_B])


def test_a_stored_response_does_not_depend_on_the_step_that_drew_it(generator, teacher, rng, tmp_path):
    batch = make_batch(rng)
    early, late = (
        responses.Responder(config("off_policy"), generator, responses.Store(tmp_path / f"{step}.jsonl", "mark"))(
            step, batch, never, lambda: teacher
        )
        for step in (0, 7)
    )
    np.testing.assert_array_equal(early.response_BxR, late.response_BxR)


def test_the_fingerprint_covers_model_prompts_and_sampling(model_dir, tmp_path):
    from msd_jax.configs import default

    base = default.get_config()
    mark = responses.fingerprint(base, model_dir)
    assert responses.fingerprint(default.get_config(), model_dir) == mark
    for change in ("prompts.teacher_template", "rollout.temperature", "model.dtype"):
        config = default.get_config()
        section, key = change.split(".")
        value = config[section][key]
        config[section][key] = value + (" " if isinstance(value, str) else 0.5)
        assert responses.fingerprint(config, model_dir) != mark
