"""Benchmarks of pytest-benchmark: `make bench`."""
