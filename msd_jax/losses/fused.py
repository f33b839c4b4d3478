"""The weighted self-distillation loss from hidden states and heads, without the logits of all tokens at once.

`fused_dpsw_loss` is `losses.dpsw_loss` on `hidden @ head`: it runs that very function on a few hundred tokens at a
time, and pulls its gradient through the product right there, so that the backward pass has nothing left to compute.
The logits of 128 x 512 tokens over a vocabulary of 152,064 take 40 GB for each role; those of a chunk of 512 take 0.3.

The gradient leaves the loss in float32 and meets 16-bit weights as the sum of two 16-bit numbers; rounded to one of
them, each of its elements would be off by a part in 500.

That the head's gradient can be had in the forward pass is the idea of Liger Kernel's fused linear cross-entropy (Hsu et
al., [Liger Kernel](https://arxiv.org/abs/2410.10989), 2024).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msd_jax.losses.checks import check_mask, check_response
from msd_jax.losses.dpsw import weighted_loss
from msd_jax.losses.naming import formerly
from msd_jax.losses.settings import LossSettings

Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]  # loss_sum, normaliser, aux
Gradients = tuple[jax.Array | None, jax.Array | None]  # of the student's hidden states and head; None: not wanted
# The teacher's hidden states and head (None where the loss reads no teacher), response, mask, and beta where that is an
# array.
Data = tuple[jax.Array | None, jax.Array | None, jax.Array | None, jax.Array, jax.Array | None]
Axes = str | tuple[str, ...] | None  # mesh axes that split one axis of an array

TOKEN_AXES = ("data", "fsdp")  # mesh axes that split the tokens
HEAD_AXES = ("fsdp", "tensor")  # those that split a head's rows and its vocabulary


@formerly(
    student_hidden="student_hidden_NxD",
    student_head="student_head_DxV",
    teacher_hidden="teacher_hidden_NxD",
    teacher_head="teacher_head_DxV",
    response="response_N",
    mask="mask_N",
)
def fused_dpsw_loss(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head: jax.Array | None,
    response: jax.Array | None,
    mask: jax.Array,
    *,
    chunk: int = 512,
    dtype: jnp.dtype | None = None,
    logit_softcap: float | None = None,
    tied: bool = False,
    mesh: Mesh | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Equals ``losses.dpsw_loss(student_hidden @ student_head, teacher_hidden @ teacher_head, ...)``.

    Gradients flow to the student's hidden states and head alone, through loss_sum alone. They are computed in the
    forward pass, and only those that are asked for: a frozen head costs no gradient.

    Args:
      student_hidden: float `[N, D]`; row t gives the distribution that response token t was drawn from.
      student_head: float `[D, V]`.
      teacher_hidden: float `[N, D']`, held constant. None, as the head, as in `losses.dpsw_loss`.
      teacher_head: float `[D', V]`, held constant.
      response: int `[N]`, the response tokens; None as in `losses.dpsw_loss`.
      mask: bool or 0/1 `[N]`, true at response tokens; what is elsewhere reaches neither results nor gradients.
      chunk: static; tokens whose logits are held at a time, on each device.
      dtype: static; operands of the matrix products are cast to it (sums are float32), inside, so that gradients come
        back in the precision of the arguments. None leaves them.
      logit_softcap: static; logits become c * tanh(logits / c), as in Gemma 2. None: none.
      tied: static; the heads are transposed embedding tables. Products are then taken with the tables as they lie, and
        the gradient is summed as one: XLA's CPU backend would hold a transposed copy of each.
      mesh: static; a mesh with the axes `data`, `fsdp` and `tensor`. Tokens are split over the first two, rows of the
        heads over `fsdp` (gathered once, in `dtype`; their gradient is scattered once, in float32), and the vocabulary
        over `tensor`. None: one device, or whatever XLA makes of the arguments' sharding.
      **options: divergence, beta, top_k, token_cap, weighting, weight_top_k, entropy_scale, student_token, normalize
        and temperature of `losses.dpsw_loss`; static, but for an array beta.

    Returns:
      (loss_sum, normaliser, aux), as `losses.dpsw_loss`, summed over all N tokens of all devices.

    Raises:
      ValueError: for shapes that do not fit, N that does not divide over the mesh, and as `losses.dpsw_loss`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from msd_jax import losses
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> hidden, head, other_hidden, other_head = (jax.random.normal(key, (8, 8)) for key in keys)
      >>> arguments = (None, jnp.ones(8, bool))
      >>> fused, _, _ = losses.fused_dpsw_loss(
      ...     hidden, head, other_hidden, other_head, *arguments, chunk=4, weight_top_k=2)
      >>> dense, _, _ = losses.dpsw_loss(hidden @ head, other_hidden @ other_head, *arguments, weight_top_k=2)
      >>> print(f"{jnp.abs(fused / dense - 1) < 1e-5}")
      True

    References:
      Qin et al., [Multilingual Safety Alignment via Self-Distillation](https://arxiv.org/abs/2605.02971), 2026
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, response, mask, mesh)
    beta = options.get("beta")
    layout = _Layout(LossSettings(**options), chunk, dtype, logit_softcap, tied, mesh)
    data: Data = (
        *(teacher_hidden, teacher_head, response, mask),
        beta if isinstance(beta, jax.Array) else None,
    )

    @jax.custom_vjp
    def fused(hidden: jax.Array, head: jax.Array, data: Data) -> Sums:
        return _losses_and_gradients(hidden, head, *data, layout, wanted=(False, False))[0]

    def forward(hidden: Any, head: Any, data: Any) -> tuple[Sums, Gradients]:  # each array as a CustomVJPPrimal
        values: Data = jax.tree.map(lambda x: x.value, data, is_leaf=lambda x: hasattr(x, "perturbed"))
        wanted = (hidden.perturbed, head.perturbed)
        return _losses_and_gradients(hidden.value, head.value, *values, layout, wanted)

    def backward(gradients: Gradients, cotangents: Any) -> tuple[jax.Array | None, jax.Array | None, None]:
        scale = cotangents[0]  # of loss_sum; normaliser and aux carry no gradient
        if isinstance(scale, SymbolicZero):
            return None, None, None
        d_hidden, d_head = (None if g is None else (scale * g).astype(g.dtype) for g in gradients)
        return d_hidden, d_head, None

    fused.defvjp(forward, backward, symbolic_zeros=True)
    sums: Sums = fused(student_hidden, student_head, data)
    return sums


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The static arguments of `fused_dpsw_loss`."""

    loss: LossSettings
    chunk: int
    dtype: jnp.dtype | None
    softcap: float | None
    tied: bool
    mesh: Mesh | None

    def cast(self, x: jax.Array) -> jax.Array:
        return x if self.dtype is None else x.astype(self.dtype)

    def capped(self, logits: jax.Array) -> jax.Array:
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def _losses_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head: jax.Array | None,
    response: jax.Array | None,
    mask: jax.Array,
    beta: jax.Array | None,
    layout: _Layout,
    wanted: tuple[bool, bool],
) -> tuple[Sums, Gradients]:
    """((loss_sum, normaliser, aux), (gradient of hidden or None, of head or None)) on all devices of the mesh."""
    local = functools.partial(_local, layout=layout, wanted=wanted)
    dtypes, mesh = (hidden.dtype, head.dtype), layout.mesh

    def as_stored(head: jax.Array) -> jax.Array:  # its own inverse
        return head.T if layout.tied else head

    def axes_as_stored(rows: Axes, columns: Axes) -> tuple[Axes, Axes]:
        return (columns, rows) if layout.tied else (rows, columns)

    def returned(d_hidden: jax.Array | None, d_head: jax.Array | None) -> Gradients:
        d_head = None if d_head is None else as_stored(d_head)
        d_hidden, d_head = (None if g is None else g.astype(d) for g, d in zip((d_hidden, d_head), dtypes))
        return d_hidden, d_head

    hidden, teacher_hidden = jax.tree.map(layout.cast, (hidden, teacher_hidden))
    head, teacher_head = jax.tree.map(lambda w: as_stored(layout.cast(w)), (head, teacher_head))
    if mesh is None:
        sums, gradients = local(hidden, head, teacher_hidden, teacher_head, response, mask, beta)
        return sums, returned(*gradients)

    def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
        constrained: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))
        return constrained

    def on_one_device(*operands: Any) -> tuple[Sums, Gradients]:
        sums, (d_hidden, d_head) = local(*operands)
        return jax.lax.psum(sums, TOKEN_AXES), (d_hidden, None if d_head is None else d_head[None])

    # Heads are gathered here, not inside: there XLA would gather their vocabulary as well. For the same reason the
    # devices' gradients of the head come out side by side, and are added under their final sharding.
    gathered = axes_as_stored(None, HEAD_AXES[1])
    head, teacher_head = jax.tree.map(lambda w: constrain(w, *gathered), (head, teacher_head))
    tokens, whole = PartitionSpec(TOKEN_AXES), PartitionSpec()
    sums, (d_hidden, d_head) = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(tokens, whole, tokens, whole, tokens, tokens, whole),
        out_specs=(whole, (tokens, tokens)),
        axis_names=set(TOKEN_AXES),  # the vocabulary's split over `tensor` is left to XLA
        check_vma=False,
    )(hidden, head, teacher_hidden, teacher_head, response, mask, beta)
    if d_head is not None:
        d_head = constrain(jnp.sum(constrain(d_head, TOKEN_AXES, *gathered), axis=0), *axes_as_stored(*HEAD_AXES))
    return sums, returned(d_hidden, d_head)


