"""Key of a draw: all random numbers of this package are functions of it and of a position in the row."""

from typing import NamedTuple

from torch import Tensor


class Key(NamedTuple):
    """Key of a block of draws. Row i of the block is the global row `first_row + i`.

    Neither rank nor micro-batch is part of the key, so any split of a batch draws the same numbers.
    """

    rng: Tensor
    """int64 [2], (seed, step), on the device that draws: a Python number would be a constant of a compiled step."""
    stream: int
    """Purpose of the draw. Draws of two streams are independent."""
    first_row: int
    """Global row of the block's first row."""
