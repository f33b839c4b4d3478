"""Generation: prefill, then decoding with a KV cache, in one jitted program per shape.

Every sampling parameter is an argument; of a model's generation_config only the stop tokens are used.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from msd_jax.models import decoder, forward, int8, pretrained
from msd_jax.parallel import compiler_options, padding, sharding

# Where each token takes the layers' weights from arrays of their own: in a scan, XLA copies there what it slices.
UNSTACKED = ("cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      max_new_tokens: R, the most response tokens, the stop token among them.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: keep the k most probable tokens, 0 keeps all.
      top_p: keep the smallest set of most probable tokens that has at least this probability.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Rollout(NamedTuple):
    """Responses of a batch.

    Attributes:
      response_BxR: int32 ids, right-padded; the first stop token is part of the response.
      length_B: int32 number of response tokens.
      stopped_B: bool, whether a stop token was reached.
    """

    response_BxR: jax.Array
    length_B: jax.Array
    stopped_B: jax.Array

    def row(self, row: int) -> tuple[list[int], bool]:
        """(token ids, whether a stop token was reached) of one row of a rollout on the host."""
        return self.response_BxR[row, : self.length_B[row]].tolist(), bool(self.stopped_B[row])


def argmax(x_BxV: jax.Array) -> jax.Array:
    """int32 jnp.argmax(x_BxV, axis=-1) of numbers without NaN, in a form that XLA vectorises on CPU."""
    V = x_BxV.shape[-1]
    highest_BxV = x_BxV == jnp.max(x_BxV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(highest_BxV, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def sample(logits_BxV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token for each row, int32 [B]; each row has its own key."""
    if sampling.temperature == 0:
        return argmax(logits_BxV)
    kept_BxV = jax.nn.log_softmax(logits_BxV / sampling.temperature)
    if 0 < sampling.top_k < kept_BxV.shape[-1]:
        # min, not [-1]: a slice of top_k's values keeps XLA's fast top-k from being used on CPU.
        lowest_Bx1 = jnp.min(jax.lax.top_k(kept_BxV, sampling.top_k)[0], axis=-1, keepdims=True)
        kept_BxV = jnp.where(kept_BxV >= lowest_Bx1, kept_BxV, -jnp.inf)
    if sampling.top_p < 1:
        kept_BxV = jax.nn.log_softmax(kept_BxV)
        sorted_BxV = -jnp.sort(-kept_BxV, axis=-1)
        before_BxV = jnp.cumsum(jnp.exp(sorted_BxV), axis=-1) - jnp.exp(sorted_BxV)
        last_B = jnp.sum(before_BxV < sampling.top_p, axis=-1) - 1
        lowest_Bx1 = jnp.take_along_axis(sorted_BxV, jnp.maximum(last_B, 0)[:, None], axis=-1)
        kept_BxV = jnp.where(kept_BxV >= lowest_Bx1, kept_BxV, -jnp.inf)
    noise_BxV = jax.vmap(lambda key: jax.random.gumbel(key, kept_BxV.shape[1:], kept_BxV.dtype))(key_B)
    return argmax(noise_BxV + kept_BxV)  # as jax.random.categorical draws


