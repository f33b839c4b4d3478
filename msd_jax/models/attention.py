"""Causal grouped-query attention, of whole sequences to themselves and of new tokens to a cache.

Whole sequences go through the kernel that suits the platform and the shapes:

- `cudnn`: NVIDIA's flash attention, on GPUs, for 16-bit inputs.
- `splash`: JAX's Pallas kernel for TPUs. It never holds [T, T] logits, and works block by block under shard_map.
- `blocks`: on CPUs, `xla` for one block of queries after the other, without the keys that come after it.
- `xla`: everything else: other platforms, soft-caps on GPUs, shapes that the kernels do not take.

A cache is always attended to by `xla`. All compute the same numbers, within the rounding of the inputs' dtype, wherever
a query may attend to anything. Axis letters beside the project's: S key/value slots, G = N / K query heads that share a
key/value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from msd_jax.parallel import sharding

CHOICES = ("auto", "xla")  # of config.model.attention
BEGINNINGS = 1 << 10  # a segment modulo this is what its sequence begins with, see `self_attention`
_LANES = 128  # of a TPU's vector registers: splash takes sequences of a multiple of it
_BLOCK = 128  # queries


class Scores(NamedTuple):
    """How logits come from queries and keys: scale * q k, then softcap * tanh(. / softcap) unless it is None."""

    scale: float
    softcap: float | None = None


def self_attention(
    query_BxTxNxH: jax.Array,
    key_BxKxTxH: jax.Array,
    value_BxKxTxH: jax.Array,
    segment_BxT: jax.Array,
    position_BxT: jax.Array,
    window: ArrayLike,
    *,
    windows: tuple[int, ...],
    scores: Scores,
    mesh: Mesh | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Causal attention of whole sequences to themselves, within a window.

    A row holds one sequence, or several that are packed one after the other. Where several begin alike, the row may
    hold that beginning once, before them.

    Args:
      query_BxTxNxH: float queries.
      key_BxKxTxH, value_BxKxTxH: float; query head n attends to key/value head n // (N / K).
      segment_BxT: int32 or bool; a token of segment s attends to those of its own segment, which are consecutive, and
        to those of segment s % BEGINNINGS, with which its sequence begins, if that is another one (not by splash, which
        only compares segments). Padding is a segment of its own, by convention 0 (false).
      position_BxT: int32, of each token in its sequence.
      window: int32 scalar, one of `windows`: how many tokens a query sees, its own included.
      windows: static; the windows of all layers, so that a kernel can be made for each.
      scores: static.
      mesh: static; the devices that rows and heads are split over. None: one device.
      kernel: static; "auto" chooses by platform and shapes, see `choose`.

    Returns:
      [B, T, N, H] in the dtype of the values; finite numbers without meaning at padding.
    """
    if kernel == "auto":
        kernel = choose(query_BxTxNxH, scores, mesh)
    if kernel == "splash":
        return _splash(query_BxTxNxH, key_BxKxTxH, value_BxKxTxH, segment_BxT, window, windows, scores, mesh)
    mask_BxTxT = _causal_mask(segment_BxT.astype(jnp.int32), position_BxT, window)
    if kernel == "cudnn":
        return _cudnn(query_BxTxNxH, key_BxKxTxH, value_BxKxTxH, mask_BxTxT, scores)
    if kernel == "blocks":
        return _blocks(query_BxTxNxH, key_BxKxTxH, value_BxKxTxH, mask_BxTxT, scores)
    return _xla(query_BxTxNxH, key_BxKxTxH, value_BxKxTxH, mask_BxTxT, scores)


def cached_attention(
    query_BxTxNxH: jax.Array,
    key_BxKxSxH: jax.Array,
    value_BxKxSxH: jax.Array,
    position_BxT: jax.Array,
    slot: jax.Array,
    window: ArrayLike,
    scores: Scores,
) -> jax.Array:
    """Causal attention of the tokens in T consecutive slots, from `slot` on, to a cache of S slots.

    The slots are a ring: slot 0 follows slot S - 1. A row's tokens are in consecutive slots, so that a query attends to
    as many slots, back from its own, as its row has tokens by then; what else is in the row's slots is never seen.

    Args:
      query_BxTxNxH: float queries.
      key_BxKxSxH, value_BxKxSxH: float, the cache; those of the T tokens are already written.
      position_BxT: int32, how many tokens of its row are before each token.
      slot: int32 scalar.
      window, scores: as in `self_attention`.

    Returns:
      [B, T, N, H], as `self_attention`.
    """
    T, S = query_BxTxNxH.shape[1], key_BxKxSxH.shape[2]
    distance_TxS = (slot + jnp.arange(T)[:, None] - jnp.arange(S)) % S
    seen_BxTx1 = jnp.minimum(position_BxT, window - 1)[..., None]
    return _xla(query_BxTxNxH, key_BxKxSxH, value_BxKxSxH, distance_TxS <= seen_BxTx1, scores)


def choose(query_BxTxNxH: jax.Array, scores: Scores, mesh: Mesh | None) -> str:
    """The kernel of whole sequences for these shapes on the mesh's platform."""
    _, T, _, H = query_BxTxNxH.shape
    platform = sharding.platform(mesh)
    if platform == "tpu" and T % _LANES == 0:
        return "splash"
    sixteen_bit = query_BxTxNxH.dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and sixteen_bit and scores.softcap is None and T % 2 == 0 and H % 8 == 0:
        return "cudnn" if H <= 128 else "xla"  # 256 from Hopper on, and a mesh does not say which GPU it has
    return "blocks" if platform == "cpu" and T > _BLOCK else "xla"


