"""Bins of histograms of discriminator scores. They are fixed, so that histograms of all steps can be compared."""

SCORE_EDGES = tuple(float(edge) for edge in range(-10, 11))
"""Edges of 20 bins. The first bin also counts all scores below it, the last one all scores above it."""
