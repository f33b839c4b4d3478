"""The train step: one global denominator, no gradient through the teacher, no update that is not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from msd_jax.configs import default

from msd_jax import losses
from msd_jax.models import config as model_config
from msd_jax.models import decoder, forward, pretrained
from msd_jax.parallel import sharding
from msd_jax.training import optimizer, packing, train_step
from msd_jax.training.completions import both_logits
from tests.conftest import LLAMA

CONFIG = model_config.from_dict(LLAMA)
BETA = optax.constant_schedule(0.5)
FROZEN = ml_collections.FrozenConfigDict({"kind": "frozen", "ema_decay": 0.9, "period": 3})


def make_batch(rng, B=8, P=6, Q=9, R=5, lengths=None):
    lengths = rng.integers(1, R + 1, B) if lengths is None else lengths
    arrays = (
        rng.integers(0, 40, (B, P)), rng.integers(1, P + 1, B),
        rng.integers(0, 40, (B, Q)), rng.integers(1, Q + 1, B),
        rng.integers(0, 40, (B, R)), lengths,
    )  # fmt: skip
    return packing.TrainBatch(*(np.asarray(a, np.int32) for a in arrays))


def make_batch_alike(rng, B=12):
    """A batch in which two languages take turns, and what the prompts of each begin with in each role.

    Every fifth prompt, of either language, begins as no other does.
    """
    batch = make_batch(rng, B, P=20, Q=30)
    beginnings = tuple(tuple(tuple(rng.integers(1, 40, n).tolist()) for n in sizes) for sizes in ((4, 21), (0, 17)))
    student, teacher = (np.array(x) for x in (batch.student_prompt_BxP, batch.teacher_prompt_BxP))
    lengths = [rng.integers(5, 21, B).astype(np.int32), rng.integers(22, 31, B).astype(np.int32)]
    for row in range(B):
        for prompt_BxP, length_B, ids in zip((student, teacher), lengths, beginnings[row % 2]):
            if row % 5:
                first = prompt_BxP.shape[1] - length_B[row]
                prompt_BxP[row, first : first + len(ids)] = ids
    replaced = {"student_prompt_BxP": student, "teacher_prompt_BxP": teacher}
    return batch._replace(**replaced, student_length_B=lengths[0], teacher_length_B=lengths[1]), beginnings


def make_state(optimize, *, live=False, seed=0):
    _, params = decoder.init(CONFIG, jax.random.key(seed))
    _, other = decoder.init(CONFIG, jax.random.key(seed + 1))
    teacher = None if live else jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, params, other)
    zero = jnp.zeros((), jnp.int32)
    return train_step.TrainState(zero, params, teacher, optimize.init(params), zero)


def make_step(
    optimize,
    *,
    rows=8,
    lengths=(10, 13),
    beginnings=(),
    teacher=FROZEN,
    dtype=jnp.float32,
    mesh=None,
    beta_schedule=BETA,
    loss_function=losses.fused_dpsw_loss,
    **loss,
):
    """(state, batch) -> (state, scalars), in packs of `rows` rows of `lengths` (student's, teacher's) tokens."""
    graphdef, _, _ = decoder.abstract(CONFIG, dtype=dtype, mesh=mesh)
    loss = functools.partial(loss_function, **{"weight_top_k": 5, "chunk": 7, "mesh": mesh} | loss)
    sums_of = jax.jit(functools.partial(train_step.pack_sums, graphdef=graphdef, loss=loss, beta=beta_schedule))
    rule = {"optimize": optimize, "teacher": teacher, "beta": beta_schedule}
    update = jax.jit(functools.partial(train_step.update, **rule))
    parts = sharding.batch_shards(mesh) if mesh else 1

    def step(state, batch):
        roles = 1 if batch.teacher_prompt_BxP is None else 2
        shape = packing.Shape(parts, rows // parts, lengths[:roles], beginnings)
        weights = state.params, state.teacher_params, {}, state.step
        sums = optax.tree.zeros_like(jax.eval_shape(sums_of, *weights, packing.empty(shape)))
        for pack in packing.pack(batch, shape):
            sums = sums_of(*weights, sharding.put_batch(mesh, pack) if mesh else pack, sums)
        return update(state, sums)

    return step


def largest_difference(a, b):
    """Of any array: norm of the difference over norm of the first."""
    scaled = jax.tree.map(lambda x, y: jnp.linalg.norm(x - y) / (jnp.linalg.norm(x) + 1e-12), a, b)
    return max(float(x) for x in jax.tree.leaves(scaled))


SGD = optax.sgd(0.1)
# Its state is the last gradient: read there, it has not been rounded by adding it to the weights.
RECORD = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


@pytest.mark.parametrize("normalize", ["mean", "none"])
def test_update_does_not_depend_on_the_packs(rng, normalize):
    """Nor on what shares a row, though the responses differ in length and the weights in their sums.

    The model runs in float64, so that what is left is the order in which some 25 float32 weights are added.
    """
    with jax.enable_x64(True):
        batch, state = make_batch(rng), make_state(RECORD)
        state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        options = {"normalize": normalize, "dtype": jnp.float64}
        whole, whole_scalars = make_step(RECORD, **options)(state, batch)
        for shape in ({"rows": 2}, {"rows": 1}, {"rows": 1, "lengths": (25, 64)}, {"rows": 3, "lengths": (11, 17)}):
            split, scalars = make_step(RECORD, **shape, **options)(state, batch)
            difference = optax.tree.sub(whole.opt_state, split.opt_state)
            assert optax.tree.norm(difference) < 2e-6 * optax.tree.norm(whole.opt_state)
            assert largest_difference(whole.opt_state, split.opt_state) < 4e-6  # small arrays are farthest off
            for name, value in whole_scalars.items():
                np.testing.assert_allclose(scalars[name], value, rtol=2e-6, err_msg=name)


def test_update_does_not_depend_on_whether_a_beginning_is_shared(rng):
    """In float64, as above: a shared token's gradient comes from all sequences that read it."""
    with jax.enable_x64(True):
        (batch, beginnings), state = make_batch_alike(rng), make_state(RECORD)
        state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        options = {"dtype": jnp.float64}
        alone, expected = make_step(RECORD, rows=12, lengths=(25, 35), **options)(state, batch)
        for rows, lengths in ((2, (60, 120)), (1, (40, 50)), (1, (150, 240))):
            step = make_step(RECORD, rows=rows, lengths=lengths, beginnings=beginnings, **options)
            shared, scalars = step(state, batch)
            assert largest_difference(alone.opt_state, shared.opt_state) < 4e-6
            for name, value in expected.items():
                np.testing.assert_allclose(scalars[name], value, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 2, 2), (2, 2, 2)])
