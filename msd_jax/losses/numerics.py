"""Log-probabilities, and the sums over a vocabulary that the losses are made of, in float32."""

import functools

import jax
import jax.numpy as jnp

from msd_jax.losses.checks import check_pair, check_static, check_top_k


@jax.custom_jvp
def kl_terms(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """Elementwise a log(a / b) - a + b, whose sum over a row is KL(a || b) as both rows sum to 1.

    Every term is >= 0 (scipy.special.kl_div; the Bregman divergence of a log a). The plain terms a log(a / b) have
    both signs and cancel: near-equal rows, where self-distillation lives, would be left with the rounding error of
    the two log-normalisers. Here that error enters in second order only.
    """
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    d = log_ratio(log_b, log_a, a)
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
    return jnp.where((a > 0) & (abs(d) < 0.5), a * series, b - a * (1 + d))  # exp(d) - 1 - d = series(d)


# By hand: shorter than what autodiff makes of the two branches, and free of inf - inf at excluded tokens.
kl_terms.defjvps(
    lambda tangent, _, log_a, log_b: tangent * jnp.exp(log_a) * log_ratio(log_a, log_b, jnp.exp(log_a)),
    lambda tangent, _, log_a, log_b: tangent * (jnp.exp(log_b) - jnp.exp(log_a)),
)


def log_ratio(log_x: jax.Array, log_y: jax.Array, weight: jax.Array) -> jax.Array:
    """log(x / y), and 0 where `weight` is 0: 0 log(0 / y) = 0, the convention of the KL divergence."""
    used = weight > 0
    return jnp.where(used, jnp.where(used, log_x, 0.0) - jnp.where(used, log_y, 0.0), 0.0)


def kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return jnp.sum(kl_terms(log_a, log_b), axis=-1)


def entropy(log_p: jax.Array) -> jax.Array:
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)


def log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    check_static("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def log_rows(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float, top_k: int | None
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of student and teacher, over V tokens or over the teacher's top_k and TAIL."""
    check_pair(student_logits, teacher_logits)
    log_student = log_softmax(student_logits, temperature)
    log_teacher = log_softmax(jax.lax.stop_gradient(teacher_logits), temperature)
    if top_k is None:
        return log_student, log_teacher
    check_top_k("top_k", top_k, 1, log_teacher.shape[-1])
    if top_k == log_teacher.shape[-1]:  # the tail is empty
        return log_student, log_teacher
    # Of the logits as they come: XLA may compute a log-softmax twice, differently rounded, which moves the K-th place.
    ranked = jax.lax.stop_gradient(teacher_logits)
    top_values, top_tokens = blockwise_top_k(ranked, top_k)
    # Equal logits are common in bfloat16: of those that tie at the K-th place, top_k takes the lower indices.
    # (The K-th place by min: a slice of top_k's results keeps XLA from its fast top-k, and it sorts all of V.)
    lowest = jnp.min(top_values, axis=-1, keepdims=True)
    last = jnp.max(jnp.where(top_values == lowest, top_tokens, -1), axis=-1, keepdims=True)
    in_top = (ranked > lowest) | ((ranked == lowest) & (jnp.arange(ranked.shape[-1]) <= last))
    return coarsen(log_student, top_tokens, in_top), coarsen(log_teacher, top_tokens, in_top)


_DEVICES = 16


def blockwise_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """jax.lax.top_k: values and indices `[..., k]`, by far fewer comparisons, so that a split vocabulary stays split.

    Each of 16 parts gives its k largest elements, and the k largest of those are taken: a part of the vocabulary lies
    on one device where the number of devices divides 16. Of equal elements the first come first, as in top_k.
    """
    V = x.shape[-1]
    if V % _DEVICES or k >= V // _DEVICES:
        return _top_k_of_blocks(x, k)
    values, indices = _top_k_of_blocks(x.reshape(*x.shape[:-1], _DEVICES, V // _DEVICES), k)
    indices += jnp.arange(0, V, V // _DEVICES)[:, None]
    values, indices = (a.reshape(*x.shape[:-1], _DEVICES * k) for a in (values, indices))
    top_values, positions = jax.lax.top_k(values, k)
    return top_values, jnp.take_along_axis(indices, positions, axis=-1)


def _top_k_of_blocks(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """jax.lax.top_k; except on TPUs, where sorting is faster than gathering, of the k blocks with the largest maxima.

    All k largest elements are there: where a block is left out, k blocks have a maximum that is as large and, if equal,
    comes first. On GPUs XLA would sort all of V.
    """
    V = x.shape[-1]
    sizes = [size for size in range(2, V // k) if V % size == 0]
    if not sizes:
        return _top_k(x, k)
    size = min(sizes, key=lambda size: abs(V // size - k * size))  # as many maxima as elements of chosen blocks

    def of_blocks(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = x.reshape(*x.shape[:-1], V // size, size)
        chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), k)[1], axis=-1)
        kept = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)
        top_values, positions = jax.lax.top_k(kept.reshape(*x.shape[:-1], k * size), k)
        return top_values, jnp.take_along_axis(chosen, positions // size, axis=-1) * size + positions % size

    values, indices = jax.lax.platform_dependent(x, tpu=functools.partial(_top_k, k=k), default=of_blocks)
    return values, indices


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    values, indices = jax.lax.top_k(x, k)
    return values, indices


def coarsen(log_p: jax.Array, top_tokens: jax.Array, in_top: jax.Array) -> jax.Array:
    """`[..., V]` -> `[..., K + 1]`: the log-probabilities of top_tokens, then that of all others together."""
    # A sum over the others; 1 - sum(top) would lose a small tail. If they are all excluded, the gradient of
    # logsumexp is NaN, so that it must not see them.
    others = jnp.where(in_top, -jnp.inf, log_p)
    empty = jnp.max(others, axis=-1, keepdims=True) == -jnp.inf
    tail = jax.nn.logsumexp(jnp.where(empty, 0.0, others), axis=-1, keepdims=True)
    tail = jnp.where(empty, -jnp.inf, tail)
    return jnp.concatenate([jnp.take_along_axis(log_p, top_tokens, axis=-1), tail], axis=-1)
