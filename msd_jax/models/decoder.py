"""One decoder-only transformer for every supported family, as a Flax NNX module.

Parameters of the layers are stacked on a leading L axis and run with `jax.lax.scan`, so that compile time does not
grow with depth. Every forward pass in this project is a pure function of params:

    graphdef, params = decoder.init(config, jax.random.key(0))
    hidden_BxTxD, _ = nnx.merge(graphdef, params)(tokens_BxT, positions_BxT, valid_BxT)

`params` is a plain nested dict of arrays. Axis letters are those of the whole project: B batch, T tokens, S cache
slots, V vocabulary, D width, L layers, N query heads, K key/value heads, H head size, F feed-forward.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh

from msd_jax.models import lora as lora_lib
from msd_jax.models.attention import Scores, attention
from msd_jax.models.config import DecoderConfig
from msd_jax.models.lora import Lora
from msd_jax.parallel import sharding

Params = dict[str, Any]

REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of every layer: two arrays [L, B, K, S, H] in the compute dtype."""

    key_LxBxKxSxH: jax.Array
    value_LxBxKxSxH: jax.Array


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype, mesh: Mesh | None = None) -> KVCache:
    """An empty cache, split by rows and by key/value heads."""
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    empty = sharding.constrain(jnp.zeros(shape, dtype), mesh, None, "batch", "kv_heads", None, None)
    return KVCache(empty, empty)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float, dtype: jnp.dtype) -> jax.Array:
    """RMSNorm over the last axis, in float32, returned in `dtype`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * (offset + weight.astype(jnp.float32))).astype(dtype)


def apply_rope(x_BxTxNxH: jax.Array, cos_BxTxH: jax.Array, sin_BxTxH: jax.Array) -> jax.Array:
    """Rotates the two halves of each head (the layout of Hugging Face checkpoints)."""
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BxTxH[:, :, None], sin_BxTxH[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


class Layers(nnx.Module):
    """All L layers, each parameter stacked on a leading L axis; `axes` are the logical axes that sharding maps."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, param: Any, lora: Lora | None):
        c = config
        self.config, self.dtype, self.lora = c, dtype, lora
        L, D, N, K, H, F = c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffw

        def matrix(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
            setattr(self, name, param((L, *inputs, *outputs), ("layers", *axes)))
            if lora and name in lora.targets:
                in_axes, out_axes = axes[: len(inputs)], axes[len(inputs) :]
                a = param((L, *inputs, lora.rank), ("layers", *in_axes, None), bound=lora_lib.bound(inputs))
                b = param((L, lora.rank, *outputs), ("layers", None, *out_axes), fill=0.0)
                setattr(self, name + lora_lib.A, a)
                setattr(self, name + lora_lib.B, b)

        self.attention_norm = param((L, D), ("layers", None), fill=1.0 - c.norm_offset)
        matrix("query", (D,), (N, H), ("embed", "heads", None))
        matrix("key", (D,), (K, H), ("embed", "kv_heads", None))
        matrix("value", (D,), (K, H), ("embed", "kv_heads", None))
        matrix("output", (N, H), (D,), ("heads", None, "embed"))
        self.ffw_norm = param((L, D), ("layers", None), fill=1.0 - c.norm_offset)
        matrix("gate", (D,), (F,), ("embed", "ffw"))
        matrix("up", (D,), (F,), ("embed", "ffw"))
        matrix("down", (F,), (D,), ("ffw", "embed"))
        if c.qkv_bias:
            self.query_bias = param((L, N, H), ("layers", "heads", None), fill=0.0)
            self.key_bias = param((L, K, H), ("layers", "kv_heads", None), fill=0.0)
            self.value_bias = param((L, K, H), ("layers", "kv_heads", None), fill=0.0)
        if c.qk_norm:
            self.query_norm = param((L, H), ("layers", None), fill=1.0 - c.norm_offset)
            self.key_norm = param((L, H), ("layers", None), fill=1.0 - c.norm_offset)
        if c.sandwich_norms:
            self.post_attention_norm = param((L, D), ("layers", None), fill=1.0 - c.norm_offset)
            self.post_ffw_norm = param((L, D), ("layers", None), fill=1.0 - c.norm_offset)

    def norm(self, x: jax.Array, weight: nnx.Param) -> jax.Array:
        return rms_norm(x, weight[...], self.config.norm_eps, self.config.norm_offset, self.dtype)

    def project(self, x: jax.Array, name: str) -> jax.Array:
        """x through one layer's matrix `name` and its adapter: the matrix's input axes are the last ones of x."""

        def times(x: jax.Array, weight: str, inputs: int) -> jax.Array:
            return jnp.tensordot(x, getattr(self, weight)[...].astype(self.dtype), inputs)

        y = times(x, name, lora_lib.INPUTS[name])
        if self.lora and name in self.lora.targets:
            y += times(times(x, name + lora_lib.A, lora_lib.INPUTS[name]), name + lora_lib.B, 1) * self.lora.scale
        return y

    def qkv(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [B, T, N, H], key and value [B, T, K, H] of one layer (no L axis on its parameters)."""
        query, key, value = (self.project(x_BxTxD, name) for name in ("query", "key", "value"))
        if self.config.qkv_bias:
            query += self.query_bias[...].astype(self.dtype)
            key += self.key_bias[...].astype(self.dtype)
            value += self.value_bias[...].astype(self.dtype)
        if self.config.qk_norm:
            query, key = self.norm(query, self.query_norm), self.norm(key, self.key_norm)
        return query, key, value

    def feed_forward(self, x_BxTxD: jax.Array) -> jax.Array:
        activation = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
        gate_BxTxF = activation[self.config.activation](self.project(x_BxTxD, "gate"))
        return self.project(gate_BxTxF * self.project(x_BxTxD, "up"), "down")

    def residual(self, x: jax.Array, update: jax.Array, post_norm: str) -> jax.Array:
        return x + (self.norm(update, getattr(self, post_norm)) if self.config.sandwich_norms else update)


class Decoder(nnx.Module):
    """Token ids -> final hidden states, and hidden states -> logits.

    Args:
      config: sizes and family differences.
      dtype: of matrix products; residuals, softmax, norms and logits are float32 whatever it is.
      param_dtype: of newly made parameters.
      remat: what the backward pass keeps of each layer: a key of REMAT_POLICIES.
      attention: "auto", or a kernel of models/attention.py.
      mesh: the devices that activations are split over; None: one device, or as XLA finds best.
      lora: adapters beside the matrices of the layers, or None.
      rngs: for new parameters.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        remat: str = "full",
        attention: str = "auto",
        mesh: Mesh | None = None,
        lora: Lora | None = None,
        rngs: nnx.Rngs,
    ):
        def param(shape, axes, *, fill=None, bound=None):
            """A parameter that is `fill`, uniform within `bound`, or normal with the config's standard deviation."""
            if fill is not None:
                value = jnp.full(shape, fill, param_dtype)
            elif bound is not None:
                value = jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)
            else:
                value = config.initializer_range * jax.random.normal(rngs.params(), shape, param_dtype)
            return nnx.Param(value, axes=axes)

        self.config, self.dtype, self.remat = config, dtype, remat
        self.attention, self.mesh = attention, mesh
        self.embedding = param((config.vocab_size, config.width), ("vocab", "embed"))
        self.layers = Layers(config, dtype, param, lora)
        self.final_norm = param((config.width,), (None,), fill=1.0 - config.norm_offset)
        if not config.tied_embeddings:
            self.head = param((config.width, config.vocab_size), ("embed", "vocab"))

    def __call__(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        valid_BxS: jax.Array,
        cache: KVCache | list[KVCache] | None = None,
        slot: jax.Array | int = 0,
        layers: list[nnx.State] | None = None,
    ) -> tuple[jax.Array, KVCache | list[KVCache] | None]:
        """Final hidden states (normalised, ready for `logits`).

        Args:
          tokens_BxT: int32 token ids; those at padding are ignored whatever they are.
          positions_BxT: int32, counting real tokens only.
          valid_BxS: bool, which key slots hold a real token. Without a cache S = T.
          cache: keys and values of earlier slots, or None to attend among the tokens given.
          slot: with a cache, the slot of the first token given; tokens lie in consecutive slots.
          layers: with a cache, both of them as `apart` gives them, to be run one by one; None: with `jax.lax.scan`.

        Returns:
          hidden_BxTxD, at least float32, and the cache with the tokens' keys and values written, or None.
        """
        c = self.config
        T = tokens_BxT.shape[1]
        alone = cache is None or (isinstance(slot, int) and slot == 0)  # nothing to see but the tokens given
        # The residual stream is float32 under a bfloat16 compute dtype: with it in bfloat16 log-probabilities are twice
        # as far off, and in self-distillation what tells student from teacher is small.
        residual = jnp.promote_types(self.dtype, jnp.float32)
        x_BxTxD = self.embedding[...][tokens_BxT].astype(residual)
        if cache is None:  # first as the table is split, then by rows: left to itself, XLA may hold all rows everywhere
            x_BxTxD = sharding.constrain(x_BxTxD, self.mesh, "replica", None, "embed")
        if c.embed_scale != 1.0:  # rounded to the compute dtype, as in Gemma's own code
            x_BxTxD *= jnp.asarray(c.embed_scale, self.dtype).astype(residual)
        x_BxTxD = self.constrain(x_BxTxD)

        graphdef, stacked = nnx.split(self.layers)
        frequencies, factors = zip(*(rope.frequencies(c.head_dim) for rope in c.ropes))
        windows = [window or np.iinfo(np.int32).max for window in c.windows]
        per_layer = (stacked, cache, jnp.array(frequencies), jnp.array(factors), jnp.array(windows, jnp.int32))
        attend = functools.partial(
            attention,
            valid_BxS=valid_BxS[:, :T] if alone else valid_BxS,
            slot=slot,
            windows=tuple(sorted(set(windows))),
            scores=Scores(c.query_scale, c.attention_softcap),
            mesh=self.mesh,
            kind=self.attention,
        )

        def layer(x_BxTxD, inputs):
            params, cached, frequency, factor, window = inputs
            block = nnx.merge(graphdef, params)
            angle = positions_BxT[..., None].astype(jnp.float32) * frequency
            cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
            query, key, value = block.qkv(block.norm(x_BxTxD, block.attention_norm))
            query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
            key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
            new = None
            if cached is not None:
                new = KVCache(key.astype(cached[0].dtype), value.astype(cached[1].dtype))
            if not alone:
                key, value = (jax.lax.dynamic_update_slice_in_dim(*pair, slot, axis=2) for pair in zip(cached, new))
            update = block.project(attend(query, key, value, window=window), "output")
            x_BxTxD = block.residual(x_BxTxD, update, "post_attention_norm")
            update = block.feed_forward(block.norm(x_BxTxD, block.ffw_norm))
            return self.constrain(block.residual(x_BxTxD, update, "post_ffw_norm")), new

        if cache is None and self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        if layers is None:
            x_BxTxD, new_LxBxKxTxH = jax.lax.scan(layer, x_BxTxD, per_layer)
        else:
            new_LxBxKxTxH = []
            for inputs in zip(layers, cache, frequencies, factors, windows):
                x_BxTxD, new = layer(x_BxTxD, inputs)
                new_LxBxKxTxH.append(new)
        if cache is not None:  # written once for all layers: a cache carried through the scan is copied by each
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=-2)
            cache = jax.tree.map(write, cache, new_LxBxKxTxH)
        return rms_norm(x_BxTxD, self.final_norm[...], c.norm_eps, c.norm_offset, residual), cache

    def apart(self, cache: KVCache) -> tuple[list[nnx.State], list[KVCache]]:
        """(weights, cache) of each layer in arrays of its own, for `__call__`.

        Of what a scan slices, XLA makes copies on CPU: all weights and the whole cache, for each token decoded.
        """
        layers = [operator.itemgetter(i) for i in range(self.config.layers)]
        return tuple([jax.tree.map(layer, tree) for layer in layers] for tree in (nnx.split(self.layers)[1], cache))

    @property
    def head_DxV(self) -> jax.Array:
        """The matrix from hidden states to logits, in the parameters' dtype; of tied embeddings, their transpose."""
        return self.embedding[...].T if self.config.tied_embeddings else self.head[...]

    def constrain(self, x_BxTxD: jax.Array) -> jax.Array:
        """The residual stream, split by rows alone: left to itself, XLA may split D as the weights are."""
        return sharding.constrain(x_BxTxD, self.mesh, "batch", None, None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 [..., V], of hidden states [..., D]."""
        operands = hidden.astype(self.dtype), self.head_DxV.astype(self.dtype)
        logits = jnp.matmul(*operands, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def init(config: DecoderConfig, key: jax.Array, **options) -> tuple[nnx.GraphDef, Params]:
    """A new model as (graphdef, params); `options` are Decoder's."""
    graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(params=key), **options))
    return graphdef, nnx.to_pure_dict(state)


