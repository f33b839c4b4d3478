"""config.data -> records: from one source, or from several whose records keep apart."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from msd_jax.data import files
from msd_jax.data.records import Query
from msd_jax.errors import UserError

if TYPE_CHECKING:
    import ml_collections

# The keys of a source, in config.data itself or in config.data.sources.NAME, where `weight` joins them.
DEFAULTS = {"path": "", "tfds": "", "split": "train", "data_dir": "", "harmful": "file"}


def load(data: "ml_collections.ConfigDict", tell: Callable[[str], None] = lambda line: None) -> tuple[Query, ...]:
    """The records that training reads; of several sources one after the other, their ids as NAME/ID.

    Args:
      data: config.data.
      tell: is called with a line for each source: how many records, from where, and the checksum where it is known.

    Raises:
      UserError: one message that names the file or the key, and what to mend.
    """
    records: list[Query] = []
    for name, source in settings(data).items():
        read, where = _read(source, f"config.data.sources.{name}" if name else "config.data")
        tell(f"queries: {len(read)} of {where}")
        records += [qualified(name, query) for query in read]
    return tuple(records)


def settings(data: "ml_collections.ConfigDict") -> dict[str, dict[str, Any]]:
    """Name -> DEFAULTS and weight as configured; the name of a single source, in config.data itself, is ""."""
    if data.get("sources"):
        return {name: DEFAULTS | {"weight": 1.0} | dict(source) for name, source in data.sources.items()}
    return {"": {key: data.get(key, value) for key, value in DEFAULTS.items()} | {"weight": 1.0}}


def weights(data: "ml_collections.ConfigDict") -> dict[str, float]:
    """Sampling weight by name, as in `settings`."""
    return {name: float(source["weight"]) for name, source in settings(data).items()}


def describe(data: "ml_collections.ConfigDict") -> str:
    """The sources in a few words, for errors about their records."""
    return ", ".join(source["tfds"] or str(source["path"]) for source in settings(data).values())


def as_path(data: "ml_collections.ConfigDict") -> str:
    """The one source as files.read takes it. Raises UserError where there are several."""
    several = settings(data)
    if len(several) > 1:
        raise UserError(f"config.data.sources has {', '.join(several)}: name the queries in config.eval.path instead")
    source = next(iter(several.values()))
    if not source["tfds"]:
        return source["path"]
    version = "" if ":" in source["tfds"] else ":1.0.0"
    data_dir = f"?data_dir={source['data_dir']}" if source["data_dir"] else ""
    return f"tfds://{source['tfds']}{version}/{source['split']}{data_dir}"


def qualified(name: str, query: Query) -> Query:
    """The record of source `name` with an id that no other source has."""
    return dataclasses.replace(query, id=f"{name}/{query.id}") if name else query


def source_of(id: str) -> str:
    """The name of the source whose record `qualified` made."""
    return id.partition("/")[0]


def _read(source: Mapping[str, Any], key: str) -> tuple[tuple[Query, ...], str]:
    """(records, what they are)."""
    if source["tfds"]:
        from msd_jax.data import parallel_queries

        records, metadata = parallel_queries.read(source["tfds"], source["split"], source["data_dir"], key)
        checksum = str(metadata.get("sha256", ""))[:12]
        return (
            files.labelled(records, source["harmful"]),
            f"{source['tfds']}, split {source['split']}" + (f", built from sha256 {checksum}..." if checksum else ""),
        )
    return files.read(source["path"], harmful=source["harmful"], key=f"{key}.path"), str(source["path"])
