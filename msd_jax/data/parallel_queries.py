"""The TFDS dataset `parallel_queries`: versioned, split by record, in array_record; TensorFlow is not needed.

`python -m msd_jax.queries --build SOURCE` builds it, for `tfds build` itself does not start without TensorFlow.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from msd_jax.data import files
from msd_jax.data.records import Query
from msd_jax.errors import UserError, UserFileError

NAME, VERSION = "parallel_queries", "1.0.0"
SPLITS = {"train": 0.9, "test": 0.1}
_REFERENCE = re.compile(r"(?P<name>[a-z]\w*)(/(?P<config>\w[\w.-]*))?(:(?P<version>\d+\.\d+\.\d+))?")
_URI = re.compile(r"tfds://(?P<reference>[^:?]+:[^/?]+)(/(?P<split>[^?]+))?(\?data_dir=(?P<data_dir>.+))?")
_TEXTS = tfds.features.Sequence({"language": tfds.features.Text(), "text": tfds.features.Text()})


class ParallelQueries(tfds.core.GeneratorBasedBuilder):
    """One example is one record, with the query in all its languages, so that no split separates translations."""

    def __init__(
        self, *, queries: Mapping[str, Sequence[Query]], metadata: dict[str, Any], version: str, **options: Any
    ):
        """Takes the queries of each split, what the dataset keeps as its metadata, and options of TFDS's builder."""
        self._queries, self._metadata = queries, metadata
        self.VERSION = tfds.core.Version(version)
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Queries, each in several languages.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "harmful": tfds.features.Text(),  # "true", "false", or "" for unknown
                    "category": tfds.features.Text(),
                    "texts": _TEXTS,
                    "answers": _TEXTS,
                }
            ),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,  # the order of the source; training shuffles by its seed
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(queries) for split, queries in self._queries.items()}

    def _generate_examples(self, queries: Sequence[Query]) -> Iterator[tuple[str, dict[str, Any]]]:
        for query in queries:
            yield (
                query.id,
                {
                    "id": query.id,
                    "harmful": "" if query.harmful is None else str(query.harmful).lower(),
                    "category": query.category,
                    "texts": _pairs(query.texts),
                    "answers": _pairs(query.answers),
                },
            )


@dataclasses.dataclass(frozen=True)
class Built:
    """A dataset on disk.

    Attributes:
      directory: DATA_DIR/NAME[/CONFIG]/VERSION.
      reference: NAME[/CONFIG]:VERSION.
      data_dir: DATA_DIR, or "" for TFDS's own.
      metadata: `source`, `sha256` (of the source), `harmful` (the label of records without one), `splits` (their shares
        as configured), `records` (number by split) and `languages` (number of records by language).
    """

    directory: pathlib.Path
    reference: str
    data_dir: str
    metadata: dict[str, Any]

    def path(self, split: str) -> str:
        """What config.data.path or config.eval.path takes."""
        return f"tfds://{self.reference}/{split}" + (f"?data_dir={self.data_dir}" if self.data_dir else "")

    def lines(self) -> Iterator[str]:
        """Where it is, what it was built from, and how many records each split and language has."""
        yield str(self.directory)
        yield f"source {self.metadata['source']}, sha256 {self.metadata['sha256']}"
        for split, count in self.metadata["records"].items():
            yield f"{self.path(split)}: {count} records"
        yield "languages: " + ", ".join(f"{code} {count}" for code, count in self.metadata["languages"].items())


def build(
    source: str,
    reference: str = NAME,
    data_dir: str = "",
    splits: Mapping[str, float] = SPLITS,
    harmful: str = "file",
) -> Built:
    """Builds a dataset, unless it has been built from the same source in the same way.

    Args:
      source: as for files.read.
      reference: parallel_queries[/CONFIG][:VERSION]; CONFIG distinguishes several datasets.
      data_dir: "" for TFDS_DATA_DIR, or ~/tensorflow_datasets.
      splits: each split's share of the records, adding up to 1; see `split_of`.
      harmful: the label of records without one: "file" leaves it unknown, "true" or "false" sets it.

    Raises:
      UserError: one message, most often because this version has been built from something else.
    """
    name, config, version = _parse(reference)
    if name != NAME:
        raise UserError(f"{reference}: the dataset is called {NAME}; name several as {NAME}/CONFIG:VERSION")
    if not splits or min(splits.values()) <= 0 or abs(sum(splits.values()) - 1) > 1e-6:
        raise UserError(f"splits {dict(splits)}: each needs a share above 0, adding up to 1 (train=0.9,test=0.1)")
    metadata = {"sha256": checksum(source), "harmful": harmful, "splits": dict(splits)}
    directory, whole = _directory(reference, data_dir), f"{name}{config and '/' + config}:{version}"
    if directory.exists():
        built = Built(directory, whole, data_dir, dict(_open(directory).info.metadata or {}))
        changed = [key for key, value in metadata.items() if built.metadata.get(key) != value]
        if changed:
            then_and_now = ", ".join(f"{key} {built.metadata.get(key)} (now {metadata[key]})" for key in changed)
            other = f"{name}{config and '/' + config}:{_next(version)}"
            raise UserError(
                f"{directory} was built with {then_and_now}: build another version (--name {other}), or remove the "
                "directory"
            )
        return built
    queries = files.read(source, harmful=harmful, key="SOURCE")
    by_split = {split: [query for query in queries if split_of(query.id, splits) == split] for split in splits}
    by_split = {split: chosen for split, chosen in by_split.items() if chosen}  # TFDS knows no empty splits
    metadata |= {
        "source": str(source),
        "records": {split: len(chosen) for split, chosen in by_split.items()},
        "languages": dict(collections.Counter(code for query in queries for code in query.texts)),
    }
    options = {"config": tfds.core.BuilderConfig(name=config, version=version)} if config else {}
    builder = ParallelQueries(
        queries=by_split, metadata=metadata, version=version, data_dir=data_dir or None, **options
    )
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints about downloads
        builder.download_and_prepare()
    return Built(directory, whole, data_dir, metadata)


