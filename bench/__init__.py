"""Benchmarks. A package, so that pytest finds `kernels` beside it and not bench/gpu/kernels.py under that name."""
