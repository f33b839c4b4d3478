"""One decoder-only transformer for every supported family, as a Flax NNX module.

Parameters of the layers are stacked on a leading L axis and run with `jax.lax.scan`, so that compile time does not
grow with depth. Every forward pass in this project is a pure function of params:

    graphdef, params = decoder.init(config, jax.random.key(0))
    hidden_BxTxD = nnx.merge(graphdef, params)(tokens_BxT, positions_BxT, valid_BxT)

`params` is a plain nested dict of arrays. Axis letters are those of the whole project: B batch, P prompt, T tokens, V
vocabulary, D width, L layers, N query heads, K key/value heads, H head size, F feed-forward; and S, cache slots.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh
from jax.typing import ArrayLike

from msd_jax.errors import UserError
from msd_jax.models import attention as attention_lib
from msd_jax.models import int8, rope
from msd_jax.models.config import DecoderConfig
from msd_jax.models.layers import Layers, ParamFactory, apply_rope, normalise
from msd_jax.models.lora import Lora
from msd_jax.parallel import sharding

Params = dict[str, Any]

REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class KVCache(NamedTuple):
    """Keys (after RoPE) and values: [L, B, K, S, H] of all layers, or [B, K, S, H] of one, in the compute dtype."""

    key: jax.Array
    value: jax.Array

    def write(self, new: "KVCache", slot: jax.Array | int) -> "KVCache":
        """The cache with `new` in the slots from `slot` on."""

        def update(cached: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), slot, axis=-2)

        return KVCache(update(self.key, new.key), update(self.value, new.value))


class LayerKind(NamedTuple):
    """What distinguishes a layer from the others besides its weights; of all layers, fields have a leading L axis.

    Attributes:
      rope: int32 scalar, which of the model's distinct Ropes.
      window: int32 scalar, how many tokens a query attends to, its own included.
    """

    rope: ArrayLike
    window: ArrayLike


# (query_BxTxNxH, keys and values of the same tokens, the layer's window) -> [B, T, N, H].
Attend = Callable[[jax.Array, KVCache, ArrayLike], jax.Array]


def layer_kinds(config: DecoderConfig) -> list[LayerKind]:
    """The kind of each layer, in NumPy's numbers."""
    ropes, windows = rope.distinct(config.ropes), (visible_tokens(window) for window in config.windows)
    return [LayerKind(np.int32(ropes.index(r)), np.int32(w)) for r, w in zip(config.ropes, windows)]


def visible_tokens(window: int | None) -> int:
    """How many tokens a query attends to, as a number also where it is all of them."""
    return np.iinfo(np.int32).max if window is None else window


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype, mesh: Mesh | None = None) -> KVCache:
    """An empty cache, split by rows and by key/value heads."""
    require_length(config, slots)
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    empty = sharding.constrain(jnp.zeros(shape, dtype), mesh, None, "batch", "kv_heads", None, None)
    return KVCache(empty, empty)


def require_length(config: DecoderConfig, tokens: int) -> None:
    """Raises UserError if sequences of this many tokens are longer than `config.longest`."""
    if config.longest is not None and tokens > config.longest:
        raise UserError(
            f"sequences of {tokens} tokens are not implemented for this model: beyond {config.longest} tokens its RoPE "
            "(longrope) has other frequencies; lower the limits of prompts and responses"
        )


