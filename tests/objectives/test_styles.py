"""Generators with styles: two styles in an image, and path lengths that equal those of the whole Jacobian."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen_dist.config import GanConfig, OptimizerConfig
from gen_dist.errors import ConfigError
from gen_dist.kernels import normal
from gen_dist.networks.players import Generator
from gen_dist.networks.stylegan2 import Stylegan2Decoder
from gen_dist.objectives import Batch
from gen_dist.objectives.gan import Gan
from gen_dist.objectives.styled_gan import PathLengthGeneratorPhase, StyledGan
from gen_dist.objectives.styles import LENGTHS, PathLengths
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer
from tests.support.runs import SMALL_STYLEGAN2, make_trainer, rates_and_betas, run_steps, small_config

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = 2


def trainer_of(**changes: Any) -> Trainer:
    objective = GanConfig(style_mixing=0.7, path_length_weight=2.0, path_length_every=2)
    config = small_config("gan", objective=replace(objective, **changes), network=SMALL_STYLEGAN2, steps=8)
    return make_trainer(config)


def parts_of(trainer: Trainer) -> tuple[StyledGan, Stylegan2Decoder, PathLengths]:
    objective = trainer.objective
    assert isinstance(objective, StyledGan)
    generator, lengths = objective.networks["generator"], objective.networks["path_lengths"]
    assert isinstance(generator, Generator) and isinstance(lengths, PathLengths)
    assert isinstance(generator.decoder, Stylegan2Decoder)
    return objective, generator.decoder, lengths


def batch_of(trainer: Trainer, rows: slice = slice(0, ROWS)) -> Batch:
    split = trainer.dataset.train
    images, labels = (torch.from_numpy(array[rows]) for array in (split.images, split.labels))
    return Batch(images, labels, torch.tensor([3, 9]), rows.start)


def test_one_style_at_all_places_gives_the_image_of_its_latents() -> None:
    objective, decoder, _ = parts_of(trainer_of())
    latents = torch.randn(3, 5)
    wanted = objective.decode(latents)
    assert torch.equal(decoder.synthesize(decoder.styles(latents)), wanted)
    changed = decoder.styles(latents).clone()
    for place in range(decoder.places):  # every place has a part in the image
        changed[:, place] = 0.5 + torch.rand(6)
        assert not torch.equal(decoder.synthesize(changed), wanted)
        wanted = decoder.synthesize(changed)


def test_images_mix_two_styles_at_a_keyed_place() -> None:
    trainer = trainer_of()
    objective, decoder, _ = parts_of(trainer)
    batch = batch_of(trainer, slice(0, 200))
    styles = objective.styles(batch, Stream.GENERATOR_LATENTS)
    both = [
        decoder.styles(normal(batch.key(stream), 200, 5)) for stream in (Stream.GENERATOR_LATENTS, Stream.MIXED_LATENTS)
    ]
    is_first, is_second = ((styles == one).all(dim=2) for one in both)
    assert (is_first ^ is_second).all() and is_first[:, 0].all()
    assert (is_second.int().diff(dim=1) >= 0).all()  # no return to the first
    mixed = is_second[:, -1]
    assert mixed.float().mean() == pytest.approx(0.7, abs=0.1)
    places = is_second[mixed].sum(dim=1)
    assert set(places.tolist()) == set(range(1, decoder.places))
    parts = [objective.generate(batch_of(trainer, one), Stream.GENERATOR_LATENTS) for one in (slice(0, 7), slice(7, 9))]
    whole = objective.generate(batch_of(trainer, slice(0, 9)), Stream.GENERATOR_LATENTS)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_path_lengths_of_a_linear_generator_are_those_of_its_matrix() -> None:
    matrix, styles = torch.randn(3 * 6, 2 * 4 * 5), torch.randn(4, 3, 6)
    batch = Batch(torch.zeros(4, 2, 4, 5), torch.zeros(4, dtype=torch.int64), torch.tensor([3, 9]), 7)
    images, lengths = PathLengths()(lambda one: (one.flatten(1) @ matrix).view(-1, 2, 4, 5), styles, batch)
    assert torch.equal(images.flatten(1), styles.flatten(1) @ matrix)
    slopes = normal(batch.key(Stream.PATH_DIRECTIONS), 4, 40) @ matrix.T / (4 * 5) ** 0.5
    torch.testing.assert_close(lengths, (slopes.square().sum(dim=1) / 3).sqrt())  # the mean over three places


@pytest.mark.slow
def test_path_lengths_and_their_gradients_equal_those_of_the_jacobian() -> None:
    """Karras et al. 2020, eq. 4, with the Jacobian of each image written out, in float64."""
    trainer = trainer_of()
    run_steps(trainer, 0, 3)
    objective, _, lengths_of = parts_of(trainer)
    batch = batch_of(trainer)
    phase = objective.phases()["generator"]
    assert isinstance(phase, PathLengthGeneratorPhase)
    result = phase(batch)
    plain = phase(batch._replace(penalized=False))
    assert LENGTHS not in plain.carried and "path_length" not in plain.logs
    torch.testing.assert_close(plain.carried["generated"], result.carried["generated"])

    exact = copy.deepcopy(objective).double()
    decoder = exact.networks["generator"].decoder
    assert isinstance(decoder, Stylegan2Decoder)
    styles = objective.styles(batch, Stream.GENERATOR_LATENTS)
    noise = normal(batch.key(Stream.GENERATOR_LAYER_NOISE), ROWS, decoder.noise_count).double()
    directions = normal(batch.key(Stream.PATH_DIRECTIONS), ROWS, 28 * 28).double() / 28  # of |y|^2 1 in the mean

    # The styles depend on the mapping network in the penalty, too.
    latents = [normal(batch.key(one), ROWS, 5).double() for one in (Stream.GENERATOR_LATENTS, Stream.MIXED_LATENTS)]
    first, second = (decoder.styles(one) for one in latents)
    is_second = (styles - second).norm(dim=2, keepdim=True) < (styles - first).norm(dim=2, keepdim=True)
    exact_styles = torch.where(is_second, second, first)
    squares = []
    for row in range(ROWS):

        def image_of(own: Tensor, row: int = row) -> Tensor:
            return decoder.synthesize(own[None], noise[row : row + 1]).flatten()

        jacobian = torch.autograd.functional.jacobian(image_of, exact_styles[row], create_graph=True)
        step = torch.einsum("pls,p->ls", jacobian, directions[row])
        squares.append(step.square().sum(dim=1).mean())
    lengths = torch.stack(squares).sqrt()
    penalty = (lengths - float(lengths_of.average)).square().mean()
    torch.testing.assert_close(result.logs["path_length_penalty"].double(), penalty.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.logs["path_length"].double(), lengths.detach().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.loss - plain.loss, (4.0 * penalty).float(), rtol=1e-3, atol=1e-5)

    ours, theirs = list(objective.networks["generator"].parameters()), list(decoder.parameters())
    found: tuple[Any, ...] = torch.autograd.grad(result.loss - plain.loss, ours, allow_unused=True)
    wanted: tuple[Any, ...] = torch.autograd.grad(4.0 * penalty, theirs, allow_unused=True)
    largest = max(float(one.norm()) for one in wanted if one is not None)
    for mine, reference in zip(found, wanted, strict=True):
        expected = torch.zeros(()) if reference is None else reference.float()
        mine = torch.zeros_like(expected) if mine is None else mine
        torch.testing.assert_close(mine, expected.expand_as(mine), rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize(("every", "lengths_every", "turns"), [(1, 4, 4), (2, 4, 2), (3, 3, 1), (3, 2, 2)])
def test_the_penalty_weighs_as_much_per_turn_with_any_periods(every: int, lengths_every: int, turns: int) -> None:
    trainer = trainer_of(generator_every=every, path_length_every=lengths_every)
    phase = trainer.objective.phases()["generator"]
    due = [step for step in range(24) if phase.due_at(step)]
    assert len(due) == turns * sum(map(phase.penalized_at, due))
    batch = batch_of(trainer)
    result, plain = phase(batch), phase(batch._replace(penalized=False))
    torch.testing.assert_close(result.loss - plain.loss, 2.0 * turns * result.logs["path_length_penalty"])


def test_the_average_length_follows_the_whole_batch() -> None:
    module = PathLengths()
    carried = [{LENGTHS: torch.tensor([6.0, 2.0])}, {LENGTHS: torch.tensor([4.0, 3.0])}]
    module.follow(carried, lambda statistic, items: statistic(items))
    assert module.average == pytest.approx(0.01 * 2.0)
    module.follow(carried, lambda statistic, items: statistic(items))
    assert module.average == pytest.approx(0.02 * 0.99 + 0.02)


def test_lazy_scaling_changes_rates_and_betas_of_lazy_phases() -> None:
    """c = k / (k + 1): Karras et al. 2020, appendix B."""
    optimization = OptimizerConfig(betas=(0.5, 0.99), lazy_scaling=True)
    objective = GanConfig(penalty_weight=1.0, penalty_every=16)
    config = small_config("gan", objective=objective, optimization=optimization, learning_rate=1e-3)
    trainer = make_trainer(config)
    run_steps(trainer, 0, 1)
    rates = rates_and_betas(trainer)
    c = 16 / 17
    assert rates["generator"] == pytest.approx((1e-3, 0.5, 0.99))
    assert rates["discriminator"] == pytest.approx((1e-3 * c, 0.5**c, 0.99**c))
    unpenalized = make_trainer(replace(config, objective=replace(objective, penalty_weight=0.0)))
    assert all(turn._rate == 1.0 for turn in unpenalized._turns.values())


def test_options_of_styles_are_refused_for_other_generators() -> None:
    for option in ("style_mixing", "path_length_weight"):
        objective = GanConfig().__class__(**{option: 0.5})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"{option} needs a generator with styles; use --network stylegan2"):
            make_trainer(small_config("gan", objective=objective))
    with pytest.raises(ConfigError, match=r"style_mixing 1.5 is not in 0..1"):
        GanConfig(style_mixing=1.5)
    assert not any(isinstance(one, PathLengths) for one in nn.ModuleList([make_trainer(small_config("gan")).objective]))


def test_a_gan_without_styles_refuses_options_of_styles() -> None:
    for option, value in (("style_mixing", 0.5), ("path_length_weight", 2.0)):
        config = small_config("gan", objective=GanConfig(**{option: value}), network=SMALL_STYLEGAN2)  # type: ignore[arg-type]
        with pytest.raises(
            ConfigError, match=f"^{option}: Gan trains no styles; derive it from .*styled_gan.StyledGan"
        ):
            Gan(config.objective, config.roles, (1, 28, 28), 1)  # type: ignore[arg-type]


def test_phases_that_measure_no_path_lengths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a plug-in's subclass."""
    monkeypatch.setattr("gen_dist.objectives.shared_scores.SharedScoresGan.phases", Gan.phases)
    with pytest.raises(ConfigError, match="path_length_weight 2: no phase of SharedScoresGan measures path lengths"):
        trainer_of()
    trainer_of(path_length_weight=0.0)
