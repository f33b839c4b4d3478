"""Whose the response is: the student's (on-policy), the teacher's (off-policy), either's (mixed), or a given one."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from msd_jax.data import batches
from msd_jax.generation import refill, rollout
from msd_jax.io import jsonl
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding

# Streams of randomness under config.seed.
_SAMPLE, _POLICY, _TEACHER = 0, 1, 2

# Probability that the student writes a response, by config.rollout.policy; None: config.rollout.on_policy_fraction.
_STUDENTS_SHARE: dict[str, float | None] = {"on_policy": 1.0, "off_policy": 0.0, "mixed": None}
POLICIES = (*_STUDENTS_SHARE, "reference")

Key = tuple[str, str]  # query id, language


@dataclasses.dataclass(frozen=True)
class Responses:
    """One response per query, on the host.

    Attributes:
      response_BxR: int32, right-padded; R is the full config.rollout.max_new_tokens.
      length_B: int32.
      stopped_B: bool, whether a stop token was reached.
      on_policy_B: bool, whether the student wrote it.
      generated: number of tokens generated for this batch, those taken from the store left out.
      prompt_length_B: int32, tokens of the prompts that were answered; 0 where nothing was generated.
      decoded: how many times generation read all weights: where the whole batch is generated at a time, the length of
        the longest response, once for each role.
    """

    response_BxR: np.ndarray
    length_B: np.ndarray
    stopped_B: np.ndarray
    on_policy_B: np.ndarray
    generated: int
    prompt_length_B: np.ndarray
    decoded: int


class Store:
    """What the frozen teacher wrote for each query, once, in memory and in a file of the workdir."""

    def __init__(self, path: pathlib.Path, fingerprint: str):
        """Reads what an earlier run stored, and drops all of it if its fingerprint differs."""
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
    """A hash of everything that a stored response depends on: the teacher's weights, its prompts and the sampling."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(directory.glob("*.safetensors"))]
    sections = [json.loads(config[key].to_json_best_effort()) for key in ("model", "prompts", "rollout")]
    sections[-1].pop("rows", None)  # on which no response depends
    if sections[-1].get("weights") == "float":  # as before there was a choice
        del sections[-1]["weights"]
    settings = [config.seed, *map(json.dumps, sections)]
    return hashlib.sha256(json.dumps([files, settings]).encode()).hexdigest()


Generator = rollout.Generator | refill.Refilling


def make_generator(config: ml_collections.ConfigDict, model: pretrained.Pretrained, mesh: Mesh) -> Generator:
    """What writes the responses of a batch, with config.rollout.rows of them at a time."""
    sampling = {key: config.rollout[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    options = model.graphdef, mesh, rollout.Sampling(**sampling), model.stop_ids, model.pad_id
    if not 0 < config.rollout.rows < config.data.batch_size:
        return rollout.Generator(*options)
    limit = max(config.prompts.student_limit, config.prompts.teacher_limit)
    return refill.Refilling(refill.PoolGenerator(*options, rows=config.rollout.rows, limit=limit))


class GivenResponder:
    """Gives each batch the records' own answers, with config.rollout.policy = "reference"; nothing is generated."""

    def __init__(self, generator: Generator):
        """`generator`: whose limit, stop tokens and padding the responses have."""
        self._generator = generator

    def __call__(
        self,
        step: int,
        batch: batches.Batch,
        student: Callable[[], decoder.Params],
        teacher: Callable[[], decoder.Params],
    ) -> Responses:
        """As `Responder`."""
        given = [ids for example in batch.examples if (ids := example.response_ids) is not None]
        B, R = len(given), self._generator.sampling.max_new_tokens
        response_BxR = np.full((B, R), self._generator.pad_id, np.int32)
        for row, ids in zip(response_BxR, given):
            row[: len(ids)] = ids
        length_B = np.array([len(ids) for ids in given], np.int32)
        stopped_B = np.array([ids[-1] in self._generator.stop_ids for ids in given])
        return Responses(response_BxR, length_B, stopped_B, np.zeros(B, bool), 0, np.zeros(B, np.int32), 0)


@jax.jit
def _fold(root: jax.Array, stream: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(root, stream), step)


@jax.jit
def _uniform(key: jax.Array, query_hash_B: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.uniform)(rollout.row_keys(key, query_hash_B))


class Responder:
    """Gives each batch its responses, as config.rollout.policy says."""

    def __init__(self, config: ml_collections.ConfigDict, generator: Generator, store: Store | None):
        """`store` keeps the teacher's responses, each drawn once; with None they are drawn anew at each step."""
        self._generator, self._store = generator, store
        self._root = jax.random.key(config.seed)
        fraction = _STUDENTS_SHARE[config.rollout.policy]
        self._fraction = config.rollout.on_policy_fraction if fraction is None else fraction

    def __call__(
        self,
        step: int,
        batch: batches.Batch,
        student: Callable[[], decoder.Params],
        teacher: Callable[[], decoder.Params],
    ) -> Responses:
        """One response per query; every draw is a function of (seed, step, query), for a stored one of (seed, query).

        Args:
          step: number of finished steps.
          batch: the queries.
          student, teacher: give weights in the rollout layout; called only where they are needed.
        """
        store, keys = self._store, [(example.query_id, example.language) for example in batch.examples]
        draws_B = _uniform(self._key(_POLICY, step), jax.device_put(batch.query_hash_B))
        on_policy_B = jax.device_get(draws_B) < self._fraction
        stored_B = np.array([store is not None and key in store for key in keys]) & ~on_policy_B
        drawn_B = ~on_policy_B & ~stored_B

        B, R = len(keys), self._generator.sampling.max_new_tokens
        response_BxR = np.full((B, R), self._generator.pad_id, np.int32)
        length_B, stopped_B = np.zeros(B, np.int32), np.zeros(B, bool)
        answered_B, decoded = np.zeros(B, np.int32), 0

        def generate(params, prompt_BxP, prompt_length_B, rows_B, key) -> rollout.Rollout:
            nonlocal decoded
            written = self._generator(params, prompt_BxP, prompt_length_B, batch.query_hash_B, rows_B, key)
            written = sharding.fetch(written)
            response_BxR[rows_B] = written.response_BxR[rows_B]
            length_B[rows_B], stopped_B[rows_B] = written.length_B[rows_B], written.stopped_B[rows_B]
            answered_B[rows_B] = prompt_length_B[rows_B]
            decoded += self._generator.decoded(written)
            return written

        if on_policy_B.any():
            prompts = (batch.student_prompt_BxP, batch.student_length_B)
            generate(student(), *prompts, on_policy_B, self._key(_SAMPLE, step))
        if drawn_B.any():
            prompts = (batch.teacher_prompt_BxP, batch.teacher_length_B)
            written = generate(teacher(), *prompts, drawn_B, self._key(_TEACHER, step if store is None else 0))
            if store is not None:
                store.add({keys[row]: written.row(row) for row in np.flatnonzero(drawn_B).tolist()})
        generated = int(length_B.sum())
        if store is not None:
            for row in np.flatnonzero(stored_B):
                tokens, stopped_B[row] = store[keys[row]]
                response_BxR[row, : len(tokens)], length_B[row] = tokens, len(tokens)
        return Responses(response_BxR, length_B, stopped_B, on_policy_B, generated, answered_B, decoded)

    def _key(self, stream: int, step: int) -> jax.Array:
        return _fold(self._root, *jax.device_put((np.uint32(stream), np.uint32(step))))
