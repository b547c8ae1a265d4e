"""Helpers that every other folder may use: errors, whole files, result logs, extras, and clients of servers."""
