"""Whether a model is safe and useful, by language."""
