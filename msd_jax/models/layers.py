"""What one layer of the decoder is made of: its parameters, norms, projections, RoPE and feed-forward.

How they make a layer is `Decoder.block`; axis letters are those of models/decoder.py.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from msd_jax.models import int8
from msd_jax.models import lora as lora_lib
from msd_jax.models.config import DecoderConfig
from msd_jax.models.lora import Lora

Axes = dict[str, int]  # the size of each logical axis, in order; parallel/sharding.py maps them to mesh axes

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def normalise(
    x: jax.Array, weight: jax.Array, config: DecoderConfig, dtype: jnp.dtype, axes: tuple[int, ...] = (-1,)
) -> jax.Array:
    """RMSNorm, or LayerNorm without a bias, over the last axis or the last `axes`, in float32, returned in `dtype`."""
    x32 = x.astype(jnp.float32)
    if config.layer_norm:
        x32 -= jnp.mean(x32, axis=axes, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + config.norm_eps)
    return (x32 * (config.norm_offset + weight.astype(jnp.float32))).astype(dtype)


def apply_rope(x_BxTxNxH: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates pairs of each head's first numbers by angles [B, T, H/2], or fewer; the rest stays as it is.

    A pair is a number of the first half and one of the second (as most Hugging Face checkpoints have it), or two
    neighbours if `interleaved`.
    """
    if 2 * cos.shape[-1] < x_BxTxNxH.shape[-1]:
        rotated, rest = jnp.split(x_BxTxNxH, [2 * cos.shape[-1]], axis=-1)
        return jnp.concatenate([apply_rope(rotated, cos, sin, interleaved), rest], axis=-1)
    x = x_BxTxNxH.astype(jnp.float32)
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    pair = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.stack(pair, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


def xielu(x: jax.Array, positive_alpha: jax.Array, negative_alpha: jax.Array) -> jax.Array:
    """xIELU (Huang and Schlag, 2024, arXiv 2411.13010) with beta = 1/2, in float32, returned in the dtype of x.

    The alphas are those of a checkpoint, before softplus.
    """
    dtype = x.dtype
    x, positive, negative = (value.astype(jnp.float32) for value in (x, positive_alpha, negative_alpha))
    below = (jnp.expm1(jnp.minimum(x, 0.0)) - x) * (0.5 + jax.nn.softplus(negative))
    return (jnp.where(x > 0, jax.nn.softplus(positive) * x * x, below) + 0.5 * x).astype(dtype)


class ParamFactory:
    """Makes parameters; each random one takes the next key of `rngs`, so that their order decides their values."""

    def __init__(self, dtype: jnp.dtype, rngs: nnx.Rngs):
        self._dtype, self._rngs = dtype, rngs

    def constant(self, axes: Axes, value: float) -> nnx.Param:
        return self._param(axes, jnp.full(tuple(axes.values()), value, self._dtype))

    def normal(self, axes: Axes, stddev: float) -> nnx.Param:
        return self._param(axes, stddev * jax.random.normal(self._rngs.params(), tuple(axes.values()), self._dtype))

    def uniform(self, axes: Axes, bound: float) -> nnx.Param:
        shape = tuple(axes.values())
        return self._param(axes, jax.random.uniform(self._rngs.params(), shape, self._dtype, -bound, bound))

    def _param(self, axes: Axes, value: jax.Array) -> nnx.Param:
        return nnx.Param(value, axes=tuple(axes))


class Layers(nnx.Module):
    """The parameters of all layers, each stacked on a leading L axis, and what one layer computes with its own.

    Beside a matrix stand the two of its adapter, see models/lora.py. What a model does not have is None.
    """

    gate: nnx.Param | None
    gate_lora_a: nnx.Param | None
    gate_lora_b: nnx.Param | None

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, lora: Lora | None, make: ParamFactory):
        c = config
        self.config, self.dtype, self.lora_scale = c, dtype, lora.scale if lora else 0.0
        layers, width, head, ffw = {"layers": c.layers}, {"embed": c.width}, {"head": c.head_dim}, {"ffw": c.ffw}
        heads, kv_heads, features = {"heads": c.heads} | head, {"kv_heads": c.kv_heads} | head, {"norm": c.width}

        def matrix(name: str, inputs: Axes, outputs: Axes) -> tuple[nnx.Param, nnx.Param | None, nnx.Param | None]:
            weight = make.normal(layers | inputs | outputs, c.initializer_range)
            if lora is None or name not in lora.targets:
                return weight, None, None
            rank = {"rank": lora.rank}
            lora_a = make.uniform(layers | inputs | rank, lora_lib.init_bound(inputs.values()))
            return weight, lora_a, make.constant(layers | rank | outputs, 0.0)

        def norm(axis: Axes) -> nnx.Param:
            return make.constant(layers | axis, 1.0 - c.norm_offset)

        self.attention_norm = norm(features) if c.pre_norms else None
        self.query, self.query_lora_a, self.query_lora_b = matrix("query", width, heads)
        self.key, self.key_lora_a, self.key_lora_b = matrix("key", width, kv_heads)
        self.value, self.value_lora_a, self.value_lora_b = matrix("value", width, kv_heads)
        self.output, self.output_lora_a, self.output_lora_b = matrix("output", heads, width)
        self.ffw_norm = norm(features) if c.pre_norms and not c.parallel else None
        gated = c.activation != "xielu"
        self.gate, self.gate_lora_a, self.gate_lora_b = matrix("gate", width, ffw) if gated else (None, None, None)
        self.up, self.up_lora_a, self.up_lora_b = matrix("up", width, ffw)
        self.down, self.down_lora_a, self.down_lora_b = matrix("down", ffw, width)
        self.query_bias = make.constant(layers | heads, 0.0) if c.qkv_bias else None
        self.key_bias = make.constant(layers | kv_heads, 0.0) if c.qkv_bias else None
        self.value_bias = make.constant(layers | kv_heads, 0.0) if c.qkv_bias else None
        self.query_norm = norm(head if c.qk_norm == "head" else heads) if c.qk_norm else None
        self.key_norm = norm(head if c.qk_norm == "head" else kv_heads) if c.qk_norm else None
        self.post_attention_norm = norm(features) if c.post_norms else None
        self.post_ffw_norm = norm(features) if c.post_norms else None
        one = {"norm": 1}
        self.positive_alpha = None if gated else make.constant(layers | one, math.log(math.expm1(0.8)))
        self.negative_alpha = None if gated else make.constant(layers | one, math.log(math.expm1(0.3)))

    def norm(self, x: jax.Array, weight: nnx.Param | None, axes: tuple[int, ...] = (-1,)) -> jax.Array:
        """The norm with `weight`, over the last `axes`; x itself where the model has no such norm."""
        if weight is None:
            return x.astype(self.dtype)
        return normalise(x, weight[...], self.config, self.dtype, axes)

    def project(
        self, x: jax.Array, weight: nnx.Param, lora_a: nnx.Param | None, lora_b: nnx.Param | None, inputs: int = 1
    ) -> jax.Array:
        """x times a matrix with its adapter, if it has one; the last `inputs` axes of x are the matrix's first."""
        y = int8.product(x, weight[...], inputs)
        if lora_a is not None and lora_b is not None:
            y += int8.product(int8.product(x, lora_a[...], inputs), lora_b[...]) * self.lora_scale
        return y

    def add_bias(self, x: jax.Array, bias: nnx.Param | None) -> jax.Array:
        return x if bias is None else x + bias[...].astype(self.dtype)

    def qkv(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [B, T, N, H], key and value [B, T, K, H], before RoPE."""
        query = self.project(x_BxTxD, self.query, self.query_lora_a, self.query_lora_b)
        key = self.project(x_BxTxD, self.key, self.key_lora_a, self.key_lora_b)
        value = self.project(x_BxTxD, self.value, self.value_lora_a, self.value_lora_b)
        query, key = self.add_bias(query, self.query_bias), self.add_bias(key, self.key_bias)
        axes = (-2, -1) if self.config.qk_norm == "all heads" else (-1,)
        query, key = self.norm(query, self.query_norm, axes), self.norm(key, self.key_norm, axes)
        return query, key, self.add_bias(value, self.value_bias)

    def attention_output(self, heads_BxTxNxH: jax.Array) -> jax.Array:
        update_BxTxD = self.project(heads_BxTxNxH, self.output, self.output_lora_a, self.output_lora_b, inputs=2)
        return self.scale(self.norm(update_BxTxD, self.post_attention_norm))

    def feed_forward(self, x_BxTxD: jax.Array) -> jax.Array:
        """SwiGLU or GeGLU; or, without a gate, xIELU."""
        if self.gate is None:
            assert self.positive_alpha is not None and self.negative_alpha is not None
            positive, negative = (x[...].astype(self.dtype) for x in (self.positive_alpha, self.negative_alpha))
            inner_BxTxF = xielu(self.project(x_BxTxD, self.up, self.up_lora_a, self.up_lora_b), positive, negative)
        else:
            gate_BxTxF = self.project(x_BxTxD, self.gate, self.gate_lora_a, self.gate_lora_b)
            gate_BxTxF = ACTIVATIONS[self.config.activation](gate_BxTxF)
            inner_BxTxF = gate_BxTxF * self.project(x_BxTxD, self.up, self.up_lora_a, self.up_lora_b)
        update_BxTxD = self.project(inner_BxTxF, self.down, self.down_lora_a, self.down_lora_b)
        return self.scale(self.norm(update_BxTxD, self.post_ffw_norm))

    def scale(self, update_BxTxD: jax.Array) -> jax.Array:
        """What a sublayer computed -> what it adds to the residual stream."""
        factor = self.config.residual_scale
        return update_BxTxD if factor == 1.0 else update_BxTxD * factor
