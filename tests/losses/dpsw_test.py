"""losses.py against float64 references written from the formulas, and the properties that it promises."""

import doctest
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msd_jax import losses
from msd_jax.losses import divergences, dpsw, fused, naming, numerics, settings, weights

each_divergence = pytest.mark.parametrize("name", losses.DIVERGENCES)
WEIGHTINGS = ["dpsw", "teacher", "student", "uniform"]


# --- The reference: float64 numpy -------------------------------------------------------------------------------


def reference_softmax(logits, temperature):
    scaled = np.asarray(logits, np.float64) / temperature
    exp = np.exp(scaled - scaled.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def reference_kl(p, q):
    return sum_where(p > 0, lambda: p * np.log(p / q))


def sum_where(condition, values):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(condition, values(), 0.0).sum(-1)


def reference_divergence(name, student_logits, teacher_logits, *, beta=0.5, temperature=1.0, top_k=None):
    p_S = reference_softmax(student_logits, temperature)
    p_T = reference_softmax(teacher_logits, temperature)
    if top_k is not None:
        order = np.argsort(-np.asarray(teacher_logits, np.float64), axis=-1, kind="stable")
        p_S, p_T = (np.take_along_axis(p, order, -1) for p in (p_S, p_T))
        p_S, p_T = (np.concatenate([p[..., :top_k], p[..., top_k:].sum(-1, keepdims=True)], -1) for p in (p_S, p_T))
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return reference_kl(p_S, p_T)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return reference_kl(p_T, p_S)
    if name == "blend":
        return (1 - beta) * reference_kl(p_T, p_S) + beta * reference_kl(p_S, p_T)
    m = beta * p_T + (1 - beta) * p_S
    return beta * reference_kl(p_T, m) + (1 - beta) * reference_kl(p_S, m)


def reference_cross_entropy(student_logits, tokens, temperature):
    p_S = reference_softmax(student_logits, temperature)
    return -np.log(np.take_along_axis(p_S, np.asarray(tokens)[..., None], -1)[..., 0])


def reference_gradient(function, logits, step=1e-5):
    """Central differences in float64; function maps [..., V] to [...], each row on its own."""
    logits = np.asarray(logits, np.float64)
    columns = []
    for v in range(logits.shape[-1]):
        shift = np.zeros(logits.shape[-1])
        shift[v] = step
        columns.append((function(logits + shift) - function(logits - shift)) / (2 * step))
    return np.stack(columns, -1)


def reference_saturated(student_logits, teacher_logits, divergence, gradient, temperature):
    """bool [...]; `gradient` is that of the divergence on the student's logits."""
    p_S, p_T = (reference_softmax(x, temperature) for x in (student_logits, teacher_logits))
    apart = 0.5 * np.abs(p_S - p_T).sum(-1) > 0.5
    return apart & (temperature * np.abs(gradient).sum(-1) < 0.1 * np.minimum(divergence, 1))


def reference_capped(divergence, token_cap):
    if token_cap is None:
        return divergence
    return np.where(
        divergence > token_cap, token_cap * (1 + np.log(np.maximum(divergence, 1e-300) / token_cap)), divergence
    )


def reference_entropy(p):
    return sum_where(p > 0, lambda: -p * np.log(p))


def reference_weights(student_logits, teacher_logits, tokens, top_k, temperature=1.0, entropy_scale="linear"):
    p_S, p_T = (reference_softmax(x, temperature) for x in (student_logits, teacher_logits))
    top = np.sort(p_T, -1)[..., ::-1][..., :top_k]
    entropy = reference_entropy(top / top.sum(-1, keepdims=True))
    w_T = {"linear": 1 - entropy / np.log(top_k), "exponential": np.exp(-entropy)}[entropy_scale]
    return w_T, 1 - np.take_along_axis(p_S, tokens[..., None], -1)[..., 0]


# --- Inputs -----------------------------------------------------------------------------------------------------


def random_logits(rng, *shape, scale=2.0):
    return (rng.normal(size=shape) * scale).astype(np.float32)


def random_batch(rng, B=16, R=5, V=24, dtype=jnp.float32):
    """Student logits, teacher logits, response tokens, mask: ragged responses of 1..R tokens."""
    student, teacher = (jnp.asarray(random_logits(rng, B, R, V), dtype) for _ in range(2))
    mask = np.arange(R) < rng.integers(1, R + 1, size=(B, 1))
    return student, teacher, jnp.asarray(rng.integers(V, size=(B, R))), jnp.asarray(mask)


@functools.cache  # compilation is what tests spend their time on: those that share shapes and options share it
def compiled_divergence(name, **options):
    def run(student, teacher):
        divergence = functools.partial(losses.DIVERGENCES[name], **options)
        values, pullback = jax.vjp(divergence, student, teacher)
        return values, *pullback(jnp.ones_like(values))

    return jax.jit(run)


def value_and_gradient(name, student, teacher, **options):
    """Per-row divergences [...] and their gradients [..., V] for the student's logits, under jit."""
    values, gradient, _ = jax.device_get(compiled_divergence(name, **options)(student, teacher))
    return values, gradient


def relative_error(actual, expected):
    """Largest error of a row, relative to the row's length: for gradients, whose entries span many orders."""
    error = np.linalg.norm(np.asarray(actual, np.float64) - expected, axis=-1)
    return np.max(error / np.linalg.norm(expected, axis=-1))


# --- Divergences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, {"top_k": top_k, "temperature": temperature})
            for name in losses.DIVERGENCES
            for top_k, temperature in ((None, 1.0), (None, 0.6), (5, 1.0), (1, 3.0))
        ),
        ("jsd", {"beta": 0.1, "top_k": None}),
        ("jsd", {"beta": 0.9, "top_k": 5}),
        ("blend", {"beta": 0.2, "top_k": None}),
        ("blend", {"beta": 0.7, "top_k": 5, "temperature": 0.6}),
    ],
    ids=str,
)
def test_divergence_and_gradient_equal_float64_reference(rng, name, options):
    student, teacher = random_logits(rng, 3, 4, 12), random_logits(rng, 3, 4, 12)
    values, gradients = value_and_gradient(name, student, teacher, **options)
    assert values.shape == (3, 4) and values.dtype == np.float32
    expected = functools.partial(reference_divergence, name, teacher_logits=teacher, **options)
    np.testing.assert_allclose(values, expected(student), rtol=5e-6, atol=1e-8)
    np.testing.assert_allclose(gradients, reference_gradient(expected, student), rtol=2e-5, atol=5e-6)


