"""FUSION on published benchmarks, through lmms-eval: adapter, tasks, runs and their records."""
