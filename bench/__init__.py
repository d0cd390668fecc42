"""Benchmarks. A package, so that pytest finds `kernels` beside it and not bench/kernels.py under that name."""
