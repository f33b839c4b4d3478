"""Queries in several languages: what a record is, and where records come from."""

from msd_jax.queries.files import read, write_jsonl
from msd_jax.queries.records import Query, language_name, require_languages

__all__ = ["Query", "language_name", "read", "require_languages", "write_jsonl"]
