"""A run: its set-up, its loop, its step."""
