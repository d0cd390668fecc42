"""Adversarial objectives against the equations of their papers: float64, and torch.autograd for double backward.

Only the networks, copied to float64, augmentation, which has its own tests, and raw draws are those of gen_dist.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm

from gen_dist.config import (
    AdversarialConfig,
    GanConfig,
    NetworkConfig,
    ObjectiveConfig,
    PatchganConfig,
    R3ganConfig,
    ResnetConfig,
    VaeGanConfig,
    WganGpConfig,
)
from gen_dist.data import image_indices
from gen_dist.errors import ConfigError
from gen_dist.kernels import Key
from gen_dist.kernels.noise import host_normal
from gen_dist.networks.players import Discriminator, Generator
from gen_dist.objectives import Batch, Phase, build_objective
from gen_dist.objectives.adversarial import DISCRIMINATOR_STREAMS, Adversarial, signed_unit
from gen_dist.objectives.augmentation import add_noise, augment
from gen_dist.randomness import Stream
from gen_dist.records.score_bins import SCORE_EDGES
from gen_dist.training.trainer import Trainer
from tests.objectives.papers import NOISE_BESIDE, Reference, reference_of
from tests.support.runs import (
    ADVERSARIAL,
    ALL_AUGMENTATIONS,
    OBJECTIVES,
    SMALL_DCGAN,
    SMALL_R3GAN,
    each_of,
    make_trainer,
    run_steps,
    small_config,
)

SEED = 11
FIRST_ROW = 6  # not 0, so that a draw without it differs
ROWS = 15
REFERENCED = tuple(name for name in ADVERSARIAL if not getattr(OBJECTIVES[name][0], "path_length_weight", 0.0))
"""Objectives of `papers`; test_styles.py has the reference of path lengths."""
every_objective = each_of(REFERENCED)
CONDITIONAL = [name for name in ADVERSARIAL if getattr(OBJECTIVES[name][0], "conditioning", "none") != "none"]
PENALIZED = [name for name in ADVERSARIAL if getattr(OBJECTIVES[name][0], "penalty_weight", 0.0)]

PHASES: dict[str, dict[str, tuple[str, ...]]] = {
    "gan": {"generator": ("generator",), "discriminator": ("discriminator",)},
    "wgan-gp": {"generator": ("generator",), "critic": ("discriminator",)},
    "r3gan": {"generator": ("generator",), "discriminator": ("discriminator",)},
    "vae-gan": {"encoder": ("encoder",), "generator": ("generator",), "discriminator": ("discriminator",)},
}
"""Turns of each kind of objective in their order, and the networks that each trains."""


def _config_of(name: str) -> ObjectiveConfig:
    return OBJECTIVES[name][0]


def _trainer(name: str, **changes: Any) -> Trainer:
    """Trainer after a few large steps, away from initial values with vanishing terms or equal scores."""
    trainer = make_trainer(replace(small_config(name, seed=SEED, learning_rate=5e-3), **changes))
    run_steps(trainer, 0, 5)
    return trainer


def _adversarial(trainer: Trainer) -> Adversarial:
    assert isinstance(trainer.objective, Adversarial)
    return trainer.objective


def _batch(trainer: Trainer, step: int = 4, penalized: bool = True) -> Batch:
    """Batch of the first turn of a step, with the carried tensors that the turns of a VAE-GAN need."""
    images = torch.from_numpy(trainer.dataset.train.images[30 : 30 + ROWS])
    labels = torch.from_numpy(trainer.dataset.train.labels[30 : 30 + ROWS])
    carried: dict[str, Tensor] = {}
    if isinstance(trainer.config.objective, VaeGanConfig):
        random = torch.Generator().manual_seed(SEED)
        carried["posterior_latents"] = torch.randn(ROWS, trainer.objective.latent_shape[0], generator=random)
        for name in ("reconstructions", "generated"):
            carried[name] = torch.rand(images.shape, generator=random) * 2 - 1
        discriminator = trainer.objective.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        with torch.no_grad():
            shape = discriminator.encoder.features(carried["generated"]).shape
        carried["real_features"] = torch.randn(shape, generator=random)
    return Batch(images, labels, torch.tensor([SEED, step]), FIRST_ROW, penalized, carried)


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach().double(), value.detach(), rtol=1e-5, atol=3e-5, msg=name)


def _phases_of(names: Any) -> list[tuple[str, str, bool]]:
    """All (objective, phase, penalized); lazily computed penalties also have cases without them."""
    return [
        (name, phase, penalized)
        for name in names
        for phase in PHASES[_config_of(name).kind]
        for penalized in ((True, False) if phase in ("critic", "discriminator") and "lazy" in name else (True,))
    ]


@pytest.mark.parametrize(("objective", "phase", "penalized"), _phases_of(REFERENCED))
def test_loss_logs_and_gradients_of_a_phase_equal_the_paper(objective: str, phase: str, penalized: bool) -> None:
    _assert_a_phase_equals_the_paper(_trainer(objective), phase, penalized)


class _AnyGenerator(nn.Module):
    """A generator from outside, without noise inputs."""

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return latents[:, :1, None, None].expand(-1, 1, 28, 28)


def test_a_generator_may_be_any_module() -> None:
    trainer = make_trainer(small_config("gan"))
    objective = _adversarial(trainer)
    objective.networks["generator"] = _AnyGenerator()
    assert objective.generate(_batch(trainer), Stream.GENERATOR_LATENTS).shape == (ROWS, 1, 28, 28)


PATCHES: dict[str, ObjectiveConfig] = {
    "non-saturating": GanConfig(),
    "least squares, concat": GanConfig(loss="least_squares", conditioning="concat"),
    "hinge, projection": GanConfig(loss="hinge", conditioning="projection"),
    "wgan-gp": WganGpConfig(),
    "r3gan": R3ganConfig(),
    "vae-gan": VaeGanConfig(),
}


@pytest.mark.parametrize(
    ("name", "phase"), [(name, phase) for name, config in PATCHES.items() for phase in PHASES[config.kind]]
)
def test_losses_of_patches_are_means_over_all_patches(name: str, phase: str) -> None:
    patches = PatchganConfig(feature_maps=8, layers=1, discriminator_norm="group")
    # Batch normalization mixes images: what is scored together then matters, as the reference says too.
    mixing = replace(patches, discriminator_norm="batch")
    networks = [patches] if name in ("wgan-gp", "r3gan") else [patches, mixing]
    for network in networks:
        trainer = _trainer("gan", objective=PATCHES[name], discriminator=network)
        images = torch.zeros(2, 1, 28, 28)
        labels = torch.zeros(2, dtype=torch.int64)
        assert _adversarial(trainer).scores(images, labels).shape == (2, 12, 12)
        # Rounding moves some of the many patches across the kinks of their activations.
        _assert_a_phase_equals_the_paper(trainer, phase, penalized=True, tolerance=1e-3)


def test_a_lazy_r1_penalty_of_a_gan_equals_the_paper() -> None:
    changed = GanConfig(penalty_weight=0.5, penalty_every=2, augmentation=ALL_AUGMENTATIONS, instance_noise=0.3)
    trainer = _trainer("gan", objective=changed)
    for penalized in (True, False):
        _assert_a_phase_equals_the_paper(trainer, "discriminator", penalized=penalized)


def _assert_a_phase_equals_the_paper(trainer: Trainer, phase: str, penalized: bool, tolerance: float = 1e-4) -> None:
    model, config = _adversarial(trainer), trainer.config.objective
    model.carries_graphs = False  # no turn freezes the discriminator
    batch = _batch(trainer, penalized=penalized)
    reference, expected_loss, expected_logs = reference_of(model, config, phase, batch)
    phases = model.phases()
    assert {name: phase.trains for name, phase in phases.items()} == PHASES[config.kind]
    assert list(phases) == list(PHASES[config.kind])
    loss, logs, carried = phases[phase](batch)
    _assert_equal({"the loss": loss} | logs, {"the loss": expected_loss} | expected_logs)
    _assert_equal(carried, _carried_by(reference, config, phase))
    assert not any(value.requires_grad for value in (*logs.values(), *carried.values()))

    trained = reference.parameters(phases[phase].trains)
    ours = dict(model.networks.named_parameters())
    found = torch.autograd.grad(loss, [ours[name] for name in trained])
    expected = torch.autograd.grad(expected_loss, list(trained.values()))
    largest = max(float(gradient.norm()) for gradient in expected)
    # Batch normalization removes biases that are added to all images alike before it, as in the last residual block.
    last_biases = ("trunk.2.residual.6.bias", "trunk.2.shortcut.0.bias")
    mixing = any(isinstance(layer, _BatchNorm) for layer in model.networks["generator"].modules())
    for name, mine, theirs in zip(trained, found, expected, strict=True):
        # A common bias of all scores has no gradient if only differences of scores count.
        differences = isinstance(config, WganGpConfig | R3ganConfig)
        dead = (differences and name.endswith("encoder.head.bias")) or (mixing and name.endswith(last_biases))
        assert theirs.norm() > 1e-6 * largest or dead, name
        # Terms of about 1/16 cancel in a dead bias, of which float32 leaves their last digit, 2^-28.
        left_over = 1e-8 if dead else 0.0
        assert (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-6 * largest + left_over, name


def _carried_by(reference: Reference, config: ObjectiveConfig, phase: str) -> dict[str, Tensor]:
    if phase == "encoder":
        return {"posterior_latents": reference.posterior()[0], "real_features": reference.real_features()}
    if phase == "discriminator" and getattr(config, "adapts_augmentation", False):
        mean, rows = reference.discriminator_phase()[1]["real_sign"], len(reference.labels)
        return {"signs": torch.stack([mean * rows, torch.tensor(float(rows))])}
    if phase != "generator":
        return {}
    generated = {"generated": reference.generated(Stream.GENERATOR_LATENTS)}
    return generated | ({"reconstructions": reference.reconstructions()} if isinstance(config, VaeGanConfig) else {})


class _Turn(NamedTuple):
    """State of one forward of a phase in the trainer."""

    phase: Phase
    batch: Batch
    reference_loss: Tensor
    reference_logs: dict[str, Tensor]
    reference_carried: dict[str, Tensor]
    weights: dict[str, Tensor]
    requiring_gradients: set[str]
    with_gradients: set[str]


@contextmanager
def _watched_turns(trainer: Trainer) -> Iterator[list[_Turn]]:
    turns: list[_Turn] = []
    model, config = _adversarial(trainer), trainer.config.objective
    names = {type(phase): name for name, phase in model.phases().items()}

    def watch(module: nn.Module, arguments: tuple[Batch]) -> None:
        if not isinstance(module, Phase):
            return
        reference, loss, logs = reference_of(model, config, names[type(module)], arguments[0])
        parameters = dict(model.networks.named_parameters())
        turns.append(
            _Turn(
                module,
                arguments[0],
                loss.detach(),
                {f"{names[type(module)]}/{name}": value.detach() for name, value in logs.items()},
                _carried_by(reference, config, names[type(module)]),
                {name: parameter.detach().clone() for name, parameter in parameters.items()},
                {name for name, parameter in parameters.items() if parameter.requires_grad},
                {name for name, parameter in parameters.items() if parameter.grad is not None},
            )
        )

    handle = nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        yield turns
    finally:
        handle.remove()


@every_objective
def test_a_phase_gets_its_images_and_moves_its_networks_alone(objective: str) -> None:
    """Images, labels, rows and step that the trainer gives a phase, frozen weights, and the order of turns."""
    trainer = _trainer(objective, accumulation=2)
    for step in (12, 13):  # at step 12 every phase has a turn, and every penalty is due
        chosen = image_indices(len(trainer.dataset.train.images), SEED, step, 24, 0, 24)
        with _watched_turns(trainer) as turns:
            logs = trainer.run_step(step)
        phases = _adversarial(trainer).phases()
        in_turn = [name for name, phase in phases.items() if step % phase.every == 0]
        assert [type(turn.phase) for turn in turns] == [type(phases[name]) for name in in_turn for _ in range(2)]
        after = [turn.weights for turn in turns[2::2]]
        after.append({name: value.detach().clone() for name, value in trainer.objective.networks.named_parameters()})
        expected: dict[str, Tensor] = {}
        earlier: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, first, second, moved in zip(in_turn, turns[::2], turns[1::2], after, strict=True):
            for part, turn in enumerate((first, second)):
                rows = chosen[12 * part : 12 * part + 12]
                assert torch.equal(turn.batch.images, torch.from_numpy(trainer.dataset.train.images[rows]))
                assert turn.batch.labels.tolist() == trainer.dataset.train.labels[rows].tolist()
                assert (turn.batch.first_row, turn.batch.rng.tolist()) == (12 * part, [SEED, step])
                assert turn.batch.penalized == (step % phases[name].penalty_every == 0)
                assert {parameter.split(".")[0] for parameter in turn.requiring_gradients} == set(turn.phase.trains)
                assert turn.with_gradients == (turn.requiring_gradients if part else set())
                _assert_equal(dict(turn.batch.carried), earlier[part])
                earlier[part].update(turn.reference_carried)
            changed = {
                parameter for parameter, value in first.weights.items() if not torch.equal(moved[parameter], value)
            }
            assert {parameter.split(".")[0] for parameter in changed} == set(first.phase.trains)
            for key, value in first.reference_logs.items():
                both = value, second.reference_logs[key]
                expected[key] = torch.cat(both) if value.ndim else torch.stack(both).mean()
            expected[f"{name}/gradient_norm"] = logs[f"{name}/gradient_norm"].double()
        _assert_equal(logs, expected)
        assert all(parameter.grad is None and parameter.requires_grad for parameter in trainer.objective.parameters())


def test_spectral_norms_are_iterated_once_per_turn() -> None:
    network = replace(SMALL_DCGAN, generator_norm="group", discriminator_norm="none", spectral_norm=True)
    config = small_config("r3gan", seed=SEED, network=network)
    whole, parts = make_trainer(config), make_trainer(replace(config, accumulation=4))
    power_method = _SpectralNorm._power_method
    for step in range(6):
        with mock.patch.object(_SpectralNorm, "_power_method", autospec=True, side_effect=power_method) as iterated:
            logs = parts.run_step(step)
        counts = Counter(id(call.args[0]) for call in iterated.call_args_list)
        assert list(counts.values()) == [2] * 3  # turns, and layers of the discriminator
        _assert_equal(logs, {name: value.double() for name, value in whole.run_step(step).items()})


@every_objective
def test_latents_are_functions_of_step_and_turn(objective: str) -> None:
    trainer = _trainer(objective)
    trainer.objective.carries_graphs = False  # no turn freezes the discriminator
    phases, drawn = _adversarial(trainer).phases(), []
    handle = trainer.objective.networks["generator"].register_forward_pre_hook(
        lambda _module, arguments: drawn.append(arguments[0].detach())
    )
    # The discriminator of a VAE-GAN draws none: a turn of the generator precedes each of its turns.
    turns = ["generator", *(name for name in ("critic", "discriminator") if name in phases and objective != "vae-gan")]
    calls = [(turns[-1], 4), (turns[-1], 4), *((turn, 4) for turn in turns[:-1]), (turns[-1], 5)]
    of_prior = []
    for phase, step in calls:
        drawn.clear()
        phases[phase](_batch(trainer, step))
        of_prior.append(drawn[-1])  # after those of reconstructions
    handle.remove()
    first, again, *others = of_prior
    assert torch.equal(first, again)
    for other in others:
        assert not (first == other).any()
    assert first.std() == pytest.approx(1.0, abs=0.25)


@each_of([name for name in ADVERSARIAL if "augmented" in name])
@pytest.mark.parametrize("phase", ["discriminator", "generator"])
def test_real_and_generated_images_are_augmented_alike(objective: str, phase: str) -> None:
    trainer = make_trainer(small_config(objective, seed=SEED))
    model, batch = _adversarial(trainer), _batch(trainer)
    seen: list[Tensor] = []
    handle = model.networks["discriminator"].register_forward_pre_hook(
        lambda _module, arguments: seen.append(arguments[0].detach())
    )
    with torch.no_grad():
        for bare in (False, True):
            model._seen = AdversarialConfig() if bare else AdversarialConfig("", "none", ALL_AUGMENTATIONS, 0.3)
            model.phases()[phase](batch._replace(penalized=False))
    handle.remove()
    augmented, plain = (torch.cat(images) for images in (seen[: len(seen) // 2], seen[len(seen) // 2 :]))
    assert len(plain) == ROWS * (2 if phase == "discriminator" or "r3gan" in objective else 1)
    streams = list(NOISE_BESIDE)[:2] if phase == "discriminator" else list(NOISE_BESIDE)[2:]
    for images, changed, stream in zip(
        plain.split(ROWS), augmented.split(ROWS), streams[-len(plain) // ROWS :], strict=True
    ):
        expected = augment(images, ALL_AUGMENTATIONS, Key(batch.rng, stream, FIRST_ROW))
        assert torch.equal(changed, add_noise(expected, 0.3, Key(batch.rng, NOISE_BESIDE[stream], FIRST_ROW)))
        assert ((changed - images).abs().amax(dim=(1, 2, 3)) > 0.1).all()


@pytest.mark.parametrize("objective", CONDITIONAL)
def test_a_label_changes_image_and_score_of_its_row_alone(objective: str) -> None:
    trainer = _trainer(objective)
    model, batch = _adversarial(trainer), _batch(trainer)
    model.eval()
    others = batch.labels.clone()
    others[:5] = (others[:5] + 3) % 10
    with torch.no_grad():
        latents = torch.randn(ROWS, model.latent_shape[0], generator=torch.Generator().manual_seed(0))
        images = [model.decode(latents, labels) for labels in (batch.labels, others)]
        scores = [model.scores(signed_unit(batch.images), labels) for labels in (batch.labels, others)]
    for before, after in (images, scores):
        changes = (after - before).abs().flatten(1).amax(1) if before.ndim > 1 else (after - before).abs()
        assert (changes[:5] > 1e-4).all()
        assert (changes[5:] == 0).all()


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
@pytest.mark.parametrize("kind", [GanConfig, WganGpConfig, R3ganConfig])
def test_classes_that_the_data_do_not_have_are_refused(kind: Any, conditioning: str) -> None:
    config = replace(small_config("gan"), objective=kind(conditioning=conditioning))
    with pytest.raises(ConfigError, match=f"conditioning {conditioning} needs labelled images"):
        build_objective(config, (1, 28, 28), classes=1)


@pytest.mark.parametrize("objective", [WganGpConfig(), R3ganConfig()], ids=lambda config: config.kind)
@pytest.mark.parametrize(
    "network",
    [SMALL_DCGAN, replace(SMALL_R3GAN, discriminator_norm="batch"), ResnetConfig(discriminator_norm="batch")],
    ids=["dcgan", "r3gan", "sngan"],
)
def test_a_penalty_through_batch_statistics_is_refused(objective: ObjectiveConfig, network: NetworkConfig) -> None:
    config = replace(small_config("gan"), objective=objective, network=network)
    with pytest.raises(ConfigError, match=r"a gradient penalty needs scores.*--discriminator-norm group"):
        build_objective(config, (1, 32, 32), classes=10)


@every_objective
def test_real_scores_do_not_depend_on_generated_images(objective: str) -> None:
    """In one joint pass they would, with batch statistics; without them both ways give equal scores."""
    trainer = _trainer(objective)
    model, batch = _adversarial(trainer), _batch(trainer)
    real, fake = signed_unit(batch.images), model.generate(batch, DISCRIMINATOR_STREAMS.latents)
    with torch.no_grad():
        apart = model.scores(real, batch.labels), model.scores(fake, batch.labels)
        together = model.scores(torch.cat([real, fake]), torch.cat([batch.labels] * 2)).chunk(2)
        both = model.scores_of_both(real, fake, batch.labels)
    mixing = any(isinstance(layer, _BatchNorm) for layer in model.networks["discriminator"].modules())
    for found, separate, joined in zip(both, apart, together, strict=True):
        torch.testing.assert_close(found, separate, rtol=1e-5, atol=1e-5)
        assert torch.allclose(joined, separate, rtol=1e-5, atol=1e-5) == (not mixing)


def test_a_histogram_of_scores_is_numpys_over_all_micro_batches() -> None:
    trainer = _trainer("conditional gan", accumulation=3)
    with _watched_turns(trainer) as turns:
        logs = trainer.run_step(8)
    (averaged,) = trainer.average_logs([logs])
    inner = np.array(SCORE_EDGES)
    inner[0], inner[-1] = -np.inf, np.inf
    for kind in ("real", "fake"):
        name = f"discriminator/scores_{kind}"
        scores = torch.cat([turn.reference_logs[name] for turn in turns if name in turn.reference_logs]).numpy()
        assert len(scores) == 24
        shares = averaged[name]
        assert isinstance(shares, list)
        np.testing.assert_allclose(shares, np.histogram(scores, inner)[0] / 24, atol=1e-7)
        assert sum(shares) == pytest.approx(1.0)
        assert sum(share > 0 for share in shares) > 1


def test_scores_on_bin_edges_and_out_of_range_are_counted() -> None:
    trainer = make_trainer(small_config("gan"))
    rows = [[-1e30, -10.0, -9.0, -0.5, 0.0, 0.5, 9.0, 10.0, 1e30], [3.5] * 9]
    averaged = trainer.average_logs([{"scores_real": torch.tensor(row), "loss": torch.tensor(2.0)} for row in rows])
    edges = np.array([-np.inf, *SCORE_EDGES[1:-1], np.inf])
    for row, found in zip(rows, averaged, strict=True):
        np.testing.assert_allclose(np.array(found["scores_real"]) * 9, np.histogram(row, edges)[0], atol=1e-5)
        assert found["loss"] == 2.0


@pytest.mark.parametrize("objective", PENALIZED)
def test_a_dead_critic_is_trained_on_with_finite_gradients(objective: str) -> None:
    trainer = make_trainer(small_config(objective, seed=SEED))
    with torch.no_grad():
        for parameter in trainer.objective.networks["discriminator"].parameters():
            parameter.zero_()
    run_steps(trainer, 0, 4)
    assert trainer.broken_networks() == []


def test_vae_gan_evaluates_reconstructions_by_pixels() -> None:
    trainer = _trainer("vae-gan")
    split, model = trainer.dataset.test, trainer.best_objective
    images = torch.from_numpy(split.images.copy())
    networks = copy.deepcopy(model.networks).double().eval()
    with torch.no_grad():
        mean, logvar = networks["encoder"](images.double() / 127.5 - 1).chunk(2, dim=1)
        drawn = host_normal(SEED, Stream.TEST_LATENTS, range(1), 0, len(images), model.latent_shape[0])
        noise = torch.from_numpy(drawn[0])
        decoder = networks["generator"]
        assert isinstance(decoder, Generator)
        decoded = decoder.decoder(mean + (logvar / 2).exp() * noise.double()).tanh()
    error = (decoded / 2 + 0.5 - images.double() / 255).square().sum(dim=(1, 2, 3)).mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1).mean()
    expected = {"reconstruction_error": float(error), "kl": float(kl)}
    assert trainer.evaluate(split, decoded_per_batch=16) == pytest.approx(expected, rel=1e-5, abs=1e-7)
