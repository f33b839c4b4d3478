"""config.data -> records, of one source or of several that are kept apart."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from msd_jax.data import files, records
from msd_jax.data.records import Query, labelled, usable
from msd_jax.errors import UserError

if TYPE_CHECKING:
    import ml_collections

# The keys of a source, in config.data itself or in config.data.sources.NAME, where `weight` joins them.
DEFAULTS = {"path": "", "harmful": "file"}


def read(path: str | os.PathLike, *, harmful: str = "file", key: str = "config.data.path") -> tuple[Query, ...]:
    """Reads the records that one path names.

    Args:
      path: query files, see files.locate; or a TFDS dataset, as tfds://NAME[/CONFIG]:VERSION[/SPLIT][?data_dir=DIR].
      harmful: the label of records without one: "file" leaves it unknown, "true" or "false" sets it.
      key: the setting that errors name.

    Raises:
      UserError: one message that says what to change.
    """
    if _is_tfds(path):
        from msd_jax.data import parallel_queries  # here, for TFDS takes long to import

        return labelled(parallel_queries.read(str(path), key)[0], harmful)
    return files.read(path, harmful=harmful, key=key)


def load(
    data: "ml_collections.ConfigDict", tell: Callable[[str], None] = lambda line: None, *, teacher: bool = True
) -> tuple[Query, ...]:
    """Reads the records of a training run, source by source; with several sources, ids are NAME/ID.

    A record without a text in the source language (where anything reads the teacher), or in any target language whose
    weight is above 0, is left out.

    Args:
      data: config.data.
      tell: called with lines to print: the number of records of each source, where they are from, and the checksum if
        known; how many are left out; and how many there are by language and label.
      teacher: whether anything reads the teacher, see prompts.shows_teacher.

    Raises:
      UserError: one message that names the file or the key, and what to change.
    """
    found: list[Query] = []
    for name, source in settings(data).items():
        queries, where = _read(source, f"config.data.sources.{name}" if name else "config.data")
        tell(f"queries: {len(queries)} of {where}")
        found += [qualified(name, query) for query in queries]
    targets = [language for language, weight in data.languages.items() if weight > 0]
    queries = usable(found, data.source_language if teacher else None, targets, describe(data))
    if len(queries) < len(found):
        tell(
            f"queries: {len(found) - len(queries)} of {len(found)} left out: no text in "
            + f"{data.source_language}, or in " * teacher
            + f"{'none' if teacher else 'any'} of {', '.join(targets)}"
        )
    tell(f"queries: {records.describe(queries, targets)}")
    return queries


def settings(data: "ml_collections.ConfigDict") -> dict[str, dict[str, Any]]:
    """The keys of DEFAULTS and `weight` by source; the name of a single source, in config.data itself, is ""."""
    if data.get("sources"):
        return {name: DEFAULTS | {"weight": 1.0} | dict(source) for name, source in data.sources.items()}
    return {"": {key: data.get(key, value) for key, value in DEFAULTS.items()} | {"weight": 1.0}}


def weights(data: "ml_collections.ConfigDict") -> dict[str, float]:
    """Sampling weights by source, named as in `settings`."""
    return {name: float(source["weight"]) for name, source in settings(data).items()}


def describe(data: "ml_collections.ConfigDict") -> str:
    """The sources in a few words, for errors about their records."""
    return ", ".join(str(source["path"]) for source in settings(data).values())


def as_path(data: "ml_collections.ConfigDict") -> str:
    """The one source, as `read` takes it.

    Raises:
      UserError: there are several.
    """
    several = settings(data)
    if len(several) > 1:
        raise UserError(f"config.data.sources has {', '.join(several)}: name the queries in config.eval.path instead")
    return next(iter(several.values()))["path"]


def qualified(name: str, query: Query) -> Query:
    """The record of source `name` with an id that no other source has."""
    return dataclasses.replace(query, id=f"{name}/{query.id}") if name else query


def source_of(id: str) -> str:
    """The name of the source whose record `qualified` made."""
    return id.partition("/")[0]


def _read(source: Mapping[str, Any], key: str) -> tuple[tuple[Query, ...], str]:
    """(the records of a source, where they are from)."""
    path = str(source["path"])
    if not _is_tfds(path):
        return read(path, harmful=source["harmful"], key=f"{key}.path"), path
    from msd_jax.data import parallel_queries

    queries, metadata = parallel_queries.read(path, f"{key}.path")
    checksum = str(metadata.get("sha256", ""))[:12]
    return labelled(queries, source["harmful"]), path + (f", built from sha256 {checksum}..." if checksum else "")


def _is_tfds(path: object) -> bool:
    return str(path).startswith("tfds://")