def test_update_does_not_depend_on_the_devices(rng, shape):
    batch, state = make_batch(rng), make_state(RECORD)
    alone, scalars = make_step(RECORD)(state, batch)
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    _, abstract, axes = decoder.abstract(CONFIG)
    layout = sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN)
    spread = dataclasses.replace(
        jax.device_put(state, sharding.replicated(mesh)),
        params=jax.device_put(state.params, layout),
        teacher=jax.device_put(state.teacher, layout),
        opt_state=jax.device_put(state.opt_state, layout),
    )
    together, other = make_step(RECORD, mesh=mesh)(spread, batch)
    assert largest_difference(alone.opt_state, jax.device_get(together.opt_state)) < 1e-5
    np.testing.assert_allclose(other["loss"], scalars["loss"], rtol=1e-5)


def test_update_is_the_gradient_of_the_mean_loss(rng):
    """Against jax.grad of the loss written out once more, with the teacher's logits as constants."""
    batch, state = make_batch(rng), make_state(RECORD)
    graphdef, _, _ = decoder.abstract(CONFIG)
    _, teacher = both_logits(graphdef, state.params, state.teacher, batch)
    mask = forward.response_mask(batch.response_length_B, 5)

    def mean_loss(params):
        student, _ = both_logits(graphdef, params, state.teacher, batch)
        total, normaliser, _ = losses.dpsw_loss(student, teacher, batch.response_BxR, mask, weight_top_k=5)
        return total / normaliser

    expected = jax.grad(mean_loss)(state.params)
    new, scalars = make_step(RECORD)(state, batch)
    assert largest_difference(expected, new.opt_state) < 1e-5
    np.testing.assert_allclose(scalars["loss"], mean_loss(state.params), rtol=1e-6)


