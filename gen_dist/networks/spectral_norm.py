"""Spectral normalization with one power iteration per turn (Miyato et al. 2018)."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm
from torch.nn.utils.parametrize import is_parametrized


def spectrally_normalize(module: nn.Module) -> None:
    """Divide every weight of linear and convolutional layers by its largest singular value (Miyato et al. 2018).

    Each forward in training mode takes one step of power iteration, unless `iterate_spectral_norms` does. The two
    vectors of the iteration are buffers, saved with the weights.
    """
    for layer in [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]:
        spectral_norm(layer)


def spectrally_normalized(module: nn.Module) -> list[nn.Module]:
    """Layers of a module with spectrally normalized weights."""
    return [
        layer
        for layer in module.modules()
        if is_parametrized(layer, "weight") and isinstance(_norm_of(layer), _SpectralNorm)
    ]


def iterate_spectral_norms(layers: Iterable[nn.Module]) -> None:
    """Take one step of power iteration in each of these layers; forwards then take none until the next `train()`.

    All forwards and micro-batches of a turn thus have the same weights.
    """
    for layer in layers:
        norm = _norm_of(layer)
        norm.training = True
        with torch.no_grad():
            layer.weight  # noqa: B018  # reading it takes the step
        norm.training = False


def _norm_of(layer: nn.Module) -> nn.Module:
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    weight = layer.parametrizations["weight"]
    assert isinstance(weight, nn.ModuleList)
    return weight[0]
