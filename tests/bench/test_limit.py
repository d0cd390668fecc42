"""bench/costs/limit.py: it finds all matrix products of a step and nothing else, and computes them as the step does."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.costs.limit import config_of, fraction_of_limit, limit_of, trainer_of
from bench.costs.products import plain_layers, record
from bench.costs.step_profile import KINDS, kinds_of_steps
from gen_dist.config import DcganConfig, MlpConfig, TrainConfig
from gen_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.support.children import ended_by_sigterm
from tests.support.flops import TorchsCount
from tests.support.warm_python import warm_python


def small(preset: str) -> TrainConfig:
    config = config_of(preset, None, "data", 16, 0)
    config = replace(config, data="synthetic", device="cpu", precision="float32")
    if isinstance(config.network, DcganConfig):
        config = replace(config, network=replace(config.network, feature_maps=8, latent_dim=8))
    return config


def test_products_of_the_textbook_vae_equal_those_by_hand() -> None:
    """Each layer has three products: forward and both gradients. The first has two, since its inputs are images."""
    rows, weights = 128, [784 * 400, 400 * 40, 20 * 400, 400 * 784]
    with trainer_of(replace(small("vae-mnist"), global_batch_size=rows)) as trainer:
        limit = limit_of(trainer)
    assert limit.flops == 2 * rows * (3 * sum(weights) - weights[0])


@pytest.mark.parametrize(
    "preset", ["vae-mnist", "vae-conv-mnist", "dcgan-mnist", "dcgan-64", "cgan-mnist", "gan-mnist"]
)
def test_flops_of_the_limit_equal_those_of_the_step(preset: str) -> None:
    with trainer_of(small(preset)) as trainer:
        limit = limit_of(trainer)
        flops = flops_of_step(trainer, 0)
    assert limit.flops == flops > 0


def flops_of_step(trainer: Trainer, step: int) -> int:
    with plain_layers(), TorchsCount() as count:
        trainer.run_step(step)
    return count.flops


def test_the_generators_turn_skips_discriminator_gradients() -> None:
    with trainer_of(small("dcgan-mnist")) as trainer:
        [(_, products)] = limit_of(trainer).groups
    names = [product.name for product in products]
    halving = "16 x 8 x 14 x 14, 16:8 of 4x4"  # the discriminator's second layer
    forward, by_input, by_weight = (
        names.count(f"{part} {halving}") for part in ("convolution", "input gradient", "weight gradient")
    )
    # Three forward passes: generated images in both turns, and real ones. Weights train in the discriminator's turn
    # alone.
    assert (forward, by_input, by_weight) == (3, 3, 2)


def test_steps_of_every_kind_count_as_often_as_they_come() -> None:
    with trainer_of(small("wgan-gp-mnist")) as trainer:
        kinds = kinds_of_steps(trainer)
        limit = limit_of(trainer)
        flops = [flops_of_step(trainer, step) for step in range(limit.round_steps)]
    assert [count for _, count in kinds] == [1, 4]  # the generator's turn is at every fifth step
    assert limit.flops == sum(flops) / len(flops)


def test_all_ways_of_a_product_have_one_result() -> None:
    torch.manual_seed(0)
    images, weight, doubling = torch.rand(4, 3, 8, 8), torch.rand(6, 3, 4, 4), torch.rand(3, 5, 4, 4)
    left, right = torch.rand(8, 9), torch.rand(9, 7)

    def step() -> None:
        for tensor in (images, weight, doubling, left):
            tensor.requires_grad_()
        halved = torch.nn.functional.conv2d(images, weight, stride=2, padding=1)
        doubled = torch.nn.functional.conv_transpose2d(images, doubling, stride=2, padding=1)
        (halved.square().sum() + doubled.square().sum() + (left @ right).sum()).backward()

    products = record(step)
    assert len(products) == 8
    assert any(len(product.ways) > 2 for product in products)
    for product in products:
        results = [_only_tensor(way()).clone() for way in product.ways.values()]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-4)


def _only_tensor(result: object) -> torch.Tensor:
    """A gradient computed alone is returned beside the others, which are None."""
    if isinstance(result, torch.Tensor):
        return result
    assert isinstance(result, tuple)
    [tensor] = [each for each in result if each is not None]
    assert isinstance(tensor, torch.Tensor)
    return tensor


def test_a_fraction_has_a_figure_of_each_round() -> None:
    config = replace(small("vae-mnist"), network=MlpConfig(hidden_sizes=(32,), latent_dim=5))
    with trainer_of(config) as trainer:
        figures = fraction_of_limit(trainer, rounds=2).figures()
    assert {name: figure["n"] for name, figure in figures.items()} == {"step": 2, "limit": 2, "fraction": 2}
    assert all(figure["p20"] > 0 for figure in figures.values())


def test_command_prints_limit_share_and_where_the_rest_goes() -> None:
    words = ["bench/costs/limit.py", "vae-mnist", "--batch-size", "16", "--rounds", "1", "--data", "synthetic"]
    done = subprocess.run([*warm_python(), *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(kind in done.stdout for kind in ("fraction of the limit", "vae/backward", *KINDS))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-preset"], "unknown preset"),
        (["vae-mnist", "--rounds", "0"], "rounds 0"),
        (["vae-mnist", "--rounds", "x"], "--rounds"),
        (["vae-mnist", "--out", "/no/such/directory/out.json"], "directory is missing"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(words: list[str], said: str) -> None:
    done = subprocess.run(
        [*warm_python(), "bench/costs/limit.py", *words], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_nothing_stays_of_a_measurement_that_is_asked_to_end(tmp_path: Path) -> None:
    words = ["bench/costs/limit.py", "vae-mnist", "--rounds", "1000"]
    assert ended_by_sigterm(warm_python(), words, tmp_path) == 143
    assert list(tmp_path.glob("gen_dist-*")) == []
