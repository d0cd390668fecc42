"""Adversarial objectives against the equations of their papers: float64, and torch.autograd for double backward.

Only the networks, copied to float64, augmentation, which has its own tests, and raw draws are those of gen_dist.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.utils.parametrizations import _SpectralNorm

from gen_dist.config import (
    AdversarialConfig,
    AutoencoderConfig,
    GanConfig,
    NetworkConfig,
    ObjectiveConfig,
    PatchganConfig,
    R3ganConfig,
    ResnetConfig,
    VaeConfig,
    VaeGanConfig,
    WganGpConfig,
)
from gen_dist.data import image_indices
from gen_dist.errors import ConfigError
from gen_dist.kernels import Key
from gen_dist.kernels.noise import host_normal
from gen_dist.networks.players import Discriminator, Generator
from gen_dist.networks.r3gan import R3ganDecoder
from gen_dist.objectives import Batch, Phase, build_objective, losses
from gen_dist.objectives.adversarial import DISCRIMINATOR_STREAMS, Adversarial, signed_unit
from gen_dist.objectives.augmentation import add_noise, augment
from gen_dist.randomness import Stream
from gen_dist.records.score_bins import SCORE_EDGES
from gen_dist.training.trainer import Trainer
from tests.support.runs import (
    ADVERSARIAL,
    ALL_AUGMENTATIONS,
    OBJECTIVES,
    SMALL_DCGAN,
    SMALL_R3GAN,
    WITH_BATCH_STATISTICS,
    each_of,
    make_trainer,
    run_steps,
    small_config,
)

SEED = 11
FIRST_ROW = 6  # not 0, so that a draw without it differs
ROWS = 15
every_objective = each_of(ADVERSARIAL)
CONDITIONAL = [name for name in ADVERSARIAL if getattr(OBJECTIVES[name][0], "conditioning", "none") != "none"]
PENALIZED = [name for name in ADVERSARIAL if isinstance(OBJECTIVES[name][0], WganGpConfig | R3ganConfig)]

PHASES: dict[str, dict[str, tuple[str, ...]]] = {
    "gan": {"generator": ("generator",), "discriminator": ("discriminator",)},
    "wgan-gp": {"generator": ("generator",), "critic": ("discriminator",)},
    "r3gan": {"generator": ("generator",), "discriminator": ("discriminator",)},
    "vae-gan": {"encoder": ("encoder",), "generator": ("generator",), "discriminator": ("discriminator",)},
}
"""Turns of each kind of objective in their order, and the networks that each trains."""

NOISE_BESIDE = {
    Stream.REAL_AUGMENTATION: Stream.REAL_NOISE,
    Stream.FAKE_AUGMENTATION: Stream.FAKE_NOISE,
    Stream.GENERATOR_REAL_AUGMENTATION: Stream.GENERATOR_REAL_NOISE,
    Stream.GENERATOR_FAKE_AUGMENTATION: Stream.GENERATOR_FAKE_NOISE,
}

LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "non_saturating": (lambda s: -s.sigmoid().log(), lambda s: -(1 - s.sigmoid()).log(), lambda s: -s.sigmoid().log()),
    "least_squares": (lambda s: (s - 1) ** 2 / 2, lambda s: s**2 / 2, lambda s: (s - 1) ** 2 / 2),
    "hinge": (lambda s: (1 - s).clamp(min=0), lambda s: (1 + s).clamp(min=0), lambda s: -s),
    "wasserstein": (lambda s: -s, lambda s: s, lambda s: -s),
}
"""Losses by scores: the discriminator's on real and on generated images, and the generator's on generated ones."""


class _Reference:
    """Terms of one batch, written from the papers."""

    def __init__(self, objective: Adversarial, config: ObjectiveConfig, batch: Batch) -> None:
        """Copy the weights of the objective, whose spectral norms the trainer iterates once per turn."""
        assert not isinstance(config, AutoencoderConfig | VaeConfig)
        self.networks = copy.deepcopy(objective.networks).double()
        self._config = config
        self._labels = batch.labels
        self._step = int(batch.rng[1])
        self._batch = batch
        self._latent_dim = objective.latent_shape[0]
        # The generator of Huang et al. 2024 ends with a linear layer, all others with tanh.
        self._bounded = not isinstance(objective.networks["generator"].decoder, R3ganDecoder) or config.kind != "r3gan"
        self._training_images = batch.images.double() / 127.5 - 1

    def parameters(self, networks: tuple[str, ...]) -> dict[str, nn.Parameter]:
        return {
            f"{network}.{name}": parameter
            for network in networks
            for name, parameter in self.networks[network].named_parameters()
        }

    def _normals(self, stream: Stream, width: int) -> Tensor:
        steps = range(self._step, self._step + 1)
        drawn = host_normal(SEED, stream, steps, self._batch.first_row, len(self._labels), width)
        return torch.from_numpy(drawn[0]).double()

    def _augmented(self, images: Tensor, stream: Stream) -> Tensor:
        if not isinstance(self._config, AdversarialConfig):
            return images
        rng, first_row = self._batch.rng, self._batch.first_row
        changed = augment(images, self._config.augmentation, Key(rng, stream, first_row))
        return add_noise(changed, self._config.instance_noise, Key(rng, NOISE_BESIDE[stream], first_row))

    def _decode(self, latents: Tensor) -> Tensor:
        generator = self.networks["generator"]
        assert isinstance(generator, Generator)
        if getattr(self._config, "conditioning", "none") != "none":
            latents = torch.cat([latents, nn.functional.one_hot(self._labels, 10)], dim=1)
        decoded: Tensor = generator.decoder(latents)
        return decoded.tanh() if self._bounded else decoded

    def generated(self, latents: Stream) -> Tensor:
        """Images from latents of the prior, [B, ...]."""
        return self._decode(self._normals(latents, self._latent_dim))

    def reconstructions(self) -> Tensor:
        """Images from latents that an earlier turn carried, [B, ...]."""
        return self._decode(self._batch.carried["posterior_latents"].double())

    def _features_and_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        conditioning = getattr(self._config, "conditioning", "none")
        if conditioning == "concat":
            assert isinstance(discriminator.class_maps, nn.Embedding)
            maps = discriminator.class_maps.weight[self._labels].view(-1, 1, *images.shape[2:])
            images = torch.cat([images, maps], dim=1)
        features = discriminator.encoder.features(images)
        scores = discriminator.encoder.head(features)[:, 0]
        if conditioning == "projection":
            assert isinstance(discriminator.class_vectors, nn.Embedding)
            vectors = discriminator.class_vectors.weight[self._labels]
            products = torch.einsum(
                "bfn,bf->b", features.flatten(2) if features.ndim > 2 else features[:, :, None], vectors
            )
            places = features[0, 0].numel()
            scores = (scores.reshape(len(scores), -1).T + products / places).T.view(scores.shape)
        return features, scores

    def _scores(self, images: Tensor) -> Tensor:
        return self._features_and_scores(images)[1]

    def _slopes(self, images: Tensor, augmentation: Stream | None = None) -> Tensor:
        """|d score / d image| of each image before augmentation: [B]."""
        images = images.detach().requires_grad_()
        seen = images if augmentation is None else self._augmented(images, augmentation)
        (gradients,) = torch.autograd.grad(_of_images(self._scores(seen)).sum(), images, create_graph=True)
        return gradients.flatten(1).norm(dim=1)

    def discriminator_phase(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [] and logs: Goodfellow et al. 2014, eq. 1; Mao et al. 2017; Lim & Ye 2017; Gulrajani et al. 2017."""
        real = self._augmented(self._training_images, Stream.REAL_AUGMENTATION)
        generated = self._batch.carried.get("generated", self.generated(Stream.DISCRIMINATOR_LATENTS).detach())
        generated = generated.double()
        fake = self._augmented(generated, Stream.FAKE_AUGMENTATION)
        real_scores, fake_scores = self._scores(real), self._scores(fake)
        logs = {"scores_real": _of_images(real_scores), "scores_fake": _of_images(fake_scores)}
        penalized = self._batch.penalized
        if isinstance(self._config, GanConfig):
            on_real, on_fake, _ = LOSSES[self._config.loss]
            loss = on_real(real_scores).mean() + on_fake(fake_scores).mean()
            return loss, logs | _accuracies(real_scores, fake_scores, 0.5 * (self._config.loss == "least_squares"))
        if isinstance(self._config, VaeGanConfig):
            reconstructions = self._batch.carried["reconstructions"].double()
            on_real, on_fake, _ = LOSSES["non_saturating"]
            terms = on_real(real_scores), on_fake(self._scores(reconstructions)), on_fake(fake_scores)
            return torch.stack(terms).sum(0).mean(), logs | _accuracies(real_scores, fake_scores, 0.0)
        logs["accuracy"] = (real_scores > fake_scores).double().mean()
        if isinstance(self._config, WganGpConfig):  # algorithm 1, line 7
            loss = fake_scores.mean() - real_scores.mean()
            logs["distance"] = -loss
            if penalized:
                share = torch.special.ndtr(self._normals(Stream.PENALTY_MIX, 1))[:, :, None, None]
                penalty = ((self._slopes(share * real + (1 - share) * fake) - 1) ** 2).mean()
                logs["penalty"] = penalty
                loss = loss + self._config.penalty_weight * self._config.penalty_every * penalty
            return loss, logs
        assert isinstance(self._config, R3ganConfig)  # Huang et al. 2024, eq. 2 and section 2.2
        loss = -logsigmoid(real_scores - fake_scores).mean()
        if penalized:
            logs["r1"] = (self._slopes(self._training_images, Stream.REAL_AUGMENTATION) ** 2).mean()
            logs["r2"] = (self._slopes(generated, Stream.FAKE_AUGMENTATION) ** 2).mean()
            weight = self._config.penalty_weight / 2 * self._config.penalty_every
            loss = loss + weight * (logs["r1"] + logs["r2"])
        return loss, logs

    critic_phase = discriminator_phase

    def generator_phase(self) -> tuple[Tensor, dict[str, Tensor]]:
        generated = self.generated(Stream.GENERATOR_LATENTS)
        fake_scores = self._scores(self._augmented(generated, Stream.GENERATOR_FAKE_AUGMENTATION))
        if isinstance(self._config, R3ganConfig):
            real = self._augmented(self._training_images, Stream.GENERATOR_REAL_AUGMENTATION)
            return -logsigmoid(fake_scores - self._scores(real)).mean(), {}
        if isinstance(self._config, VaeGanConfig):  # Larsen et al. 2016, algorithm 1
            seen, scores = self._features_and_scores(self.reconstructions())
            error = _feature_error(self._batch.carried["real_features"].double(), seen)
            deceit = -logsigmoid(scores).mean() - logsigmoid(fake_scores).mean()
            return self._config.reconstruction_weight * error + deceit, {"feature_error": error}
        loss = self._config.loss if isinstance(self._config, GanConfig) else "wasserstein"
        return LOSSES[loss][2](fake_scores).mean(), {}

    def encoder_phase(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(self._config, VaeGanConfig)
        latents, kl = self.posterior()
        error = _feature_error(self.real_features(), self._features_and_scores(self._decode(latents))[0])
        return self._config.beta * kl + error, {"feature_error": error, "kl": kl}

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Latents [B, D] drawn from the posterior, and the mean KL []."""
        mean, logvar = self.networks["encoder"](self._training_images).chunk(2, dim=1)
        posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
        prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
        latents = mean + posterior.scale * self._normals(Stream.LATENTS, self._latent_dim)
        return latents, torch.distributions.kl_divergence(posterior, prior).sum(1).mean()

    def real_features(self) -> Tensor:
        """Discriminator features of training images, [B, F]."""
        return self._features_and_scores(self._training_images)[0]


def _of_images(scores: Tensor) -> Tensor:
    """Scores of images [B]: means over their patches, if those are scored."""
    return scores.reshape(len(scores), -1).mean(1)


def _feature_error(real: Tensor, seen: Tensor) -> Tensor:
    """Mean of -log N(f(x); f(x~), I) over features [B, F, ...], up to a constant."""
    real, seen = real.flatten(1), seen.flatten(1)
    constant = real.shape[1] * math.log(2 * math.pi) / 2
    return -torch.distributions.Normal(seen, 1.0).log_prob(real).sum(1).mean() - constant


def _accuracies(real_scores: Tensor, fake_scores: Tensor, threshold: float) -> dict[str, Tensor]:
    return {
        "accuracy_real": (real_scores > threshold).double().mean(),
        "accuracy_fake": (fake_scores <= threshold).double().mean(),
    }


def _reference_of(objective: Adversarial, config: ObjectiveConfig, phase: str, batch: Batch) -> Any:
    """Networks of the reference, and its loss and all logs after the phase."""
    reference = _Reference(objective, config, batch)
    loss, logs = getattr(reference, f"{phase}_phase")()
    return reference, loss, {"loss": loss, **logs}


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


@pytest.mark.parametrize(("objective", "phase", "penalized"), _phases_of(ADVERSARIAL))
def test_loss_logs_and_gradients_of_a_phase_equal_the_paper(objective: str, phase: str, penalized: bool) -> None:
    _assert_a_phase_equals_the_paper(_trainer(objective), phase, penalized)


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


def _assert_a_phase_equals_the_paper(trainer: Trainer, phase: str, penalized: bool, tolerance: float = 1e-4) -> None:
    model, config = _adversarial(trainer), trainer.config.objective
    model.carries_graphs = False  # no turn freezes the discriminator
    batch = _batch(trainer, penalized=penalized)
    reference, expected_loss, expected_logs = _reference_of(model, config, phase, batch)
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
    for name, mine, theirs in zip(trained, found, expected, strict=True):
        # A common bias of all scores has no gradient if only differences of scores count.
        differences = isinstance(config, WganGpConfig | R3ganConfig)
        assert theirs.norm() > 1e-6 * largest or (differences and name.endswith("encoder.head.bias")), name
        assert (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-6 * largest, name


def _carried_by(reference: _Reference, config: ObjectiveConfig, phase: str) -> dict[str, Tensor]:
    if phase == "encoder":
        return {"posterior_latents": reference.posterior()[0], "real_features": reference.real_features()}
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
        reference, loss, logs = _reference_of(model, config, names[type(module)], arguments[0])
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
    for found, separate, joined in zip(both, apart, together, strict=True):
        torch.testing.assert_close(found, separate, rtol=1e-5, atol=1e-5)
        assert torch.allclose(joined, separate, rtol=1e-5, atol=1e-5) == (objective not in WITH_BATCH_STATISTICS)


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
