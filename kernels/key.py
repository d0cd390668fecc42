"""The key of a draw: all random numbers here are functions of it and of a place in the row."""

from typing import NamedTuple

from torch import Tensor


class Key(NamedTuple):
    """What a block of draws depends on. Row i of the block is the global row `first_row + i`.

    Neither the rank nor the micro-batch that holds a row is part of its key, so any split of a batch draws the same
    numbers.
    """

    rng: Tensor
    """int64 [2], (seed, step), on the device that draws: a Python number would be a constant of a compiled step."""
    stream: int
    """Purpose of the draw. Draws of two streams are independent."""
    first_row: int
    """Global row of the block's first row."""
