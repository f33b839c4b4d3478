"""Generation for many prompts: a row whose response has ended takes the next prompt, so that few rows stand idle.

A batch of `rollout.generate` lasts as long as its longest response. Here a fixed number of rows draws on a pool of
prompts: one program decodes until some rows have ended, and others give these rows new prompts. All rows write to the
same slot of the cache at a time, and the slots are a ring: whichever slot a row begins at, its tokens follow in
consecutive slots. Each response is the one that `rollout.generate` gives, for a draw depends on key and query alone.

Prompts are read a few columns at a time, up to the end of the longest, so that one program reads prompts of any length
with little padding. What all prompts of a pool begin with, as a chat template's system message or a teacher's
instruction, is read once.

Axis letters beside the project's: F rows that are filled at a time, W columns that are read at a time.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from msd_jax.generation import rollout
from msd_jax.models import decoder
from msd_jax.parallel import compiler_options, padding, sharding

PARTS = 8  # rows are filled in eighths of the batch: few programs run, and few rows stand idle
_TOKENS, _TOKENS_ON_CPU = 512, 64  # F x W of each device, which make its matrix products fast
_COLUMNS = 16  # W at least
# Sizes of the cache at most. On accelerators, compiling another takes longer than it saves over a few thousand prompts.
_SIZES, _SIZES_ON_CPU = 2, 8


@dataclasses.dataclass(frozen=True)
class Response:
    """A finished response: the index of its prompt, its token ids, and whether a stop token was reached."""

    index: int
    tokens: list[int]
    stopped: bool


class _Pool(NamedTuple):
    """What is asked: prompts, of which the first `shared` tokens are the same, and what decides the draws."""

    params: decoder.Params
    prompts_ids: Sequence[np.ndarray]
    shared: int
    hash_of: np.ndarray
    key_data: jax.Array


class PoolGenerator:
    """Responses to any number of prompts, each given once it has ended.

    Attributes:
      rows: B, how many are generated at a time.
      writer: how tokens are drawn, and what ends a response.
      compilations: how often a program was compiled: one that reads prompts, one that gives them to rows and one that
        decodes, for each of `sizes` that is needed.
      sizes: the cache has room for prompts of so many tokens: at first for the shortest ones.
      decoded: how often generation has read all weights for one more token of each row.
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
        self.rows, self.compilations, self.decoded = sharding.batch_rows(mesh, rows), 0, 0
        self._graphdef, self._mesh = graphdef, mesh
        self.writer = rollout.Writer(sampling, stop_ids, pad_id)
        self._part = sharding.batch_rows(mesh, -(-self.rows // PARTS))
        platform, R = sharding.platform(mesh), sampling.max_new_tokens
        self._layer_by_layer = platform in rollout.UNSTACKED
        tokens = (_TOKENS_ON_CPU if platform == "cpu" else _TOKENS) * sharding.batch_shards(mesh)
        self._columns = max(_COLUMNS, min(R, tokens // self._part))
        self._behind = max(R, self._columns)  # slots of the cache beside those of prompts
        self.sizes, most = [limit], _SIZES_ON_CPU if platform == "cpu" else _SIZES
        # Half of the size would hardly make the cache smaller where responses are longer.
        while len(self.sizes) < most and self.sizes[0] // 2 >= max(R // 2, _COLUMNS):
            self.sizes.insert(0, self.sizes[0] // 2)
        by_row: Any = sharding.batch_sharding(mesh)
        whole: Any = sharding.replicated(mesh)
        out = rollout.Rows(whole, by_row, by_row, by_row, by_row, None, rollout.Rollout(by_row, by_row, by_row))
        self._empty = jax.jit(self._no_rows, static_argnums=1, out_shardings=out)
        options = compiler_options.rollout_options(mesh)
        self._blank = jax.jit(self._no_prompts, static_argnums=1)
        self._enlarge = jax.jit(self._larger, static_argnums=1, out_shardings=out)
        self._read = jax.jit(self._prefill, out_shardings=(by_row, None))
        self._take = jax.jit(self._refill, donate_argnums=1, out_shardings=out)
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
        hash_of = np.zeros(len(prompts_ids), np.uint32) if query_hash is None else np.asarray(query_hash, np.uint32)
        shared = padding.common_prefix(prompts_ids) if len(prompts_ids) > self._part else 0
        pool = _Pool(params, prompts_ids, shared, hash_of, sharding.put_replicated(self._mesh, key_data))
        layers = self._unstack(params) if self._layer_by_layer else None
        size, slot = 0, 0
        state: Any = None  # rollout.Rows, once it is known how much room they need
        begun: Any = None
        waiting = collections.deque(range(len(prompts_ids)))
        free, held = list(range(self.rows)), dict[int, int]()  # row -> prompt
        while waiting or held:
            while waiting and len(free) >= min(self._part, len(waiting)):
                taken = [waiting.popleft() for _ in range(min(self._part, len(waiting)))]
                into, free = free[: len(taken)], free[len(taken) :]
                held |= dict(zip(into, taken))
                needed = self._size(max(len(prompts_ids[i]) for i in taken))
                if needed > size:
                    size, slot = needed, 0
                    state, begun = self._with_room(pool, state, size)
                state = self._fill(pool, state, begun, size, taken, into)
            enough = min(self._part, len(waiting)) if waiting else self.rows
            state = self._decode(params, layers, state, self._number(enough))
            done_B, written, now = sharding.fetch((state.done_B, state.written, state.slot))
            self.decoded += int(now - slot) % (size + self._behind)
            slot = int(now)
            for row in [row for row in held if done_B[row]]:
                free.append(row)
                yield Response(held.pop(row), *written.row(row))

    def _size(self, length: int) -> int:
        """The smallest of `sizes` that has room for a prompt."""
        if length > self.sizes[-1]:
            raise ValueError(f"a length of {length} exceeds its limit of {self.sizes[-1]}")
        return next(size for size in self.sizes if size >= length)

    def _number(self, value: int) -> jax.Array:
        return sharding.put_replicated(self._mesh, np.int32(value))

    def _with_room(self, pool: _Pool, state: rollout.Rows | None, size: int) -> tuple[rollout.Rows, Any]:
        """The rows with room for prompts of `size` tokens, and a cache of what all prompts begin with."""
        room: Any = self._empty if state is None else self._enlarge
        state = room(pool.params if state is None else state, size + self._behind)
        begun = self._blank(pool.params, size + self._columns)
        if pool.shared:
            tokens = self._padded([pool.prompts_ids[0][: pool.shared]] * self._part, size)  # for whatever rows follow
            _, begun = self._read(pool.params, begun, *tokens, self._number(0))
        return state, begun

    def _fill(
        self, pool: _Pool, state: rollout.Rows, begun: Any, size: int, taken: Sequence[int], into: Sequence[int]
    ) -> rollout.Rows:
        """The rows with the prompts `taken` in the rows `into`."""
        tokens = self._padded([pool.prompts_ids[i][pool.shared :] for i in taken], size)
        read = self._read(pool.params, begun, *tokens, self._number(pool.shared))
        missing = self._part - len(taken)
        length_F = np.array([len(pool.prompts_ids[i]) for i in taken] + [1] * missing, np.int32)
        hash_F = np.concatenate([pool.hash_of[taken], np.zeros(missing, np.uint32)])
        row_F = np.array([*into, *[self.rows] * missing], np.int32)  # no row, which takes nothing
        by_row = sharding.put_batch(self._mesh, (length_F, hash_F))
        return self._take(pool.params, state, read, *by_row, sharding.put_replicated(self._mesh, row_F), pool.key_data)

    def _padded(self, rows: Sequence[np.ndarray], size: int) -> tuple[jax.Array, jax.Array]:
        """(token ids [F, P], right-padded, their lengths [F]), always of as many rows and columns."""
        P = -(-size // self._columns) * self._columns
        token_FxP = np.full((self._part, P), self.writer.pad_id, np.int32)
        length_F = np.ones(self._part, np.int32)
        for i, ids in enumerate(rows):
            token_FxP[i, : len(ids)], length_F[i] = ids, len(ids)
        return sharding.put_batch(self._mesh, (token_FxP, length_F))

    # --- What is compiled -----------------------------------------------------------------------------------------

    def _no_rows(self, params: decoder.Params, slots: int) -> rollout.Rows:
        """All rows done, with an empty cache."""
        model, B = nnx.merge(self._graphdef, params), self.rows
        cache: Any = decoder.init_cache(model.config, B, slots, model.dtype, model.mesh)
        if self._layer_by_layer:
            cache = model.unstack(cache)
        zeros_B, keys = jnp.zeros(B, jnp.int32), jax.random.split(jax.random.key(0), B)
        return rollout.Rows(jnp.int32(0), zeros_B, zeros_B, jnp.ones(B, bool), keys, cache, self.writer.empty(B))

    def _larger(self, rows: rollout.Rows, slots: int) -> rollout.Rows:
        """The rows with a cache of so many slots, in which slot 0 is the next."""

        def larger(x: jax.Array) -> jax.Array:
            before = [(0, 0)] * (x.ndim - 2) + [(slots - x.shape[-2], 0), (0, 0)]
            return jnp.pad(jnp.roll(x, -rows.slot, axis=-2), before)

        return rows._replace(slot=jnp.int32(0), cache=jax.tree.map(larger, rows.cache))

    def _no_prompts(self, params: decoder.Params, slots: int) -> decoder.KVCache:
        model = nnx.merge(self._graphdef, params)
        return decoder.init_cache(model.config, self._part, slots, model.dtype, self._mesh)

    def _prefill(
        self, params: decoder.Params, cache: decoder.KVCache, token_FxP: jax.Array, length_F: jax.Array, slot: jax.Array
    ) -> tuple[jax.Array, decoder.KVCache]:
        """(the hidden state of each row's last token [F, 1, D], the cache with these tokens from `slot` on).

        Padding is behind a row's tokens: what the cache holds of it is in slots that the row's next tokens will take.
        """
        self.compilations += 1  # only while tracing
        model, W = nnx.merge(self._graphdef, params), self._columns

        def some(carry: tuple) -> tuple:
            first, last_Fx1xD, cache = carry
            token_FxW = jax.lax.dynamic_slice_in_dim(token_FxP, first, W, axis=1)
            position_FxW = jnp.broadcast_to(slot + first + jnp.arange(W), token_FxW.shape)
            hidden_FxWxD, cache = model.decode(token_FxW, position_FxW, cache, slot + first)
            column_Fx1x1 = (length_F - 1 - first)[:, None, None]
            here_Fx1xD = jnp.take_along_axis(hidden_FxWxD, jnp.clip(column_Fx1x1, 0, W - 1), axis=1)
            return first + W, jnp.where((column_Fx1x1 >= 0) & (column_Fx1x1 < W), here_Fx1xD, last_Fx1xD), cache

        nothing_Fx1xD = jnp.zeros((self._part, 1, model.config.width), model.residual_dtype)
        carry = jnp.int32(0), model.constrain(nothing_Fx1xD), cache
        _, last_Fx1xD, cache = jax.lax.while_loop(lambda carry: carry[0] < jnp.max(length_F), some, carry)
        # As `_no_prompts` has it, or the program would be compiled for either.
        return last_Fx1xD, jax.tree.map(
            lambda x: sharding.constrain(x, self._mesh, None, "batch", "kv_heads", None, None), cache
        )

    def _refill(
        self,
        params: decoder.Params,
        rows: rollout.Rows,
        read: tuple[jax.Array, decoder.KVCache],
        length_F: jax.Array,
        hash_F: jax.Array,
        row_F: jax.Array,
        key_data: jax.Array,
    ) -> rollout.Rows:
        """The rows with the prompts that were `read` in those of `row_F`, and the first token of each."""
        self.compilations += 1  # only while tracing
        model, (last_Fx1xD, prompts), F = nnx.merge(self._graphdef, params), read, self._part
        slots = jax.tree.leaves(rows.cache)[0].shape[-2]

        def at_slot(x: jax.Array, length: jax.Array) -> jax.Array:
            """A row's tokens in the slots before the next one, whichever that is: all rows write to the same."""
            behind = [(0, 0)] * (x.ndim - 2) + [(0, slots - x.shape[-2]), (0, 0)]
            return jnp.roll(jnp.pad(x, behind), rows.slot - length, axis=-2)

        cache: Any = jax.tree.map(lambda x: jax.vmap(at_slot, (1, 0), 1)(x, length_F), prompts)
        key_F = rollout.row_keys(jax.random.wrap_key_data(key_data), hash_F)
        none_F, written = jnp.zeros(F, jnp.int32), self.writer.empty(F)
        begun = rollout.Rows(rows.slot, none_F, length_F - 1, row_F >= self.rows, key_F, cache, written)
        begun = self.writer.emit(model, last_Fx1xD, begun)
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
        return self.writer.decode(model, run_decoder, rows, enough)

    def _layers(self, params: decoder.Params) -> list[nnx.State]:
        """Each layer's weights in arrays of their own: once for a pool, and not once for each part of it."""
        return nnx.merge(self._graphdef, params).unstacked_weights()


class Refilling:
    """`rollout.Generator` for batches of more prompts than rows: rows that end early take what is left of the batch.

    The responses are the same. `sampling`, `stop_ids`, `pad_id` and `compilations` are as there.
    """

    def __init__(self, pool: PoolGenerator):
        self._pool, self._decoded = pool, 0
        writer = pool.writer
        self.sampling, self.stop_ids, self.pad_id = writer.sampling, writer.stop_ids, writer.pad_id

    @property
    def compilations(self) -> int:
        return self._pool.compilations

    def __call__(
        self,
        params: decoder.Params,
        prompt_BxP: np.ndarray,
        prompt_length_B: np.ndarray,
        query_hash_B: np.ndarray,
        active_B: np.ndarray,
        key: jax.Array,
    ) -> rollout.Rollout:
        """As `rollout.Generator`, with results on the host."""
        asked = np.flatnonzero(active_B)
        asked = asked[np.argsort(prompt_length_B[asked], kind="stable")]
        prompts_ids = [prompt_BxP[i, prompt_BxP.shape[1] - prompt_length_B[i] :] for i in asked]
        B, before = len(prompt_BxP), self._pool.decoded
        response_BxR: Any = np.full((B, self.sampling.max_new_tokens), self.pad_id, np.int32)
        length_B: Any = np.zeros(B, np.int32)
        stopped_B: Any = np.zeros(B, bool)
        for response in self._pool(params, prompts_ids, query_hash_B[asked].tolist(), key):
            row, length = asked[response.index], len(response.tokens)
            response_BxR[row, :length] = response.tokens
            length_B[row], stopped_B[row] = length, response.stopped
        self._decoded = self._pool.decoded - before
        return rollout.Rollout(response_BxR, length_B, stopped_B)

    def decoded(self, written: rollout.Rollout) -> int:
        """How often the last call read all weights for one more token of each row."""
        return self._decoded