def abstract(config: DecoderConfig, **options) -> tuple[nnx.GraphDef, Params, Params]:
    """(graphdef, params, axes) without allocating: params as ShapeDtypeStructs, axes as tuples of logical axes."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0), **options))
    graphdef, state = nnx.split(model)
    axes = jax.tree.map(lambda p: p.get_metadata()["axes"], state, is_leaf=lambda p: isinstance(p, nnx.Param))
    return graphdef, nnx.to_pure_dict(state), _pure(axes)


def split(params: Params, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """(the parameters whose dotted name is `chosen`, the others), both as nested dicts; leaves may be anything."""
    flat = traverse_util.flatten_dict(params, sep=".")
    parts = ({name: leaf for name, leaf in flat.items() if chosen(name) == wanted} for wanted in (True, False))
    return tuple(traverse_util.unflatten_dict(part, sep=".") for part in parts)


def join(*parts: Params) -> Params:
    """The nested dict that `split` took apart."""
    flat = [traverse_util.flatten_dict(part, sep=".") for part in parts]
    return traverse_util.unflatten_dict({name: leaf for part in flat for name, leaf in part.items()}, sep=".")


def _pure(state: Any) -> Any:
    return {k: _pure(v) for k, v in state.items()} if hasattr(state, "items") else state
