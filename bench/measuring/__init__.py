"""Timing, conditions and spread of measurements, shared by all benchmarks."""
