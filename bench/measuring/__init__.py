"""How benchmarks time, under which conditions, and what they say of spread."""
