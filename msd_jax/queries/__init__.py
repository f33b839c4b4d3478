"""Queries in several languages: what a record is, and where records come from."""

from msd_jax.queries.files import read, write_jsonl
from msd_jax.queries.records import Query, language_name, require_languages
from msd_jax.queries.sources import as_path, describe, load

__all__ = ["Query", "as_path", "describe", "language_name", "load", "read", "require_languages", "write_jsonl"]
