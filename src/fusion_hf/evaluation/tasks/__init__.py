"""Tasks for lmms-eval that this package adds."""
