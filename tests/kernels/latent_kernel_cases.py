"""The Triton kernels, interpreted, against their twins in float64. Run by tests/kernels/test_latent_kernel.py.

It needs TRITON_INTERPRET=1 before Triton is imported, so its name keeps pytest from collecting it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_dist.kernels import latent, triton_latent, triton_noise
from gen_dist.kernels.device_noise import device_normal, device_words, philox_4x32_10
from gen_dist.kernels.latent import twin_backward, twin_forward
from gen_dist.kernels.latent_layout import LOGVAR_RANGE, memory_format_of
from tests.kernels.interpreter import record_launches, round_bfloat16_to_nearest
from tests.kernels.philox_answers import PHILOX_4X32_10_ANSWERS

assert triton.knobs.runtime.interpret, "run tests/kernels/test_latent_kernel.py"
round_bfloat16_to_nearest()

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RNG = torch.tensor([0x123456789ABCDEF, 17])
STREAM, FIRST_ROW = 3, 5
# Half a unit in the last place of a result, plus a margin for the float32 arithmetic before.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}
DTYPES = list(ROUNDING)
LAYOUTS = {
    "rows": ((40,), torch.contiguous_format),
    "one spatial dimension": ((6, 5), torch.contiguous_format),
    "image": ((6, 3, 5), torch.contiguous_format),
    "channels_last": ((8, 4, 5), torch.channels_last),
    "channels_last, odd channels": ((6, 3, 5), torch.channels_last),
    "channels_last, one channel": ((2, 3, 5), torch.channels_last),
    "channels_last, 16 channels": ((32, 2, 3), torch.channels_last),
    "volume": ((4, 3, 2, 3), torch.contiguous_format),
    "channels_last_3d": ((10, 3, 2, 3), torch.channels_last_3d),
}

OPTIONS = {  # samples, deterministic, prior
    "standard prior": (1, False, False),
    "prior": (1, False, True),
    "deterministic": (1, True, False),
    "2 deterministic samples, prior": (2, True, True),
    "2 samples": (2, False, False),
    "5 samples, prior": (5, False, True),
}


def draw(*shape: int, seed: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=memory_format)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def assert_equals_the_twin(
    parameters: Tensor,
    prior: Tensor | None = None,
    *,
    samples: int = 1,
    deterministic: bool = False,
    kl_tolerance: float = 1e-6,
) -> None:
    """Assert that latents, KL and gradients equal the twins' in float64, from the same rounded inputs."""
    noise = (RNG, STREAM, FIRST_ROW, samples, deterministic)
    dtype, rows = parameters.dtype, len(parameters)
    latents, kl_nats = triton_latent.forward(parameters, prior, *noise)
    expected_latents, expected_kl = twin_forward(parameters.double(), double(prior), *noise)
    assert latents.dtype == dtype
    assert latents.stride() == expected_latents.stride()
    assert kl_nats.dtype == torch.float32
    assert kl_nats.shape == (rows,)
    torch.testing.assert_close(latents.double(), expected_latents, rtol=ROUNDING[dtype], atol=2e-6, equal_nan=True)
    torch.testing.assert_close(kl_nats.double(), expected_kl, rtol=kl_tolerance, atol=1e-7, equal_nan=True)

    latents_gradient = torch.randn(latents.shape, generator=torch.Generator().manual_seed(8)).to(dtype)
    latents_gradient = latents_gradient.contiguous(memory_format=memory_format_of(parameters))
    kl_gradient = torch.randn(rows, generator=torch.Generator().manual_seed(9))
    gradients = triton_latent.backward(latents_gradient, kl_gradient, parameters, prior, *noise)
    expected = twin_backward(
        latents_gradient.double(), kl_gradient.double(), parameters.double(), double(prior), *noise
    )
    assert len(gradients) == len(expected)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert gradient.stride() == parameters.stride()
        # The scale of finite values: an infinite one would allow any difference.
        finite = reference[reference.isfinite()].abs()
        size = finite.amax().item() if finite.numel() else 0.0
        # Sums of terms that cancel are as exact as their largest term.
        torch.testing.assert_close(
            gradient.double(), reference, rtol=ROUNDING[dtype], atol=1e-6 * max(1.0, size), equal_nan=True
        )