@each_divergence
def test_near_equal_rows_keep_their_relative_accuracy(rng, name):
    """The regime of self-distillation, about 0.002 nats a token; sum p (log p - log q) is off by 1e-4 here."""
    teacher = random_logits(rng, 8, 4000, scale=3.0)
    student = teacher + random_logits(rng, 8, 4000, scale=0.06)
    values, gradients = value_and_gradient(name, student, teacher)
    expected = reference_divergence(name, student, teacher)
    assert 2e-4 < expected.mean() < 3e-3
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    # The gradient in closed form: d/dz sum_v c_v log p_v = c - p sum(c).
    p_S, p_T = reference_softmax(student, 1.0), reference_softmax(teacher, 1.0)
    c = {
        "reverse_kl": p_S * np.log(p_S / p_T),
        "forward_kl": p_S - p_T,
        "jsd": 0.5 * p_S * np.log(p_S / (0.5 * p_T + 0.5 * p_S)),
        "blend": 0.5 * (p_S - p_T) + 0.5 * p_S * np.log(p_S / p_T),
    }[name]
    assert relative_error(gradients, c - p_S * c.sum(-1, keepdims=True)) < 3e-5
    coarse = losses.DIVERGENCES[name](student, teacher, top_k=16)
    np.testing.assert_allclose(coarse, reference_divergence(name, student, teacher, top_k=16), rtol=2e-5)


@each_divergence
def test_tiny_differences_are_not_negative(rng, name):
    teacher = random_logits(rng, 8, 4000)
    student = teacher + random_logits(rng, 8, 4000, scale=1e-6)
    values, _ = value_and_gradient(name, student, teacher)
    assert (values >= 0).all() and values.max() < 1e-9


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_peaked_rows_keep_their_relative_accuracy(rng, name):
    """Both rows put all but 1e-6 or so on one token: its log-probability is mere rounding, the rest must tell."""
    teacher = random_logits(rng, 8, 4000)
    teacher[:, 7] += 26
    student = teacher + random_logits(rng, 8, 4000, scale=0.5)
    values, _ = value_and_gradient(name, student, teacher)
    expected = reference_divergence(name, student, teacher)
    assert expected.max() < 1e-5
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_direction_by_hand():
    student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    # KL(student || teacher) = 0.5 ln(5/9) + 0.5 ln 5
    np.testing.assert_allclose(losses.reverse_kl(student, teacher), 0.5108256, rtol=1e-6)
    # KL(teacher || student) = 0.9 ln 1.8 + 0.1 ln 0.2
    np.testing.assert_allclose(losses.forward_kl(student, teacher), 0.3680642, rtol=1e-6)
    # beta is the teacher's share: m = (0.6, 0.4); 0.25 (0.9 ln 1.5 + 0.1 ln 0.25) + 0.75 (0.5 ln(25/24))
    np.testing.assert_allclose(losses.jsd(student, teacher, beta=0.25), 0.0718806, rtol=1e-5)


def test_jsd_ends_are_the_kls_and_its_limits_point_to_them(rng):
    student, teacher = random_logits(rng, 3, 4, 12), random_logits(rng, 3, 4, 12)
    forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
    np.testing.assert_array_equal(losses.jsd(student, teacher, beta=0.0), forward)
    np.testing.assert_array_equal(losses.jsd(student, teacher, beta=1.0), reverse)
    np.testing.assert_allclose(losses.jsd(student, teacher, beta=1e-5) / 1e-5, forward, rtol=1e-2)
    np.testing.assert_allclose(losses.jsd(student, teacher, beta=1 - 1e-5) / 1e-5, reverse, rtol=1e-2)
    np.testing.assert_allclose(
        losses.jsd(student, teacher, beta=0.3), losses.jsd(teacher, student, beta=0.7), rtol=1e-5
    )


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_blend_ends_are_the_kls_though_the_other_is_infinite(rng, beta, name, as_array):
    student, teacher = random_logits(rng, 3, 4, 12), random_logits(rng, 3, 4, 12)
    student[..., 2] = teacher[..., 2] = -np.inf
    (student if name == "reverse_kl" else teacher)[..., 5] = -np.inf

    @jax.jit
    def blend(student, beta):
        values, pullback = jax.vjp(lambda s: losses.blend(s, teacher, beta=beta), student)
        return values, pullback(jnp.ones_like(values))[0]

    actual = blend(student, jnp.array(beta)) if as_array else value_and_gradient("blend", student, teacher, beta=beta)
    expected = value_and_gradient(name, student, teacher)
    for one, two in zip(actual, expected):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_blend_is_the_weighted_sum_of_the_kls(rng):
    student, teacher = random_logits(rng, 3, 4, 12), random_logits(rng, 3, 4, 12)
    forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
    for beta in (0.2, 0.5, jnp.float32(0.9)):
        actual = losses.blend(student, teacher, beta=beta)
        np.testing.assert_allclose(actual, (1 - beta) * forward + beta * reverse, rtol=1e-6)
        np.testing.assert_allclose(actual, losses.blend(teacher, student, beta=1 - beta), rtol=1e-5)


def test_an_array_beta_moves_without_a_recompilation_and_carries_no_gradient(rng):
    student, teacher, response, mask = random_batch(rng)
    traced = 0

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(beta, student):
        nonlocal traced
        traced += 1
        return losses.dpsw_loss(student, teacher, response, mask, divergence="blend", beta=beta)[0]

    for beta in (0.0, 0.25, 1.0):
        value, (by_beta, by_student) = loss(jnp.float32(beta), student)
        (expected, *_), gradient = loss_and_gradient((student, teacher, response, mask), divergence="blend", beta=beta)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(by_student, gradient, rtol=1e-5, atol=1e-7)
        assert by_beta == 0
    assert traced == 1


def test_a_certain_student_moves_under_the_forward_part_alone():
    """The first token of a reply: the student says one thing, the teacher another, and each all but excludes it."""
    student, teacher = jnp.array([9.0, -9.0, 0.0]), jnp.array([-7.0, 7.0, 0.0])
    pull = {
        name: -value_and_gradient(name, student, teacher, **options)[1][1]  # on the teacher's token
        for name, options in (
            ("reverse_kl", {}),
            ("jsd", {}),
            ("forward_kl", {}),
            ("blend", {"beta": 0.75}),
        )
    }
    assert abs(pull["reverse_kl"]) < 1e-6 and abs(pull["jsd"]) < 1e-6
    np.testing.assert_allclose(pull["forward_kl"], 0.999, atol=1e-3)  # p_T - p_S
    np.testing.assert_allclose(pull["blend"], 0.25 * pull["forward_kl"], rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(jnp.bfloat16, {}), (jnp.bfloat16, {"top_k": 3, "temperature": 0.7}), (jnp.float32, {})],
    ids=["bfloat16", "bfloat16-top_k", "float32"],
)
@each_divergence
def test_equal_rows_give_exactly_zero_under_jit(rng, name, dtype, options):
    logits = jnp.asarray(random_logits(rng, 8, 4000, scale=5.0), dtype).at[:, 3:9].set(-jnp.inf)
    values, gradients = value_and_gradient(name, logits, jnp.copy(logits), **options)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradients.astype(np.float32), 0)


@each_divergence
def test_half_precision_logits_are_computed_in_float32(rng, name):
    student, teacher = (jnp.asarray(random_logits(rng, 8, 4000), jnp.bfloat16) for _ in range(2))
    values, _ = value_and_gradient(name, student, teacher)
    upcast, _ = value_and_gradient(name, student.astype(jnp.float32), teacher.astype(jnp.float32))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, upcast, rtol=1e-6)
    assert losses.DIVERGENCES[name](student[:, :9].astype(jnp.float16), teacher[:, :9]).dtype == jnp.float32


