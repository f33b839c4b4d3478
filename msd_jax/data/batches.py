"""Queries -> encoded prompts -> shuffled, padded batches whose order depends on (seed, position) alone. By grain."""

import collections
import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import grain
import numpy as np

from msd_jax.data import prompts, sources
from msd_jax.data.records import Query, require_languages
from msd_jax.errors import UserError
from msd_jax.parallel import padding

if TYPE_CHECKING:
    import ml_collections
    import transformers


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Every query in each of its target languages.

    Attributes:
      records: for each query its examples, those over a limit left out, and last the one that is retained where there
        are such; a query without any in a target language is left out.
      languages: the target languages; each has examples.
      student_limit, teacher_limit: in tokens.
      dropped: number of pairs left out by (language, limits exceeded, as in "student_limit and teacher_limit").
    """

    records: tuple[tuple[prompts.Example, ...], ...]
    languages: tuple[str, ...]
    student_limit: int
    teacher_limit: int
    dropped: Mapping[tuple[str, str], int]

    def describe_dropped(self) -> list[str]:
        """One line for each language and reason."""
        return [
            f"{count} prompts in {language} dropped, longer than config.prompts.{reason}"
            for (language, reason), count in self.dropped.items()
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """B queries, each in one target language. Masks come from lengths: the pad id may be a token of the text.

    Attributes:
      student_prompt_BxP: int32 [B, P], left-padded; P is a bucket and differs between the roles.
      student_length_B: int32 [B], real tokens.
      teacher_prompt_BxP: int32 [B, P], left-padded.
      teacher_length_B: int32 [B].
      query_hash_B: uint32 [B], see `query_hash`.
      examples: what is in the rows.
    """

    student_prompt_BxP: np.ndarray
    student_length_B: np.ndarray
    teacher_prompt_BxP: np.ndarray
    teacher_length_B: np.ndarray
    query_hash_B: np.ndarray
    examples: tuple[prompts.Example, ...]


def encode_all(
    records: Sequence[Query],
    languages: Sequence[str],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
    analyses: Mapping[str, str] | None = None,
) -> Encoded:
    """Encodes each query in each target language, once.

    Args:
      records: every one has texts in the source language and in `languages`.
      languages: target languages.
      tokenizer: of transformers.
      config: the whole config.
      analyses: the teacher's, by id of the query, with config.prompts.cot = "generated"; what is missing is empty.

    Raises:
      UserError: a text is missing, or all prompts in a language are longer than their limits.
    """
    source = config.data.source_language
    require_languages(records, (source, *languages), sources.describe(config.data))
    limits = {key: config.prompts[key] for key in ("student_limit", "teacher_limit")}
    retain = config.data.retain_fraction > 0
    kept, dropped = [], collections.Counter()
    longest = collections.defaultdict(int)
    for record in records:
        examples = []
        shown = [
            prompts.encode(record, language, tokenizer, config.prompts, source, (analyses or {}).get(record.id, ""))
            for language in languages
        ]
        if retain:
            shown.append(prompts.retained(record, tokenizer, config.prompts, source))
        for example in shown:
            lengths = {"student_limit": len(example.student_ids), "teacher_limit": len(example.teacher_ids)}
            over = [key for key in limits if lengths[key] > limits[key]]
            for key in over:
                longest[example.language, key] = max(longest[example.language, key], lengths[key])
            if over:
                dropped[example.language, " and ".join(over)] += 1
            else:
                examples.append(example)
        if any(not example.retained for example in examples):
            kept.append(tuple(examples))
    left = {example.language for examples in kept for example in examples}
    for language in (*languages, *((source,) if retain else ())):
        if language not in left:
            reasons = " and ".join(
                f"config.prompts.{key}={limits[key]} (longest: {longest[language, key]} tokens)"
                for key in limits
                if longest[language, key]
            )
            raise UserError(
                f"{sources.describe(config.data)}: all {len(records)} prompts in {language!r} are longer than {reasons}"
                "; raise the limit"
            )
    return Encoded(tuple(kept), tuple(languages), **limits, dropped=dict(dropped))


def batches(
    encoded: Encoded,
    weights: Mapping[str, float],
    batch_size: int,
    seed: int,
    pad_id: int,
    window: int = 1,
    *,
    source_weights: Mapping[str, float] | None = None,
    harmful_share: float | None = None,
    retain_fraction: float = 0.0,
) -> grain.IterDataset[Batch]:
    """An endless stream of batches.

    Each epoch holds every query once, in a new order and in one target language drawn by weight; batches run on over
    the ends of epochs. Where queries are in parts that are mixed (sources, harmful and harmless), each part has epochs
    of its own, and among any number of successive queries each part has its share, rounded. Query i of the stream
    depends on (seed, i) alone: not on the batch size, nor on the number of hosts. Of every `window * batch_size`
    queries those of like length then share a batch, so that little of it is padding, and the batches come in random
    order. All hosts build the same batch and take their rows of it, so that they agree on P.

    `iter(...)` gives an iterator with get_state() and set_state(); the state is {"next_index": i}, an int.

    Args:
      encoded: from `encode_all`.
      weights: target language -> sampling weight; 0 or absent leaves the language out.
      batch_size: B.
      seed: at least 0.
      pad_id: fills the left of shorter prompts.
      window: number of batches among which queries are sorted by length; 1 leaves them as they come.
      source_weights: source -> its share of the stream, relative to the others', whatever its size; 0 leaves it out.
        None, or a single source: queries as they come.
      harmful_share: 0 to 1, of harmful queries in the stream; their sources, and those of harmless ones, then share
        out either part by their weights. None: queries as they come.
      retain_fraction: probability that a query is not shown in a target language but retained.

    Raises:
      UserError: a weight is not a number from 0 on, its language was not encoded, or nothing is left.
    """
    for language, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"config.data.languages.{language}={weight!r} must be a number from 0 on")
        if language not in encoded.languages:
            raise UserError(f"config.data.languages.{language}: only {', '.join(encoded.languages)} were encoded")
    records = [tuple(x for x in record if x.retained or weights.get(x.language)) for record in encoded.records]
    records = [record for record in records if record and not record[0].retained]
    if not records:
        raise UserError(f"config.data.languages={dict(weights)}: no language with a weight above 0 has queries")
    parts = _parts(records, source_weights or {}, harmful_share)

    def draw(record: tuple[prompts.Example, ...], rng: np.random.Generator) -> prompts.Example:
        weights_L = np.array([0.0 if x.retained else weights[x.language] for x in record], np.float64)
        share_L = weights_L / weights_L.sum()
        if record[-1].retained:
            share_L = np.append((1 - retain_fraction) * share_L[:-1], retain_fraction)
        return record[rng.choice(len(record), p=share_L)]

    def group(examples: Sequence[prompts.Example], rng: np.random.Generator) -> list[Sequence[prompts.Example]]:
        if window > 1:
            examples = sorted(examples, key=lambda example: len(example.student_ids) + len(example.teacher_ids))
        groups = [examples[first : first + batch_size] for first in range(0, len(examples), batch_size)]
        return [groups[i] for i in rng.permutation(window)]

    def collate(examples: Sequence[prompts.Example]) -> Batch:
        student = padding.left_pad([example.student_ids for example in examples], encoded.student_limit, pad_id)
        teacher = padding.left_pad([example.teacher_ids for example in examples], encoded.teacher_limit, pad_id)
        hashes = [query_hash(example.query_id, example.language) for example in examples]
        return Batch(*student, *teacher, np.array(hashes, np.uint32), tuple(examples))

    def endless(records: Sequence[tuple[prompts.Example, ...]], seed: int) -> grain.MapDataset[prompts.Example]:
        # shuffle(seed=s) would use s + epoch, so that seeds 0 and 1 share their epochs
        return grain.MapDataset.source(records).seed(seed).shuffle().repeat().random_map(draw)

    if len(parts) == 1:
        stream = endless(parts[0].records, seed)
    else:
        mixed = [endless(part.records, part.seed(seed)) for part in parts]
        stream = grain.MapDataset.mix(mixed, [part.share for part in parts]).seed(seed)
    windows = stream.batch(window * batch_size, drop_remainder=True, batch_fn=list).random_map(group)
    groups = grain.experimental.FlatMapMapDataset(windows, _Split(window))
    # Everything is in memory already: no threads, no buffer.
    return groups.map(collate).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


class _Part(NamedTuple):
    """Queries that have a share of the stream."""

    name: str
    share: float
    records: list[tuple[prompts.Example, ...]]

    def seed(self, seed: int) -> int:
        """Its own, whatever other parts there are."""
        return int(np.random.SeedSequence([seed, zlib.crc32(self.name.encode())]).generate_state(1)[0])


def _parts(
    records: Sequence[tuple[prompts.Example, ...]], source_weights: Mapping[str, float], harmful_share: float | None
) -> list[_Part]:
    """The parts with a share above 0, by source and label; one part with all records where nothing is mixed."""
    by_part = collections.defaultdict(list)
    for record in records:
        source = sources.source_of(record[0].query_id) if len(source_weights) > 1 else ""
        by_part[source, None if harmful_share is None else record[0].harmful].append(record)
    present = {source for source, _ in by_part}
    for source, weight in source_weights.items():
        if weight and len(source_weights) > 1 and source not in present:
            raise UserError(f"config.data.sources.{source}: none of its queries is left; set its weight to 0")
    unlabelled = [record[0].query_id for (_, label), part in by_part.items() if label is None for record in part]
    if harmful_share is not None and unlabelled:
        raise UserError(
            f"config.data.harmful_share={harmful_share}: {len(unlabelled)} queries say neither harmful nor harmless "
            f"(first: id {unlabelled[0]!r}); label them, or set `harmful` of their source to true or false"
        )
    parts = []
    for label, share in (
        {None: 1.0} if harmful_share is None else {True: harmful_share, False: 1 - harmful_share}
    ).items():
        weights = {source: source_weights.get(source, 1.0) for source, other in by_part if other is label}
        total = sum(weights.values())
        if share and not total:
            kind = {True: "harmful", False: "harmless"}[label]
            raise UserError(f"config.data.harmful_share={harmful_share}: there are no {kind} queries to draw")
        parts += [
            _Part(f"{source} {label}", share * weight / total, by_part[source, label])
            for source, weight in weights.items()
            if share * weight > 0
        ]
    return parts


class _Split(grain.experimental.FlatMapTransform):
    """A list of `max_fan_out` elements -> each of them."""

    def __init__(self, count: int):
        self.max_fan_out = count

    def flat_map(self, element: list) -> list:
        return element


def query_hash(query_id: str, language: str) -> int:
    """A stable 32-bit hash (CRC-32) of a query in a language, folded into random keys."""
    return zlib.crc32(f"{query_id}\x1f{language}".encode())
