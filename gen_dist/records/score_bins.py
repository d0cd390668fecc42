"""The bins in which a discriminator's scores are counted: fixed, so that histograms of all steps compare."""

SCORE_EDGES = tuple(float(edge) for edge in range(-10, 11))
"""Edges of 20 bins; the first also takes all scores below it, the last all above."""
