"""Calls of the latent kernels for tests: cases, inputs and launches."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gen_dist.kernels import triton_latent
from gen_dist.kernels.latent_layout import empty_latents
from tests.kernels.calls import NAMES, Call, placed, warp_size_of


@dataclass(frozen=True)
class Case:
    """One call of `reparameterize_kl`.

    Attributes:
        shape: shape of the parameters, [B, 2C, ...].
        dtype: dtype of parameters, prior and latents.
        channels_last: True if all of them are channels_last.
        samples: latents per image.
        prior: True if the prior is not N(0, I).
        deterministic: draw no noise.
        misaligned: True if tensors start one element off a multiple of 16 bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    samples: int = 1
    prior: bool = False
    deterministic: bool = False
    misaligned: bool = False
    stream: int = 3
    first_row: int = 5

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), NAMES[self.dtype]]
        words += [f"{self.samples}samples"] if self.samples > 1 else []
        words += [name for name in ("channels_last", "prior", "deterministic", "misaligned") if getattr(self, name)]
        return "-".join(words)

    @property
    def latents(self) -> int:
        """Latents of one sample of one image."""
        return int(np.prod(self.shape[1:])) // 2


QUICK_CASES = (
    Case((5, 2 * 64)),
    Case((3, 2 * 7), torch.float16),
    Case((2, 2 * 1030), torch.bfloat16),  # two programs per row, the second nearly empty
    Case((2, 2 * 1500), torch.bfloat16, samples=2, prior=True),
    Case((2, 16, 2, 3, 3), torch.float16, channels_last=True),
    Case((2, 6, 5, 7), channels_last=True, samples=3),  # a run of channels not divisible by a vector
    Case((3, 2 * 33), prior=True, deterministic=True, misaligned=True),
)
"""Every dtype, layout and option in few calls, for few compilations."""


def _placed(values: Tensor, case: Case) -> Tensor:
    return placed(values, case.dtype, channels_last=case.channels_last, misaligned=case.misaligned)


@dataclass
class Inputs:
    """Tensors of a case, and the gradients of its results."""

    case: Case
    parameters: Tensor
    prior: Tensor | None
    latents_gradient: Tensor
    kl_gradient: Tensor
    rng: Tensor

    @staticmethod
    def of(case: Case) -> "Inputs":
        """Draw ordinary numbers: standard normal, log-variances with half of that spread."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def parameters() -> Tensor:
            mean, logvar = draw(*case.shape).chunk(2, dim=1)
            return _placed(torch.cat((mean, 0.5 * logvar), dim=1), case)

        rows, channels, *spatial = case.shape
        return Inputs(
            case=case,
            parameters=parameters(),
            prior=parameters() if case.prior else None,
            latents_gradient=_placed(draw(rows * case.samples, channels // 2, *spatial), case),
            kl_gradient=draw(rows),
            rng=torch.tensor([0x9E3779B97F4A7C15 - 2**64, 2**33 + 17]),
        )


def forward_call(inputs: Inputs, target: str) -> Call:
    """Call of the forward kernel on a case."""
    case = inputs.case
    launch = triton_latent.forward_launch(
        inputs.parameters,
        case.stream,
        case.first_row,
        case.samples,
        case.deterministic,
        warp_size=warp_size_of(target),
    )
    return Call(
        launch,
        {"parameters_ptr": inputs.parameters, "prior_ptr": inputs.prior, "rng_ptr": inputs.rng},
        {
            "latents_ptr": _placed(empty_latents(inputs.parameters, case.samples), case),
            "kl_ptr": torch.empty(case.shape[0], launch.grid[1]),
        },
    )


def backward_call(inputs: Inputs, target: str, *, of_latents: bool = True, of_kl: bool = True) -> Call:
    """Call of the backward kernel on a case with latents, KL divergence or both in use."""
    case = inputs.case
    prior = inputs.prior if of_kl else None
    launch = triton_latent.backward_launch(
        inputs.parameters,
        case.stream,
        case.first_row,
        case.samples,
        case.deterministic,
        inputs.kl_gradient.stride(0) if of_kl else 0,
        with_prior=prior is not None,
        warp_size=warp_size_of(target),
    )
    return Call(
        launch,
        {
            "latents_gradient_ptr": inputs.latents_gradient if of_latents else None,
            "kl_gradient_ptr": inputs.kl_gradient if of_kl else None,
            "parameters_ptr": inputs.parameters,
            "prior_ptr": prior,
            "rng_ptr": inputs.rng,
        },
        {
            "parameters_gradient_ptr": _placed(inputs.parameters, case),
            "prior_gradient_ptr": None if prior is None else _placed(prior, case),
        },
    )


def with_logvar(inputs: Inputs, *values: float) -> Inputs:
    """Replace the log-variances by these in turn in the posterior, and in reverse order in the prior."""

    def replaced(parameters: Tensor, order: tuple[float, ...]) -> Tensor:
        changed = parameters.clone()
        logvar = changed.chunk(2, dim=1)[1]
        cycle = torch.tensor(order).repeat(-(-logvar.numel() // len(order)))[: logvar.numel()]
        logvar.copy_(cycle.view(logvar.shape))
        return changed

    prior = None if inputs.prior is None else replaced(inputs.prior, values[::-1])
    return replace(inputs, parameters=replaced(inputs.parameters, values), prior=prior)
