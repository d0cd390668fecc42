"""Shapes of the outputs of networks from outside this package, before any training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gen_dist.errors import ConfigError


def refuse_other_shape(
    network: nn.Module, kind: str, given: tuple[int, ...], expected: tuple[int, ...], *, spatial: bool = False
) -> None:
    """Raise ConfigError if a plug-in's network maps inputs [2, *given] to another shape than [2, *expected].

    Shapes alone are computed, on a copy without memory. Ours are held to their shapes by tests. A network whose shapes
    cannot be computed so is not refused.

    Args:
        network: the network.
        kind: kind of its config, for the error.
        given: shape of one input.
        expected: shape of one output.
        spatial: allow further dimensions at the end of the output.
    """
    if type(network).__module__.startswith("gen_dist.networks."):
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = copy.deepcopy(network).to("meta").eval()(torch.empty(2, *given, device="meta"))
    except Exception:  # the user's own code: its error is raised where it is used
        return
    if not isinstance(found, Tensor):
        raise ConfigError(f"network {kind}: {type(network).__name__} gives {type(found).__name__}, not a tensor")
    seen = tuple(found.shape[: len(expected) + 1]) if spatial else tuple(found.shape)
    if seen != (2, *expected):
        raise ConfigError(
            f"network {kind}: {type(network).__name__} gives {_text(tuple(found.shape[1:]))} for inputs "
            f"{_text(given)}, and {_text(expected)} is needed"
        )


def _text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(['B', *map(str, shape)])}]"