def test_float64_inputs_give_float32(rng):
    with jax.enable_x64(True):
        student, teacher, response, mask = random_batch(rng, dtype=jnp.float64)
        loss_fn = functools.partial(losses.dpsw_loss, divergence="jsd", top_k=3, student_token="sampled")
        gradient, results = jax.eval_shape(compiled_loss(**loss_fn.keywords), student, teacher, response, mask)
        assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype("float32")}
        assert gradient.dtype == jnp.float64  # that of the input


@pytest.mark.parametrize("top_k", [None, 5])
@each_divergence
def test_tokens_excluded_by_both_rows_contribute_nothing(rng, name, top_k):
    """-inf on both sides is 0 probability; with top_k = 5 and 4 tokens left, TAIL is excluded as well."""
    student, teacher = random_logits(rng, 3, 4, 12), random_logits(rng, 3, 4, 12)
    excluded = [1, 4, 5, 6, 7, 9, 10, 11]
    student[..., excluded] = teacher[..., excluded] = -np.inf
    options = {"top_k": top_k, "temperature": 1.0}
    values, gradients = value_and_gradient(name, student, teacher, **options)
    expected = functools.partial(reference_divergence, name, teacher_logits=teacher, **options)
    np.testing.assert_allclose(values, expected(student), rtol=5e-6, atol=1e-8)
    np.testing.assert_array_equal(gradients[..., excluded], 0)
    np.testing.assert_allclose(gradients, reference_gradient(expected, student), rtol=2e-5, atol=5e-6)


def test_one_hot_rows():
    one, other, even = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0]), jnp.zeros(2)
    for name in losses.DIVERGENCES:
        value, gradient = value_and_gradient(name, one, one)
        assert value == 0 and (gradient == 0).all()
    np.testing.assert_allclose(losses.reverse_kl(one, even), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.forward_kl(even, one), np.log(2), rtol=1e-6)
    assert losses.blend(even, one) == losses.blend(one, even) == jnp.inf
    assert losses.reverse_kl(even, one) == jnp.inf and losses.forward_kl(one, even) == jnp.inf
    np.testing.assert_allclose(losses.jsd(one, other), np.log(2), rtol=1e-6)
    value, gradient = value_and_gradient("jsd", even, other)
    np.testing.assert_allclose(value, reference_divergence("jsd", even, other), rtol=1e-6)
    assert np.isfinite(gradient).all()


@each_divergence
def test_extreme_logits_stay_finite(name):
    """float32's lowest number as a mask, and probabilities that underflow to 0 and to denormals."""
    lowest = float(np.finfo(np.float32).min)
    student = jnp.array([[0.0, lowest, -3.0, 5.0], [0.0, -90.0, -104.0, -120.0], [0.0, -86.8, -87.0, -88.0]])
    teacher = jnp.array([[0.5, lowest, -1.0, 2.0], [0.0, -110.0, -87.5, -95.0], [0.0, -87.3, -87.2, -87.0]])
    values, gradients = value_and_gradient(name, student, teacher)
    assert np.isfinite(gradients).all()
    np.testing.assert_allclose(values, reference_divergence(name, student, teacher), rtol=1e-5, atol=1e-35)


@each_divergence
def test_nan_logits_are_not_hidden(rng, name):
    row = random_logits(rng, 3, 4, 12)
    nan = row.copy()
    nan[..., 5] = np.nan
    for student, teacher in ((row, nan), (nan, row), (nan, nan)):
        values, _ = value_and_gradient(name, student, teacher, top_k=None, temperature=1.0)
        assert np.isnan(values).all()


@each_divergence
def test_top_k_is_a_lower_bound_that_rises_to_the_full_divergence(rng, name):
    student, teacher = random_logits(rng, 3, 4, 12), random_logits(rng, 3, 4, 12)
    one, few, all_but_one, full = (
        value_and_gradient(name, student, teacher, **options)[0]
        for options in (
            {"top_k": 1, "temperature": 3.0},
            {"top_k": 5, "temperature": 1.0},
            {"top_k": 11, "temperature": 1.0},
            {"top_k": None, "temperature": 1.0},
        )
    )
    hot, _ = value_and_gradient(name, student / 3, teacher / 3, top_k=None, temperature=1.0)
    assert (one >= 0).all() and (one <= hot + 1e-6).all()
    assert (few >= 0).all() and (few <= full + 1e-6).all() and (few < full - 1e-3).any()
    np.testing.assert_allclose(all_but_one, full, rtol=1e-5, atol=1e-7)  # a tail of one token is that token
    np.testing.assert_array_equal(losses.DIVERGENCES[name](student, teacher, top_k=12), full)


@each_divergence
def test_a_tail_of_1e_8_is_accurate(rng, name):
    """Tails of 1e-8 and 1e-9, next to top tokens that agree: the divergence is the tail's alone."""
    top = random_logits(rng, 3, 4, 5, scale=1.0)
    student = np.concatenate([top, random_logits(rng, 3, 4, 7, scale=1.0) - 22], -1)
    teacher = np.concatenate([top, random_logits(rng, 3, 4, 7, scale=1.0) - 20], -1)
    options = {"top_k": 5, "temperature": 1.0}
    p_S, p_T = reference_softmax(student, 1.0), reference_softmax(teacher, 1.0)
    tail_S, tail_T = (p[..., 5:].sum(-1, keepdims=True) for p in (p_S, p_T))
    assert tail_S.min() > 1e-11 and tail_T.max() < 1e-7
    values, gradients = value_and_gradient(name, student, teacher, **options)
    np.testing.assert_allclose(values, reference_divergence(name, student, teacher, **options), rtol=1e-4)
    # The tail's slope by its log-probability, shared out by p_S within the tail.
    slope = {
        "reverse_kl": tail_S * np.log(tail_S / tail_T),
        "forward_kl": tail_S - tail_T,
        "jsd": 0.5 * tail_S * np.log(tail_S / (0.5 * tail_T + 0.5 * tail_S)),
        "blend": 0.5 * (tail_S - tail_T) + 0.5 * tail_S * np.log(tail_S / tail_T),
    }[name]
    np.testing.assert_allclose(gradients[..., 5:], slope * p_S[..., 5:] / tail_S, rtol=1e-3)


def test_tied_teacher_logits_still_give_exactly_top_k_tokens(rng):
    """bfloat16 logits tie often; a threshold at the K-th logit alone would take the tied ones out of the tail."""
    student, teacher = random_logits(rng, 3, 4, 12), rng.integers(3, size=(3, 4, 12)).astype(np.float32)
    options = {"top_k": 5, "temperature": 1.0}
    values, _ = value_and_gradient("reverse_kl", student, teacher, **options)
    np.testing.assert_allclose(values, reference_divergence("reverse_kl", student, teacher, **options), rtol=1e-5)


