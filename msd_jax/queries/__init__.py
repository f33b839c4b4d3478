"""Queries in several languages: what a record is, and where records come from."""

from msd_jax.queries.files import Query, language_name, read, require_languages, write_jsonl

__all__ = ["Query", "language_name", "read", "require_languages", "write_jsonl"]
