"""losses/fused.py against the dense loss, against float64, and for what it may not hold or compute."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msd_jax import losses
from msd_jax.losses import fused as fused_module
from msd_jax.parallel import sharding

N, D, V = 48, 24, 160
BOTH = (0, 1)


def make_inputs(rng, *, tokens=N, vocabulary=V, closeness=1.0):
    """Hidden states and heads of two roles, response tokens and mask; the teacher is `closeness` away."""
    hidden, head = rng.normal(size=(tokens, D)), rng.normal(size=(D, vocabulary)) / 3
    other_hidden, other_head = (x + closeness * rng.normal(size=x.shape) for x in (hidden, head))
    arrays = (jnp.asarray(x, jnp.float32) for x in (hidden, head, other_hidden, other_head))
    return *arrays, jnp.asarray(rng.integers(vocabulary, size=tokens)), jnp.asarray(rng.random(tokens) < 0.8)


def dense_loss(hidden, head, other_hidden, other_head, response, mask, *, logit_softcap=None, **options):
    student, teacher = hidden @ head, other_hidden @ other_head
    if logit_softcap:
        student, teacher = (logit_softcap * jnp.tanh(x / logit_softcap) for x in (student, teacher))
    return losses.dpsw_loss(student, teacher, response, mask, **options)


def run(loss, inputs, wanted=BOTH, **options):
    """((loss_sum, (normaliser, aux)), gradients), under jit."""

    def total(*inputs):
        loss_sum, *rest = loss(*inputs, **options)
        return loss_sum, rest

    return jax.device_get(jax.jit(jax.value_and_grad(total, wanted, has_aux=True))(*inputs))


def error(actual, expected):
    """Norm of the difference over norm of what is expected; the worst array counts."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(np.linalg.norm(np.asarray(a, np.float64) - b) / (np.linalg.norm(b) + 1e-30) for a, b in pairs)


EVERY_KIND = pytest.mark.parametrize(
    "options",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "forward_kl", "temperature": 0.7, "weighting": "teacher"},
        {"divergence": "jsd", "beta": 0.3, "weighting": "student", "student_token": "sampled"},
        {"divergence": "reverse_kl", "top_k": 7, "normalize": "none", "weighting": "uniform"},
        {"divergence": "forward_kl", "top_k": 7, "logit_softcap": 8.0, "temperature": 1.3},
        {"divergence": "jsd", "logit_softcap": 5.0},
        {"divergence": "cross_entropy", "weighting": "uniform", "temperature": 0.7},
        {"divergence": "blend", "beta": 0.3, "token_cap": 0.8, "entropy_scale": "exponential"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_an_array_beta_equals_the_number(shape, rng):
    inputs, mesh = make_inputs(rng), shape and sharding.make_mesh(*shape)
    options = {"divergence": "blend", "weight_top_k": 5}

    def fused(*inputs, beta):
        return losses.fused_dpsw_loss(*inputs, chunk=7, mesh=mesh, beta=beta, **options)

    for beta in (0.0, 0.3, 1.0):
        expected = run(dense_loss, inputs, beta=beta, **options)
        assert error(run(fused, inputs, beta=jnp.float32(beta)), expected) < 1e-5
        traced = jax.jit(lambda beta: jax.grad(lambda *inputs: fused(*inputs, beta=beta)[0], BOTH)(*inputs))
        assert error(traced(jnp.float32(beta)), expected[1]) < 1e-5


@EVERY_KIND
@pytest.mark.parametrize("chunk", [7, 48, 500])
def test_equals_the_dense_loss(options, chunk, rng):
    inputs = make_inputs(rng)
    options = options | {"weight_top_k": 5}
    actual = run(functools.partial(losses.fused_dpsw_loss, chunk=chunk), inputs, **options)
    assert error(actual, run(dense_loss, inputs, **options)) < 1e-5


@EVERY_KIND
def test_tied_heads_are_as_exact(options, rng):
    """Against float64: their products are rounded otherwise than the dense loss's, and not worse."""
    inputs, options = make_inputs(rng), options | {"weight_top_k": 5}
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) if x.dtype == jnp.float32 else x for x in inputs]
        expected = run(dense_loss, wide, **options)
    actual = run(functools.partial(losses.fused_dpsw_loss, chunk=7, tied=True), inputs, **options)
    assert error(actual, expected) < 2 * error(run(dense_loss, inputs, **options), expected) + 1e-6


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("options", [{}, {"top_k": 7, "divergence": "forward_kl"}], ids=["full", "top_k"])
@pytest.mark.parametrize("tied", [False, True])
def test_does_not_depend_on_the_devices(shape, options, tied, rng):
    """Tokens over data and fsdp, rows of the heads over fsdp, the vocabulary over tensor; in and out."""
    inputs, mesh = make_inputs(rng), sharding.make_mesh(*shape)
    tokens, heads = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp", "tensor")
    spread = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, (tokens, heads) * 2 + (tokens, tokens))]
    fused = functools.partial(losses.fused_dpsw_loss, chunk=3, weight_top_k=5, tied=tied, **options)
    actual = run(functools.partial(fused, mesh=mesh), spread)
    assert error(actual, run(functools.partial(dense_loss, weight_top_k=5, **options), inputs)) < 1e-5

    gradient = jax.jit(jax.grad(lambda *inputs: fused(*inputs, mesh=mesh)[0], BOTH))(*spread)
    for actual, wanted in zip(gradient, (tokens, heads)):
        assert actual.sharding.is_equivalent_to(NamedSharding(mesh, wanted), 2)


