"""Truncation of styles: generated images nearer to the average one (Karras et al. 2019, appendix B)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gen_dist.errors import UserError
from gen_dist.kernels import Key, normal
from gen_dist.networks.label_inputs import with_labels
from gen_dist.networks.players import Generator
from gen_dist.networks.stylegan2 import Stylegan2Decoder
from gen_dist.objectives import Objective
from gen_dist.randomness import Stream

LATENTS_OF_THE_MEAN = 10_000
"""Latents over whose styles the mean is taken, as in the authors' code."""


def truncating_decoder(objective: Objective) -> Stylegan2Decoder | None:
    """Decoder of a generator with styles, or None."""
    if "generator" not in objective.networks:
        return None
    decoder = getattr(objective.networks["generator"], "decoder", None)
    return decoder if isinstance(decoder, Stylegan2Decoder) else None


@contextlib.contextmanager
def truncated(objective: Objective, truncation: float, labels_in_turn: Callable[[int], Tensor]) -> Iterator[None]:
    """Context manager in which styles have `truncation` times their distance from the mean style.

    Args:
        objective: a model in eval mode.
        truncation: 1 changes nothing, 0 gives every image the mean style.
        labels_in_turn: labels of so many images, for a conditional model; see `GenerativeModel`.

    Raises:
        UserError: the number is not in 0..1, or the model has no styles.
    """
    if not (math.isfinite(truncation) and 0.0 <= truncation <= 1.0):
        raise UserError(f"truncation {truncation} is not in 0..1; 0.7 is usual, and 1 truncates nothing")
    if truncation == 1.0:
        yield
        return
    decoder = truncating_decoder(objective)
    if decoder is None:
        raise UserError("truncation needs a generator with styles, which network stylegan2 has; leave it out")
    take_mean_style(objective, labels_in_turn)
    decoder.truncation = truncation
    try:
        yield
    finally:
        decoder.truncation = 1.0


def take_mean_style(objective: Objective, labels_in_turn: Callable[[int], Tensor]) -> None:
    """Compute the mean style of a generator that has styles, if its weights come without one.

    It is the mean over `LATENTS_OF_THE_MEAN` keyed latents, with all classes in turn, so weights alone decide it.
    """
    decoder = truncating_decoder(objective)
    if decoder is None or bool(decoder.mean_style.any()):
        return
    generator = objective.networks["generator"]
    assert isinstance(generator, Generator)
    device, key = decoder.mean_style.device, Key(torch.tensor([0, 0]), Stream.MEAN_STYLE, 0)
    with torch.no_grad():
        inputs = normal(key, LATENTS_OF_THE_MEAN, math.prod(objective.latent_shape)).to(device)
        if generator.label_vectors:
            inputs = with_labels(inputs, generator.label_vectors(labels_in_turn(LATENTS_OF_THE_MEAN).to(device)))
        decoder.mean_style.copy_(decoder.mapping(inputs).mean(dim=0, dtype=torch.float64))
