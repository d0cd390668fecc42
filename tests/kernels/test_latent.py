"""The latent step against torch.distributions in float64, and its gradients."""

from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gen_dist.kernels import Key, normal, reparameterize_kl
from gen_dist.kernels.latent import _LatentsKl, plain_latents_kl
from gen_dist.kernels.latent_layout import LOGVAR_RANGE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RNG = torch.tensor([7, 3])


def _parameters(rows: int, *shape: int) -> torch.Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(40,), (6, 5, 4), (2, 3, 3, 3)])
def test_latents_and_kl_equal_torch_distributions(shape: tuple[int, ...]) -> None:
    parameters = _parameters(5, *shape)
    latents, kl_nats = reparameterize_kl(parameters, Key(RNG, 2, 10))
    mean, logvar = parameters.double().chunk(2, dim=1)
    posterior = Normal(mean, (0.5 * logvar).exp())
    noise = normal(Key(RNG, 2, 10), 5, mean[0].numel()).double().view(mean.shape)
    torch.testing.assert_close(latents.double(), mean + posterior.scale * noise, rtol=1e-6, atol=1e-6)
    expected = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).flatten(1).sum(1)
    torch.testing.assert_close(kl_nats.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_standard_deviation_is_exp_of_half_the_log_variance() -> None:
    """Some texts print z = mean + exp(logvar) * eps, which is a misprint of exp(logvar / 2)."""
    parameters = torch.cat([torch.zeros(20000, 1), torch.full((20000, 1), 2.0)], dim=1)
    latents, _ = reparameterize_kl(parameters, Key(RNG, 2, 0))
    assert latents.std().item() == pytest.approx(torch.e, rel=0.02)


def test_kl_sums_over_latents() -> None:
    """A mean over the latents would divide beta by their number."""
    one = reparameterize_kl(torch.ones(3, 2), Key(RNG, 2, 0))[1]
    ten = reparameterize_kl(torch.ones(3, 20), Key(RNG, 2, 0))[1]
    torch.testing.assert_close(ten, 10 * one)


def test_deterministic_gives_the_mean() -> None:
    parameters = _parameters(4, 6)
    assert torch.equal(reparameterize_kl(parameters, Key(RNG, 2, 0), deterministic=True)[0], parameters[:, :3])


def test_samples_of_an_image_stand_in_adjoining_rows_and_differ() -> None:
    parameters = _parameters(4, 6)
    latents, kl_nats = reparameterize_kl(parameters, Key(RNG, 2, 0), samples=5)
    assert latents.shape == (20, 3)
    assert kl_nats.shape == (4,)
    noise = (latents.view(4, 5, 3) - parameters[:, None, :3]) / (0.5 * parameters[:, None, 3:]).exp()
    torch.testing.assert_close(noise.flatten(1), normal(Key(RNG, 2, 0), 4, 15), rtol=1e-4, atol=1e-4)


def test_rows_of_two_shards_equal_the_whole() -> None:
    parameters = _parameters(8, 6)
    whole = reparameterize_kl(parameters, Key(RNG, 2, 0))[0]
    shards = [
        reparameterize_kl(parameters[:5], Key(RNG, 2, 0))[0],
        reparameterize_kl(parameters[5:], Key(RNG, 2, 5))[0],
    ]
    assert torch.equal(torch.cat(shards), whole)


def test_wild_log_variances_are_clamped_and_nan_stays_visible() -> None:
    parameters = torch.tensor([[0.0, 80.0], [0.0, -80.0], [0.0, torch.nan]])
    latents, kl_nats = reparameterize_kl(parameters, Key(RNG, 2, 0))
    assert latents[:2].isfinite().all()
    assert kl_nats[:2].isfinite().all()
    assert kl_nats[1].item() == pytest.approx(0.5 * (-1 - LOGVAR_RANGE[0]), rel=1e-5)
    assert latents[2].isnan().all()
    assert kl_nats[2].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_prior", [False, True])
def test_half_precision_is_computed_in_float32_and_rounded_once(with_prior: bool, dtype: torch.dtype) -> None:
    parameters = _parameters(6, 8).to(dtype)
    prior = parameters.flip(0) if with_prior else None
    latents, kl_nats = reparameterize_kl(parameters, Key(RNG, 2, 0), samples=2, prior=prior)
    wide_prior = None if prior is None else prior.float()
    wide_latents, wide_kl = reparameterize_kl(parameters.float(), Key(RNG, 2, 0), samples=2, prior=wide_prior)
    assert torch.equal(latents, wide_latents.to(dtype))
    assert torch.equal(kl_nats, wide_kl)


def test_float64_is_computed_in_float64() -> None:
    parameters = _parameters(3, 8).double().requires_grad_()
    latents, kl_nats = reparameterize_kl(parameters, Key(RNG, 2, 0))
    assert latents.dtype == kl_nats.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda values: reparameterize_kl(values, Key(RNG, 2, 0)), (parameters,))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_latents_keep_the_memory_format_of_the_parameters(samples: int, deterministic: bool) -> None:
    formats = {(8, 3, 5): torch.channels_last, (4, 2, 3, 2): torch.channels_last_3d}
    for shape, memory_format in formats.items():
        contiguous = _parameters(3, *shape)
        last = contiguous.contiguous(memory_format=memory_format)
        found, kl_nats = reparameterize_kl(last, Key(RNG, 2, 0), samples=samples, deterministic=deterministic)
        expected, expected_kl = reparameterize_kl(
            contiguous, Key(RNG, 2, 0), samples=samples, deterministic=deterministic
        )
        assert found.is_contiguous(memory_format=memory_format)
        assert expected.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, check_stride=False)
        torch.testing.assert_close(kl_nats, expected_kl)