def float64_gradient(inputs):
    """Of the reverse KL with DPSW weights, from the formulas, all in float64; heads and hidden states as given."""
    with jax.enable_x64(True):
        hidden, head, other_hidden, other_head, _, mask = (np.asarray(x) for x in inputs)
        hidden, head, other_hidden, other_head = (
            jnp.asarray(x, jnp.float64) for x in (hidden, head, other_hidden, other_head)
        )
        log_T = jax.nn.log_softmax(other_hidden @ other_head)
        top = jax.nn.softmax(jnp.sort(log_T)[:, -20:])

        def total(hidden, head):
            log_S = jax.nn.log_softmax(hidden @ head)
            kl = jnp.sum(jnp.exp(log_S) * (log_S - log_T), -1)
            w_T = 1 + jnp.sum(top * jnp.log(top), -1) / np.log(20)
            w_S = 1 - jnp.exp(jnp.take_along_axis(log_S, jnp.argmax(log_T, -1)[:, None], -1)[:, 0])
            mean_kl = jnp.mean(kl, where=mask)
            return jnp.sum(jax.lax.stop_gradient(w_T * w_S) * kl, where=mask), mean_kl

        gradient, mean_kl = jax.grad(total, BOTH, has_aux=True)(hidden, head)
        return jax.device_get(gradient), float(mean_kl)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 1e-3), (jnp.float32, 1e-5)])
@pytest.mark.parametrize("tied", [False, True])
def test_gradient_is_exact_where_student_and_teacher_are_close(dtype, bound, tied, rng):
    """At 0.002 nats a token, where the gradients of rounded logits are half noise."""
    inputs = make_inputs(rng, tokens=256, vocabulary=2000, closeness=0.015)
    inputs = [x.astype(dtype).astype(jnp.float32) if x.dtype == jnp.float32 else x for x in inputs]
    expected, mean_kl = float64_gradient(inputs)
    assert 1e-3 < mean_kl < 4e-3
    _, actual = run(functools.partial(losses.fused_dpsw_loss, chunk=100, dtype=dtype, tied=tied), inputs)
    assert error(actual, expected) < bound

    def rounded(hidden, head, other_hidden, other_head, response, mask):
        student, teacher = (x.astype(jnp.bfloat16) for x in (hidden @ head, other_hidden @ other_head))
        return losses.dpsw_loss(student, teacher, response, mask)

    assert error(run(rounded, inputs)[1], expected) > 0.1


