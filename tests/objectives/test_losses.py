"""Likelihoods and bounds against float64 references from torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import logsigmoid

from gen_dist.objectives.losses import (
    bernoulli_nll,
    gaussian_nll,
    importance_weighted_bound,
    normal_log_density,
    squared_error,
    standard_normal_log_density,
)

SHAPE = (6, 3, 5, 4)


def _random(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_bernoulli_nll_equals_log_probability_of_binary_pixels() -> None:
    logits, targets = _random(0) * 10, (_random(1) > 0).float()
    expected = -Bernoulli(logits=logits.double()).log_prob(targets.double()).flatten(1).sum(1)
    torch.testing.assert_close(bernoulli_nll(logits, targets).double(), expected, rtol=1e-6, atol=1e-6)


def test_bernoulli_nll_and_its_gradient_equal_cross_entropy() -> None:
    logits, targets = (_random(0) * 10).requires_grad_(), torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    wide = logits.detach().double()
    probability = wide.sigmoid()
    expected = -(targets * logsigmoid(wide) + (1 - targets) * logsigmoid(-wide)).flatten(1).sum(1)
    nll = bernoulli_nll(logits, targets)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-5)
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    torch.testing.assert_close(gradient.double(), probability - targets, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit", [-1e4, -200.0, 200.0, 1e4])
def test_bernoulli_nll_of_extreme_logits_is_finite_and_right(logit: float) -> None:
    logits = torch.full((1, 2), logit, requires_grad=True)
    nll = bernoulli_nll(logits, torch.tensor([[0.0, 1.0]]))
    assert nll.item() == pytest.approx(abs(logit))
    nll.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_gaussian_nll_equals_the_normal_log_density() -> None:
    log_scale = torch.tensor(-1.3)
    expected = -Normal(_random(0).double(), log_scale.double().exp()).log_prob(_random(1).double()).flatten(1).sum(1)
    nll = gaussian_nll(_random(0), _random(1), log_scale)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-5)


def test_squared_error_sums_over_pixels() -> None:
    expected = (_random(0).double() - _random(1).double()).pow(2).flatten(1).sum(1)
    torch.testing.assert_close(squared_error(_random(0), _random(1)).double(), expected, rtol=1e-6, atol=1e-6)


def test_normal_densities_equal_torch_distributions() -> None:
    values, mean, logvar = _random(0), _random(1), _random(2)
    expected = Normal(mean.double(), (0.5 * logvar.double()).exp()).log_prob(values.double()).flatten(1).sum(1)
    torch.testing.assert_close(normal_log_density(values, mean, logvar).double(), expected, rtol=1e-6, atol=1e-5)
    expected = Normal(0.0, 1.0).log_prob(values.double()).flatten(1).sum(1)
    torch.testing.assert_close(standard_normal_log_density(values).double(), expected, rtol=1e-6, atol=1e-5)


def test_the_importance_bound_is_the_log_mean_weight() -> None:
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    expected = torch.tensor([math.log(2.0), math.log(4.0)])
    torch.testing.assert_close(importance_weighted_bound(weights.log()), expected)
    shifted = importance_weighted_bound(weights.log() - 5000.0)  # far below the range of float32's exp
    torch.testing.assert_close(shifted, expected - 5000.0)


def test_the_bound_grows_with_the_number_of_samples() -> None:
    log_weights = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * 2
    bounds = [importance_weighted_bound(log_weights[:, :samples]).mean() for samples in (1, 4, 16, 64)]
    assert bounds == sorted(bounds)
