"""How a batch is cut into micro-batches, and what is said where it cannot be."""

from __future__ import annotations

import re

import pytest
import torch

from gen_dist.errors import ConfigError
from gen_dist.parallel.processes import Processes
from gen_dist.presets import get_preset
from gen_dist.training.rows import rows_of_rank


@pytest.mark.parametrize(
    ("world_size", "ways"),
    [
        (1, "use --global-batch-size 6 or more, or --accumulation 4 or less"),
        (2, "use --global-batch-size 12 or more, --accumulation 2 or less, or fewer processes"),
        (5, "use --global-batch-size 30 or more, or fewer processes"),
    ],
)
def test_a_batch_of_too_few_images_names_the_ways_out(world_size: int, ways: str) -> None:
    config = get_preset("vae-mnist").with_options(global_batch_size=4, accumulation=6)
    with pytest.raises(ConfigError, match=f"{re.escape(ways)}$"):
        rows_of_rank(config, Processes(0, 0, world_size, torch.device("cpu")))