@pytest.mark.parametrize("top_k", [None, 5])
@each_divergence
def test_gradient_of_the_teacher_is_exactly_zero(rng, name, top_k):
    student, teacher = random_logits(rng, 3, 4, 12), random_logits(rng, 3, 4, 12)
    _, by_student, by_teacher = compiled_divergence(name, top_k=top_k, temperature=1.0)(student, teacher)
    assert jnp.abs(by_student).max() > 0.01
    np.testing.assert_array_equal(by_teacher, 0)


@each_divergence
def test_second_derivative_is_that_of_the_divergence(rng, name):
    """At equal rows the Hessian of both KLs is the Fisher matrix diag(p) - p p', and of the JSD beta (1 - beta)
    times that; a rule for the first derivative that hides dependencies would get this wrong."""
    logits = random_logits(rng, 6)
    logits[4] = -np.inf
    hessian = jax.jit(jax.hessian(lambda s: losses.DIVERGENCES[name](s, logits)))(logits)
    p = reference_softmax(logits, 1.0)
    scale = 0.25 if name == "jsd" else 1.0
    np.testing.assert_allclose(hessian, scale * (np.diag(p) - np.outer(p, p)), atol=1e-6)


# --- Weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy_scale", "temperature"), [("linear", 1.0), ("linear", 0.5), ("exponential", 0.5)])
@pytest.mark.parametrize("student_token", losses.STUDENT_TOKENS)
def test_weights_equal_float64_reference(rng, student_token, entropy_scale, temperature):
    student, teacher, response, _ = random_batch(rng)
    tokens = np.argmax(teacher, -1) if student_token == "teacher_argmax" else np.asarray(response)
    w_T, w_S = reference_weights(student, teacher, tokens, 7, temperature, entropy_scale)
    expected = {"dpsw": w_T * w_S, "teacher": w_T, "student": w_S, "uniform": np.ones_like(w_T)}
    assert list(expected) == WEIGHTINGS == list(losses.WEIGHTINGS)
    for weighting in WEIGHTINGS:
        actual = losses.dpsw_weights(
            student,
            teacher,
            response,
            weighting=weighting,
            top_k=7,
            entropy_scale=entropy_scale,
            student_token=student_token,
            temperature=temperature,
        )
        assert actual.shape == (16, 5) and actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected[weighting], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 30.0, 1000.0])
def test_weights_lie_in_0_1(rng, scale):
    student, teacher = (random_logits(rng, 200, 30, scale=scale) for _ in range(2))
    for temperature in (0.3, 1.0):
        w_T, w_exp = (
            losses.teacher_weight(teacher, top_k=20, entropy_scale=scale, temperature=temperature)
            for scale in losses.ENTROPY_SCALES
        )
        # exp(-H) is convex in H, from 1 to 1/K, and H >= -log max p.
        assert (w_exp <= (1 + 19 * w_T) / 20 + 1e-6).all()
        top_20 = jax.nn.softmax(np.sort(teacher)[:, -20:] / temperature)
        assert (w_exp <= top_20.max(-1) + 1e-6).all() and (w_exp >= 1 / 20).all()
        w_S = losses.student_weight(student, teacher.argmax(-1), temperature)
        for w in (w_T, w_exp, w_S):
            assert (w >= 0).all() and (w <= 1).all()


def test_teacher_weight_at_its_extremes():
    one_hot = jnp.array([-jnp.inf, 0.0, -jnp.inf, -jnp.inf])
    assert losses.teacher_weight(one_hot, top_k=3) == 1
    assert losses.teacher_weight(jnp.array([200.0, 0.0, 0.0, 0.0]), top_k=4) == 1
    # Equal top 3, whatever is below them: 0 to rounding.
    np.testing.assert_allclose(losses.teacher_weight(jnp.array([1.0, 1.0, 1.0, -5.0]), top_k=3), 0, atol=1e-6)
    # Two of three equally good, the third excluded: 1 - log 2 / log 3.
    two = jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf])
    np.testing.assert_allclose(losses.teacher_weight(two, top_k=3), 1 - np.log(2) / np.log(3), rtol=1e-5)
    for top_k in (2, 3, 4):  # exp(-log 2), whatever K
        np.testing.assert_allclose(losses.teacher_weight(two, top_k=top_k, entropy_scale="exponential"), 0.5, rtol=1e-6)
    assert losses.teacher_weight(one_hot, top_k=3, entropy_scale="exponential") == 1


def test_student_weight_is_accurate_where_p_rounds_to_1(rng):
    logits = random_logits(rng, 6, 40)
    logits[:, 11] += np.array([0, 5, 10, 20, 30, 60])
    w_S = losses.student_weight(logits, jnp.full(6, 11))
    exact = np.asarray(logits, np.float64)
    others = np.exp(np.delete(exact, 11, -1)).sum(-1)
    np.testing.assert_allclose(w_S, others / (others + np.exp(exact[:, 11])), rtol=2e-6)
    assert losses.student_weight(jnp.array([0.0, -jnp.inf]), jnp.array(0)) == 0
    assert losses.student_weight(jnp.array([0.0, -jnp.inf]), jnp.array(1)) == 1


def test_weights_carry_no_gradient(rng):
    student, teacher, response, _ = random_batch(rng)
    for function in (
        lambda s, t: losses.teacher_weight(t, top_k=4).sum(),
        lambda s, t: losses.student_weight(s, response).sum(),
        lambda s, t: losses.dpsw_weights(s, t, response, top_k=4, student_token="sampled").sum(),
        lambda s, t: losses.dpsw_weights(s, t, top_k=4).sum(),
    ):
        for gradient in jax.grad(function, argnums=(0, 1))(student, teacher):
            np.testing.assert_array_equal(gradient, 0)


# --- The loss ---------------------------------------------------------------------------------------------------


@functools.cache
def compiled_loss(**options):
    def loss_fn(student, *rest):
        results = losses.dpsw_loss(student, *rest, **options)
        return results[0], results

    return jax.jit(jax.grad(loss_fn, has_aux=True))


def loss_and_gradient(batch, **options):
    """(loss_sum, normaliser, aux) and the gradient of loss_sum for the student's logits, under jit."""
    gradient, results = jax.device_get(compiled_loss(**options)(*batch))
    return results, gradient


