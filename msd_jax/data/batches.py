"""Records -> encoded prompts -> shuffled, padded batches, whose order depends on (seed, position) alone. By grain."""

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import grain
import numpy as np

from msd_jax.data import prompts, sources
from msd_jax.data.prompts import Example
from msd_jax.data.records import Query, usable
from msd_jax.data.references import References
from msd_jax.errors import UserError
from msd_jax.parallel import padding

if TYPE_CHECKING:
    import ml_collections
    import transformers


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedQuery:
    """One query in each of its target languages.

    Attributes:
      id, harmful: of the record.
      targets: its examples in the target languages, at least one.
      retained: its example in the source language, see prompts.retained; None if queries are not retained.
    """

    id: str
    harmful: bool | None
    targets: tuple[Example, ...]
    retained: Example | None = None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """All queries, without the prompts that exceed a limit and without the queries of which no target is left.

    Attributes:
      queries: in the order of the records.
      languages: the target languages; each has examples.
      student_limit, teacher_limit: in tokens.
      dropped: number of prompt pairs left out, by (language, limits exceeded: "student_limit", "teacher_limit" or
        "student_limit and teacher_limit").
      hostile: number of queries, of all records, that spell a control token of the tokenizer.
      references: the lines on reference responses that are absent or cut.
    """

    queries: tuple[EncodedQuery, ...]
    languages: tuple[str, ...]
    student_limit: int
    teacher_limit: int
    dropped: Mapping[tuple[str, str], int]
    hostile: int = 0
    references: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[int, int]:
        """The largest P of each role. Batches of short prompts have half of it: two programs generate for all."""
        lengths = ((len(example.student_ids), len(example.teacher_ids)) for example in self.examples())
        student, teacher = map(max, zip(*lengths))
        return padding.bucket(student, self.student_limit), padding.bucket(teacher, self.teacher_limit)

    def examples(self) -> Iterator[Example]:
        """Every example that may be drawn."""
        for query in self.queries:
            yield from query.targets
            if query.retained:
                yield query.retained

    def describe(self) -> list[str]:
        """One line per language and limit by which prompts are dropped, on references, and on control tokens."""
        return (
            [*self.references]
            + [
                f"prompts dropped in {language}: {count}, longer than config.prompts.{limits}"
                for (language, limits), count in self.dropped.items()
            ]
            + prompts.describe_hostile("training", self.hostile)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """B queries, each in one target language. Masks come from lengths, for the pad id may be a token of the text.

    Attributes:
      student_prompt_BxP: int32 [B, P], left-padded; P differs between the roles and has one of two sizes.
      student_length_B: int32 [B], real tokens.
      teacher_prompt_BxP: int32 [B, P], left-padded.
      teacher_length_B: int32 [B].
      query_hash_B: uint32 [B], see `query_hash`.
      examples: one per row.
      columns: the larger P of each role.
    """

    student_prompt_BxP: np.ndarray
    student_length_B: np.ndarray
    teacher_prompt_BxP: np.ndarray
    teacher_length_B: np.ndarray
    query_hash_B: np.ndarray
    examples: tuple[Example, ...]
    columns: tuple[int, int]


def encode_all(
    records: Sequence[Query],
    languages: Sequence[str],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
    analyses: Mapping[str, str] | None = None,
) -> Encoded:
    """Encodes each query, once in each target language that it has.

    Args:
      records: those without the source language (where anything reads the teacher), or without any of `languages`, are
        left out; so are, with config.rollout.policy = "reference", languages in which a record has no answer.
      languages: the target languages.
      tokenizer: of transformers.
      config: the whole config.
      analyses: the teacher's, by id of the query, with config.prompts.cot = "generated"; "" where there is none.

    Raises:
      UserError: no record has a language, or an answer in it that is needed, or every prompt in it exceeds a limit.
    """
    source = config.data.source_language
    teachers = source if prompts.shows_teacher(config) else None
    references = References(tokenizer, config.rollout.max_new_tokens) if config.rollout.policy == "reference" else None
    where = sources.describe(config.data)
    prompts.check_templates(tokenizer, config.prompts)
    limits = _Limits({key: config.prompts[key] for key in ("student_limit", "teacher_limit")})
    retained = (source,) if config.data.retain_fraction > 0 else ()
    hostile = sum(prompts.is_hostile(record, (source, *languages), tokenizer) for record in records)
    records = usable(records, teachers, languages, where)
    if references:
        references.require(records, (*languages, *retained), where)

    def held(record: Query, examples: Iterable[Example]) -> list[Example]:
        """Those within the limits, with their reference responses where these are asked for."""
        if references:
            examples = references.added(record, examples)
        return [example for example in examples if limits.hold(example)]

    queries = []
    for record in records:
        analysis = (analyses or {}).get(record.id, "")
        spoken = (language for language in languages if language in record.texts)
        targets = held(
            record, (prompts.encode(record, x, tokenizer, config.prompts, teachers, analysis) for x in spoken)
        )
        shown = held(record, (prompts.retained(record, tokenizer, config.prompts, x) for x in retained))
        if targets:
            queries.append(EncodedQuery(record.id, record.harmful, tuple(targets), next(iter(shown), None)))
    encoded = Encoded(
        tuple(queries),
        tuple(languages),
        **limits.tokens,
        dropped=dict(limits.dropped),
        hostile=hostile,
        references=tuple(references.describe()) if references else (),
    )
    limits.require_left(encoded, (*languages, *retained), where)
    return encoded


class _Limits:
    """The longest prompts that are allowed, and the prompts that were longer.

    Attributes:
      tokens: by key of config.prompts.
      dropped: as in Encoded.
    """

    def __init__(self, tokens: Mapping[str, int]):
        self.tokens = tokens
        self.dropped: collections.Counter[tuple[str, str]] = collections.Counter()
        self._longest: collections.Counter[tuple[str, str]] = collections.Counter()

    def hold(self, example: Example) -> bool:
        """Whether both prompts are within their limits; counts the example if not."""
        lengths = {"student_limit": len(example.student_ids), "teacher_limit": len(example.teacher_ids)}
        over = [key for key, limit in self.tokens.items() if lengths[key] > limit]
        for key in over:
            self._longest[example.language, key] = max(self._longest[example.language, key], lengths[key])
        if over:
            self.dropped[example.language, " and ".join(over)] += 1
        return not over

    def require_left(self, encoded: Encoded, languages: Sequence[str], where: str) -> None:
        """Raises UserError where every prompt in one of `languages` exceeds a limit."""
        left = {example.language for example in encoded.examples()}
        for language in languages:
            if language not in left:
                raise UserError(
                    f"{where}: all prompts in {language!r} are longer than {self.exceeded(language)}; raise the limit"
                )

    def exceeded(self, language: str) -> str:
        """The limits that prompts in `language` exceeded, and by how much."""
        return " and ".join(
            f"config.prompts.{key}={limit} (longest: {self._longest[language, key]} tokens)"
            for key, limit in self.tokens.items()
            if self._longest[language, key]
        )


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

    Each epoch holds every query once, in a new order and in one of its target languages, drawn by weight; batches
    continue across the ends of epochs. Where queries are in parts that are mixed (sources, harmful and harmless), each
    part has epochs of its own, and among any number of successive queries each part has its share, rounded. Query i of
    the stream depends on (seed, i) alone: neither on the batch size nor on the number of hosts. Of every
    `window * batch_size` queries those of like length then share a batch, which saves padding, and the batches come in
    random order. All hosts build the same batch and take their rows of it, so that they agree on P.

    `iter(...)` gives an iterator with get_state() and set_state(); the state is {"next_index": i}, an int.

    Args:
      encoded: from `encode_all`.
      weights: sampling weight by target language; 0 or absent leaves the language out.
      batch_size: B.
      seed: at least 0.
      pad_id: fills the left of shorter prompts.
      window: number of batches among which queries are sorted by length; 1 leaves them in their order.
      source_weights: each source's share of the stream, relative to the others', whatever its size; 0 leaves it out.
        None, or a single source: queries in their proportions.
      harmful_share: share of harmful queries in the stream, 0 to 1; sources then share out the harmful part, and the
        harmless part, by their weights. None: queries in their proportions.
      retain_fraction: probability that a query is shown as its `retained` example instead of in a target language.

    Raises:
      UserError: a weight is not a finite number of at least 0, its language was not encoded, or no query is left.
    """
    parts = _parts(_drawable(encoded, weights), source_weights or {}, harmful_share)
    draw = functools.partial(_draw, weights=weights, retain_fraction=retain_fraction)

    def endless(queries: Sequence[EncodedQuery], seed: int) -> grain.MapDataset[Example]:
        # shuffle(seed=s) would use s + epoch, so that seeds 0 and 1 would share epochs
        return grain.MapDataset.source(queries).seed(seed).shuffle().repeat().random_map(draw)

    if len(parts) == 1:
        stream = endless(parts[0].queries, seed)
    else:
        mixed = [endless(part.queries, part.seed(seed)) for part in parts]
        stream = grain.MapDataset.mix(mixed, [part.share for part in parts]).seed(seed)
    windows = stream.batch(window * batch_size, drop_remainder=True, batch_fn=list)
    groups = windows.random_map(functools.partial(_group, batch_size=batch_size, window=window))
    split = grain.experimental.FlatMapMapDataset(groups, _Split(window))
    collate = functools.partial(_collate, columns=encoded.columns, pad_id=pad_id)
    # Everything is in memory already: no threads, no buffer.
    return split.map(collate).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def _drawable(encoded: Encoded, weights: Mapping[str, float]) -> list[EncodedQuery]:
    """The queries, in the languages with a weight above 0."""
    for language, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"config.data.languages.{language}={weight!r} must be a finite number of at least 0")
        if language not in encoded.languages:
            raise UserError(f"config.data.languages.{language}: only {', '.join(encoded.languages)} were encoded")
    queries = [
        dataclasses.replace(query, targets=targets)
        for query in encoded.queries
        if (targets := tuple(example for example in query.targets if weights.get(example.language)))
    ]
    if not queries:
        raise UserError(f"config.data.languages={dict(weights)}: no language with a weight above 0 has queries")
    return queries


def _draw(
    query: EncodedQuery, rng: np.random.Generator, *, weights: Mapping[str, float], retain_fraction: float
) -> Example:
    """The query in one of its languages."""
    choices, weight_L = query.targets, np.array([weights[x.language] for x in query.targets], np.float64)
    share_L = weight_L / weight_L.sum()
    if query.retained:
        choices = (*choices, query.retained)
        share_L = np.append((1 - retain_fraction) * share_L, retain_fraction)
    return choices[rng.choice(len(choices), p=share_L)]


def _group(
    examples: Sequence[Example], rng: np.random.Generator, *, batch_size: int, window: int
) -> list[Sequence[Example]]:
    """The batches of a window, those of like length together, in random order."""
    if window > 1:
        examples = sorted(examples, key=lambda example: len(example.student_ids) + len(example.teacher_ids))
    groups = [examples[first : first + batch_size] for first in range(0, len(examples), batch_size)]
    return [groups[i] for i in rng.permutation(window)]


def _collate(examples: Sequence[Example], *, columns: tuple[int, int], pad_id: int) -> Batch:
    """The batch; `columns` hold any prompt of each role."""

    def padded(rows: Sequence[np.ndarray], whole: int) -> tuple[np.ndarray, np.ndarray]:
        return padding.left_pad(rows, whole, pad_id, padding.half_or_whole(max(map(len, rows)), whole))

    student = padded([example.student_ids for example in examples], columns[0])
    teacher = padded([example.teacher_ids for example in examples], columns[1])
    hashes = [query_hash(example.query_id, example.language) for example in examples]
    return Batch(*student, *teacher, np.array(hashes, np.uint32), tuple(examples), columns)


class _Part(NamedTuple):
    """Queries that have a share of the stream."""

    name: str
    share: float
    queries: list[EncodedQuery]

    def seed(self, seed: int) -> int:
        """A seed of the part's own, whatever other parts there are."""
        return int(np.random.SeedSequence([seed, zlib.crc32(self.name.encode())]).generate_state(1)[0])


def _parts(
    queries: Sequence[EncodedQuery], source_weights: Mapping[str, float], harmful_share: float | None
) -> list[_Part]:
    """The parts with a share above 0, by source and label; one part with all queries where nothing is mixed."""
    by_part: dict[tuple[str, bool | None], list[EncodedQuery]] = collections.defaultdict(list)
    for query in queries:
        source = sources.source_of(query.id) if len(source_weights) > 1 else ""
        by_part[source, None if harmful_share is None else query.harmful].append(query)
    present = {source for source, _ in by_part}
    for source, weight in source_weights.items():
        if weight and len(source_weights) > 1 and source not in present:
            raise UserError(f"config.data.sources.{source}: none of its queries is left; set its weight to 0")
    shares: dict[bool | None, float] = {None: 1.0}
    if harmful_share is not None:
        shares = {True: harmful_share, False: 1 - harmful_share}
        if unlabelled := [query.id for (_, label), part in by_part.items() if label is None for query in part]:
            raise UserError(
                f"config.data.harmful_share={harmful_share}: {len(unlabelled)} queries have no label (first: id "
                f"{unlabelled[0]!r}); label them, or set `harmful` of their source to true or false"
            )
    parts = []
    for label, share in shares.items():
        weights = {source: source_weights.get(source, 1.0) for source, other in by_part if other is label}
        total = sum(weights.values())
        if share and not total:
            kind = "harmful" if label else "harmless"
            raise UserError(f"config.data.harmful_share={harmful_share}: there are no {kind} queries to draw")
        parts += [
            _Part(f"{source} {label}", share * weight / total, by_part[source, label])
            for source, weight in weights.items()
            if share * weight > 0
        ]
    return parts


class _Split(grain.experimental.FlatMapTransform):
    """A list of `max_fan_out` elements -> its elements."""

    def __init__(self, count: int):
        self.max_fan_out = count

    def flat_map(self, element: list) -> list:
        return element


def query_hash(query_id: str, language: str) -> int:
    """A stable 32-bit hash (CRC-32) of a query in a language, folded into random keys."""
    return zlib.crc32(f"{query_id}\x1f{language}".encode())