def test_what_is_masked_out_reaches_nothing(rng):
    inputs = make_inputs(rng)
    mask = inputs[-1]
    poisoned = [jnp.where(mask[:, None], x, jnp.nan) if x.shape == (N, D) else x for x in inputs]
    fused = functools.partial(losses.fused_dpsw_loss, chunk=7)
    for actual, expected in zip(jax.tree.leaves(run(fused, poisoned)), jax.tree.leaves(run(fused, inputs))):
        np.testing.assert_array_equal(actual, expected)
    nothing = (*inputs[:-1], jnp.zeros(N, bool))
    assert all(np.all(x == 0) for x in jax.tree.leaves(run(fused, nothing)))


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_is_finite_at_the_extremes(divergence, rng):
    """Excluded tokens (logits of -inf), rows of one token, a vocabulary that no block divides."""
    hidden, head, other_hidden, other_head, response, mask = make_inputs(rng, vocabulary=4487)
    hidden, other_hidden = (x.at[:, 0].set(1.0) for x in (hidden, other_hidden))
    excluded = np.arange(4487) >= 4400
    head, other_head = (
        jnp.where(excluded, 0.0, w).at[0].set(jnp.where(excluded, -3e38, w[0])) for w in (head, other_head)
    )
    inputs = (hidden.at[:9].mul(300), head, other_hidden.at[:9].mul(300), other_head, response, mask)
    # At temperature 0.5 -3e38 becomes -inf.
    fused = functools.partial(losses.fused_dpsw_loss, divergence=divergence, temperature=0.5, chunk=7)
    assert np.all(np.asarray((hidden @ head / 0.5)[mask][:, excluded]) == -np.inf)
    value, gradient = run(fused, inputs)
    if divergence == "jsd":  # the KLs of one-token rows may be infinite by right
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))
    assert not any(np.isnan(x).any() for x in jax.tree.leaves((value, gradient)))


def shapes_of(function, *inputs):
    """Every shape that a program computes, those inside loops included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from ((equation.primitive.name, v.aval.shape) for v in equation.outvars)
            for sub in jax.core.jaxprs_in_params(equation.params):
                yield from walk(sub)

    return list(walk(jax.make_jaxpr(function)(*inputs).jaxpr))


def test_holds_a_chunk_and_computes_what_is_asked_for(rng):
    inputs = make_inputs(rng, tokens=256)

    def products(wanted):
        def fused(*inputs):
            return losses.fused_dpsw_loss(*inputs, chunk=16)[0]

        shapes = shapes_of(jax.grad(fused, wanted) if wanted else fused, *inputs)
        assert max(int(np.prod(shape)) for _, shape in shapes) < 256 * V / 4
        return sum(name == "dot_general" for name, _ in shapes)

    # Two products give the logits; each gradient takes one more, and a backward pass none.
    assert [products(wanted) for wanted in ((), (0,), (1,), BOTH)] == [2, 3, 3, 4]


def test_tied_heads_are_not_transposed_in_memory():
    """What a program needs for the gradient of the table falls by two tables, a copy of each head."""
    hidden, table, other_hidden, other_table = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(64, 32), (5000, 32)] * 2
    )

    def temporary_bytes(tied):
        def total(hidden, table, other_hidden, other_table):
            arguments = (hidden, table.T, other_hidden, other_table.T, None, jnp.ones(64, bool))
            return losses.fused_dpsw_loss(*arguments, chunk=4, tied=tied)[0]

        compiled = jax.jit(jax.grad(total, BOTH)).lower(hidden, table, other_hidden, other_table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(False) - temporary_bytes(True) > 1.9 * 5000 * 32 * 4


def test_teacher_takes_no_gradient(rng):
    _, gradients = run(functools.partial(losses.fused_dpsw_loss, chunk=7), make_inputs(rng), wanted=(2, 3))
    assert all(np.all(g == 0) for g in gradients)


def test_gradient_follows_the_scale_of_its_sum(rng):
    """The cotangent is used, and normaliser and aux carry none."""
    inputs = make_inputs(rng)

    def total(hidden, *rest):
        loss_sum, normaliser, aux = losses.fused_dpsw_loss(hidden, *rest, chunk=7)
        return -3 * loss_sum + normaliser + sum(aux.values())

    _, (expected, _) = run(functools.partial(losses.fused_dpsw_loss, chunk=7), inputs)
    np.testing.assert_allclose(jax.grad(total)(*inputs), -3 * expected, rtol=1e-5, atol=1e-7)


def test_errors_name_what_does_not_fit(rng):
    hidden, head, other_hidden, other_head, response, mask = make_inputs(rng)
    with pytest.raises(ValueError, match=r"teacher_hidden and teacher_head.*V=160"):
        losses.fused_dpsw_loss(hidden, head, other_hidden, other_head[:, :-1], response, mask)
    with pytest.raises(ValueError, match=r"mask must have the shape \[N\] = \(48,\)"):
        losses.fused_dpsw_loss(hidden, head, other_hidden, other_head, response, mask[:-1])
    with pytest.raises(ValueError, match=r"N=48 tokens do not divide over 5 devices"):
        mesh = sharding.make_mesh(1, 5, 1, devices=jax.devices()[:5])
        losses.fused_dpsw_loss(hidden, head, other_hidden, other_head, response, mask, mesh=mesh)


def test_examples():
    assert doctest.testmod(fused_module).failed == 0
