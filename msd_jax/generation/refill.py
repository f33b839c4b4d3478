"""Generation for many prompts: a row whose response has ended takes the next prompt, so that few rows stand idle.

A batch of `rollout.generate` lasts as long as its longest response. Here a fixed number of rows draws on a pool of
prompts: one program decodes until some rows have ended, and another one gives these rows new prompts. All rows write to
the same slot of the cache at a time, and the slots are a ring: whichever slot a row begins at, its tokens follow in
consecutive slots. Each response is the one that `rollout.generate` gives, for a draw depends on key and query alone.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from msd_jax.generation import rollout
from msd_jax.models import decoder, forward
from msd_jax.parallel import compiler_options, padding, sharding

PARTS = 4  # rows are filled in quarters of the batch: fewer programs run, and a quarter is idle at most


@dataclasses.dataclass(frozen=True)
class Response:
    """A finished response: the index of its prompt, its token ids, and whether a stop token was reached."""

    index: int
    tokens: list[int]
    stopped: bool


class PoolGenerator:
    """Responses to any number of prompts, each given once it has ended.

    Attributes:
      rows: B, how many are generated at a time.
      compilations: how often a program was compiled: for pools whose longest prompts share a bucket, one that decodes
        and one for each bucket of prompt lengths.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        mesh: Mesh,
        sampling: rollout.Sampling,
        stop_ids: tuple[int, ...],
        pad_id: int,
        *,
        rows: int,
        limit: int,
    ):
        """`rows`: rounded up to what the mesh divides; `limit`: the most tokens of a prompt."""
        self.rows, self.compilations = sharding.batch_rows(mesh, rows), 0
        self._graphdef, self._mesh, self._limit = graphdef, mesh, limit
        self._writer = rollout.Writer(sampling, stop_ids, pad_id)
        self._part = sharding.batch_rows(mesh, -(-self.rows // PARTS))
        self._layer_by_layer = sharding.platform(mesh) in rollout.UNSTACKED
        by_row: Any = sharding.batch_sharding(mesh)
        whole: Any = sharding.replicated(mesh)
        out = rollout.Rows(whole, by_row, by_row, by_row, by_row, None, rollout.Rollout(by_row, by_row, by_row))
        self._empty = jax.jit(self._no_rows, static_argnums=1, out_shardings=out)
        self._fill = jax.jit(self._prefill, donate_argnums=1, out_shardings=out)
        options = compiler_options.rollout_options(mesh)
        self._decode = jax.jit(self._decoding, donate_argnums=2, out_shardings=out, compiler_options=options)
        self._unstack = jax.jit(self._layers)

    def __call__(
        self,
        params: decoder.Params,
        prompts_ids: Sequence[np.ndarray],
        query_hash: Sequence[int] | None = None,
        key: jax.Array | None = None,
    ) -> Iterator[Response]:
        """Takes the prompts in their order, which is best that of their lengths.

        Args:
          params: in the rollout layout.
          prompts_ids: int32 [P] each, of any lengths up to the limit.
          query_hash: a number for each prompt, which with `key` decides its draws; needed where tokens are sampled.
          key: the same for all prompts.
        """
        if not prompts_ids:
            return
        key_data = jax.device_get(jax.random.key_data(jax.random.key(0) if key is None else key))
        key_data = sharding.put_replicated(self._mesh, key_data)
        hash_of = np.zeros(len(prompts_ids), np.uint32) if query_hash is None else np.asarray(query_hash, np.uint32)
        layers = self._unstack(params) if self._layer_by_layer else None
        longest = padding.bucket(max(map(len, prompts_ids)), self._limit)
        state = self._empty(params, longest + self._writer.sampling.max_new_tokens)
        waiting = collections.deque(range(len(prompts_ids)))
        free, held = list(range(self.rows)), dict[int, int]()  # row -> prompt
        while waiting or held:
            while waiting and free:
                taken = [waiting.popleft() for _ in range(min(len(waiting), len(free), self._part))]
                into, free = free[: len(taken)], free[len(taken) :]
                held |= dict(zip(into, taken))
                prompts = self._padded([prompts_ids[i] for i in taken], hash_of[taken], into)
                state = self._fill(params, state, *prompts, key_data)
            enough = self.rows - len(held) + min(self._part, len(held)) if waiting else self.rows
            state = self._decode(params, layers, state, sharding.put_replicated(self._mesh, np.int32(enough)))
            done_B, written = sharding.fetch((state.done_B, state.written))
            for row in [row for row in held if done_B[row]]:
                free.append(row)
                yield Response(held.pop(row), *written.row(row))

    def _padded(self, prompts_ids: Sequence[np.ndarray], hashes: np.ndarray, into: Sequence[int]) -> tuple:
        """Arguments of `_prefill`: always as many prompts, so that few programs are compiled."""
        missing = self._part - len(prompts_ids)
        filled = [*prompts_ids, *[prompts_ids[0]] * missing]
        prompt_FxP, length_F = padding.left_pad(filled, self._limit, self._writer.pad_id)
        hash_F = np.concatenate([hashes, np.zeros(missing, np.uint32)])
        row_F = np.array([*into, *[self.rows] * missing], np.int32)  # no row, which takes nothing
        by_row = sharding.put_batch(self._mesh, (prompt_FxP, length_F, hash_F))
        return *by_row, sharding.put_replicated(self._mesh, row_F)

    # --- What is compiled -----------------------------------------------------------------------------------------

    def _no_rows(self, params: decoder.Params, slots: int) -> rollout.Rows:
        """All rows done, with an empty cache."""
        model, B = nnx.merge(self._graphdef, params), self.rows
        cache: Any = decoder.init_cache(model.config, B, slots, model.dtype, model.mesh)
        if self._layer_by_layer:
            cache = model.unstack(cache)
        zeros_B, keys = jnp.zeros(B, jnp.int32), jax.random.split(jax.random.key(0), B)
        return rollout.Rows(jnp.int32(0), zeros_B, zeros_B, jnp.ones(B, bool), keys, cache, self._writer.empty(B))

    def _prefill(
        self,
        params: decoder.Params,
        rows: rollout.Rows,
        prompt_FxP: jax.Array,
        length_F: jax.Array,
        hash_F: jax.Array,
        row_F: jax.Array,
        key_data: jax.Array,
    ) -> rollout.Rows:
        """The rows with prompts in those of `row_F`, and the first token of each."""
        self.compilations += 1  # only while tracing
        model, (F, P) = nnx.merge(self._graphdef, params), prompt_FxP.shape
        slots = jax.tree.leaves(rows.cache)[0].shape[-2]
        cache: Any = decoder.init_cache(model.config, F, slots, model.dtype, model.mesh)
        hidden_FxPxD, cache = model.prefill(prompt_FxP, *forward.prompt_layout(length_F, P), cache)
        # The slots before the next one, whichever that is, so that all rows write to the same.
        cache = jax.tree.map(lambda x: jnp.roll(x, rows.slot - P, axis=-2), cache)
        key_F = rollout.row_keys(jax.random.wrap_key_data(key_data), hash_F)
        begun = rollout.Rows(
            rows.slot, prompt_FxP[:, -1], length_F - 1, row_F >= self.rows, key_F, cache, self._writer.empty(F)
        )
        begun = self._writer.emit(model, hidden_FxPxD[:, -1:], begun)
        if self._layer_by_layer:
            cache = model.unstack(cache)

        def put(axis: int, old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[(slice(None),) * axis + (row_F,)].set(new, mode="drop", unique_indices=True)

        def of_rows(r: rollout.Rows) -> tuple:
            return r.token_B, r.position_B, r.done_B, r.key_B, r.written

        in_cache = functools.partial(put, 0 if self._layer_by_layer else 1)
        kept = jax.tree.map(functools.partial(put, 0), of_rows(rows), of_rows(begun))
        token_B, position_B, done_B, key_B, written = kept
        cache = jax.tree.map(in_cache, rows.cache, cache)
        return rollout.Rows(rows.slot, token_B, position_B, done_B, key_B, cache, written)

    def _decoding(
        self, params: decoder.Params, layers: list[nnx.State] | None, rows: rollout.Rows, enough: jax.Array
    ) -> rollout.Rows:
        """Token after token until `enough` rows are done."""
        self.compilations += 1  # only while tracing
        model = nnx.merge(self._graphdef, params)
        run_decoder: rollout.RunDecoder = model.decode
        if layers is not None:
            run_decoder = functools.partial(model.decode_unstacked, layers)
        return self._writer.decode(model, run_decoder, rows, enough)

    def _layers(self, params: decoder.Params) -> list[nnx.State]:
        """Each layer's weights in arrays of their own: once for a pool, and not once for each part of it."""
        return nnx.merge(self._graphdef, params).unstacked_weights()
