"""Files of JSON lines, and what a run shows on the console."""