def test_a_blend_passes_from_forward_to_reverse_kl_in_one_program(rng):
    """Over the first two steps; each step's gradient is that of its beta as a number."""
    config = default.get_config()
    config.loss.divergence, config.loss.beta, config.loss.beta_ramp, config.train.steps = "blend", 1.0, 0.5, 4
    schedule = train_step.beta_schedule(config)
    traced, traces = 0, 0

    def beta(step):
        nonlocal traced
        traced += 1
        return schedule(step)

    batch, first = make_batch(rng), make_state(RECORD)
    step = make_step(RECORD, divergence="blend", beta_schedule=beta)
    for count, expected in enumerate([0.0, 0.5, 1.0, 1.0]):
        state = dataclasses.replace(first, step=jnp.int32(count))
        moved, scalars = step(state, batch)
        assert scalars["beta"] == expected
        traces = traces or traced
        constant = make_step(RECORD, divergence="blend", beta_schedule=optax.constant_schedule(expected))
        if count < 3:
            still, other = constant(state, batch)
            assert largest_difference(still.opt_state, moved.opt_state) < 1e-5
            np.testing.assert_allclose(scalars["loss"], other["loss"], rtol=1e-6)
    assert traced == traces  # no step but the first compiled anything
    config.loss.beta_ramp = 0.0
    assert train_step.beta_schedule(config)(jnp.int32(3)) == 1.0


def test_saturated_is_a_share_of_the_loss(rng):
    """However the batch is split, and with a cap."""
    batch, state = make_batch(rng), make_state(RECORD)
    for options in ({}, {"token_cap": 0.5}):
        loss = {"temperature": 0.02, **options}
        shares = [make_step(RECORD, rows=n, **loss)(state, batch)[1]["saturated"] for n in (8, 2)]
        assert 0 < shares[0] < 1
        np.testing.assert_allclose(*shares, rtol=1e-5)


def test_a_live_teacher_takes_no_gradient(rng):
    """With one prompt for both roles the live teacher is the student: loss and gradient are exactly zero."""
    batch = make_batch(rng)
    batch = batch._replace(teacher_prompt_BxP=batch.student_prompt_BxP, teacher_length_B=batch.student_length_B)
    live = ml_collections.ConfigDict({"kind": "live"})
    state = make_state(SGD, live=True)
    new, scalars = make_step(SGD, teacher=live, lengths=(13, 13))(state, batch)
    assert scalars["loss"] == 0 and scalars["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    # With two prompts, the gradient is that of a frozen teacher with equal weights.
    batch = make_batch(rng)
    frozen = dataclasses.replace(make_state(SGD, live=True), teacher=state.params)
    by_live, _ = make_step(SGD, teacher=live)(state, batch)
    by_frozen, _ = make_step(SGD)(frozen, batch)
    assert largest_difference(by_frozen.params, by_live.params) < 1e-6
    assert largest_difference(state.params, by_live.params) > 1e-5


def test_teachers(rng):
    batch = make_batch(rng)
    for kind in ("frozen", "ema", "periodic"):
        teacher = ml_collections.ConfigDict({"kind": kind, "ema_decay": 0.9, "period": 3})
        step, state = make_step(SGD, teacher=teacher), make_state(SGD)
        expected = state.teacher
        for number in range(1, 5):
            state, _ = step(state, batch)
            if kind == "ema":
                expected = jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, expected, state.params)
            elif kind == "periodic" and number == 3:
                expected = state.params
            assert largest_difference(expected, state.teacher) < 1e-6, (kind, number)


