"""Likelihoods and bounds against float64 references from torch.distributions; losses of scores against the papers'."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Laplace, Normal
from torch.nn.functional import logsigmoid

from gen_dist.objectives import losses
from gen_dist.objectives.losses import (
    bernoulli_nll,
    discretized_logistic_nll,
    gaussian_nll,
    importance_weighted_bound,
    laplace_nll,
    normal_log_density,
    squared_error,
    standard_normal_log_density,
)
from tests.objectives.papers import LOSSES

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


def test_laplace_nll_equals_the_laplace_log_density() -> None:
    log_scale = torch.tensor(-1.7)
    expected = -Laplace(_random(0).double(), log_scale.double().exp()).log_prob(_random(1).double()).flatten(1).sum(1)
    nll = laplace_nll(_random(0), _random(1), log_scale)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-5)


def _logistic_nll(means: Tensor, levels: Tensor, scale: float, most: int) -> Tensor:
    """Differences of the logistic's distribution function in float64, of one value each."""
    upper, lower = ((levels.double() + end) / most for end in (0.5, -0.5))
    upper = torch.where(levels == most, torch.inf, upper)
    lower = torch.where(levels == 0, -torch.inf, lower)
    return -torch.log(((upper - means.double()) / scale).sigmoid() - ((lower - means.double()) / scale).sigmoid())


@pytest.mark.parametrize(("most", "scale"), [(255, 0.11), (255, 0.004), (65_535, 0.02), (2449, 0.3)])
def test_discretized_logistic_nll_equals_float64_differences(most: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, most + 1, (6, 2, 5, 5), generator=generator)
    levels[0, 0, 0, :2] = torch.tensor([0, most])
    means = levels / most + 5 * scale * (torch.rand(levels.shape, generator=generator) - 0.5)
    nll = discretized_logistic_nll(means, levels / most, torch.tensor(math.log(scale)), torch.tensor(1 / most))
    expected = _logistic_nll(means, levels, scale, most).flatten(1).sum(1)
    torch.testing.assert_close(nll.double(), expected, rtol=2e-5, atol=1e-4)


def test_probabilities_of_all_whole_numbers_sum_to_one() -> None:
    levels = torch.arange(256).view(-1, 1)
    nll = discretized_logistic_nll(
        torch.full((256, 1), 0.3), levels / 255, torch.tensor(-2.0), torch.tensor(1 / 255), torch.float64
    )
    assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=1e-5)


def test_far_means_have_finite_gradients_for_whole_numbers() -> None:
    means = torch.tensor([[-40.0, 50.0, 0.5]], requires_grad=True)
    nll = discretized_logistic_nll(means, torch.tensor([[1.0, 0.0, 0.2]]), torch.tensor(-6.0), torch.tensor(1 / 255))
    nll.sum().backward()
    assert nll.isfinite().all() and means.grad is not None and means.grad.isfinite().all()


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


def test_losses_of_scores_are_those_of_the_papers() -> None:
    scores = torch.tensor([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0], dtype=torch.float64)
    for name, expected in LOSSES.items():
        for ours, theirs in zip((losses.real_loss, losses.fake_loss, losses.generator_loss), expected, strict=True):
            torch.testing.assert_close(ours(name, scores), theirs(scores))  # type: ignore[arg-type]
    torch.testing.assert_close(
        losses.relativistic_loss(scores, scores.flip(0)), -(scores - scores.flip(0)).sigmoid().log()
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_scores_far_from_zero_are_finite_and_right(kind: Any) -> None:
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    sides = {"non_saturating": (0, 1e4), "hinge": (0, 1e4 + 1), "least_squares": (5e7, 5e7), "wasserstein": (-1e4, 1e4)}
    found = losses.fake_loss(kind, scores)
    assert found.tolist() == pytest.approx(sides[kind], rel=1e-3)
    assert losses.real_loss(kind, -scores).tolist() == pytest.approx(sides[kind], rel=1e-3)
    found.sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert losses.relativistic_loss(scores, -scores).tolist() == [2e4, 0]


def test_penalties_are_of_each_images_whole_slope() -> None:
    slopes = torch.zeros(3, 1, 2, 2)
    slopes[0, 0, 0] = torch.tensor([3.0, 4.0])
    slopes[1, 0, 1, 1] = 1.0
    torch.testing.assert_close(losses.one_centred_penalty(slopes), torch.tensor([16.0, 0.0, 1.0]), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(losses.zero_centred_penalty(slopes), torch.tensor([25.0, 1.0, 0.0]))
    narrow = losses.zero_centred_penalty(slopes.half() * 100)  # half precision cannot hold 250,000
    torch.testing.assert_close(narrow, torch.tensor([250_000.0, 10_000.0, 0.0]))


@pytest.mark.parametrize("penalty", [losses.one_centred_penalty, losses.zero_centred_penalty])
def test_a_flat_critic_gets_finite_gradients_from_its_penalty(penalty: Callable[[Tensor], Tensor]) -> None:
    weight = torch.zeros(6, requires_grad=True)
    images = torch.ones(4, 6, requires_grad=True)
    (slopes,) = torch.autograd.grad((images @ weight).sum(), images, create_graph=True)
    penalty(slopes).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