def shares_beginnings(mesh: Mesh | None) -> bool:
    """Whether sequences of a row may share a beginning on the mesh's platform; splash, on TPUs, cannot."""
    return sharding.platform(mesh) != "tpu"


def _causal_mask(segment_BxT: jax.Array, position_BxT: jax.Array, window: ArrayLike) -> jax.Array:
    """bool [B, T, T]: whether the first token may attend to the second."""
    begins_BxT, other_Bx1xT = segment_BxT % BEGINNINGS, segment_BxT[:, None]
    same_BxTxT = (segment_BxT[:, :, None] == other_Bx1xT) | (begins_BxT[:, :, None] == other_Bx1xT)
    distance_BxTxT = position_BxT[:, :, None] - position_BxT[:, None]
    return same_BxTxT & (distance_BxTxT >= 0) & (distance_BxTxT < window)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scores: Scores) -> jax.Array:
    if scores.softcap is not None:
        raise ValueError(f"cudnn attention has no soft-cap, got {scores.softcap}")
    key_BxSxKxH, value_BxSxKxH = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        query, key_BxSxKxH, value_BxSxKxH, mask=mask[:, None], scale=scores.scale, implementation="cudnn"
    )


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scores: Scores) -> jax.Array:
    """Two matrix products for each row and key/value head, over all queries of all heads that share it."""
    (B, T, N, H), K = query.shape, key.shape[1]
    query_BxKxGTxH = jnp.moveaxis(query.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    logits = jnp.einsum("bkxh,bksh->bkxs", query_BxKxGTxH, key, preferred_element_type=jnp.float32) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * jnp.tanh(logits / scores.softcap)
    logits_BxKxGxTxS = logits.reshape(B, K, N // K, T, -1)
    logits_BxKxGxTxS = jnp.where(mask[:, None, None], logits_BxKxGxTxS, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits_BxKxGxTxS, axis=-1).astype(value.dtype).reshape(logits.shape)
    out_BxKxGxTxH = jnp.einsum("bkxs,bksh->bkxh", weights, value).reshape(B, K, N // K, T, H)
    return jnp.moveaxis(out_BxKxGxTxH, 3, 1).reshape(B, T, N, H)


def _blocks(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scores: Scores) -> jax.Array:
    """`_xla` where no query but padding's may attend to a later key."""
    T = query.shape[1]
    spans = [(first, min(first + _BLOCK, T)) for first in range(0, T, _BLOCK)]
    out = [
        _xla(query[:, first:last], key[:, :, :last], value[:, :, :last], mask[:, first:last, :last], scores)
        for first, last in spans
    ]
    return jnp.concatenate(out, axis=1)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment: jax.Array,
    window: ArrayLike,
    windows: tuple[int, ...],
    scores: Scores,
    mesh: Mesh | None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention on each device's rows and heads."""
    on_device = functools.partial(_splash_on_device, windows=windows, scores=scores, interpret=interpret)
    if mesh is None:
        return on_device(query, key, value, segment, window)
    # With fewer key/value heads than devices, each device takes the one that its queries attend to.
    copies = max(1, sharding.parts(mesh, "heads") // key.shape[1])
    key, value = (jnp.repeat(x, copies, axis=1) for x in (key, value))
    rows, heads = (sharding.rules_of(mesh)[axis] for axis in ("batch", "heads"))
    queries, keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(queries, keys, keys, PartitionSpec(rows), PartitionSpec()),
        out_specs=queries,
        check_vma=False,  # pallas_call does not say over which axes its results vary
    )(query, key, value, segment, window)


def _splash_on_device(
    query_BxTxNxH: jax.Array,
    key_BxKxTxH: jax.Array,
    value_BxKxTxH: jax.Array,
    segment_BxT: jax.Array,
    window: ArrayLike,
    *,
    windows: tuple[int, ...],
    scores: Scores,
    interpret: bool,
) -> jax.Array:
    """The kernel of `window`, out of one for each of `windows`."""
    (B, T, N, H), K = query_BxTxNxH.shape, key_BxKxTxH.shape[1]
    scaled = (query_BxTxNxH.astype(jnp.float32) * scores.scale).astype(query_BxTxNxH.dtype)
    query_BxKxGxTxH = jnp.moveaxis(scaled.reshape(B, T, K, N // K, H), 1, 3)
    segments = splash_kernel.SegmentIds(segment_BxT.astype(jnp.int32), segment_BxT.astype(jnp.int32))
    block = next(size for size in (512, 256, _LANES) if T % size == 0)
    blocks = splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def within(size: int, *operands: jax.Array) -> jax.Array:
        mask = splash_mask.LocalMask((T, T), (size - 1, 0), 0) if size < T else splash_mask.CausalMask((T, T))
        kernel = splash_kernel.make_splash_mqa_single_device(
            splash_mask.MultiHeadMask([mask] * (N // K)),
            block_sizes=blocks,
            attn_logits_soft_cap=scores.softcap,
            interpret=interpret,
        )
        return jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(*operands)

    sizes = sorted({min(size, T) for size in windows})
    out_BxKxGxTxH = jax.lax.switch(
        jnp.searchsorted(jnp.array(sizes), jnp.minimum(window, T)),
        [functools.partial(within, size) for size in sizes],
        *(query_BxKxGxTxH, key_BxKxTxH, value_BxKxTxH, segments),
    )
    return jnp.moveaxis(out_BxKxGxTxH, 3, 1).reshape(B, T, N, H)