def row_keys(key: jax.Array, query_hash_B: jax.Array) -> jax.Array:
    """A key for each row that depends on `key` and the query alone, not on the row's place in the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, query_hash_B)


class Rows(NamedTuple):
    """What the rows of a batch hold between two tokens.

    Attributes:
      slot: int32, where in the cache the next token is written, for all rows; after the last slot comes the first.
      token_B: int32, the last token of each row, whose keys and values are not in the cache yet.
      position_B: int32, how many tokens of its row are before it.
      done_B: bool, rows that get no more tokens.
      key_B: one key for each row; its token t is drawn with fold_in(key, t).
      cache: holds all tokens before token_B; that of all layers, or a list of each layer's.
      written: the responses so far.
    """

    slot: jax.Array | int
    token_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    key_B: jax.Array
    cache: Any
    written: Rollout


# (tokens_Bx1, positions_Bx1, cache, slot) -> (hidden_Bx1xD, cache).
RunDecoder = Callable[[jax.Array, jax.Array, Any, jax.Array | int], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Writer:
    """How tokens are drawn, and what ends a response; see `generate`."""

    sampling: Sampling
    stop_ids: tuple[int, ...]
    pad_id: int

    def empty(self, rows: int) -> Rollout:
        """No tokens yet."""
        response_BxR = jnp.full((rows, self.sampling.max_new_tokens), self.pad_id, jnp.int32)
        return Rollout(response_BxR, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))

    def emit(self, model: decoder.Decoder, hidden_Bx1xD: jax.Array, rows: Rows) -> Rows:
        """The rows with the next token of those that are not done, which `hidden_Bx1xD` predicts."""
        (response_BxR, length_B, stopped_B), R = rows.written, self.sampling.max_new_tokens
        keys = jax.vmap(jax.random.fold_in)(rows.key_B, length_B)
        token_B = sample(model.logits(model.share(hidden_Bx1xD))[:, 0], keys, self.sampling)
        token_B = jnp.where(rows.done_B, self.pad_id, token_B)
        now_stopped_B = ~rows.done_B & jnp.isin(token_B, jnp.array(self.stop_ids, jnp.int32))
        here_BxR = (jnp.arange(R) == length_B[:, None]) & ~rows.done_B[:, None]
        response_BxR = jnp.where(here_BxR, token_B[:, None], response_BxR)
        length_B += ~rows.done_B
        return rows._replace(
            token_B=token_B,
            position_B=rows.position_B + ~rows.done_B,
            done_B=rows.done_B | now_stopped_B | (length_B >= R),
            written=Rollout(response_BxR, length_B, stopped_B | now_stopped_B),
        )

    def decode(self, model: decoder.Decoder, run_decoder: RunDecoder, rows: Rows, enough: jax.Array | int) -> Rows:
        """Token after token, until `enough` rows are done."""

        def one(rows: Rows) -> Rows:
            token_Bx1, position_Bx1 = rows.token_B[:, None], rows.position_B[:, None]
            hidden_Bx1xD, cache = run_decoder(token_Bx1, position_Bx1, rows.cache, rows.slot)
            slots = jax.tree.leaves(cache)[0].shape[-2]
            return self.emit(model, hidden_Bx1xD, rows._replace(cache=cache, slot=(rows.slot + 1) % slots))

        return jax.lax.while_loop(lambda rows: jnp.sum(rows.done_B) < enough, one, rows)


def generate(
    graphdef: nnx.GraphDef,
    params: decoder.Params,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    key_B: jax.Array,
    active_B: jax.Array,
    *,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """Responses to left-padded prompts; ends early once every row has stopped.

    Args:
      graphdef, params: of a models.decoder.Decoder.
      prompt_BxP: int32 ids, left-padded.
      prompt_length_B: int32, at least 1.
      key_B: one key for each row; token t is drawn with fold_in(key, t).
      active_B: bool; rows that are not active get no tokens (length 0).
      sampling, stop_ids, pad_id: static.
    """
    model, writer = nnx.merge(graphdef, params), Writer(sampling, stop_ids, pad_id)
    B, P = prompt_BxP.shape
    cache: Any = decoder.init_cache(model.config, B, P + sampling.max_new_tokens, model.dtype, model.mesh)
    hidden_BxPxD, cache = model.prefill(prompt_BxP, *forward.prompt_layout(prompt_length_B, P), cache)
    run_decoder: RunDecoder = model.decode
    if sharding.platform(model.mesh) in UNSTACKED:
        cache = model.unstack(cache)
        run_decoder = functools.partial(model.decode_unstacked, model.unstacked_weights())
    rows = Rows(jnp.int32(P), prompt_BxP[:, -1], prompt_length_B - 1, ~active_B, key_B, cache, writer.empty(B))
    return writer.decode(model, run_decoder, writer.emit(model, hidden_BxPxD[:, -1:], rows), enough=B).written


class Generator:
    """`generate`, jitted and sharded for one model and one way of sampling.

    Attributes:
      compilations: how often it was compiled: once for each shape of the prompts.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh, sampling: Sampling, stop_ids: tuple[int, ...], pad_id: int):
        self.mesh, self.sampling, self.stop_ids, self.pad_id = mesh, sampling, stop_ids, pad_id
        self.compilations = 0

        def rollout(
            params: decoder.Params,
            prompt_BxP: jax.Array,
            prompt_length_B: jax.Array,
            query_hash_B: jax.Array,
            active_B: jax.Array,
            key_data: jax.Array,
        ) -> Rollout:
            self.compilations += 1  # only while tracing
            key_B = row_keys(jax.random.wrap_key_data(key_data), query_hash_B)
            prompts = prompt_BxP, prompt_length_B, key_B, active_B
            return generate(graphdef, params, *prompts, sampling=sampling, stop_ids=stop_ids, pad_id=pad_id)

        options = compiler_options.rollout_options(mesh)
        self._run = jax.jit(rollout, out_shardings=sharding.batch_sharding(mesh), compiler_options=options)

    def __call__(
        self,
        params: decoder.Params,
        prompt_BxP: np.ndarray,
        prompt_length_B: np.ndarray,
        query_hash_B: np.ndarray,
        active_B: np.ndarray,
        key: jax.Array,
    ) -> Rollout:
        """`generate` from host arrays; `key` and a query's hash alone decide its response, whatever the batch."""
        arrays = sharding.put_batch(self.mesh, (prompt_BxP, prompt_length_B, query_hash_B, active_B))
        key_data = jax.device_get(jax.random.key_data(key))
        return self._run(params, *arrays, sharding.put_replicated(self.mesh, key_data))

    def decoded(self, written: Rollout) -> int:
        """How often the weights were read for `written`, on the host: once for each token of the longest response."""
        return int(written.length_B.max())

    def write(
        self,
        params: decoder.Params,
        prompts_ids: Sequence[np.ndarray],
        rows: int,
        limit: int,
        query_hash: Sequence[int] | None = None,
        key: jax.Array | None = None,
    ) -> Rollout:
        """Responses to at most `rows` prompts, as NumPy arrays of `rows` rows; those beyond the prompts are empty.

        Args:
          params: in the rollout layout.
          prompts_ids: int32 [P] each, of any lengths up to `limit`; padded here.
          rows: B, divisible by the devices that share it; always the same, so that few programs are compiled.
          limit: the largest P.
          query_hash, key: as in `__call__`; needed only where tokens are sampled.
        """
        count = len(prompts_ids)
        filled = [*prompts_ids, *[prompts_ids[0]] * (rows - count)]
        prompt_BxP, length_B = padding.left_pad(filled, limit, self.pad_id)
        hash_B = np.zeros(rows, np.uint32)
        hash_B[:count] = 0 if query_hash is None else query_hash
        active_B = np.arange(rows) < count
        key = jax.random.key(0) if key is None else key
        return sharding.fetch(self(params, prompt_BxP, length_B, hash_B, active_B, key))

    def trace(self, params: decoder.Params, B: int, P: int) -> jax.stages.Traced:
        """The program for B prompts of P tokens and abstract params, to be compiled for devices elsewhere."""
        rows = sharding.batch_sharding(self.mesh)
        shapes = ((B, P), jnp.int32), ((B,), jnp.int32), ((B,), jnp.uint32), ((B,), jnp.bool_)
        arrays = (jax.ShapeDtypeStruct(*shape, sharding=rows) for shape in shapes)
        key_data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        return self._run.trace(params, *arrays, key_data.update(sharding=sharding.replicated(self.mesh)))