@pytest.mark.parametrize(
    ("name", "top_k", "weighting", "normalize", "token_cap"),
    [
        ("reverse_kl", None, "dpsw", "mean", None),
        ("reverse_kl", None, "dpsw", "mean", 0.7),
        ("forward_kl", 6, "dpsw", "none", None),
        ("jsd", None, "teacher", "mean", None),
        ("blend", None, "dpsw", "none", 1.5),
        ("reverse_kl", 6, "student", "none", None),
        ("forward_kl", None, "uniform", "mean", 0.7),
        ("cross_entropy", None, "uniform", "mean", None),
        ("cross_entropy", None, "dpsw", "none", 1.5),
    ],
)
def test_loss_equals_float64_reference(rng, name, top_k, weighting, normalize, token_cap):
    student, teacher, response, mask = random_batch(rng)
    student = student.at[:4, :2].mul(6)  # certain of something else: saturated, under reverse KL
    teacher = teacher.at[:4, :2].mul(3)
    (loss_sum, normaliser, aux), _ = loss_and_gradient(
        (student, teacher, response, mask),
        divergence=name,
        beta=0.3,
        top_k=top_k,
        token_cap=token_cap,
        weighting=weighting,
        weight_top_k=5,
        student_token="sampled",
        normalize=normalize,
        temperature=0.8,
    )

    def reference(student):
        if name == "cross_entropy":
            return reference_cross_entropy(student, response, 0.8)
        return reference_divergence(name, student, teacher, beta=0.3, top_k=top_k, temperature=0.8)

    divergence, slopes = reference(student), reference_gradient(reference, student)
    saturated = reference_saturated(student, teacher, divergence, slopes, 0.8)
    assert saturated.any() == (name in ("reverse_kl", "jsd"))
    w_T, w_S = reference_weights(student, teacher, np.asarray(response), 5, 0.8)
    weight = {"dpsw": w_T * w_S, "teacher": w_T, "student": w_S, "uniform": np.ones_like(w_T)}[weighting]
    per_token = {
        "tokens": np.ones_like(w_T),
        "kl": divergence,
        "weight": weight,
        "w_T": w_T,
        "w_S": w_S,
        "teacher_entropy": reference_entropy(reference_softmax(teacher, 0.8)),
        "student_entropy": reference_entropy(reference_softmax(student, 0.8)),
        "saturated": weight * reference_capped(divergence, token_cap) * saturated,
    }
    mask = np.asarray(mask)
    assert set(aux) == set(per_token)
    for key, values in per_token.items():
        assert aux[key].shape == () and aux[key].dtype == np.float32
        np.testing.assert_allclose(aux[key], values[mask].sum(), rtol=1e-5, err_msg=key)
    np.testing.assert_allclose(loss_sum, (weight * reference_capped(divergence, token_cap))[mask].sum(), rtol=1e-5)
    np.testing.assert_allclose(normaliser, weight[mask].sum() if normalize == "mean" else mask.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("weighting", "student_token"),
    [("dpsw", "teacher_argmax"), ("dpsw", "sampled"), ("student", "sampled"), ("teacher", "sampled")],
)
def test_gradient_is_that_of_constant_weights(rng, weighting, student_token):
    batch = student, teacher, response, mask = random_batch(rng)
    options = {"weighting": weighting, "student_token": student_token}
    _, gradient = loss_and_gradient(batch, **options, weight_top_k=6)
    weights = losses.dpsw_weights(student, teacher, response, **options, top_k=6)
    constants = jnp.asarray(np.asarray(weights * mask))
    expected = jax.grad(lambda s: (constants * losses.reverse_kl(s, teacher)).sum())(student)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalize", losses.NORMALIZATIONS)
def test_normaliser_and_aux_carry_no_gradient(rng, normalize):
    student, teacher, response, mask = random_batch(rng)

    def rest_sum(student, teacher):
        _, normaliser, aux = losses.dpsw_loss(student, teacher, response, mask, normalize=normalize)
        return normaliser + sum(aux.values())

    for gradient in jax.jit(jax.grad(rest_sum, argnums=(0, 1)))(student, teacher):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_live_teacher_gets_no_gradient(rng, name):
    """Student and teacher are the SAME parameters on two prompts: the gradient is that of a frozen copy."""
    _, _, response, mask = random_batch(rng)
    params = random_logits(rng, 6, 24)
    student_prompt, teacher_prompt = (random_logits(rng, 16, 5, 6, scale=0.5) for _ in range(2))

    def loss(student_params, teacher_params):
        student, teacher = student_prompt @ student_params, teacher_prompt @ teacher_params
        return losses.mean_loss(*losses.dpsw_loss(student, teacher, response, mask, divergence=name)[:2])

    by_student, by_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, params)
    assert jnp.abs(by_student).max() > 1e-4
    np.testing.assert_array_equal(by_teacher, 0)
    live = jax.jit(jax.grad(lambda params: loss(params, params)))(params)
    np.testing.assert_allclose(live, by_student, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "top_k"), [("reverse_kl", None), ("forward_kl", 3), ("jsd", None)])
def test_masked_positions_cannot_poison(rng, name, top_k):
    student, teacher, response, mask = random_batch(rng)
    options = {"divergence": name, "top_k": top_k, "student_token": "sampled"}
    expected, expected_gradient = loss_and_gradient((student, teacher, response, mask), **options)
    hole = ~mask[..., None]
    for poison in (np.nan, np.inf, -np.inf):
        poisoned = jnp.where(hole, poison, student), jnp.where(hole, poison, teacher)
        actual, gradient = loss_and_gradient((*poisoned, jnp.where(mask, response, -100), mask), **options)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        np.testing.assert_array_equal(gradient, expected_gradient)
        np.testing.assert_array_equal(gradient[~np.asarray(mask)], 0)


def test_masked_and_excluded_logits_do_not_trip_debug_nans(rng):
    student, teacher, response, mask = map(np.array, random_batch(rng))
    student[..., 3] = teacher[..., 3] = -np.inf
    student[~mask] = teacher[~mask] = np.nan
    for name in losses.DIVERGENCES:
        with jax.debug_nans(True):
            loss_sum, _, _ = losses.dpsw_loss(student, teacher, response, mask, divergence=name, top_k=5)
        assert loss_sum > 0


@pytest.mark.parametrize(("shape", "normalize"), [((3, 4), "mean"), ((3, 4), "none"), ((3, 0), "mean")])
def test_no_response_tokens(shape, normalize):
    student = jnp.full((*shape, 24), jnp.nan)
    zeros = jnp.zeros(shape, int)

    def mean(student):
        results = losses.dpsw_loss(
            student, student, zeros, zeros, top_k=3, normalize=normalize, student_token="sampled"
        )
        loss = losses.mean_loss(*results[:2])
        return loss, (loss, results)

    gradient, results = jax.jit(jax.grad(mean, has_aux=True))(student)
    assert all(leaf == 0 for leaf in jax.tree.leaves(results))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(("weighting", "parts"), [("dpsw", 2), ("dpsw", 4), ("dpsw", 16), ("uniform", 4)])
def test_micro_batches_add_up_to_the_batch(rng, weighting, parts):
    """Ragged responses: a mean of the parts' means would be wrong."""
    batch = random_batch(rng)
    options = {"weighting": weighting}
    whole, whole_gradient = loss_and_gradient(batch, **options)
    splits = [loss_and_gradient(part, **options) for part in zip(*(np.split(x, parts) for x in batch))]
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(results for results, _ in splits))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), summed, whole)
    gradient = np.concatenate([gradient for _, gradient in splits])
    np.testing.assert_allclose(
        losses.mean_loss(gradient, summed[1]), losses.mean_loss(whole_gradient, whole[1]), rtol=1e-6, atol=1e-8
    )


