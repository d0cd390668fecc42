"""Picture of the samples that are nearest to a training image, each beside that image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from gen_dist.errors import UserError
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metrics.memorization import copies_of
from gen_dist.files import reason_of
from gen_dist.pictures.grids import save_pairs

PAIRS = 32
TITLE = "in each pair: a sample, and its nearest training image, mirrored where that is nearer; nearest first"


def draw_nearest_pairs(path: Path, context: Context, say: Callable[[str], None]) -> None:
    """Draw the pairs that `memorization` found. Only the main process calls it."""
    found, scale = copies_of(context), context.dataset.scale
    places = found.order[:PAIRS].cpu()
    rows = context.training.rows[found.training_rows.cpu()[places].numpy()]
    training = scale.eight_bit(np.ascontiguousarray(context.dataset.train.sample.images[rows]))
    mirrored = found.mirrored.cpu()[places].numpy()
    training = np.where(mirrored[:, None, None, None], training[..., ::-1], training)
    samples = context.sampled.images[places.to(context.sampled.images.device)]
    try:
        save_pairs(path, scale.eight_bit(_values(context, samples)), training, TITLE, bar=scale.shown_values)
    except (OSError, UserError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        say(f"warning: the nearest training images are not drawn: {reason}")


def _values(context: Context, images: Tensor) -> np.ndarray:
    """Values of the data's dtype from images in the model's range."""
    scale = context.dataset.scale
    found: np.ndarray = (images if scale.is_plain else scale.values(images / 255.0)).cpu().numpy()
    return found