class Decoder(nnx.Module):
    """Token ids -> final hidden states, and hidden states -> logits.

    Calling it runs whole sequences, as training and scoring do; `prefill` and `decode` generate with a cache.

    Args:
      config: sizes and family differences.
      dtype: of matrix products; residuals, softmax, norms and logits are float32 whatever it is.
      param_dtype: of newly made parameters.
      remat: what the backward pass keeps of each layer: a key of REMAT_POLICIES.
      attention: "auto", or a kernel of models/attention.py for whole sequences.
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
        self.config, self.dtype, self.remat = config, dtype, remat
        self.attention, self.mesh = attention, mesh
        make, width = ParamFactory(param_dtype, rngs), {"embed": config.width}
        vocab = {"vocab": config.vocab_size}
        self.embedding = make.normal(vocab | width, config.initializer_range)
        self.layers = Layers(config, dtype, lora, make)
        self.final_norm = make.constant({"norm": config.width}, 1.0 - config.norm_offset)
        self.head = None if config.tied_embeddings else make.normal(width | vocab, config.initializer_range)

    def __call__(self, tokens_BxT: jax.Array, positions_BxT: jax.Array, segment_BxT: jax.Array) -> jax.Array:
        """Final hidden states of whole sequences, for training and scoring.

        Args:
          tokens_BxT: int32 token ids; those at padding may be anything.
          positions_BxT: int32, of each token in its sequence.
          segment_BxT: the sequence that a token is of, see attention.self_attention; bool, true at real tokens, where
            a row has but one.

        Returns:
          hidden_BxTxD, normalised, ready for `logits`, at least float32.
        """
        if segment_BxT.dtype == bool:  # a row of several sequences may be longer than any of them
            require_length(self.config, tokens_BxT.shape[1])
        attend, rotations = self._self_attention(segment_BxT, positions_BxT), self._rotations(positions_BxT)

        def layer(x_BxTxD: jax.Array, inputs: tuple[nnx.State, LayerKind]) -> tuple[jax.Array, None]:
            x_BxTxD, _ = self.block(x_BxTxD, *inputs, rotations, attend)
            return x_BxTxD, None

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x_BxTxD = self._look_up(tokens_BxT)
        # First as the table is split, then by rows: left to itself, XLA may hold all rows everywhere.
        x_BxTxD = self._scale(sharding.constrain(x_BxTxD, self.mesh, "replica", None, "embed"))
        x_BxTxD, _ = jax.lax.scan(layer, x_BxTxD, self._stacked_layers())
        return self._normalise(x_BxTxD)

    def prefill(
        self, tokens_BxP: jax.Array, positions_BxP: jax.Array, valid_BxP: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """`__call__` of prompts, whose keys and values fill the first P slots of `cache`: (hidden_BxPxD, cache)."""
        attend, rotations = self._self_attention(valid_BxP, positions_BxP), self._rotations(positions_BxP)

        def layer(x_BxPxD: jax.Array, inputs: tuple[nnx.State, LayerKind]) -> tuple[jax.Array, KVCache]:
            return self.block(x_BxPxD, *inputs, rotations, attend, share=True)

        x_BxPxD = self._scale(self._look_up(self.share(tokens_BxP)))
        x_BxPxD, new = jax.lax.scan(layer, x_BxPxD, self._stacked_layers())
        return self._normalise(x_BxPxD), cache.write(new, 0)

    def decode(
        self, tokens_BxT: jax.Array, positions_BxT: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Final hidden states of tokens that follow those in the cache.

        Args:
          tokens_BxT: int32 token ids; T is 1 where tokens are generated one by one.
          positions_BxT: int32, counting real tokens only; they tell how many slots, back from its own, a token sees.
          cache: from `prefill` or `decode`.
          slot: int32 scalar, of the first token; the others take the slots after it.

        Returns:
          (hidden_BxTxD, the cache with the tokens' keys and values).
        """
        rotations = self._rotations(positions_BxT)

        def layer(x_BxTxD: jax.Array, inputs: tuple[nnx.State, LayerKind, KVCache]) -> tuple[jax.Array, KVCache]:
            params, kind, cached = inputs
            attend = self._cached_attention(cached, positions_BxT, slot)
            return self.block(x_BxTxD, params, kind, rotations, attend, share=True)

        x_BxTxD = self._scale(self._look_up(self.share(tokens_BxT)))
        x_BxTxD, new = jax.lax.scan(layer, x_BxTxD, (*self._stacked_layers(), cache))
        # Written once for all layers: a cache carried through the scan is copied by each.
        return self._normalise(x_BxTxD), cache.write(new, slot)

    def unstack(self, stacked: Any) -> list[Any]:
        """Arrays with a leading L axis, as of a cache -> those of each layer, for `decode_unstacked`."""
        return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(self.config.layers)]

    def unstacked_weights(self) -> list[nnx.State]:
        """The weights of each layer in arrays of their own, for `decode_unstacked`."""
        return self.unstack(nnx.state(self.layers))

    def decode_unstacked(
        self,
        layers: list[nnx.State],
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        cache: list[KVCache],
        slot: jax.Array,
    ) -> tuple[jax.Array, list[KVCache]]:
        """`decode` as a loop over layers, whose weights and caches are `unstack`ed.

        On CPUs and GPUs XLA copies what a scan slices, which here is all weights and the whole cache for each token.
        """
        x_BxTxD = self._scale(self._look_up(self.share(tokens_BxT)))
        new, rotations = [], self._rotations(positions_BxT)
        for params, kind, cached in zip(layers, layer_kinds(self.config), cache):
            attend = self._cached_attention(cached, positions_BxT, slot)
            params = int8.held_until(x_BxTxD, params)
            x_BxTxD, new_of_layer = self.block(x_BxTxD, params, kind, rotations, attend, share=True)
            new.append(new_of_layer)
        return self._normalise(x_BxTxD), [cached.write(n, slot) for cached, n in zip(cache, new)]

    def block(
        self,
        x_BxTxD: jax.Array,
        params: nnx.State,
        kind: LayerKind,
        rotations: tuple[jax.Array, jax.Array],
        attend: Attend,
        share: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """One layer: attention, then feed-forward, each on a normalised input and added to the residual stream.

        With `config.parallel` both have the same input.

        Args:
          x_BxTxD: the residual stream.
          params, kind: the layer's.
          rotations: of all distinct Ropes, from `rope.rotations`.
          attend: attention, to these tokens alone or to a cache as well.
          share: whether the feed-forward's input is `share`d, as its weights are in generation.

        Returns:
          (x_BxTxD, the keys and values of the tokens).
        """
        layer = nnx.merge(nnx.graphdef(self.layers), params)
        cos, sin = (of_all_RxBxTxH[kind.rope] for of_all_RxBxTxH in rotations)
        inputs_BxTxD = layer.norm(x_BxTxD, layer.attention_norm)
        query, key, value = layer.qkv(inputs_BxTxD)
        query, key = (apply_rope(x, cos, sin, self.config.rope_interleaved) for x in (query, key))
        new = KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2))
        x_BxTxD += self._summed(layer.attention_output(attend(query, new, kind.window)))
        if not self.config.parallel:
            inputs_BxTxD = layer.norm(x_BxTxD, layer.ffw_norm)
        if share:
            inputs_BxTxD = self.share(inputs_BxTxD)
        x_BxTxD += self._summed(layer.feed_forward(inputs_BxTxD))
        return self.constrain(x_BxTxD), new

    @property
    def head_DxV(self) -> jax.Array:
        """The matrix from hidden states to logits, in the parameters' dtype; with tied embeddings, their transpose."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 [..., V], of hidden states [..., D]."""
        hidden = hidden.astype(self.dtype)
        logits = int8.product(hidden, int8.held_until(hidden, self.head_DxV), result=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def share(self, x: jax.Array) -> jax.Array:
        """Rows [B, ...] on all devices that share what parallel.sharding.rollout_mesh splits over `fsdp`."""
        if self.mesh is None or self.mesh.shape["fsdp"] == 1:
            return x
        return sharding.constrain(x, self.mesh, "replica", *[None] * (x.ndim - 1))

    def constrain(self, x_BxTxD: jax.Array) -> jax.Array:
        """The residual stream, split by rows alone: left to itself, XLA may split D as the weights are."""
        return sharding.constrain(x_BxTxD, self.mesh, "batch", None, None)

    def _summed(self, update_BxTxD: jax.Array) -> jax.Array:
        """What a sublayer adds to the residual stream, summed over `tensor` in the compute dtype.

        Left to itself, XLA widens the devices' summands first, and twice the bytes cross between them.
        """
        split = self.mesh is not None and sharding.parts(self.mesh, "ffw") > 1
        return jax.lax.optimization_barrier(update_BxTxD) if split else update_BxTxD

    @property
    def residual_dtype(self) -> jnp.dtype:
        """float32 under a bfloat16 compute dtype.

        With the residual stream in bfloat16 log-probabilities are twice as far off, and in self-distillation what tells
        student from teacher is small.
        """
        return jnp.promote_types(self.dtype, jnp.float32)

    def _look_up(self, tokens_BxT: jax.Array) -> jax.Array:
        return self.embedding[...][tokens_BxT].astype(self.residual_dtype)

    def _scale(self, x_BxTxD: jax.Array) -> jax.Array:
        """Embeddings -> the residual stream."""
        if self.config.embed_scale != 1.0:  # rounded to the compute dtype, as in Gemma's own code
            x_BxTxD *= jnp.asarray(self.config.embed_scale, self.dtype).astype(self.residual_dtype)
        return self.constrain(x_BxTxD)

    def _normalise(self, x_BxTxD: jax.Array) -> jax.Array:
        """The residual stream -> hidden states whose product with the head is the logits, but for the soft cap."""
        hidden_BxTxD = normalise(x_BxTxD, self.final_norm[...], self.config, self.residual_dtype)
        return hidden_BxTxD if self.config.logit_scale == 1.0 else hidden_BxTxD * self.config.logit_scale

    def _stacked_layers(self) -> tuple[nnx.State, LayerKind]:
        """(weights, kinds) of all layers, to be scanned over."""
        kinds = jax.tree.map(lambda *values: jnp.array(values), *layer_kinds(self.config))
        return nnx.state(self.layers), kinds

    def _rotations(self, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope.rotations(self.config.ropes, self.config.head_dim, positions_BxT)

    def _scores(self) -> attention_lib.Scores:
        return attention_lib.Scores(self.config.query_scale, self.config.attention_softcap)

    def _self_attention(self, segment_BxT: jax.Array, positions_BxT: jax.Array) -> Attend:
        windows = tuple(sorted({visible_tokens(window) for window in self.config.windows}))

        def attend(query: jax.Array, new: KVCache, window: ArrayLike) -> jax.Array:
            return attention_lib.self_attention(
                query,
                new.key,
                new.value,
                segment_BxT,
                positions_BxT,
                window,
                windows=windows,
                scores=self._scores(),
                mesh=self.mesh,
                kernel=self.attention,
            )

        return attend

    def _cached_attention(self, cached: KVCache, positions_BxT: jax.Array, slot: jax.Array) -> Attend:
        def attend(query: jax.Array, new: KVCache, window: ArrayLike) -> jax.Array:
            key, value = cached.write(new, slot)
            return attention_lib.cached_attention(query, key, value, positions_BxT, slot, window, self._scores())

        return attend


def init(config: DecoderConfig, key: jax.Array, **options: Any) -> tuple[nnx.GraphDef, Params]:
    """A new model as (graphdef, params); `options` are Decoder's."""
    graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(params=key), **options))
    return graphdef, nnx.to_pure_dict(state)


