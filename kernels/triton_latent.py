"""The latent step in one pass over memory: reparameterization, KL divergence and their gradient in Triton.

A program reads a tile of the encoder's output once, both halves by offset, draws the noise itself and writes latents
and a partial sum of the KL divergence. The backward pass redraws the same noise, so none is stored.
"""

# Device code is typed by Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_layout import LOGVAR_RANGE, empty_latents, latents_per_sample, run_of_means
from .triton_noise import Launch, Tile, noise_tile, tile_of, warp_size_of


@triton.jit
def parameter_offsets(row, column, LATENTS: tl.constexpr, RUN: tl.constexpr):
    """Offsets of the means of a tile in [rows, 2 * LATENTS]; their log-variances are RUN elements further.

    RUN means are followed by RUN log-variances, then by the next RUN means. RUN is all LATENTS of a row in contiguous
    tensors, and the channels of a pixel in channels_last ones.
    """
    within = column
    if RUN != LATENTS:
        within = column // RUN * (2 * RUN) + column % RUN
    return row.to(tl.int64)[:, None] * (2 * LATENTS) + within[None, :]


@triton.jit
def clamp_logvar(logvar, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Clamp the log-variance to its range; NaN stays NaN."""
    return tl.clamp(logvar, LOW, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where_unclamped(logvar, gradient, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Gradient of the log-variance from that of the clamped one: zero where the clamp acts."""
    return tl.where((logvar < LOW) | (logvar > HIGH), 0.0, gradient)


@triton.jit
def scaled_exp(exponent, FACTOR: tl.constexpr):
    """exp(FACTOR * exponent), as a power of two, which is one instruction."""
    return tl.exp2(exponent * (FACTOR * 1.4426950408889634))


@triton.jit(do_not_specialize=["rows", "first_row", "noise_stream"])
def forward_kernel(
    parameters_ptr,
    prior_ptr,
    latents_ptr,
    kl_ptr,
    rng_ptr,
    rows,
    first_row,
    noise_stream,
    LATENTS: tl.constexpr,
    RUN: tl.constexpr,
    SAMPLES: tl.constexpr,
    DRAWN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Latents [rows * SAMPLES, LATENTS] and partial KL sums [rows, programs in y] of parameters [rows, 2 * LATENTS].

    prior_ptr is None for the standard normal prior.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < LATENTS)[None, :]
    offsets = parameter_offsets(row, column, LATENTS, RUN)
    # Lanes outside hold mean 0 and log-variance 0 for posterior and prior, so their divergence is 0.
    mean = tl.load(parameters_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    logvar = tl.load(parameters_ptr + (offsets + RUN), mask=inside, other=0.0).to(tl.float32)
    logvar = clamp_logvar(logvar, LOW, HIGH)
    std = scaled_exp(logvar, 0.5)

    if prior_ptr is None:
        twice_kl = mean * mean + (std * std - 1.0 - logvar)
    else:
        prior_mean = tl.load(prior_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        prior_logvar = tl.load(prior_ptr + (offsets + RUN), mask=inside, other=0.0).to(tl.float32)
        prior_logvar = clamp_logvar(prior_logvar, LOW, HIGH)
        precision = scaled_exp(prior_logvar, -1.0)
        distance = mean - prior_mean
        twice_kl = distance * distance * precision + (std * std * precision - 1.0 - (logvar - prior_logvar))
    parts = kl_ptr + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts, 0.5 * tl.sum(twice_kl, axis=1), mask=row < rows)

    for sample in range(SAMPLES):
        latents = mean
        if DRAWN:
            first_block = sample * ((LATENTS + 3) // 4) + first_column // 4
            latents += std * noise_tile(rng_ptr, row + first_row, first_block, noise_stream, ROWS, COLUMNS, VECTOR)
        target = (row.to(tl.int64) * SAMPLES + sample)[:, None] * LATENTS + column[None, :]
        tl.store(latents_ptr + target, latents.to(latents_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "first_row", "noise_stream", "kl_gradient_stride"])
def backward_kernel(
    latents_gradient_ptr,
    kl_gradient_ptr,
    parameters_ptr,
    prior_ptr,
    rng_ptr,
    parameters_gradient_ptr,
    prior_gradient_ptr,
    rows,
    first_row,
    noise_stream,
    kl_gradient_stride,
    LATENTS: tl.constexpr,
    RUN: tl.constexpr,
    SAMPLES: tl.constexpr,
    DRAWN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Gradients of the parameters and the prior of `forward_kernel`, in their layouts.

    latents_gradient_ptr or kl_gradient_ptr is None if that output was not used. prior_ptr and prior_gradient_ptr are
    None for the standard normal prior, and if no output in use depends on the prior.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < LATENTS)[None, :]
    offsets = parameter_offsets(row, column, LATENTS, RUN)
    raw_logvar = tl.load(parameters_ptr + (offsets + RUN), mask=inside, other=0.0).to(tl.float32)
    std = scaled_exp(clamp_logvar(raw_logvar, LOW, HIGH), 0.5)

    mean_gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    std_gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    if latents_gradient_ptr is not None:
        for sample in range(SAMPLES):
            source = (row.to(tl.int64) * SAMPLES + sample)[:, None] * LATENTS + column[None, :]
            gradient = tl.load(latents_gradient_ptr + source, mask=inside, other=0.0).to(tl.float32)
            mean_gradient += gradient
            if DRAWN:
                first_block = sample * ((LATENTS + 3) // 4) + first_column // 4
                noise = noise_tile(rng_ptr, row + first_row, first_block, noise_stream, ROWS, COLUMNS, VECTOR)
                std_gradient += gradient * noise
    # d std / d logvar = std / 2, d variance / d logvar = variance.
    logvar_gradient = 0.5 * std * std_gradient

    if kl_gradient_ptr is not None:
        kl_gradient = tl.load(kl_gradient_ptr + row.to(tl.int64) * kl_gradient_stride, mask=row < rows, other=0.0)
        kl_gradient = kl_gradient[:, None]
        distance = tl.load(parameters_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        ratio = std * std
        if prior_ptr is not None:
            raw_prior_logvar = tl.load(prior_ptr + (offsets + RUN), mask=inside, other=0.0).to(tl.float32)
            precision = scaled_exp(clamp_logvar(raw_prior_logvar, LOW, HIGH), -1.0)
            ratio *= precision
            difference = distance - tl.load(prior_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            distance = difference * precision
            prior_logvar_gradient = kl_gradient * (0.5 * (1.0 - ratio - difference * distance))
            prior_logvar_gradient = where_unclamped(raw_prior_logvar, prior_logvar_gradient, LOW, HIGH)
            element = prior_gradient_ptr.dtype.element_ty
            tl.store(prior_gradient_ptr + offsets, (-kl_gradient * distance).to(element), mask=inside)
            tl.store(prior_gradient_ptr + (offsets + RUN), prior_logvar_gradient.to(element), mask=inside)
        mean_gradient += kl_gradient * distance
        logvar_gradient += kl_gradient * (0.5 * (ratio - 1.0))

    logvar_gradient = where_unclamped(raw_logvar, logvar_gradient, LOW, HIGH)
    element = parameters_gradient_ptr.dtype.element_ty
    tl.store(parameters_gradient_ptr + offsets, mean_gradient.to(element), mask=inside)
    tl.store(parameters_gradient_ptr + (offsets + RUN), logvar_gradient.to(element), mask=inside)


def _launch(
    kernel: triton.JITFunction,
    parameters: Tensor,
    tile: Tile,
    samples: int,
    deterministic: bool,
    **integers: int,
) -> Launch:
    """Launch of either kernel over tiles of the latents of `parameters`."""
    low, high = LOGVAR_RANGE
    latents = latents_per_sample(parameters)
    return Launch(
        kernel=kernel,
        grid=tile.grid(parameters.shape[0], latents),
        integers={"rows": parameters.shape[0], **integers},
        constants={
            "LATENTS": latents,
            "RUN": run_of_means(parameters),
            "SAMPLES": samples,
            "DRAWN": not deterministic,
            "LOW": low,
            "HIGH": high,
            **tile.constants(),
        },
        num_warps=tile.num_warps,
    )


def forward_launch(
    parameters: Tensor, stream: int, first_row: int, samples: int, deterministic: bool, *, warp_size: int = 32
) -> Launch:
    """Launch of `forward_kernel` for parameters of this shape, dtype and memory format.

    Pointers: parameters, prior or None, latents, kl float32 [B, grid[1]], rng.

    Args:
        parameters: [B, 2C, ...], dense, not empty. Its data are not read: it may be on "meta".
        stream: stream of the noise.
        first_row: global row of parameters[0].
        samples: latents per image.
        deterministic: draw no noise.
        warp_size: threads of a warp.
    """
    tile = tile_of(latents_per_sample(parameters), parameters.dtype, warp_size)
    return _launch(forward_kernel, parameters, tile, samples, deterministic, first_row=first_row, noise_stream=stream)


def backward_launch(
    parameters: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
    kl_gradient_stride: int,
    *,
    with_prior: bool = False,
    warp_size: int = 32,
) -> Launch:
    """Launch of `backward_kernel`, as `forward_launch`.

    Pointers: latents_gradient or None, kl_gradient or None, parameters, prior or None, rng, parameters_gradient,
    prior_gradient or None.

    Args:
        parameters: as in `forward_launch`.
        stream: stream of the noise.
        first_row: global row of parameters[0].
        samples: latents per image.
        deterministic: the forward pass drew no noise.
        kl_gradient_stride: elements between the divergence gradients of consecutive rows; 0 if all rows share one.
        with_prior: True if the launch gets a prior.
        warp_size: threads of a warp.
    """
    # Nine tensors of eight float32 elements in a thread would need over 64 registers, the limit for half of the warps.
    thread_elements = 4 if with_prior and parameters.dtype == torch.float32 else 8
    tile = tile_of(latents_per_sample(parameters), parameters.dtype, warp_size, thread_elements)
    integers = {"first_row": first_row, "noise_stream": stream, "kl_gradient_stride": kl_gradient_stride}
    return _launch(backward_kernel, parameters, tile, samples, deterministic, **integers)


def forward(
    parameters: Tensor,
    prior: Tensor | None,
    rng: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Latents and KL by `forward_kernel`; arguments as in `kernels.latent.twin_forward`, parameters and prior dense."""
    latents = empty_latents(parameters, samples)
    if parameters.numel() == 0:
        return latents, parameters.new_zeros(parameters.shape[0], dtype=torch.float32)
    warp_size = warp_size_of(parameters.device)
    launch = forward_launch(parameters, stream, first_row, samples, deterministic, warp_size=warp_size)
    kl_parts = parameters.new_empty((parameters.shape[0], launch.grid[1]), dtype=torch.float32)
    launch(parameters_ptr=parameters, prior_ptr=prior, latents_ptr=latents, kl_ptr=kl_parts, rng_ptr=rng)
    return latents, kl_parts.sum(1) if launch.grid[1] > 1 else kl_parts.view(-1)


def backward(
    latents_gradient: Tensor | None,
    kl_gradient: Tensor | None,
    parameters: Tensor,
    prior: Tensor | None,
    rng: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
) -> list[Tensor]:
    """Gradients by `backward_kernel`, as `kernels.latent.twin_backward`; all but kl_gradient in one memory format."""
    gradient = torch.empty_like(parameters)
    prior_gradient = None if prior is None else torch.empty_like(prior)
    gradients = [gradient] if prior_gradient is None else [gradient, prior_gradient]
    if parameters.numel() == 0:
        return gradients
    if kl_gradient is None and prior_gradient is not None:
        # The latents do not depend on the prior.
        prior_gradient.zero_()
        prior = prior_gradient = None
    launch = backward_launch(
        parameters,
        stream,
        first_row,
        samples,
        deterministic,
        0 if kl_gradient is None else kl_gradient.stride(0),
        with_prior=prior is not None,
        warp_size=warp_size_of(parameters.device),
    )
    launch(
        latents_gradient_ptr=latents_gradient,
        kl_gradient_ptr=kl_gradient,
        parameters_ptr=parameters,
        prior_ptr=prior,
        rng_ptr=rng,
        parameters_gradient_ptr=gradient,
        prior_gradient_ptr=prior_gradient,
    )
    return gradients
