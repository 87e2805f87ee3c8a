"""Benchmarks: providers that are checked first, then timed side by side in one run."""
