"""Mutation tests of the group normalization kernels: each change to their source must fail a check."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from gen_dist.kernels import group_norm_layout
from tests.kernels.group_norm_calls import Case, Inputs
from tests.kernels.group_norm_offsets import check_last_image
from tests.kernels.group_norm_reference import check_passes
from tests.kernels.mutants import mutation_tests

TARGET = "sm_90"
# Three channels a group, padded to four; three groups of nine pixels in a tile for four of sixteen.
WHOLE = Case((2, 9, 3, 3), 3, residual=True)
STREAMED = replace(WHOLE, shape=(2, 9, 13, 11))
"""Groups of two programs with two tiles each, where tiles are as small as `small_tiles` makes them."""


@contextmanager
def small_tiles() -> Iterator[None]:
    """Let small maps take every way: a tile has 256 elements, and a group at most two programs."""
    with mock.patch.multiple(
        group_norm_layout, WHOLE_ELEMENTS=256, STREAMED_ELEMENTS=256, MOST_SPANS=2, PART_ELEMENTS=1
    ):
        yield


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    with small_tiles():
        yield


def large_mean(case: Case) -> Case:
    return replace(case, offset=1e3, deviation=1e-2)


CHECKS: dict[str, Callable[[Path], None]] = {
    name: lambda directory, case=case: check_passes(Inputs.of(case), TARGET, directory)
    for name, case in {
        "whole": WHOLE,
        "whole, channels_last": replace(WHOLE, channels_last=True),
        "whole, half": replace(WHOLE, dtype=torch.bfloat16),
        "whole, large mean": large_mean(WHOLE),
        "streamed": STREAMED,
        "streamed, channels_last": replace(STREAMED, channels_last=True),
        "streamed, large mean": large_mean(STREAMED),
    }.items()
} | {"last image": check_last_image}

TILES, FORWARD, BACKWARD = "triton_group_norm_tiles.py", "triton_group_norm.py", "triton_group_norm_backward.py"

QUICK_MUTATIONS = [
    (TILES, "within < GROUP_CHANNELS", "within <= GROUP_CHANNELS", "whole"),
    (TILES, "-1.4426950408889634", "-1.4427950408889634", "whole"),
    (TILES, "share + values * share", "share - values * share", "whole"),
    (
        FORWARD,
        "mean = sum_groups(tl.sum(maps, axis=1), TILE_GROUPS, TILE_CHANNELS) / (GROUP_CHANNELS * PIXELS)",
        "mean = sum_groups(tl.sum(maps, axis=1), TILE_GROUPS, TILE_CHANNELS) * share",
        "whole, large mean",
    ),
    (FORWARD, "square - remainder * remainder + EPS", "square - remainder * remainder", "whole, large mean"),
    (FORWARD, "normal * weight + bias", "normal * weight - bias", "whole"),
    (
        FORWARD,
        "mean = tl.sum(weighted, axis=1) / (GROUP_CHANNELS * PIXELS)",
        "mean = tl.sum(weighted, axis=1) * share",
        "streamed, large mean",
    ),
    (FORWARD, "part_squares + distance * distance * count", "part_squares", "streamed"),
    (FORWARD, "square += further * further", "square += further", "streamed"),
    (BACKWARD, "(gradient - normal * to_channels(tilt", "(gradient + normal * to_channels(tilt", "whole"),
    (BACKWARD, "first + tl.arange(0, PARAMETER_ROWS)", "first - tl.arange(0, PARAMETER_ROWS)", "whole"),
    (BACKWARD, "(gradient * weight - level - normal * tilt)", "(gradient * weight - normal * tilt)", "streamed"),
]

MUTATIONS = [
    (FORWARD, "(tl.program_id(0) // BLOCKS).to(tl.int64)", "tl.program_id(0) // BLOCKS", "last image"),
    (FORWARD, "tl.fma(part_mean, count, 0.0)", "part_mean * count", "streamed, large mean"),
    (BACKWARD, "weight_gradient += gradient * normal", "weight_gradient += gradient", "streamed"),
    (TILES, "(group < GROUPS) & (within", "(group <= GROUPS) & (within", "whole"),
    (TILES, "index // TILE_CHANNELS", "index // GROUP_CHANNELS", "whole"),
    (TILES, "index % TILE_CHANNELS", "index % GROUP_CHANNELS", "whole"),
    (
        TILES,
        "pixel.to(tl.int64)[None, :] * CHANNELS",
        "pixel.to(tl.int64)[None, :] * (CHANNELS + 1)",
        "whole, channels_last",
    ),
    (TILES, "channel.to(tl.int64)[:, None] * PIXELS", "channel.to(tl.int64)[:, None] * (PIXELS + 1)", "whole"),
    (TILES, "values * sigmoid(values)", "sigmoid(values)", "whole"),
    (TILES, "(1.0 - share)", "(2.0 - share)", "whole"),
    (TILES, "tl.store(place + 1, remainder", "tl.store(place + 1, -remainder", "whole, large mean"),
    (TILES, "tl.store(place + 2, reciprocal", "tl.store(place + 2, 2.0 * reciprocal", "whole"),
    (FORWARD, "values = rounded.to(tl.float32)", "values = values", "whole, half"),
    (
        FORWARD,
        "normal = distance - to_channels(remainder",
        "normal = distance + to_channels(remainder",
        "whole, large mean",
    ),
    (FORWARD, "first_pixel = span * (STEPS * TILE_PIXELS)", "first_pixel = span * TILE_PIXELS", "streamed"),
    (FORWARD, "range(1, STEPS)", "range(2, STEPS)", "streamed"),
    (FORWARD, "total * remainder", "remainder", "streamed"),
    (FORWARD, "distance -= remainder[:, None]", "distance += remainder[:, None]", "streamed, large mean"),
    (FORWARD, "(part_mean - mean[:, None]) + part_remainder", "(part_mean - mean[:, None])", "streamed, large mean"),
    (
        FORWARD,
        "normalize(maps, centre, off_centre, scale)",
        "normalize(maps, centre, 0.0, scale)",
        "streamed, large mean",
    ),
    (FORWARD, "tl.maximum(pixels, 0) * GROUP_CHANNELS", "tl.maximum(pixels, 0)", "streamed"),
    (
        BACKWARD,
        "place = parts_ptr + image * (2 * GROUPS * GROUP_CHANNELS) + channel",
        "place = parts_ptr + image * (GROUPS * GROUP_CHANNELS) + channel",
        "whole",
    ),
    (TILES, "(maps - mean - remainder)", "(maps + mean - remainder)", "whole"),
    (TILES, "(maps - mean - remainder)", "(maps - mean + remainder)", "whole, large mean"),
    (
        BACKWARD,
        "gradient * weight[:, None] - to_channels(level",
        "gradient * weight[:, None] + to_channels(level",
        "whole",
    ),
    (BACKWARD, "sum_groups(bias_gradient * weight", "sum_groups(bias_gradient", "whole"),
    (BACKWARD, "sum_groups(weight_gradient * weight", "sum_groups(weight_gradient", "whole"),
    (BACKWARD, "bias_gradient += gradient\n", "bias_gradient -= gradient\n", "streamed"),
    (BACKWARD, "(row < rows)[:, None]", "(row <= rows)[:, None]", "whole"),
    (BACKWARD, "(image * SPANS + span) * (2 * GROUPS", "(image * SPANS) * (2 * GROUPS", "streamed"),
    (BACKWARD, "tl.program_id(0) < PARAMETER_BLOCKS", "tl.program_id(0) <= PARAMETER_BLOCKS", "streamed"),
    (BACKWARD, "tl.program_id(0) - PARAMETER_BLOCKS", "tl.program_id(0)", "streamed"),
    (BACKWARD, "sum_groups(level * weight", "sum_groups(level", "streamed"),
    (BACKWARD, "sum_groups(tilt * weight", "sum_groups(tilt", "streamed"),
    (BACKWARD, "(image * GROUPS + group) * (2 * SPANS) + span", "(image * GROUPS + group) * SPANS + span", "streamed"),
    (BACKWARD, "((image * GROUPS + group) * (2 * SPANS))[None, :]", "(group * (2 * SPANS))[None, :]", "streamed"),
    (BACKWARD, "tl.load(place + SPANS, mask=known", "tl.load(place, mask=known", "streamed"),
]


test_the_kernels_themselves_pass, test_a_mutation_is_noticed, test_each_other_mutation_is_noticed = mutation_tests(
    CHECKS, QUICK_MUTATIONS, MUTATIONS
)