def read(uri: str, key: str = "config.data.path") -> tuple[tuple[Query, ...], dict[str, Any]]:
    """Reads a dataset that has been built: (records, metadata).

    Args:
      uri: tfds://NAME[/CONFIG]:VERSION[/SPLIT][?data_dir=DIR]. SPLIT, by default train, is as TFDS writes it: "train",
        "train+test", "train[:10%]"; DIR as for `build`.
      key: the setting that errors name.

    Raises:
      UserError: the dataset or the split does not exist, or is damaged; one message.
    """
    match = _URI.fullmatch(uri)
    if not match:
        raise UserError(f"{key}={uri!r}: write tfds://NAME[/CONFIG]:VERSION[/SPLIT][?data_dir=DIR]")
    reference, split = match["reference"], match["split"] or "train"
    directory = _directory(reference, match["data_dir"] or "")
    if not directory.is_dir():
        raise UserFileError(
            f"{key}={uri!r}: there is no {directory}; build it by `python -m msd_jax.queries --build SOURCE --name "
            f"{reference}`, or add ?data_dir=DIR with the directory that holds it"
        )
    builder = _open(directory)
    missing = {"id", "harmful", "category", "texts", "answers"} - set(builder.info.features)
    if missing:
        raise UserError(f"{directory} is not a dataset of parallel queries: it has no {', '.join(sorted(missing))}")
    try:
        rows = builder.as_data_source(split)
        examples = rows.__getitems__(range(len(rows)))
    except ValueError as error:
        raise UserError(f"{key}={uri!r}: {str(error).splitlines()[0]}") from None
    queries = tuple(
        Query(
            id=row["id"].decode(),
            harmful={b"": None, b"true": True, b"false": False}[row["harmful"]],
            category=row["category"].decode(),
            texts=_mapping(row["texts"]),
            answers=_mapping(row["answers"]),
        )
        for row in examples
    )
    return queries, dict(builder.info.metadata or {})


def split_of(id: str, splits: Mapping[str, float]) -> str:
    """The split of a record, which follows from its id alone, so that adding or removing records moves no others."""
    point = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") / 2**64
    for split, share in splits.items():
        if point < share:
            return split
        point -= share
    return split


def checksum(source: str) -> str:
    """The SHA-256 of a source: of its file, as `sha256sum` prints it; of several files, of the list of their sums."""
    paths = files.locate(source, key="SOURCE")
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    if len(sums) == 1:
        return sums[0]
    return hashlib.sha256("".join(f"{s}  {path.name}\n" for s, path in zip(sums, paths)).encode()).hexdigest()


def _parse(reference: str) -> tuple[str, str, str]:
    """(name, config or "", version)."""
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise UserError(f"{reference!r}: write NAME[/CONFIG][:VERSION], as in {NAME}:{VERSION}")
    return match["name"], match["config"] or "", match["version"] or VERSION


def _directory(reference: str, data_dir: str) -> pathlib.Path:
    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    return root.joinpath(*filter(None, _parse(reference)))


def _open(directory: pathlib.Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder_from_directory(directory)
    except (OSError, ValueError, AssertionError, KeyError) as error:
        raise UserError(
            f"{directory} is not a complete TFDS dataset ({type(error).__name__}): remove it and build again"
        ) from None


def _next(version: str) -> str:
    *parts, last = version.split(".")
    return ".".join([*parts, str(int(last) + 1)])


def _pairs(texts: Mapping[str, str]) -> dict[str, list[str]]:
    return {"language": list(texts), "text": list(texts.values())}


def _mapping(pairs: Mapping[str, Sequence[bytes]]) -> dict[str, str]:
    return {language.decode(): text.decode() for language, text in zip(pairs["language"], pairs["text"])}
