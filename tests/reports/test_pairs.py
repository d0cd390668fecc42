"""The difference of reconstructions is what a page says it is."""

from __future__ import annotations

import numpy as np
import pytest

from gen_dist.reports.pairs import visible_difference


@pytest.mark.parametrize(("error", "factor"), [(0, 16), (10, 16), (40, 6), (200, 1)])
def test_a_small_difference_is_enlarged_by_a_whole_factor(error: int, factor: int) -> None:
    originals = np.full((2, 1, 8, 8), 220, np.uint8)
    others = (originals - error).astype(np.uint8)
    for pair in ((originals, others), (others, originals)):
        difference, times = visible_difference(*pair)
        assert times == factor
        assert (difference == error * factor).all()
