"""Training: the set-up of a run, its loop, its step."""
