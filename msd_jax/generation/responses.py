"""Who writes the response: the student (on-policy), the teacher (off-policy), or either by chance (mixed)."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from msd_jax.data import batches
from msd_jax.generation import rollout
from msd_jax.io import jsonl
from msd_jax.models import decoder
from msd_jax.parallel import sharding

# Streams of randomness under config.seed.
_SAMPLE, _POLICY, _TEACHER = 0, 1, 2

# Probability that the student writes a response, by config.rollout.policy; None: config.rollout.on_policy_fraction.
POLICIES: dict[str, float | None] = {"on_policy": 1.0, "off_policy": 0.0, "mixed": None}

Key = tuple[str, str]  # query id, language


@dataclasses.dataclass(frozen=True)
class Responses:
    """One response a query, on the host.

    Attributes:
      response_BxR: int32, right-padded; R is the full config.rollout.max_new_tokens.
      length_B: int32.
      stopped_B: bool, whether a stop token was reached.
      on_policy_B: bool, whether the student wrote it.
      generated: number of tokens that were generated now, not taken from the store.
    """

    response_BxR: np.ndarray
    length_B: np.ndarray
    stopped_B: np.ndarray
    on_policy_B: np.ndarray
    generated: int


class Store:
    """The frozen teacher's response to each query, drawn once, kept in memory and in a file of the workdir."""

    def __init__(self, path: pathlib.Path, fingerprint: str):
        """Reads what an earlier run stored; drops all of it if its fingerprint differs."""
        self._log = jsonl.JsonLines(path)
        mark, *rows = self._log.read() or [{}]
        if mark != {"fingerprint": fingerprint}:
            rows = []
            self._log.replace([{"fingerprint": fingerprint}])
        self._tokens: dict[Key, tuple[list[int], bool]] = {
            (row["id"], row["language"]): (row["tokens"], row["stopped"]) for row in rows
        }

    def __contains__(self, key: Key) -> bool:
        return key in self._tokens

    def __getitem__(self, key: Key) -> tuple[list[int], bool]:
        return self._tokens[key]

    def add(self, responses: Mapping[Key, tuple[list[int], bool]]) -> None:
        """Adds {key: (tokens, whether a stop token was reached)}, on disk when this returns."""
        self._tokens |= responses
        self._log.append(
            {"id": key[0], "language": key[1], "tokens": tokens, "stopped": stopped}
            for key, (tokens, stopped) in responses.items()
        )


def fingerprint(config: ml_collections.ConfigDict, directory: pathlib.Path) -> str:
    """Of everything that a stored response depends on: the teacher's weights, its prompts and the sampling."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(directory.glob("*.safetensors"))]
    settings = [config.seed, *(config[key].to_json_best_effort() for key in ("model", "prompts", "rollout"))]
    return hashlib.sha256(json.dumps([files, settings]).encode()).hexdigest()


@jax.jit
def _fold(root: jax.Array, stream: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(root, stream), step)


@jax.jit
def _uniform(key: jax.Array, query_hash_B: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.uniform)(rollout.row_keys(key, query_hash_B))


class Responder:
    """Responses for each batch, by config.rollout.policy."""

    def __init__(self, config: ml_collections.ConfigDict, generator: rollout.Generator, store: Store | None):
        """`store` None: the teacher's responses are drawn anew each time."""
        self._generator, self._store = generator, store
        self._root = jax.random.key(config.seed)
        fraction = POLICIES[config.rollout.policy]
        self._fraction = config.rollout.on_policy_fraction if fraction is None else fraction

    def _key(self, stream: int, step: int) -> jax.Array:
        return _fold(self._root, *jax.device_put((np.uint32(stream), np.uint32(step))))

    def __call__(
        self,
        step: int,
        batch: batches.Batch,
        student: Callable[[], decoder.Params],
        teacher: Callable[[], decoder.Params],
    ) -> Responses:
        """Every draw is a function of (seed, step, query), for a stored response of (seed, query) alone.

        Args:
          step: of the training.
          batch: the queries.
          student, teacher: give params in the rollout layout; called only where they are needed.
        """
        draws_B = _uniform(self._key(_POLICY, step), jax.device_put(batch.query_hash_B))
        on_policy_B = jax.device_get(draws_B) < self._fraction
        keys = [(example.query_id, example.language) for example in batch.examples]
        stored_B = np.array([self._store is not None and key in self._store for key in keys]) & ~on_policy_B
        parts: list[tuple[np.ndarray, rollout.Rollout]] = []

        if on_policy_B.any():
            prompts = (batch.student_prompt_BxP, batch.student_length_B)
            parts.append((on_policy_B, self._generate(student(), prompts, batch, on_policy_B, _SAMPLE, step)))
        drawn_B = ~on_policy_B & ~stored_B
        if drawn_B.any():
            prompts = (batch.teacher_prompt_BxP, batch.teacher_length_B)
            draw = 0 if self._store is not None else step
            written = self._generate(teacher(), prompts, batch, drawn_B, _TEACHER, draw)
            parts.append((drawn_B, written))
            if self._store is not None:
                self._store.add({keys[row]: written.row(row) for row in np.flatnonzero(drawn_B)})

        B, R = len(keys), self._generator.sampling.max_new_tokens
        response_BxR = np.full((B, R), self._generator.pad_id, np.int32)
        length_B, stopped_B = np.zeros(B, np.int32), np.zeros(B, bool)
        for rows_B, written in parts:
            response_BxR[rows_B] = written.response_BxR[rows_B]
            length_B[rows_B], stopped_B[rows_B] = written.length_B[rows_B], written.stopped_B[rows_B]
        generated = int(length_B.sum())
        for row in np.flatnonzero(stored_B):
            tokens, stopped_B[row] = self._store[keys[row]]
            response_BxR[row, : len(tokens)], length_B[row] = tokens, len(tokens)
        return Responses(response_BxR, length_B, stopped_B, on_policy_B, generated)

    def _generate(self, params: Any, prompts: Any, batch: Any, rows_B: np.ndarray, stream: int, step: int) -> Any:
        key = self._key(stream, step)
        return sharding.fetch(self._generator(params, *prompts, batch.query_hash_B, rows_B, key))