def layout(model: pretrained.Architecture, mesh: Mesh, weights: str = "float") -> decoder.Params:
    """How generation holds the weights on its mesh, for `reshard`: the sharding of each, of an Int8 those of its parts.

    Args:
      model: whose weights.
      mesh: of generation.
      weights: "float" (in the compute dtype) or "int8" (matrices quantised, see models/int8.py).
    """
    shardings = model.shardings(mesh, sharding.ROLLOUT)
    return int8.layout(shardings) if weights == "int8" else shardings


def abstract_params(model: pretrained.Architecture, mesh: Mesh, weights: str = "float") -> decoder.Params:
    """ShapeDtypeStructs of what `reshard` gives; arguments as in `layout`."""
    laid = layout(model, mesh, weights)
    shapes = jax.eval_shape(functools.partial(_stored, dtype=model.dtype, quantised=weights == "int8"), model.abstract)
    return jax.tree.map(lambda leaf, placed: leaf.update(sharding=placed), shapes, laid)


def _stored(params: decoder.Params, dtype: jnp.dtype, quantised: bool) -> decoder.Params:
    """Params as generation holds them, but for their layout; matrices are quantised from what training holds."""
    return int8.quantised(params, dtype) if quantised else jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@functools.partial(jax.jit, static_argnames=("dtype", "steps", "quantised"))
def _reshard(
    params: decoder.Params, dtype: jnp.dtype, steps: tuple[tuple[NamedSharding, ...], ...], quantised: bool
) -> decoder.Params:
    leaves, treedef = jax.tree.flatten(_stored(params, dtype, quantised))
    for shardings in steps:
        leaves = [jax.lax.with_sharding_constraint(leaf, s) for leaf, s in zip(leaves, shardings)]
    return jax.tree.unflatten(treedef, leaves)


def _steps(params: decoder.Params, layout: decoder.Params, quantised: bool) -> tuple[tuple[NamedSharding, ...], ...]:
    """The layouts of `reshard`, leaf by leaf."""
    now = jax.tree.map(lambda leaf: leaf.sharding, params)
    sources, targets = (tuple(jax.tree.leaves(x)) for x in (int8.layout(now) if quantised else now, layout))
    between = tuple(map(sharding.halfway, sources, targets))
    # First as they come, or XLA might move weights before it quantises them.
    return (sources, between, targets) if quantised else (between, targets)


def reshard(params: decoder.Params, dtype: jnp.dtype, layout: decoder.Params) -> decoder.Params:
    """Params in the compute dtype, or int8, and the rollout's layout: gathered once per rollout, not once per token.

    Matrices are quantised before they are moved, so that int8 crosses between devices.

    Args:
      params: in any layout of the same devices.
      dtype: of what is not quantised.
      layout: from `layout`.
    """
    quantised = int8.is_quantised(layout)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(layout))
    if not quantised and all(p.dtype == dtype and p.sharding.is_equivalent_to(s, p.ndim) for p, s in leaves):
        return params
    return _reshard(params, jnp.dtype(dtype), _steps(params, layout, quantised), quantised)


def trace_reshard(params: decoder.Params, resharded: decoder.Params) -> jax.stages.Traced:
    """The program of `reshard` for abstract params and abstract results, to be compiled for devices elsewhere."""
    quantised = int8.is_quantised(resharded)
    steps = _steps(params, jax.tree.map(lambda leaf: leaf.sharding, resharded), quantised)
    return _reshard.trace(params, resharded["embedding"].dtype, steps, quantised)
