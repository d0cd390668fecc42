"""Calls of the kernels for tests: inputs, the compiled kernel's run on them, and a float64 reference."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.kernels import triton_latent, triton_noise
from gen_dist.kernels.device_noise import device_binarize, device_normal
from gen_dist.kernels.latent import twin_forward
from gen_dist.kernels.latent_layout import LOGVAR_RANGE, empty_latents
from tests.kernels.kernel_compiler import REPOSITORY, TARGETS, Compiled, Launch, compile_launch
from tests.kernels.ptx_executor import Trace, execute
from tests.kernels.ptx_program import Program, parse

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def warp_size_of(target: str) -> int:
    """Threads of a warp on a target."""
    return TARGETS[target][2]


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


def _placed(values: Tensor, case: Case) -> Tensor:
    """Copy values to the case's dtype, memory format and alignment."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = last[values.ndim] if case.channels_last else torch.contiguous_format
    strides = torch.empty(values.shape, memory_format=memory_format, device="meta").stride()
    memory = torch.empty(values.numel() + 1, dtype=case.dtype)
    return memory.as_strided(values.shape, strides, int(case.misaligned)).copy_(values)


# ---------------------------------------------------------------------------------------------------------- execution


@dataclass
class Run:
    """A finished run of a kernel.

    Attributes:
        compiled: the kernel.
        trace: its memory accesses.
        sizes: bytes of each tensor by argument name.
    """

    compiled: Compiled
    trace: Trace
    sizes: dict[str, int]

    def counts(self, name: str, kind: Any) -> NDArray[np.int64]:
        """Number of loads or stores of each byte of a tensor."""
        return self.trace.counts(self.compiled.runtime.index(name), kind, self.sizes[name])

    def widths(self, name: str, kind: Any) -> set[int]:
        """Widths of the loads or stores of a tensor, in bytes."""
        return set(self.trace.widths(self.compiled.runtime.index(name), kind))


@dataclass
class Call:
    """A launch with its tensors by argument name; None for those not used."""

    launch: Launch
    inputs: dict[str, Tensor | None]
    outputs: dict[str, Tensor | None]

    def output(self, name: str) -> Tensor:
        """Output of this name, which must be in use."""
        tensor = self.outputs[name]
        assert tensor is not None
        return tensor

    def compile(self, target: str, directory: Path = REPOSITORY) -> Compiled:
        """Compile for a target of `kernel_compiler.TARGETS`; the package `kernels` is in `directory`."""
        return compile_launch(self.launch, {**self.inputs, **self.outputs}, target, directory)

    def run(self, target: str, directory: Path = REPOSITORY, approximation: float = 0.0) -> Run:
        """Compile and run on the CPU, `approximation` as in `execute`.

        Inputs are read-only. Outputs are NaN before the run, and must not depend on undefined registers: if one is
        read, as in half-used packed registers, the kernel runs twice with different poisons.
        """
        compiled = self.compile(target, directory)
        inputs, outputs = _memories(self.inputs), _memories(self.outputs)
        for memory in inputs.values():
            memory.flags.writeable = False
        arguments: dict[str, NDArray[Any] | int] = {**self.launch.integers, **inputs, **outputs}

        def run(poison: int) -> Trace:
            for memory in outputs.values():
                memory.fill(0xFF)
            return execute(
                _program(compiled.assembly),
                self.launch.grid,
                [arguments[name] for name in compiled.runtime],
                shared_bytes=compiled.shared_bytes,
                approximation=approximation,
                poison=poison,
            )

        trace = run(0xDEADBEEFDEADBEEF)
        if trace.undefined:
            first = {name: memory.copy() for name, memory in outputs.items()}
            run(0x4142434445464748)
            for name, memory in outputs.items():
                assert np.array_equal(memory, first[name]), f"{name} depends on undefined {dict(trace.undefined)}"
        return Run(compiled, trace, {name: memory.size for name, memory in {**inputs, **outputs}.items()})


def _memories(tensors: Mapping[str, Tensor | None]) -> dict[str, NDArray[np.uint8]]:
    return {name: memory_of(tensor) for name, tensor in tensors.items() if tensor is not None}


@functools.cache
def _program(assembly: str) -> Program:
    return parse(assembly)


