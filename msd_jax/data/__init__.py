"""Queries in several languages: records, where they come from, what each role is shown, and batches."""