@pytest.mark.parametrize("shape", [(40,), (6, 5, 4)])
def test_divergence_from_a_prior_equals_torch_distributions(shape: tuple[int, ...]) -> None:
    parameters, prior = _parameters(5, *shape), _parameters(10, *shape)[5:]
    latents, kl_nats = reparameterize_kl(parameters, Key(RNG, 2, 10), prior=prior)
    (mean, logvar), (prior_mean, prior_logvar) = parameters.double().chunk(2, 1), prior.double().chunk(2, 1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(prior_mean, (0.5 * prior_logvar).exp()))
    torch.testing.assert_close(kl_nats.double(), expected.flatten(1).sum(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(latents, reparameterize_kl(parameters, Key(RNG, 2, 10))[0])


def test_zero_priors_are_standard_normal_and_kl_to_itself_is_0() -> None:
    parameters = _parameters(5, 12)
    zeros = reparameterize_kl(parameters, Key(RNG, 2, 0), prior=torch.zeros_like(parameters))[1]
    torch.testing.assert_close(zeros, reparameterize_kl(parameters, Key(RNG, 2, 0))[1])
    assert reparameterize_kl(parameters, Key(RNG, 2, 0), prior=parameters)[1].abs().max() < 1e-6


def test_gradients_flow_to_the_prior() -> None:
    parameters, prior = _parameters(3, 8).double().requires_grad_(), _parameters(6, 8)[3:].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: reparameterize_kl(p, Key(RNG, 2, 0), prior=q)[1], (parameters, prior))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_other_devices_take_the_operator(memory_format: torch.memory_format) -> None:
    """Tensors on "meta" represent those of other devices."""
    parameters = torch.empty(3, 8, 4, 5, dtype=torch.bfloat16, device="meta").contiguous(memory_format=memory_format)
    latents, kl_nats = reparameterize_kl(parameters, Key(RNG.to("meta"), 2, 0), samples=2, prior=parameters)
    assert latents.device.type == kl_nats.device.type == "meta"
    assert latents.shape == (6, 4, 4, 5)
    assert latents.dtype == torch.bfloat16
    assert latents.is_contiguous(memory_format=memory_format)
    assert kl_nats.shape == (3,)
    assert kl_nats.dtype == torch.float32


GOOD = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("parameters", "rng", "options", "message"),
    [
        (torch.zeros(4), RNG, {}, r"parameters \[4\] are not \[B, 2C"),
        (torch.zeros(2, 5), RNG, {}, r"parameters \[2, 5\] are not \[B, 2C"),
        (GOOD.long(), RNG, {}, "parameters are torch.int64; use float32"),
        (GOOD, torch.tensor([7]), {}, r"rng is torch.int64 \[1\]; it must be int64 \[2\]"),
        (GOOD, RNG.float(), {}, r"rng is torch.float32 \[2\]"),
        (GOOD, RNG, {"samples": 0}, "samples is 0; it must be at least 1"),
        (GOOD, RNG, {"prior": torch.zeros(2, 6)}, r"prior is torch.float32 \[2, 6\], parameters are"),
        (GOOD, RNG, {"prior": GOOD.double()}, "prior is torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_values(
    parameters: torch.Tensor, rng: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reparameterize_kl(parameters, Key(rng, 2, 0), **options)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("shape", [(8,), (4, 3, 2)])
@pytest.mark.parametrize("drawn", [True, False])
def test_the_written_out_gradient_equals_that_of_autograd(drawn: bool, shape: tuple[int, ...], samples: int) -> None:
    parameters = (_parameters(5, *shape) * 3).double()
    parameters[0, -1], parameters[1, -1] = 50.0, -50.0  # where the clamp acts
    half = (shape[0] // 2, *shape[1:])
    noise = _parameters(5, samples, *half).double() if drawn else None
    upstream = _parameters(5, samples, *half).double(), _parameters(5).double()
    gradients = []
    for combine in (plain_latents_kl, _LatentsKl.apply):
        leaf = parameters.clone().requires_grad_()
        outputs = combine(leaf, noise, samples)
        gradients.append(torch.autograd.grad(outputs, leaf, upstream)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    assert gradients[0][0, -1].abs().max() == 0


def test_gradients_equal_the_derivatives_on_paper() -> None:
    parameters = _parameters(3, 8).requires_grad_()
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))

    def loss(values: torch.Tensor) -> torch.Tensor:
        latents, kl_nats = reparameterize_kl(values, Key(RNG, 2, 0))
        return (latents * weights).sum() + kl_nats.sum()

    (gradient,) = torch.autograd.grad(loss(parameters), parameters)
    mean, logvar = parameters.detach().double().chunk(2, dim=1)
    noise = normal(Key(RNG, 2, 0), 3, 4).double()
    expected = torch.cat(
        [weights + mean, weights * 0.5 * (0.5 * logvar).exp() * noise + 0.5 * (logvar.exp() - 1)], dim=1
    )
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