def memory_of(tensor: Tensor) -> NDArray[np.uint8]:
    """Bytes of a dense tensor in memory order; they share its memory."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    memory: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return memory


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


def normal_call(rng: Tensor, stream: int, first_row: int, rows: int, width: int, target: str) -> Call:
    """Call of the noise kernel."""
    launch = triton_noise.normal_launch(stream, first_row, rows, width, warp_size=warp_size_of(target))
    return Call(launch, {"rng_ptr": rng}, {"normals_ptr": torch.empty(rows, width)})


def binarize_call(images: Tensor, rng: Tensor, stream: int, first_row: int, target: str) -> Call:
    """Call of the kernel that draws the pixels of images uint8 [rows, width]."""
    launch = triton_noise.binarize_launch(stream, first_row, *images.shape, warp_size=warp_size_of(target))
    binary = torch.empty(images.shape)
    return Call(launch, {"images_ptr": images, "rng_ptr": rng}, {"binary_ptr": binary})


# ---------------------------------------------------------------------------------------------------------- reference


@dataclass
class Reference:
    """Results of a call in float64, and their scales: the sums of the sizes of their terms.

    Rounding errors are proportional to the scales: where large terms cancel, no float32 arithmetic is near the result.
    """

    latents: Tensor
    latents_scale: Tensor
    kl_nats: Tensor
    kl_scale: Tensor
    parameters: Tensor
    parameters_scale: Tensor
    prior: Tensor | None
    prior_scale: Tensor | None


def reference(inputs: Inputs, *, of_latents: bool = True, of_kl: bool = True) -> Reference:
    """Compute a call by the twin's forward pass in float64 and autograd, so that no formula is written twice."""
    case = inputs.case
    parameters = inputs.parameters.double().requires_grad_()
    prior = None if inputs.prior is None else inputs.prior.double().requires_grad_()
    call = (inputs.rng, case.stream, case.first_row, case.samples, case.deterministic)
    latents, kl_nats = twin_forward(parameters, prior, *call)
    results, weights = [], []
    if of_latents:
        results, weights = [latents], [inputs.latents_gradient.double()]
    if of_kl:
        results, weights = [*results, kl_nats], [*weights, inputs.kl_gradient.double()]
    wanted = [parameters] if prior is None or not of_kl else [parameters, prior]
    gradients = torch.autograd.grad(results, wanted, weights)
    scales = _Scales(inputs, latents.detach(), of_latents, of_kl)
    return Reference(
        latents=latents.detach(),
        latents_scale=scales.latents(),
        kl_nats=kl_nats.detach(),
        kl_scale=scales.kl_nats(),
        parameters=gradients[0],
        parameters_scale=scales.parameters(),
        prior=gradients[1] if len(gradients) == 2 else None,
        prior_scale=scales.prior() if len(gradients) == 2 else None,
    )


class _Scales:
    """Sums of the sizes of the terms of each result, in float64."""

    def __init__(self, inputs: Inputs, latents: Tensor, of_latents: bool, of_kl: bool) -> None:
        rows, samples = inputs.case.shape[0], inputs.case.samples
        self.mean, self.logvar, self.variance = _moments(inputs.parameters)
        self.by_sample = latents.unflatten(0, (rows, samples))
        self.noise_part = (self.by_sample - self.mean[:, None]).abs()
        gradient = inputs.latents_gradient.double().abs().unflatten(0, (rows, samples))
        self.gradient = gradient if of_latents else torch.zeros_like(gradient)
        kl_gradient = inputs.kl_gradient.double().abs().view(-1, *[1] * (inputs.parameters.ndim - 1))
        self.kl_gradient = kl_gradient if of_kl else torch.zeros_like(kl_gradient)
        zeros = torch.zeros_like(self.mean)
        moments = (zeros, zeros, zeros + 1.0) if inputs.prior is None else _moments(inputs.prior)
        prior_mean, self.prior_logvar, prior_variance = moments
        self.precision = 1.0 / prior_variance
        self.distance = self.mean.abs() + prior_mean.abs()
        self.squares = (self.distance**2 + self.variance) * self.precision

    def latents(self) -> Tensor:
        return (self.mean[:, None].abs() + self.noise_part).flatten(0, 1)

    def kl_nats(self) -> Tensor:
        return 0.5 * (self.squares + 1.0 + self.logvar.abs() + self.prior_logvar.abs()).flatten(1).sum(1)

    def parameters(self) -> Tensor:
        by_mean = self.gradient.sum(1) + self.kl_gradient * self.distance * self.precision
        by_logvar = (self.gradient * self.noise_part).sum(1)
        by_logvar = 0.5 * (by_logvar + self.kl_gradient * (self.variance * self.precision + 1.0))
        return torch.cat((by_mean, by_logvar), dim=1)

    def prior(self) -> Tensor:
        by_mean = self.kl_gradient * self.distance * self.precision
        return torch.cat((by_mean, 0.5 * self.kl_gradient * (1.0 + self.squares)), dim=1)