@triton.jit
def words_kernel(counters_ptr, keys_ptr, words_ptr):
    """uint32 counters [n, 4] and keys [n, 2] to words [n, 4], one row per program."""
    n = tl.program_id(0)
    w0, w1, w2, w3 = triton_noise.philox_4x32_10(
        tl.load(counters_ptr + 4 * n),
        tl.load(counters_ptr + 4 * n + 1),
        tl.load(counters_ptr + 4 * n + 2),
        tl.load(counters_ptr + 4 * n + 3),
        tl.load(keys_ptr + 2 * n),
        tl.load(keys_ptr + 2 * n + 1),
    )
    tl.store(words_ptr + 4 * n, w0)
    tl.store(words_ptr + 4 * n + 1, w1)
    tl.store(words_ptr + 4 * n + 2, w2)
    tl.store(words_ptr + 4 * n + 3, w3)


def kernel_words(counters: Tensor, keys: Tensor) -> Tensor:
    words = torch.zeros(counters.shape, dtype=torch.uint32)
    words_kernel[(len(counters),)](counters.to(torch.uint32), keys.to(torch.uint32), words)
    return words.to(torch.int64)


def test_kernel_words_are_the_known_answers_of_philox_4x32_10() -> None:
    counters, keys, answers = (torch.tensor(column) for column in zip(*PHILOX_4X32_10_ANSWERS, strict=True))
    assert torch.equal(kernel_words(counters, keys), answers)


def test_kernel_words_equal_the_twins_bit_for_bit() -> None:
    random = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (20, 4), generator=random)
    keys = torch.randint(0, 2**32, (20, 2), generator=random)
    twin = philox_4x32_10(counters.unbind(1), keys.unbind(1))  # type: ignore[arg-type]
    assert torch.equal(kernel_words(counters, keys), torch.stack(twin, dim=1))


@triton.jit
def box_muller_kernel(words_ptr, normals_ptr, PAIRS: tl.constexpr):
    """uint32 words [PAIRS, 2] to float32 normals [PAIRS, 2]."""
    pair = tl.arange(0, PAIRS)
    x, y = triton_noise.box_muller(tl.load(words_ptr + 2 * pair), tl.load(words_ptr + 2 * pair + 1))
    tl.store(normals_ptr + 2 * pair, x)
    tl.store(normals_ptr + 2 * pair + 1, y)