def test_padding_changes_nothing(rng):
    batch = random_batch(rng)
    expected, expected_gradient = loss_and_gradient(batch, weighting="dpsw")
    junk = random_logits(rng, 16, 3, 24), random_logits(rng, 16, 3, 24), rng.integers(24, size=(16, 3))
    padded = [np.concatenate([x, y], 1) for x, y in zip(batch, (*junk, np.zeros((16, 3), bool)))]
    actual, gradient = loss_and_gradient(padded, weighting="dpsw")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)
    np.testing.assert_allclose(gradient[:, :5], expected_gradient, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, 5:], 0)


def test_every_response_token_counts(rng):
    """The first one above all, and the last one that the mask holds."""
    batch = random_batch(rng)
    _, gradient = loss_and_gradient(batch, weighting="uniform")
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, batch[-1])


def test_mean_normalisation_gives_effective_weights_of_mean_1(rng):
    student, teacher, response, mask = random_batch(rng)
    _, normaliser, aux = losses.dpsw_loss(student, teacher, response, mask)
    weights = losses.dpsw_weights(student, teacher, response)[mask]
    assert weights.mean() < 0.9  # so that there is something to rescale
    # loss = sum w D / normaliser = mean of (w * tokens / normaliser) D
    np.testing.assert_allclose((weights * aux["tokens"] / normaliser).mean(), 1, rtol=1e-6)


@each_divergence
def test_uniform_weighting_is_the_plain_masked_mean(rng, name):
    student, teacher, response, mask = random_batch(rng)
    plain = losses.DIVERGENCES[name](student, teacher)[mask].mean()
    for normalize in losses.NORMALIZATIONS:
        loss_sum, normaliser, _ = losses.dpsw_loss(
            student, teacher, response, mask, divergence=name, weighting="uniform", normalize=normalize
        )
        np.testing.assert_allclose(losses.mean_loss(loss_sum, normaliser), plain, rtol=1e-6)


def test_cross_entropy_is_supervised_fine_tuning_on_the_response(rng):
    """Value and gradient of the tokens' mean negative log-likelihood; the teacher changes neither."""
    student, teacher, response, mask = random_batch(rng)
    for other in (teacher, -2 * teacher):
        (loss_sum, normaliser, _), gradient = loss_and_gradient(
            (student, other, response, mask), divergence="cross_entropy", weighting="uniform", temperature=0.8
        )
        expected = reference_cross_entropy(student, response, 0.8)[mask].sum()
        np.testing.assert_allclose(loss_sum, expected, rtol=1e-6)
        assert normaliser == mask.sum()
        # (p - y) / temperature, in float64
        p = reference_softmax(student, 0.8)
        y = np.eye(p.shape[-1])[np.asarray(response)]
        np.testing.assert_allclose(gradient, np.where(mask[..., None], (p - y) / 0.8, 0), rtol=1e-5, atol=1e-7)


def test_per_token_loss_are_the_terms_of_the_loss(rng):
    student, teacher, response, mask = random_batch(rng)
    options = {"divergence": "jsd", "beta": 0.3, "student_token": "sampled", "temperature": 0.9}
    tokens = losses.per_token_loss(student, teacher, response, **options)
    loss_sum, _, aux = losses.dpsw_loss(student, teacher, response, mask, **options)
    np.testing.assert_allclose((tokens["weight"] * tokens["kl"])[mask].sum(), loss_sum, rtol=1e-6)
    for name, values in tokens.items():
        assert values.shape == (16, 5)
        np.testing.assert_allclose(values[mask].sum(), aux[name], rtol=1e-6)


@pytest.mark.parametrize("name", [*losses.DIVERGENCES, "cross_entropy"])
def test_a_cap_shortens_the_gradients_of_tokens_above_it(rng, name):
    """It is the gradient of what is returned, has the direction of the uncapped one, and has a bound."""
    student, teacher, response, mask = random_batch(rng)
    options = {"divergence": name, "weighting": "uniform"}
    D = np.asarray(losses.per_token_loss(student, teacher, response, **options)["kl"])
    cap = float(np.median(D[mask]))
    _, gradient = loss_and_gradient((student, teacher, response, mask), **options)
    (loss_sum, _, aux), short = loss_and_gradient((student, teacher, response, mask), token_cap=cap, **options)
    assert relative_error(short[mask], (np.minimum(1, cap / D)[..., None] * gradient)[mask]) < 1e-5
    np.testing.assert_allclose(loss_sum, reference_capped(D, cap)[mask].sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["kl"], D[mask].sum(), rtol=1e-6)  # as it is, for logs


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
def test_slopes_are_bounded_by_the_divergence_and_with_a_cap_by_the_cap(rng, scale):
    """The absolute entries of the gradient add up to at most 2 D + 2/e (reverse KL), or 2 (forward KL)."""
    student, teacher = (random_logits(rng, 500, 24, scale=scale) for _ in range(2))
    D, gradient = value_and_gradient("reverse_kl", student, teacher)
    slope = np.abs(gradient).sum(-1)
    assert (slope <= 2 * D + 2 / np.e + 1e-4).all()
    assert (np.minimum(1, 1.5 / D) * slope <= 2 * 1.5 + 2 / np.e + 1e-4).all()
    _, gradient = value_and_gradient("forward_kl", student, teacher)
    assert (np.abs(gradient).sum(-1) <= 2 + 1e-4).all()


def test_a_cap_that_nothing_exceeds_changes_nothing(rng):
    batch = random_batch(rng)
    expected, actual = (loss_and_gradient(batch, token_cap=cap) for cap in (None, 1e3))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_capped_is_increasing_smooth_and_passes_bad_numbers_on():
    D = jnp.linspace(0, 10, 1001)
    slope = jax.vmap(jax.grad(lambda d: losses.capped(d, 2.0)))(D)
    assert (jnp.diff(losses.capped(D, 2.0)) > 0).all() and losses.capped(D, 2.0)[0] == 0
    np.testing.assert_allclose(slope, np.minimum(1, 2 / np.maximum(D, 1e-9)), rtol=1e-5)
    assert losses.capped(jnp.inf, 2.0) == jnp.inf and jnp.isnan(losses.capped(jnp.nan, 2.0))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_is_saturated(temperature):
    """Rows of a certain student: at odds with the teacher, agreed, at odds but not certain; a teacher with two ways."""
    p_S = jnp.array([[1e-4, 1.0, 1e-4], [1.0, 1e-4, 1e-4], [0.1, 0.9, 1e-3], [0.98, 0.02, 1e-4]])
    p_T = jnp.array([[1.0, 1e-3, 1e-3], [1.0, 1e-3, 1e-3], [1.0, 1e-3, 1e-3], [0.5, 0.5, 1e-3]])
    student, teacher = temperature * jnp.log(p_S), temperature * jnp.log(p_T)
    options = {"weighting": "uniform", "weight_top_k": 2, "temperature": temperature}
    for name, expected in {
        "reverse_kl": [True, False, False, False],
        "jsd": [True, False, False, False],
        "forward_kl": [False] * 4,
        "blend": [False] * 4,
        "cross_entropy": [False] * 4,
    }.items():
        tokens = losses.per_token_loss(student, teacher, jnp.zeros(4, int), divergence=name, **options)
        np.testing.assert_array_equal(tokens["saturated"], jnp.where(jnp.array(expected), tokens["kl"], 0), name)


