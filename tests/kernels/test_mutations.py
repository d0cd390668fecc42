"""Mutation tests of the latent and noise kernels: each change to their source, one at a time, must fail a check."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from gen_dist.kernels.device_noise import device_words
from tests.kernels.latent_calls import Case, Inputs, forward_call, with_logvar
from tests.kernels.latent_checks import check_backward, check_forward
from tests.kernels.latent_reference import reference
from tests.kernels.mutants import mutation_tests
from tests.kernels.noise_calls import binarize_call, check_binarize, check_normal

TARGET = "sm_90"
RNG = torch.tensor([-(2**50) + 7, 2**32 + 5])


def forward(inputs: Inputs, directory: Path) -> None:
    check_forward(inputs, reference(inputs), TARGET, directory)


def backward(inputs: Inputs, directory: Path) -> None:
    check_backward(inputs, reference(inputs), TARGET, directory)


def nan_stays(directory: Path) -> None:
    inputs = Inputs.of(Case((2, 2 * 16)))
    inputs.parameters[1, 16 + 3] = torch.nan
    call = forward_call(inputs, TARGET)
    call.run(TARGET, directory)
    assert call.output("latents_ptr").isnan().nonzero().tolist() == [[1, 3]]


def shared_gradient(directory: Path) -> None:
    inputs = Inputs.of(Case((3, 2 * 16)))
    backward(replace(inputs, kl_gradient=inputs.kl_gradient[:1].expand(3)), directory)


def smallest_word() -> int:
    """Row of 2^18 with the smallest first word: only there does the half-step under the logarithm matter."""
    words: Tensor = device_words(RNG, 4, 0, 2**18, 1)
    return int(words.argmin())


def binarize_rarest(directory: Path) -> None:
    """Check that the largest half draws a white pixel, and the smallest does not draw a black one."""
    first = device_words(RNG, 3, 0, 2**18, 1).flatten() & 0xFFFF
    for row, intensity in ((int(first.argmax()), 255), (int(first.argmin()), 0)):
        assert first[row] == intensity * 257
        images = torch.full((1, 8), intensity, dtype=torch.uint8)
        call = binarize_call(images, RNG, 3, row, TARGET)
        call.run(TARGET, directory)
        assert call.output("binary_ptr").tolist() == [[intensity / 255] * 8]


SAMPLES = Case((3, 2 * 18), samples=2)  # 18: the last block of a sample is half used
WIDE = Case((2, 2 * 1030), torch.bfloat16)  # two programs per row, two blocks per thread
PRIOR = Case((3, 2 * 16), prior=True)
PIXELS = Case((2, 6, 3, 2), channels_last=True)
BEYOND = (80.0, -80.0, 20.5, -30.5, 0.0)

CHECKS: dict[str, Callable[[Path], None]] = {
    "normal": lambda directory: check_normal(RNG, 9, 5, 23, TARGET, directory),
    "normal, smallest word": lambda directory: check_normal(RNG, smallest_word(), 1, 4, TARGET, directory),
    "binarize": lambda directory: check_binarize(RNG, 9, 2, 1030, TARGET, directory),
    "binarize, rarest": binarize_rarest,
    "forward": lambda directory: forward(Inputs.of(SAMPLES), directory),
    "forward, wide": lambda directory: forward(Inputs.of(WIDE), directory),
    "forward, prior": lambda directory: forward(Inputs.of(PRIOR), directory),
    "forward, pixels": lambda directory: forward(Inputs.of(PIXELS), directory),
    "forward, clamped": lambda directory: forward(with_logvar(Inputs.of(Case((3, 2 * 16))), *BEYOND), directory),
    # Next to variances of e^20 the divergence of a variance of e^-30 is lost to rounding: it has a case of its own.
    "forward, clamped below": lambda directory: forward(
        with_logvar(Inputs.of(Case((3, 2 * 16))), -80.0, 0.0), directory
    ),
    "forward, NaN": nan_stays,
    "backward": lambda directory: backward(Inputs.of(SAMPLES), directory),
    "backward, prior": lambda directory: backward(Inputs.of(PRIOR), directory),
    "backward, clamped": lambda directory: backward(with_logvar(Inputs.of(Case((3, 2 * 16))), *BEYOND), directory),
    "backward, shared": shared_gradient,
}

NOISE, LATENT = "triton_noise.py", "triton_latent.py"

QUICK_MUTATIONS = [
    (NOISE, "0xD2511F53", "0xD2511F55", "normal"),
    (NOISE, "static_range(10)", "static_range(9)", "normal"),
    (NOISE, "1.1641532182693481e-10", "0.0", "normal, smallest word"),
    (NOISE, "angle_word << 2", "angle_word << 1", "normal"),
    (NOISE, "0.02086007222533226", "0.02096007222533226", "normal"),
    (NOISE, "column < WIDTH", "column <= WIDTH", "normal"),
    (NOISE, "intensity * 257", "intensity * 256", "binarize"),
    (
        LATENT,
        "row + first_row, first_block, noise_stream, ROWS, COLUMNS, VECTOR)\n        target",
        "row, first_block, noise_stream, ROWS, COLUMNS, VECTOR)\n        target",
        "forward",
    ),
    (LATENT, "tl.clamp(logvar, LOW, HIGH,", "tl.clamp(logvar, LOW, HIGH + 1.0,", "forward, clamped"),
    (LATENT, "0.5 * tl.sum(twice_kl", "1.0 * tl.sum(twice_kl", "forward"),
    (LATENT, "std * std - 1.0 - logvar)", "std * std - 1.0 + logvar)", "forward"),
    (LATENT, "column % RUN", "column", "forward, pixels"),
    (LATENT, "mean_gradient += kl_gradient * distance", "mean_gradient -= kl_gradient * distance", "backward"),
    (LATENT, "(logvar < LOW) | (logvar > HIGH)", "(logvar < LOW) | (logvar > HIGH + 1.0)", "backward, clamped"),
    (LATENT, "(-kl_gradient * distance)", "(kl_gradient * distance)", "backward, prior"),
]

MUTATIONS = [
    (NOISE, "0xCD9E8D57", "0xCD9E8D59", "normal"),
    (NOISE, "0x9E3779B9", "0x9E3779B8", "normal"),
    (NOISE, "0xBB67AE85", "0xBB67AE84", "normal"),
    (NOISE, "(third >> 32).to(tl.uint32) ^ c1 ^ k0", "(third >> 31).to(tl.uint32) ^ c1 ^ k0", "normal"),
    (NOISE, "^ c3 ^ k1", "^ c3 ^ k0", "normal"),
    (NOISE, "radius_word.to(tl.float32) * 2.3283064365386963e-10", "radius_word.to(tl.float32) * 2.3283e-10", "normal"),
    (NOISE, "tl.sqrt(-2.0", "tl.sqrt(-2.00001", "normal"),
    (NOISE, "tl.float32) * 2.3283064365386963e-10\n    square", "tl.float32) * 2.3283e-10\n    square", "normal"),
    (NOISE, "-0.00460165785625577", "0.00460165785625577", "normal"),
    (NOISE, "0.07968003302812576", "0.07978003302812576", "normal"),
    (NOISE, "0.6459634900093079", "0.6459734900093079", "normal"),
    (NOISE, "1.5707963705062866", "1.5707863705062866", "normal"),
    (NOISE, "0.0009036316769197583", "-0.0009036316769197583", "normal"),
    (NOISE, "0.25366920232772827", "0.25376920232772827", "normal"),
    (NOISE, "1.2337005138397217", "1.2337105138397217", "normal"),
    (NOISE, "cosine * square + 1.0", "cosine * square + 1.00001", "normal"),
    (NOISE, "0x20000000", "0x10000000", "normal"),
    (NOISE, "quarter & 0x40000000", "quarter & 0x80000000", "normal"),
    (NOISE, "(quarter ^ (quarter << 1))", "(quarter ^ (quarter << 2))", "normal"),
    (NOISE, "y ^= quarter & 0x80000000", "y ^= quarter & 0x40000000", "normal"),
    (NOISE, "rng_ptr + 1", "rng_ptr", "normal"),
    (NOISE, "(seed >> 32)", "(seed >> 31)", "normal"),
    (NOISE, "block + 1", "block + 2", "forward, wide"),
    (NOISE, "tl.join(tl.join(n0, n4), tl.join(n2, n6))", "tl.join(tl.join(n0, n2), tl.join(n4, n6))", "forward, wide"),
    (NOISE, "tl.join(tl.join(n0, n2), tl.join(n1, n3))", "tl.join(tl.join(n0, n1), tl.join(n2, n3))", "normal"),
    (NOISE, "row < rows", "row <= rows", "normal"),
    (NOISE, "row + first_row", "row - first_row", "normal"),
    (NOISE, "first_column // 4, noise_stream", "first_column // 4, rows", "normal"),
    (NOISE, "first_column // VECTOR", "first_column // 4", "binarize"),
    (NOISE, "w1 & 0xFFFF", "w1 & 0x7FFF", "binarize"),
    (NOISE, "w2 >> 16", "w2 >> 17", "binarize"),
    (NOISE, "tl.join(even, odd)", "tl.join(odd, even)", "binarize"),
    (NOISE, "tl.join(w0 >> 16, w2 >> 16)", "tl.join(w2 >> 16, w0 >> 16)", "binarize"),
    (NOISE, "65534", "65535", "binarize, rarest"),
    (NOISE, "< intensity", "<= intensity", "binarize, rarest"),
    (LATENT, "[:, None] * (2 * LATENTS)", "[:, None] * LATENTS", "forward"),
    (LATENT, "(2 * RUN)", "RUN", "forward, pixels"),
    (LATENT, "tl.clamp(logvar, LOW, HIGH,", "tl.clamp(logvar, LOW + 1.0, HIGH,", "forward, clamped below"),
    (LATENT, "PropagateNan.ALL", "PropagateNan.NONE", "forward, NaN"),
    (LATENT, "1.4426950408889634", "1.44269", "forward"),
    (LATENT, "std = scaled_exp(logvar, 0.5)", "std = scaled_exp(logvar, 1.0)", "forward"),
    (LATENT, "twice_kl = mean * mean +", "twice_kl = mean +", "forward"),
    (
        LATENT,
        "precision = scaled_exp(prior_logvar, -1.0)",
        "precision = scaled_exp(prior_logvar, -0.5)",
        "forward, prior",
    ),
    (LATENT, "distance = mean - prior_mean", "distance = mean + prior_mean", "forward, prior"),
    (LATENT, "(logvar - prior_logvar)", "(logvar + prior_logvar)", "forward, prior"),
    (LATENT, "tl.num_programs(1) + tl.program_id(1)", "tl.num_programs(1)", "forward, wide"),
    (LATENT, "latents += std", "latents -= std", "forward"),
    (LATENT, "0.5 * std * std_gradient", "1.0 * std * std_gradient", "backward"),
    (LATENT, "mean_gradient += gradient", "mean_gradient -= gradient", "backward"),
    (LATENT, "* kl_gradient_stride", "* 1", "backward, shared"),
    (LATENT, "(0.5 * (ratio - 1.0))", "(0.5 * (ratio + 1.0))", "backward"),
    (LATENT, "(0.5 * (1.0 - ratio - difference", "(0.5 * (1.0 - ratio + difference", "backward, prior"),
    (LATENT, "ratio *= precision", "ratio += precision", "backward, prior"),
    (LATENT, "distance = difference * precision", "distance = difference", "backward, prior"),
]


test_the_kernels_themselves_pass, test_a_mutation_is_noticed, test_each_other_mutation_is_noticed = mutation_tests(
    CHECKS, QUICK_MUTATIONS, MUTATIONS
)