def abstract(config: DecoderConfig, **options: Any) -> tuple[nnx.GraphDef, Params, Params]:
    """(graphdef, params, axes) without allocating: params as ShapeDtypeStructs, axes as tuples of logical axes."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0), **options))
    graphdef, state = nnx.split(model)
    axes = jax.tree.map(lambda p: p.get_metadata()["axes"], state, is_leaf=lambda p: isinstance(p, nnx.Param))
    return graphdef, nnx.to_pure_dict(state), _pure(axes)


def name_of(path: tuple) -> str:
    """The dotted name of a parameter, from its path in the nested dict."""
    return ".".join(key.key for key in path)


def flat(params: Params) -> list[tuple[str, Any]]:
    """(dotted name, leaf) of each parameter."""
    return [(name_of(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]


def split(params: Params, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """(the parameters whose dotted name is `chosen`, the others), both as nested dicts; leaves may be anything."""
    named = traverse_util.flatten_dict(params, sep=".")
    parts = ({name: leaf for name, leaf in named.items() if chosen(name) == wanted} for wanted in (True, False))
    inside, outside = (traverse_util.unflatten_dict(part, sep=".") for part in parts)
    return inside, outside


def join(*parts: Params) -> Params:
    """The nested dict whose parts `split` returned."""
    named = [traverse_util.flatten_dict(part, sep=".") for part in parts]
    return traverse_util.unflatten_dict({name: leaf for part in named for name, leaf in part.items()}, sep=".")


def _pure(state: Any) -> Any:
    return {k: _pure(v) for k, v in state.items()} if hasattr(state, "items") else state