def _moments(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, log-variances and variances, float64."""
    mean, logvar = parameters.double().chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    return mean, logvar, logvar.exp()


# --------------------------------------------------------------------------------------------------------- comparison


def ulps_apart(values: Tensor, expected: Tensor) -> Tensor:
    """Distance of `values` from `expected` rounded to their dtype, in numbers of that dtype; NaN equals NaN.

    Args:
        values: float32, bfloat16 or float16.
        expected: float64, of the same shape.

    Returns:
        int64.
    """
    integer = torch.int32 if values.dtype == torch.float32 else torch.int16

    def order(numbers: Tensor) -> Tensor:
        bits = numbers.contiguous().view(integer).long()
        lowest = torch.iinfo(integer).min
        return torch.where(bits < 0, lowest - bits, bits)

    rounded = expected.to(values.dtype)
    apart = (order(values) - order(rounded)).abs()
    return torch.where(values.isnan() & rounded.isnan(), 0, apart)


def errors_in_scale(values: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Errors as fractions of the scale, float64; 0 where both are equal, NaN and infinity included."""
    same = (values.double() == expected) | (values.isnan() & expected.isnan())
    return torch.where(same, 0.0, (values.double() - expected).abs() / scale)


LATENTS_ERROR = 2e-6
GRADIENT_ERROR = 1e-6
KL_ERROR = 1e-6
"""Tolerances. Results are sums of terms, each with a few float32 roundings of 2^-24 = 6e-8, and errors are measured in
units of the sum of the terms' sizes (`Reference`): where terms cancel, no float32 arithmetic is nearer to the result.

- float32: 2e-6 absolute for latents of ordinary size, 1e-6 of the terms for gradients.
- bfloat16, float16: 1 unit in the last place of the float64 result rounded once; where terms cancel, the tolerance of
  float32.
- KL: 1e-6 of itself; where posteriors are so near their prior that its terms cancel, 4e-7 of the terms.

These must hold with the largest error that NVIDIA documents for approximate instructions (2^x, square root): 2^-22.5
for each 2^x. A variance in units of the prior's has three of them, so the KL has 1e-6 of its terms.
"""


def assert_close(values: Tensor, expected: Tensor, scale: Tensor, allowed: float) -> None:
    """Assert that errors are at most `allowed` of the scale, or in half precision at most 1 ulp."""
    errors = errors_in_scale(values, expected, scale)
    close = errors <= allowed
    if values.dtype != torch.float32:
        close |= ulps_apart(values, expected) <= 1
    assert close.all(), f"{int((~close).sum())} of {close.numel()} beyond {allowed}: up to {errors[~close].max()}"


def check_forward(
    inputs: Inputs, expected: Reference, target: str, directory: Path = REPOSITORY, approximation: float = 0.0
) -> None:
    """Check the forward kernel against float64."""
    call = forward_call(inputs, target)
    call.run(target, directory, approximation)
    latents, kl_nats = call.output("latents_ptr"), call.output("kl_ptr").sum(1)
    # Absolute for latents of ordinary size, relative for those with posterior wider than 1.
    assert_close(latents, expected.latents, expected.latents_scale.clamp(min=1.0), LATENTS_ERROR)
    kl_scale = expected.kl_scale if approximation else torch.maximum(expected.kl_nats, 0.4 * expected.kl_scale)
    assert_close(kl_nats, expected.kl_nats, kl_scale, KL_ERROR)


def check_backward(
    inputs: Inputs,
    expected: Reference,
    target: str,
    directory: Path = REPOSITORY,
    approximation: float = 0.0,
    **of: bool,
) -> None:
    """Check the backward kernel against differentiation in float64; `of` as in `backward_call`."""
    call = backward_call(inputs, target, **of)
    call.run(target, directory, approximation)
    gradient = call.output("parameters_gradient_ptr")
    assert_close(gradient, expected.parameters, expected.parameters_scale, GRADIENT_ERROR)
    assert (call.outputs["prior_gradient_ptr"] is None) == (expected.prior is None)
    if expected.prior is not None and expected.prior_scale is not None:
        assert_close(call.output("prior_gradient_ptr"), expected.prior, expected.prior_scale, GRADIENT_ERROR)


def check_binarize(
    rng: Tensor, first_row: int, rows: int, width: int, target: str, directory: Path = REPOSITORY
) -> None:
    """Check the kernel's pixels against their definition."""
    images = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    images[:, :5] = torch.tensor([0, 255, 128, 0, 0])  # never, always, half of the time
    call = binarize_call(images, rng, 3, first_row, target)
    call.run(target, directory)
    assert torch.equal(call.output("binary_ptr"), device_binarize(images, rng, 3, first_row))


def check_normal(rng: Tensor, first_row: int, rows: int, width: int, target: str, directory: Path = REPOSITORY) -> None:
    """Check the noise kernel against the definition of the noise."""
    stream = 4
    call = normal_call(rng, stream, first_row, rows, width, target)
    call.run(target, directory)
    expected = device_normal(rng, stream, first_row, rows, width, dtype=torch.float64)
    assert_close(call.output("normals_ptr"), expected, torch.ones_like(expected), LATENTS_ERROR)


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
