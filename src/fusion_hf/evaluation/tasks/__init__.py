"""Tasks of our own for lmms-eval."""