@pytest.mark.parametrize("kind", ["ema", "periodic"])
def test_a_step_that_is_not_finite_moves_no_teacher(rng, kind):
    """Nor would a NaN of the student get into it. The step is one at which a periodic teacher is due."""
    teacher = ml_collections.ConfigDict({"kind": kind, "ema_decay": 0.9, "period": 1})

    def nan_loss(*arguments, **options):
        total, normaliser, aux = losses.fused_dpsw_loss(*arguments, **options)
        return total * jnp.nan, normaliser, aux

    state = make_state(SGD)
    new, scalars = make_step(SGD, teacher=teacher, loss_function=nan_loss)(state, make_batch(rng))
    assert new.skipped == 1 and scalars["skip"]
    jax.tree.map(np.testing.assert_array_equal, new.teacher, state.teacher)
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(rng, where):
    optimize = optax.adamw(1e-3)
    ema = ml_collections.ConfigDict({"kind": "ema", "ema_decay": 0.9})
    step, batch, state = make_step(optimize, teacher=ema), make_batch(rng), make_state(optimize)
    state, _ = step(state, batch)
    broken = jax.tree.map(lambda x: x, state.params if where == "student" else state.teacher)
    broken["final_norm"] = broken["final_norm"].at[0].set(jnp.nan)
    field = "params" if where == "student" else "teacher"
    new, scalars = step(dataclasses.replace(state, **{field: broken}), batch)
    assert new.step == 2 and new.skipped == 1 and scalars["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, state.opt_state)
    if where == "teacher":
        jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    finite, _ = step(state, batch)
    assert finite.skipped == 0 and largest_difference(state.params, finite.params) > 0


def test_a_batch_without_response_tokens_is_no_update(rng):
    batch, state = make_batch(rng, lengths=np.zeros(8)), make_state(SGD)
    new, scalars = make_step(SGD)(state, batch)
    assert scalars["loss"] == 0 and scalars["tokens"] == 0 and new.skipped == 0
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


def test_a_step_holds_little_beside_the_state_and_one_gradient():
    """A second copy of gradients, moments or a table would show, and so would zeros made before their time."""
    sizes = {
        "vocab_size": 8192,
        "width": 256,
        "ffw": 1024,
        "layers": 8,
        "windows": (None,) * 8,
        "ropes": CONFIG.ropes[:1] * 8,
    }
    config = default.get_config()
    config.train.loss_chunk = 8
    config = ml_collections.FrozenConfigDict(config)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    options = {"dtype": "float32", "param_dtype": "float32", "remat": "full", "mesh": mesh}
    model = pretrained.architecture(dataclasses.replace(CONFIG, **sizes), **options)
    optimize, _ = optimizer.make_optimizer(config.optimizer, 10)
    step = train_step.TrainStep(config, model, mesh, optimize, packing.Shape(parts=1, rows=8, lengths=(8, 8)))
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(step.state.params))
    added = step.accumulate.lower(*step.inputs, step.sums, step.pack).compile().memory_analysis()
    assert added.argument_size_in_bytes < 3.01 * weights  # they, the teacher and the gradient so far
    assert added.output_size_in_bytes - added.alias_size_in_bytes < 0.01 * weights
    assert added.temp_size_in_bytes < 0.6 * weights  # of two or three layers, and no gradient of the pack
    updated = step.apply.lower(step.state, step.sums).compile().memory_analysis()
    assert updated.argument_size_in_bytes < 5.01 * weights  # with two moments
    assert updated.output_size_in_bytes - updated.alias_size_in_bytes < 0.01 * weights
    assert updated.temp_size_in_bytes < 0.1 * weights