def test_forward_kl_is_never_saturated(rng):
    """Its slope is twice the distance of the rows."""
    student, teacher = (random_logits(rng, 2000, 24, scale=30.0) for _ in range(2))
    for name, some in (("forward_kl", False), ("reverse_kl", True)):
        assert losses.per_token_loss(student, teacher, divergence=name)["saturated"].any() == some


def test_mean_loss_passes_nan_on():
    assert losses.mean_loss(jnp.array(6.0), jnp.array(4.0)) == 1.5
    assert losses.mean_loss(jnp.array(0.0), jnp.array(0.0)) == 0
    assert jnp.isnan(losses.mean_loss(jnp.array(jnp.nan), jnp.array(1.0)))
    assert jnp.isnan(losses.mean_loss(jnp.array(1.0), jnp.array(jnp.nan)))


# --- Transformations --------------------------------------------------------------------------------------------


def test_eager_numpy_vmap_and_single_tokens_agree_with_jit(rng):
    batch = random_batch(rng)
    expected, _ = loss_and_gradient(batch, weighting="dpsw")
    check = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-6))
    check(losses.dpsw_loss(*map(np.asarray, batch)), expected)
    by_row = jax.jit(jax.vmap(losses.dpsw_loss))(*batch)
    assert by_row[0].shape == (16,)
    check(jax.tree.map(jnp.sum, by_row), expected)
    by_token = jax.jit(jax.vmap(jax.vmap(losses.dpsw_loss)))(*batch)  # each call: logits [V], no other axis
    assert by_token[0].shape == (16, 5)
    check(jax.tree.map(jnp.sum, by_token), expected)


@pytest.mark.parametrize(("name", "top_k"), [("reverse_kl", None), ("forward_kl", 3), ("jsd", None)])
def test_shard_map_over_all_devices(rng, name, top_k):
    """Batch sharded, sums psum-ed, divided once: the loss and the gradient of one device."""
    options = {"divergence": name, "top_k": top_k, "student_token": "sampled"}
    batch = random_batch(rng, B=2 * jax.device_count())
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=((whole, whole), rows))
    def sharded(*batch):
        gradient, (loss_sum, normaliser, _) = compiled_loss(**options)(*batch)
        loss_sum, normaliser = jax.lax.psum((loss_sum, normaliser), "data")
        return (losses.mean_loss(loss_sum, normaliser), normaliser), losses.mean_loss(gradient, normaliser)

    (loss, normaliser), gradient = jax.jit(sharded)(*batch)
    (loss_sum, *_), whole_gradient = loss_and_gradient(batch, **options)
    np.testing.assert_allclose(loss, losses.mean_loss(loss_sum, normaliser), rtol=1e-6)
    np.testing.assert_allclose(gradient, whole_gradient / normaliser, rtol=1e-5, atol=1e-8)


