"""Grouped-query attention: one function, and the kernel behind it chosen by platform and shapes.

- `cudnn`: NVIDIA's flash attention, on GPUs, for 16-bit inputs.
- `splash`: JAX's Pallas kernel for TPUs, where a whole sequence attends to itself. It never holds [T, T] logits, and
  works block by block under shard_map.
- `xla`: everything else: other platforms, decoding, soft-caps on GPUs, shapes that the kernels do not take.

All compute the same numbers, within the rounding of the inputs' dtype, wherever a query may attend to anything.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec

from msd_jax.parallel import sharding

CHOICES = ("auto", "xla")  # of config.model.attention
_LANES = 128  # of a TPU's vector registers: splash takes sequences of a multiple of it


class Scores(NamedTuple):
    """How logits come from queries and keys: scale * q k, then softcap * tanh(. / softcap) unless it is None."""

    scale: float
    softcap: float | None = None


def attention(
    query_BxTxNxH: jax.Array,
    key_BxKxSxH: jax.Array,
    value_BxKxSxH: jax.Array,
    valid_BxS: jax.Array,
    slot: jax.Array | int,
    window: jax.Array,
    windows: tuple[int, ...],
    scores: Scores,
    mesh: Mesh | None = None,
    kind: str = "auto",
) -> jax.Array:
    """Causal attention within a window -> [B, T, N, H]; where a query sees nothing, finite, meaningless numbers.

    Args:
      query_BxTxNxH: queries of consecutive slots from `slot` on.
      key_BxKxSxH, value_BxKxSxH: of slots 0 to S - 1; head n attends to key/value head n // (N / K).
      valid_BxS: bool; slots that hold a real token. Real tokens are consecutive.
      slot: of the first query.
      window: int32 scalar, one of `windows`: how many slots a query sees, its own included.
      windows: static; all windows that the model's layers have, so that a kernel can be made for each.
      scores: static.
      mesh: that batch and heads are split over; its platform decides in `choose`. None: one device.
      kind: "auto", or the kernel to use.
    """
    if kind == "auto":
        kind = choose(query_BxTxNxH, key_BxKxSxH, slot, scores, mesh)
    if kind == "splash":
        return _splash(query_BxTxNxH, key_BxKxSxH, value_BxKxSxH, valid_BxS, window, windows, scores, mesh)
    T, S = query_BxTxNxH.shape[1], key_BxKxSxH.shape[2]
    distance_TxS = slot + jnp.arange(T)[:, None] - jnp.arange(S)
    mask_BxTxS = valid_BxS[:, None, :] & (distance_TxS >= 0) & (distance_TxS < window)
    if kind == "cudnn" and scores.softcap is None:  # it has none
        key_BxSxKxH, value_BxSxKxH = key_BxKxSxH.swapaxes(1, 2), value_BxKxSxH.swapaxes(1, 2)
        options = {"mask": mask_BxTxS[:, None], "scale": scores.scale, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(query_BxTxNxH, key_BxSxKxH, value_BxSxKxH, **options)
    return _products(query_BxTxNxH, key_BxKxSxH, value_BxKxSxH, mask_BxTxS, scores)


def platform(mesh: Mesh | None) -> str:
    """Of the mesh's devices; without a mesh, of the default one."""
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def choose(query: jax.Array, key: jax.Array, slot: jax.Array | int, scores: Scores, mesh: Mesh | None) -> str:
    """The kernel for these shapes on the mesh's platform."""
    (_, T, _, H), S = query.shape, key.shape[2]
    if platform(mesh) == "tpu" and isinstance(slot, int) and T == S and T % _LANES == 0:
        return "splash"
    sixteen_bit = query.dtype in (jnp.bfloat16, jnp.float16)
    if platform(mesh) == "gpu" and sixteen_bit and scores.softcap is None and T == S and T % 2 == 0 and H % 8 == 0:
        return "cudnn" if H <= 128 else "xla"  # 256 from Hopper on, which a mesh does not tell
    return "xla"


def _products(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scores: Scores) -> jax.Array:
    """Two products of matrices: for each row and key/value head, of all its queries in all their heads."""
    (B, T, N, H), K = query.shape, key.shape[1]
    grouped_BxKxGTxH = jnp.moveaxis(query.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    logits = jnp.einsum("bkxh,bksh->bkxs", grouped_BxKxGTxH, key, preferred_element_type=jnp.float32) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * jnp.tanh(logits / scores.softcap)
    logits_BxKxGxTxS = logits.reshape(B, K, N // K, T, -1)
    logits_BxKxGxTxS = jnp.where(mask[:, None, None], logits_BxKxGxTxS, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits_BxKxGxTxS, axis=-1).astype(value.dtype).reshape(logits.shape)
    out_BxKxGxTxH = jnp.einsum("bkxs,bksh->bkxh", weights, value).reshape(B, K, N // K, T, H)
    return jnp.moveaxis(out_BxKxGxTxH, 3, 1).reshape(B, T, N, H)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array,
    window: jax.Array,
    windows: tuple[int, ...],
    scores: Scores,
    mesh: Mesh | None,
    interpret: bool = False,
) -> jax.Array:
    T = query.shape[1]
    block = next(size for size in (512, 256, _LANES) if T % size == 0)
    blocks = splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def local(query_BxTxNxH, key_BxKxTxH, value_BxKxTxH, valid_BxT, window):
        """The heads and rows of one device."""
        B, T, N, H = query_BxTxNxH.shape
        K = key_BxKxTxH.shape[1]
        scaled = (query_BxTxNxH.astype(jnp.float32) * scores.scale).astype(query_BxTxNxH.dtype)
        query_BxKxGxTxH = jnp.moveaxis(scaled.reshape(B, T, K, N // K, H), 1, 3)
        # Padding is a segment of its own, so that no query is left without a key.
        segments = splash_kernel.SegmentIds(valid_BxT.astype(jnp.int32), valid_BxT.astype(jnp.int32))

        def within(size: int, *operands):
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

    if mesh is None:
        return local(query, key, value, valid, window)
    # Of fewer key/value heads than devices, each device takes the one that its queries look at.
    copies = max(1, mesh.shape["tensor"] // key.shape[1])
    key, value = (jnp.repeat(x, copies, axis=1) for x in (key, value))
    rows, heads = sharding.TRAIN["batch"], sharding.TRAIN["heads"]
    queries, keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(queries, keys, keys, PartitionSpec(rows), PartitionSpec()),
        out_specs=queries,
        check_vma=False,  # pallas_call does not say over which axes its results vary
    )(query, key, value, valid, window)
