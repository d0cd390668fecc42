"""A prior that is fitted to a trained model's latents: a mixture of Gaussians in place of the standard normal.

A VAE's latents of images do not fill its prior evenly, and an autoencoder has no prior at all. Images decoded from
draws of a distribution that was fitted to latents of training images are better (Ghosh et al. 2020, section 4). Here
latents are turned into their principal components: the first ones are a mixture of Gaussians with full covariances, the
others are independent normal numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gen_dist.errors import CheckpointError, DamagedError, shortened
from gen_dist.files import read_regular, unreadable, write_atomically
from gen_dist.kernels import Key, normal
from gen_dist.randomness import Stream

_FORMAT = "1"
_FACTS = "facts"
_NAMES = ("weights", "means", "factors", "centre", "directions", "deviations")


class FittedPrior(NamedTuple):
    """A mixture of K Gaussians of the first d of r principal components of latents of D numbers. All float64."""

    weights: Tensor
    """[K], together 1."""
    means: Tensor
    """[K, d]."""
    factors: Tensor
    """[K, d, d]: lower triangular Cholesky factors of the covariances."""
    centre: Tensor
    """[D]: mean of the latents."""
    directions: Tensor
    """[r, D]: principal directions, d <= r <= D."""
    deviations: Tensor
    """[r - d]: standard deviations of the components that are no part of the mixture."""
    facts: Mapping[str, str]
    """`step`, `weights` (digest of the networks), `images` and `components`."""

    def sample(self, count: int, seed: int, first_row: int = 0) -> Tensor:
        """Draw latents float32 [count, D] on the CPU. A row does not depend on the count."""
        mixed, rest = self.means.shape[1], len(self.deviations)
        key = Key(torch.tensor([seed, 0]), Stream.FITTED_PRIOR, first_row)
        draws = normal(key, count, 1 + mixed + rest).double()
        edges = self.weights.cumsum(0)[:-1].contiguous()
        chosen = torch.searchsorted(edges, torch.special.ndtr(draws[:, 0]).contiguous(), right=True)
        inner = torch.einsum("nij,nj->ni", self.factors[chosen], draws[:, 1 : 1 + mixed]) + self.means[chosen]
        components = torch.cat([inner, draws[:, 1 + mixed :] * self.deviations], dim=1)
        return (self.centre + components @ self.directions).float()

    @property
    def told(self) -> str:
        """One line on what it is."""
        return (
            f"a mixture of {len(self.weights)} Gaussians fitted to the latents of {int(self.facts['images']):,} "
            "training images"
        )


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(save_tensors({name: weights[name].detach().cpu().contiguous()}))  # with dtype and shape
    return digest.hexdigest()


def networks_digest(networks: nn.Module) -> str:
    """`weights_digest` of a model's networks, without the mean style, which follows from the other weights and is
    computed when it is first needed."""
    weights = networks.state_dict()
    return weights_digest({name: one for name, one in weights.items() if not name.endswith("decoder.mean_style")})


def write_fitted_prior(file: Path, prior: FittedPrior) -> None:
    """Write a prior with a digest of its content.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        write_atomically(file, prior_bytes(prior))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error.strerror or error}") from None


def prior_bytes(prior: FittedPrior) -> bytes:
    """A prior in safetensors, with a digest of the tensors among its metadata."""
    tensors = {name: getattr(prior, name).contiguous() for name in _NAMES}
    facts = {**prior.facts, "format": _FORMAT, "sha256": weights_digest(tensors)}
    return save_tensors(tensors, {_FACTS: json.dumps(facts)})  # one entry: the library writes several in any order


def read_fitted_prior(file: Path, digest: str | None, again: str) -> FittedPrior:
    """Read a prior.

    Args:
        file: the file.
        digest: of the model's weights, for which it has to be fitted. None takes any.
        again: command that fits it, for errors.

    Raises:
        CheckpointError: it is missing, damaged, or was fitted to other weights.
    """
    try:
        content = read_regular(file)
    except FileNotFoundError:
        raise CheckpointError(f"there is no fitted prior, {file}; fit it with {again}") from None
    except OSError as error:
        raise CheckpointError(unreadable(file, error)) from None
    try:
        tensors, facts = load_tensors(content), _facts_of(content)
        prior = FittedPrior(**{name: tensors[name] for name in _NAMES}, facts=facts)
        if facts["format"] != _FORMAT or facts["sha256"] != weights_digest(tensors):
            raise ValueError("its content has another digest than it says")
        int(facts["images"]), int(facts["step"])
        if not _fits_together(prior):
            raise ValueError("its tensors do not fit together")
    except (KeyError, TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        reason = shortened(" ".join(str(error).split()))
        raise DamagedError(f"{file} is damaged: {reason}; fit it again with {again}") from None
    if digest is not None and facts["weights"] != digest:
        raise CheckpointError(
            f"{file} was fitted to other weights, of step {facts['step']}: they have changed since; fit it again with "
            f"{again}"
        )
    return prior


def _fits_together(prior: FittedPrior) -> bool:
    """True for tensors of the documented shapes, and weights that are shares: anyone can write a digest of others."""
    tensors = [getattr(prior, name) for name in _NAMES]
    if any(one.dtype != torch.float64 or not bool(torch.isfinite(one).all()) for one in tensors):
        return False
    if prior.means.ndim != 2 or prior.directions.ndim != 2:
        return False
    (count, mixed), (kept, width) = prior.means.shape, prior.directions.shape
    shapes = (count,), (count, mixed), (count, mixed, mixed), (width,), (kept, width), (kept - mixed,)
    if count < 1 or kept < mixed or any(one.shape != shape for one, shape in zip(tensors, shapes, strict=True)):
        return False
    return bool((prior.weights >= 0).all()) and abs(float(prior.weights.sum()) - 1.0) < 1e-6


def _facts_of(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    found: dict[str, str] = json.loads(header["__metadata__"][_FACTS])
    return found
