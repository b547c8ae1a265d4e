"""Evaluate FUSION on published benchmarks with lmms-eval: model adapter, tasks, runs and their records."""