def _local(
    hidden_NxD: jax.Array,
    head: jax.Array,
    teacher_hidden_NxD: jax.Array | None,
    teacher_head: jax.Array | None,
    response_N: jax.Array | None,
    mask_N: jax.Array,
    beta: jax.Array | None,
    *,
    layout: _Layout,
    wanted: tuple[bool, bool],
) -> tuple[Sums, Gradients]:
    """The sums, and float32 gradients of loss_sum where `wanted`, over the tokens given, one chunk at a time.

    Chunks after the last token of `mask` are left out. The heads, and the gradient of one, are [V, D] if they are tied,
    and [D, V] otherwise.
    """
    settings = layout.loss if beta is None else dataclasses.replace(layout.loss, beta=beta)
    N, count = len(mask_N), -(-len(mask_N) // layout.chunk)
    size = -(-N // count)

    def split(x: jax.Array) -> jax.Array:  # the last chunk is filled up with tokens that are masked out
        return jnp.pad(x, [(0, count * size - N)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])

    hidden, teacher_hidden, response, mask = jax.tree.map(split, (hidden_NxD, teacher_hidden_NxD, response_N, mask_N))
    chunks = _Chunks(hidden, teacher_hidden, response, mask, head, teacher_head, layout, settings)

    def add(i: jax.Array, carry: tuple[Sums, jax.Array | None, jax.Array | None]) -> Any:
        total, d_hidden, d_head = carry
        sums, gradient = chunks.sums_and_gradient(i, any(wanted))
        if d_hidden is not None:
            d_hidden = d_hidden.at[i].set(_matmul(gradient, chunks.heads()[0].T))
        if d_head is not None:
            hidden = chunks.hidden_of(i)
            d_head += _outer(gradient, hidden) if layout.tied else _outer(hidden, gradient)
        return jax.tree.map(jnp.add, total, sums), d_hidden, d_head

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    like = jax.eval_shape(lambda: chunks.sums_and_gradient(0, False)[0])
    start = jax.tree.map(zeros, (like, chunks.hidden if wanted[0] else None, head if wanted[1] else None))
    used = jnp.max(jnp.where(jnp.any(chunks.mask, axis=1), jnp.arange(count) + 1, 0))
    if layout.mesh is not None:  # all devices take part in the products of a chunk
        used = jax.lax.pmax(used, TOKEN_AXES)
    sums, d_hidden, d_head = jax.lax.fori_loop(0, used, add, start)
    return sums, (None if d_hidden is None else d_hidden.reshape(count * size, -1)[:N], d_head)


class _Chunks(NamedTuple):
    """The tokens of one device with a leading axis of chunks, and what turns a chunk into its sums."""

    hidden: jax.Array
    teacher_hidden: jax.Array | None
    response: jax.Array | None
    mask: jax.Array
    head: jax.Array
    teacher_head: jax.Array | None
    layout: _Layout
    settings: LossSettings

    def hidden_of(self, i: jax.Array | int) -> jax.Array:
        """The student's hidden states; what is masked out may be NaN, and 0 * NaN is not 0."""
        return jnp.where(self.mask[i][:, None], self.hidden[i], 0)

    def heads(self) -> Any:
        """Both as [D, V]; called within the loop, where a product takes its operands either way."""
        return jax.tree.map(lambda w: w.T if self.layout.tied else w, (self.head, self.teacher_head))

    def sums_and_gradient(self, i: jax.Array | int, wanted: bool) -> tuple[Sums, Any]:
        """The sums over chunk i and, where `wanted`, the gradient of the student's logits."""
        student_head, teacher_head = self.heads()
        teacher_logits = None
        if self.teacher_hidden is not None:
            teacher_logits = self.layout.capped(_matmul(self.teacher_hidden[i], teacher_head))

        def loss(product: jax.Array) -> tuple[jax.Array, Sums]:
            response = None if self.response is None else self.response[i]
            logits = self.layout.capped(product)
            sums = weighted_loss(logits, teacher_logits, response, self.mask[i], self.settings)
            return sums[0], sums

        product = _matmul(self.hidden_of(i), student_head)
        if not wanted:
            return loss(product)[1], None
        _, pullback, sums = jax.vjp(loss, product, has_aux=True)
        return sums, pullback(jnp.ones((), jnp.float32))[0]


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in float32. If only a is float32, it is split into two parts that add up to it.

    Both parts are rows of one product, which reads b once.
    """
    if a.dtype == b.dtype or a.dtype != jnp.float32:
        return _product(a, b)
    high, low = jnp.split(_product(jnp.concatenate(_parts(a, b.dtype)), b), 2)
    return high + low


def _outer(a_NxI: jax.Array, b_NxJ: jax.Array) -> jax.Array:
    """a.T @ b in float32, a sum over tokens. If only one is float32, it is split as in `_matmul`.

    Both parts are tokens of one product, whose result, as large as a head, is written once.
    """
    if a_NxI.dtype == b_NxJ.dtype:
        return _product(a_NxI.T, b_NxJ)
    narrow = min(a_NxI.dtype, b_NxJ.dtype, key=lambda dtype: dtype.itemsize)
    a_2NxI, b_2NxJ = (jnp.concatenate(_parts(x, narrow) if x.dtype != narrow else (x, x)) for x in (a_NxI, b_NxJ))
    return _product(a_2NxI.T, b_2NxJ)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _parts(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Two arrays of `dtype` that add up to x, almost."""
    # reduce_precision, not a cast: XLA may take float32 -> bfloat16 -> float32 for nothing at all.
    high = jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return high.astype(dtype), (x - high).astype(dtype)


def _check(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head: jax.Array | None,
    response: jax.Array | None,
    mask: jax.Array,
    mesh: Mesh | None,
) -> None:
    N, V = len(hidden), head.shape[-1]
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head must both be arrays, or both None")
    teacher = () if teacher_hidden is None else (("teacher", teacher_hidden, teacher_head),)
    for name, h, w in (("student", hidden, head), *teacher):
        if h.ndim != 2 or w.ndim != 2 or len(h) != N or w.shape != (h.shape[1], V):
            raise ValueError(
                f"{name}_hidden and {name}_head must have shapes [N, D] and [D, V], with the student's N={N} and "
                f"V={V}, got {h.shape} and {w.shape}"
            )
    for name, x in (("response", response), ("mask", mask)):
        if x is not None and x.shape != (N,):
            raise ValueError(f"{name} must have the shape [N] = ({N},), got {x.shape}")
    check_mask(mask, (N,))
    if response is not None:
        check_response("response", response, mask, V)
    if mesh is not None:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if N % shards:
            raise ValueError(f"N={N} tokens do not divide over {shards} devices (data x fsdp)")