def test_vocabulary_sharded_by_the_compiler(rng):
    options = {"divergence": "forward_kl", "top_k": 3, "student_token": "sampled"}
    batch = random_batch(rng, V=3 * jax.device_count())
    mesh = jax.make_mesh((jax.device_count(),), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    sharded = (*jax.device_put(batch[:2], shards), *batch[2:])
    actual, gradient = loss_and_gradient(sharded, **options)
    expected, expected_gradient = loss_and_gradient(batch, **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("V", "k"), [(16 * 33, 20), (16 * 640, 20), (16 * 32, 1), (16 * 20, 20), (333, 20), (12, 12)])
@pytest.mark.parametrize("distinct", [3, 40, None])
def test_the_top_k_by_blocks_is_top_k(rng, V, k, distinct):
    """Values and indices, also where most elements tie, within a block and across blocks."""
    x = rng.normal(size=(2, 7, V)) if distinct is None else rng.integers(distinct, size=(2, 7, V)) - 1.0
    x = jnp.asarray(np.where(rng.random(x.shape) < 0.1, -np.inf, x), jnp.float32)
    for actual, expected in zip(jax.jit(numerics.blockwise_top_k, static_argnums=1)(x, k), jax.lax.top_k(x, k)):
        np.testing.assert_array_equal(actual, expected)


# --- Errors and examples ----------------------------------------------------------------------------------------

LOGITS, TOKENS, MASK = jnp.zeros((2, 3, 24)), jnp.zeros((2, 3), int), jnp.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.reverse_kl(LOGITS, LOGITS[..., :5]), r"same shape.*\(2, 3, 24\) and \(2, 3, 5\)"),
        (lambda: losses.reverse_kl(LOGITS, LOGITS[0]), "same shape"),
        (lambda: losses.forward_kl(TOKENS, LOGITS), "student_logits must be floats.*int"),
        (lambda: losses.jsd(LOGITS, jnp.float32(1.0)), "teacher_logits must be floats of shape"),
        (lambda: losses.reverse_kl(LOGITS, LOGITS, temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: losses.reverse_kl(LOGITS, LOGITS, temperature=float("nan")), "temperature must be > 0"),
        (lambda: losses.reverse_kl(LOGITS, LOGITS, top_k=25), r"top_k .* in 1\.\.24 .*got 25"),
        (lambda: losses.reverse_kl(LOGITS, LOGITS, top_k=0), "top_k .*got 0"),
        (lambda: losses.jsd(LOGITS, LOGITS, beta=1.5), r"beta must be in \[0, 1\], got 1.5"),
        (lambda: losses.blend(LOGITS, LOGITS, beta=-0.5), r"beta must be in \[0, 1\], got -0.5"),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS, MASK, token_cap=0), "token_cap must be > 0, got 0"),
        (
            lambda: losses.teacher_weight(LOGITS, top_k=3, entropy_scale="log"),
            "entropy_scale must be one of 'linear', 'exponential', got 'log'",
        ),
        (lambda: losses.teacher_weight(LOGITS, top_k=1), r"top_k .* in 2\.\.24 .*got 1"),
        (lambda: losses.teacher_weight(LOGITS, top_k=True), "top_k .*got True"),
        (lambda: losses.reverse_kl(LOGITS, LOGITS, top_k=3.0), "top_k .*got 3.0"),
        (lambda: losses.student_weight(LOGITS, TOKENS[0]), r"tokens must be integers of shape \(2, 3\)"),
        (lambda: losses.student_weight(LOGITS, TOKENS * 1.0), "tokens must be integers.*float32"),
        (
            lambda: losses.dpsw_weights(LOGITS, LOGITS, weighting="kl"),
            "weighting must be one of 'dpsw', 'teacher', 'student', 'uniform', got 'kl'",
        ),
        (
            lambda: losses.dpsw_weights(LOGITS, LOGITS, student_token="argmax"),
            "student_token must be one of 'teacher_argmax', 'sampled', got 'argmax'",
        ),
        (lambda: losses.dpsw_weights(LOGITS, LOGITS, student_token="sampled"), "needs the response tokens"),
        (
            lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS, MASK, divergence="kl"),
            "divergence must be one of 'reverse_kl', 'forward_kl', 'jsd', 'blend', 'cross_entropy', got 'kl'",
        ),
        (
            lambda: losses.dpsw_loss(LOGITS, LOGITS, None, MASK, divergence="cross_entropy"),
            "cross_entropy' needs the response tokens",
        ),
        (
            lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS, MASK, divergence="cross_entropy", top_k=3),
            "has no top_k, got 3",
        ),
        (
            lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS, MASK, normalize="sum"),
            "normalize must be one of 'mean', 'none', got 'sum'",
        ),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS, MASK, weight_top_k=1), "weight_top_k .*got 1"),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS, MASK, TOKENS), "response must be integers .*got bool"),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS, 0.5 * MASK), "mask must be bool, or 0 and 1, got 0.5"),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS, MASK * 1, TOKENS + 7), "mask must be .*got 7: is it the response"),
        (
            lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS - 100, MASK),
            r"tokens in 0\.\.23 where mask is true, got -100",
        ),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS + 24, MASK), "where mask is true, got 24"),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS * 1.0, MASK), "response must be integers .*float32"),
        (
            lambda: jax.jit(losses.dpsw_loss)(LOGITS, LOGITS, TOKENS, MASK, temperature=0.7),
            "temperature must be static under jit",
        ),
        (
            lambda: jax.jit(losses.dpsw_loss)(LOGITS, LOGITS, TOKENS, MASK, weight_top_k=5),
            "weight_top_k must be static under jit",
        ),
        (lambda: jax.jit(losses.jsd)(LOGITS, LOGITS, beta=0.3), "beta must be static under jit"),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS, MASK[:, :2]), r"mask .*\(2, 3\), got \(2, 2\)"),
        (lambda: losses.dpsw_loss(LOGITS, LOGITS[:, :2], TOKENS, MASK), r"same shape.*\(2, 2, 24\)"),
        (
            lambda: losses.dpsw_loss(LOGITS, LOGITS, TOKENS[:, :2], MASK, student_token="sampled"),
            r"integers of shape \(2, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_that_are_no_tokens_may_stand_where_the_mask_is_false_and_nowhere_else(rng):
    student, teacher = (jnp.asarray(rng.normal(size=(2, 3, 24)), jnp.float32) for _ in range(2))
    tokens, mask = jnp.asarray(rng.integers(0, 24, (2, 3))), jnp.array([[True, True, False], [True, False, False]])
    for options in ({"student_token": "sampled"}, {"divergence": "cross_entropy"}):
        loss_fn = functools.partial(losses.dpsw_loss, **options)
        value = jax.jit(jax.value_and_grad(lambda s, t: loss_fn(s, teacher, t, mask)[0]))  # noqa: B023
        expected = value(student, tokens)
        ignored = value(student, jnp.where(mask, tokens, -100))
        jax.tree.map(np.testing.assert_array_equal, ignored, expected)
        assert np.isfinite(expected[0]) and np.isfinite(expected[1]).all()
        for wrong in (-100, 24):
            assert np.isnan(value(student, tokens.at[0, 0].set(wrong))[0])


@pytest.mark.parametrize(("K", "V"), [(20, 5), (20, 2), (7, 6)])
def test_a_top_k_beyond_the_vocabulary_is_the_whole_vocabulary(rng, K, V):
    student, teacher = (jnp.asarray(rng.normal(size=(3, V)), jnp.float32) for _ in range(2))
    for scale in ("linear", "exponential"):
        whole = losses.teacher_weight(teacher, top_k=V, entropy_scale=scale)
        np.testing.assert_array_equal(losses.teacher_weight(teacher, top_k=K, entropy_scale=scale), whole)
    mask = jnp.ones(3, bool)
    losses_of = [losses.dpsw_loss(student, teacher, None, mask, weight_top_k=k)[0] for k in (K, V)]
    assert losses_of[0] == losses_of[1] > 0


@pytest.mark.parametrize(
    "name", ["reverse_kl", "jsd", "dpsw_weights", "per_token_loss", "dpsw_loss", "fused_dpsw_loss"]
)
def test_options_are_static_arguments_of_jit(rng, name):
    function = getattr(losses, name)
    student, teacher = (jnp.asarray(rng.normal(size=(4, 8)), jnp.float32) for _ in range(2))
    arrays = (student, teacher)
    if "loss" in name or "weights" in name:
        arrays += (jnp.asarray(rng.integers(0, 8, 4)),)
    if name.endswith("dpsw_loss"):
        arrays += (jnp.ones(4, bool),)
    if name == "fused_dpsw_loss":
        head = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
        arrays = (student, head, teacher, head, *arrays[2:])
    options = {"temperature": 0.7, "top_k": 3} | ({"chunk": 2} if name == "fused_dpsw_loss" else {})
    if name == "dpsw_loss":
        options |= {"weighting": "teacher", "divergence": "forward_kl", "normalize": "none", "token_cap": 0.5}
    jitted = jax.jit(function, static_argnames=losses.static_argnames(function))
    got, expected = jitted(*arrays, **options), function(*arrays, **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, expected)


def test_former_names_work_with_a_warning(rng):
    student, teacher = (jnp.asarray(rng.normal(size=(2, 3, 9)), jnp.float32) for _ in range(2))
    tokens, mask = jnp.zeros((2, 3), int), jnp.ones((2, 3), bool)
    expected = losses.dpsw_loss(student_logits=student, teacher_logits=teacher, response=tokens, mask=mask)[0]
    with pytest.warns(DeprecationWarning, match=r"dpsw_loss\(mask_BxR=...\) is now mask=...") as caught:
        former = losses.dpsw_loss(student, teacher_logits_BxRxV=teacher, response_BxR=tokens, mask_BxR=mask)[0]
    assert former == expected and len(caught) == 3 and caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="is now response"):
        weights = losses.dpsw_weights(student, teacher, response_tokens=tokens, student_token="sampled")
    np.testing.assert_array_equal(weights, losses.dpsw_weights(student, teacher, tokens, student_token="sampled"))
    head = jnp.eye(9)
    with pytest.warns(DeprecationWarning, match=r"fused_dpsw_loss\(mask_N=...\)"):
        fused = losses.fused_dpsw_loss(student[0], head, teacher[0], head, None, mask_N=mask[0])[0]
    np.testing.assert_allclose(fused, losses.dpsw_loss(student[0], teacher[0], None, mask[0])[0], rtol=1e-5)
    with pytest.raises(TypeError, match="got mask and mask_BxR, its former name"):
        losses.dpsw_loss(student, teacher, tokens, mask=mask, mask_BxR=mask)


def test_no_public_name_has_an_axis_suffix():
    for name in losses.__all__:
        if inspect.isfunction(function := getattr(losses, name)):
            assert not [p for p in inspect.signature(function).parameters if re.search(r"_[A-Z](x[A-Z])*$", p)], name


def test_docstring_examples():
    functions = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    examples = set()
    for module in (divergences, dpsw, fused, naming, settings, weights):
        assert doctest.testmod(module).failed == 0
        examples |= {test.name.split(".")[-1] for test in doctest.DocTestFinder().find(module) if test.examples}
    assert functions and functions <= examples