def test_box_muller_equals_its_definition_at_all_angles() -> None:
    eighths = [max(0, min(2**32 - 1, k * 2**29 + offset)) for k in range(9) for offset in (-1, 0, 1, 2**27)]
    radii = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    words = torch.cartesian_prod(torch.tensor(radii), torch.tensor(eighths))[:256]
    words = torch.cat([words, words.new_zeros(256 - len(words), 2)]) if len(words) < 256 else words
    normals = torch.empty(256, 2)
    box_muller_kernel[(1,)](words.to(torch.uint32), normals, PAIRS=256)
    uniform = (words[:, 0].to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    turn = words[:, 1].double() * (2 * np.pi / 2**32)
    radius = (-2 * uniform.log()).sqrt()
    expected = torch.stack([radius * turn.cos(), radius * turn.sin()], dim=1)
    torch.testing.assert_close(normals.double(), expected, rtol=0, atol=1e-6)
    assert normals.abs().max() <= 6.8


@pytest.mark.parametrize("width", [1, 2, 3, 5, 20, 64, 1030])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_normal_kernel_equals_its_twin(rows: int, width: int) -> None:
    if rows * width > 10_000:
        rows = 2
    normals = triton_noise.normal(RNG, STREAM, FIRST_ROW, rows, width)
    assert normals.dtype == torch.float32
    expected = device_normal(RNG, STREAM, FIRST_ROW, rows, width, dtype=torch.float64)
    torch.testing.assert_close(normals.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_normal_kernel_of_nothing_is_empty(shape: tuple[int, int]) -> None:
    assert triton_noise.normal(RNG, STREAM, FIRST_ROW, *shape).shape == shape


@pytest.mark.parametrize(
    ("seed", "step", "first_row"),
    [(-1, 1, 0), (2**62 + 5, 2**31, 0), (5, 2**32 + 9, 2**31 - 2), (5, 9, 2**32 - 2)],
)
def test_kernel_keys_beyond_32_bits_count_as_the_twins(seed: int, step: int, first_row: int) -> None:
    rng = torch.tensor([seed, step])
    expected = device_normal(rng, STREAM, first_row, 5, 7)
    torch.testing.assert_close(triton_noise.normal(rng, STREAM, first_row, 5, 7), expected, rtol=0, atol=1e-6)
    words = device_words(rng, STREAM, first_row, 5, 4)
    assert len(words.unique()) == words.numel()


def _first(values: Sequence[Any], count: int) -> list[Any]:
    """Parameters of which `make test` runs the first ones."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (place >= count)) for place, value in enumerate(values)]


@pytest.mark.parametrize("dtype", _first(DTYPES, 2), ids=str)
@pytest.mark.parametrize("latents", _first([1, 7, 33, 1030, 3, 5, 20, 64, 1000], 4))
def test_latent_kernels_equal_their_twins_at_every_width(latents: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 3, 130) if latents < 64 and dtype == torch.float32 else (1, 3):
        parameters = draw(rows, 2 * latents, seed=1, dtype=dtype, memory_format=torch.contiguous_format)
        assert_equals_the_twin(parameters)


def _cases_of_layouts() -> list[Any]:
    """Every layout with every option. `make test` takes all options of two layouts, and two of each other one."""
    cases = [
        *((torch.float32, options) for options in OPTIONS),
        (torch.bfloat16, "2 samples"),
        (torch.float16, "prior"),
    ]

    def quick(layout: str) -> list[Any]:
        return cases[:-1] if layout in ("rows", "channels_last, odd channels") else cases[-3:-1]

    return [
        pytest.param(*case, layout, marks=[pytest.mark.slow] * (case not in quick(layout)))
        for layout in LAYOUTS
        for case in cases
    ]


@pytest.mark.parametrize(("dtype", "options", "layout"), _cases_of_layouts(), ids=str)
def test_latent_kernels_equal_their_twins_in_every_layout(dtype: torch.dtype, layout: str, options: str) -> None:
    shape, memory_format = LAYOUTS[layout]
    samples, deterministic, with_prior = OPTIONS[options]
    parameters = draw(3, *shape, seed=1, dtype=dtype, memory_format=memory_format)
    prior = draw(3, *shape, seed=2, dtype=dtype, memory_format=memory_format) if with_prior else None
    assert_equals_the_twin(parameters, prior, samples=samples, deterministic=deterministic)


@pytest.mark.parametrize("shape", [(0, 40), (0, 6, 3, 5), (3, 0), (3, 4, 0, 5)], ids=str)
@pytest.mark.parametrize("with_prior", [False, True])
def test_latent_kernels_of_an_empty_batch_are_empty(shape: tuple[int, ...], with_prior: bool) -> None:
    parameters = torch.empty(shape)
    assert_equals_the_twin(parameters, parameters.clone() if with_prior else None, samples=2)
    _, kl_nats = triton_latent.forward(parameters, None, RNG, STREAM, FIRST_ROW, 2, False)
    assert not kl_nats.any()


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latent_kernels_clamp_wild_log_variances_and_keep_nan(dtype: torch.dtype, with_prior: bool) -> None:
    low, high = LOGVAR_RANGE
    parameters = draw(6, 2 * 7, seed=1, dtype=dtype, memory_format=torch.contiguous_format)
    logvars = [80.0, -80.0, low, high, float("inf"), -float("inf"), 0.0]
    parameters[:3, 7:] = torch.tensor(logvars)
    parameters[4, 9] = float("nan")  # a log-variance
    parameters[5, 1] = float("nan")  # a mean
    prior = None
    if with_prior:
        prior = draw(6, 2 * 7, seed=2, dtype=dtype, memory_format=torch.contiguous_format)
        prior[1:4, 7:] = torch.tensor(logvars)
    if dtype == torch.float16:  # exp(20 / 2) is within its range, gradients of exp(20) are not
        parameters[:3, 7:] = parameters[:3, 7:].clamp(max=4.0)
        if prior is not None:
            prior[1:4, 7:] = prior[1:4, 7:].clamp(min=-4.0)
    # exp(50) is two powers of two whose exponents, in float32, are each a part in a million off.
    assert_equals_the_twin(parameters, prior, kl_tolerance=3e-6)
    latents, kl_nats = triton_latent.forward(parameters, prior, RNG, STREAM, FIRST_ROW, 1, False)
    assert latents.isnan().nonzero().tolist() == [[4, 2], [5, 1]]
    assert kl_nats.isnan().tolist() == [False] * 4 + [True] * 2
    ones = torch.ones(6, 7, dtype=dtype)
    gradient, *_ = triton_latent.backward(ones, torch.ones(6), parameters, prior, RNG, STREAM, FIRST_ROW, 1, False)
    acts = (parameters[:, 7:] < low) | (parameters[:, 7:] > high)
    assert not gradient[:, 7:][acts].any()
    assert gradient[:3, 7:][~acts[:3]].all()
    assert gradient[4, 9].isnan()


@pytest.mark.parametrize("unused", ["latents", "kl"])
@pytest.mark.parametrize("with_prior", [False, True])
def test_backward_kernel_takes_a_missing_gradient_as_zero(with_prior: bool, unused: str) -> None:
    parameters = draw(3, 14, seed=1, dtype=torch.float32, memory_format=torch.contiguous_format)
    prior = parameters.flip(0) if with_prior else None
    gradients: dict[str, Tensor | None] = {"latents": torch.full((6, 7), 0.5), "kl": torch.full((3,), 2.0)}
    given = gradients | {unused: None}
    zero = gradients | {unused: torch.zeros_like(gradients[unused])}  # type: ignore[arg-type]
    arguments = (parameters, prior, RNG, STREAM, FIRST_ROW, 2, False)
    for found, expected in zip(
        triton_latent.backward(given["latents"], given["kl"], *arguments),
        triton_latent.backward(zero["latents"], zero["kl"], *arguments),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_backward_kernel_reads_an_expanded_divergence_gradient() -> None:
    parameters = draw(5, 14, seed=1, dtype=torch.float32, memory_format=torch.contiguous_format)
    arguments = (parameters, None, RNG, STREAM, FIRST_ROW, 1, False)
    expanded = triton_latent.backward(None, torch.tensor(0.25).expand(5), *arguments)[0]
    assert torch.equal(expanded, triton_latent.backward(None, torch.full((5,), 0.25), *arguments)[0])
    every_other = torch.arange(10.0)[::2]
    strided = triton_latent.backward(None, every_other, *arguments)[0]
    assert torch.equal(strided, triton_latent.backward(None, every_other.contiguous(), *arguments)[0])


@pytest.mark.parametrize("width", [7, 40, 1030])
def test_latent_kernel_shards_equal_the_whole(width: int) -> None:
    rows, middle = (3, 1) if width > 1000 else (9, 4)
    parameters = draw(rows, 2 * width, seed=1, dtype=torch.float32, memory_format=torch.contiguous_format)

    def forward(first: int, last: int) -> tuple[Tensor, Tensor]:
        return triton_latent.forward(parameters[first:last], None, RNG, STREAM, FIRST_ROW + first, 2, False)

    whole, shards = forward(0, rows), (forward(0, middle), forward(middle, rows))
    for output, first, second in zip(whole, *shards, strict=True):
        assert torch.equal(torch.cat([first, second]), output)


@pytest.mark.parametrize("columns", _first([64, 1024, 256], 2))
def test_latents_do_not_depend_on_the_tile(columns: int) -> None:
    parameters = draw(3, 400, seed=1, dtype=torch.float32, memory_format=torch.contiguous_format)
    outputs = []
    launch = triton_latent.forward_launch(parameters, STREAM, FIRST_ROW, 2, False)
    tile = {"ROWS": 1024 // columns, "COLUMNS": columns}
    grid = (-(-3 // tile["ROWS"]), -(-200 // columns))
    for candidate in (launch, replace(launch, grid=grid, constants=launch.constants | tile)):
        latents, kl_parts = torch.empty(6, 200), torch.empty(3, candidate.grid[1])
        candidate(parameters_ptr=parameters, prior_ptr=None, latents_ptr=latents, kl_ptr=kl_parts, rng_ptr=RNG)
        outputs.append((latents, kl_parts.sum(1)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p.expand(4, 6, 3, 5), lambda p: p.transpose(2, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_operator_runs_and_differentiates_the_kernels(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[Tensor], Tensor], memory_format: torch.memory_format
) -> None:
    """Parameters are dense or not, and gradients of latents have either memory format."""

    def gradients() -> list[Tensor]:
        base = draw(1, 6, 3, 5, seed=1, dtype=torch.float32, memory_format=memory_format)
        leaf, prior = base.requires_grad_(), torch.linspace(-1, 1, 90).view(1, 6, 3, 5).requires_grad_()
        parameters = make(leaf)
        latents, kl_nats = latent.reparameterize_kl_operator(parameters, make(prior), RNG, STREAM, FIRST_ROW, 2, False)
        weights = torch.linspace(-1, 1, latents.numel()).view(latents.shape)
        return [latents, kl_nats, *torch.autograd.grad((latents * weights).sum() + kl_nats.sum(), (leaf, prior))]

    expected = gradients()
    monkeypatch.setattr(latent, "runs_triton", lambda device: True)
    launched = record_launches(monkeypatch, (triton_latent, "forward"), (triton_latent, "backward"))
    found = gradients()
    assert launched == ["forward", "backward"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
        assert one.stride() == other.stride()
