"""Text files, files of JSON lines, and what a run shows on the console."""
