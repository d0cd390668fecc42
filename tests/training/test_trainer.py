"""The training step is a pure function of config, data, step and state."""

import copy
import dataclasses

import pytest
import torch

from gen_dist.config import DcganConfig, OptimizerConfig, ResnetConfig, TrainConfig
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.objectives import Objective, build_objective
from gen_dist.objectives.phase import Batch
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.training.schedule import learning_rate_at
from gen_dist.training.trainer import Trainer
from tests.support.fused_norm import normalize_as_on_gpus
from tests.support.runs import (
    OBJECTIVES,
    SMALL_STYLEGAN2,
    WITH_BATCH_STATISTICS,
    WITH_DISCRIMINATOR,
    all_tensors,
    assert_same_bits,
    close_losses,
    each_of,
    make_trainer,
    run_steps,
    small_config,
)
from tests.support.two_players import two_players


def _checkpoint_of(trainer: Trainer, step: int) -> Checkpoint:
    facts = {"data_digest": trainer.dataset.digest, "loss_scales": trainer.loss_scales()}
    return Checkpoint(step, {name: dict(group) for name, group in trainer.tensors().items()}, facts)


@each_of([name for name in OBJECTIVES if name not in WITH_DISCRIMINATOR])
def test_training_lowers_the_loss(objective: str) -> None:
    losses = run_steps(make_trainer(small_config(objective)), 0, 50)
    # After the warm-up of the KL weight. A Gaussian's loss may be negative, since its density may exceed 1.
    first, last = sum(losses[8:16]), sum(losses[-8:])
    assert last < first - 0.02 * abs(first)


@each_of([name for name in OBJECTIVES if name not in WITH_BATCH_STATISTICS])
def test_accumulated_micro_batches_equal_one_batch(objective: str) -> None:
    whole = run_steps(make_trainer(small_config(objective)), 0, 20)
    parts = run_steps(make_trainer(small_config(objective, accumulation=5)), 0, 20)  # of 4 and 5 images
    assert parts == close_losses(whole)


def test_logs_and_norms_do_not_depend_on_micro_batches() -> None:
    optimization = OptimizerConfig(optimizer="sgd", betas=(0.0, 0.0), clip_norm=0.5)
    found = []
    for accumulation in (1, 5):
        trainer = make_trainer(small_config("vae", optimization=optimization, accumulation=accumulation))
        found.append(trainer.average_logs([trainer.run_step(step) for step in range(5)]))
    for whole, parts in zip(*found, strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)


@each_of(OBJECTIVES, left_out=OBJECTIVES.keys())
def test_compiled_phases_equal_eager_ones(objective: str) -> None:
    eager = run_steps(make_trainer(small_config(objective)), 0, 20)
    compiled = run_steps(make_trainer(small_config(objective, compile=True)), 0, 20)
    assert compiled == close_losses(eager)
    assert len(set(compiled)) > len(compiled) // 2  # no constant; two of many numbers may be equal by chance


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_penalties_on_fused_normalization_equal_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    normalize_as_on_gpus(monkeypatch)
    network = DcganConfig(feature_maps=4, latent_dim=5, generator_norm="group", discriminator_norm="group")
    eager, compiled = (
        run_steps(make_trainer(small_config("r3gan", network=network, compile=compile)), 0, 6)
        for compile in (False, True)
    )
    assert compiled == close_losses(eager)


def test_a_compiled_phase_is_compiled_once_and_equals_the_whole_eager_one() -> None:
    eager = make_trainer(small_config("beta-vae with warm-up"))
    trainer = make_trainer(small_config("beta-vae with warm-up", compile=True, accumulation=2))
    names = set(eager.tensors()["networks"])
    compiled = run_steps(trainer, 0, 2)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled += run_steps(trainer, 2, 20)
    assert compiled == close_losses(run_steps(eager, 0, 20)) and len(set(compiled)) == len(compiled)
    laps: list[str] = []
    trainer.run_step(20, laps.append)
    assert laps == ["data", *["vae/gradients"] * 2, "vae/optimizer", "moving average"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert set(trainer.tensors()["networks"]) == names


def test_a_second_seed_is_another_run() -> None:
    assert run_steps(make_trainer(small_config("vae")), 0, 3) != run_steps(
        make_trainer(small_config("vae", seed=1)), 0, 3
    )


def test_bf16_trains_close_to_float32_with_float32_losses() -> None:
    wide = make_trainer(small_config("vae"))
    narrow = make_trainer(small_config("vae", precision="bf16"))
    logs = narrow.run_step(0)
    assert logs["loss"].dtype == torch.float32
    wide.run_step(0)
    assert run_steps(narrow, 1, 30) == pytest.approx(run_steps(wide, 1, 30), rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in narrow.objective.parameters())


def test_fp16_scales_its_loss_and_skips_steps_that_overflow() -> None:
    trainer = make_trainer(small_config("vae", precision="fp16"))
    scale = trainer.loss_scales()["vae"]["scale"]
    assert scale > 1
    losses = run_steps(trainer, 0, 40)
    assert sum(losses[-8:]) < sum(losses[:8])
    resumed = make_trainer(small_config("vae", precision="fp16"))
    resumed.load(_checkpoint_of(trainer, 40))
    assert resumed.loss_scales() == trainer.loss_scales()


def test_clipping_bounds_the_step_and_logs_the_norm() -> None:
    optimization = OptimizerConfig(optimizer="sgd", betas=(0.0, 0.0), clip_norm=0.5)
    trainer = make_trainer(small_config("vae", optimization=optimization, learning_rate=1.0, accumulation=2))
    before = {name: value.clone() for name, value in trainer.tensors()["networks"].items()}
    logs = trainer.average_logs([trainer.run_step(0)])[0]
    norm = logs["gradient_norm"]
    assert isinstance(norm, float) and norm > 0.5
    moved = sum((trainer.tensors()["networks"][name] - value).pow(2).sum() for name, value in before.items())
    assert float(moved) ** 0.5 == pytest.approx(0.5, rel=1e-3)


def test_the_average_of_the_weights_follows_its_definition() -> None:
    trainer = make_trainer(small_config("vae"))
    name = "decoder.layers.0.weight"
    average = trainer.tensors()["networks"][name].clone()
    for step in range(30):
        trainer.run_step(step)
        decay = min(0.99, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * trainer.tensors()["networks"][name]
    torch.testing.assert_close(trainer.tensors()["averaged"][name], average)


def test_the_steps_of_a_gan_are_simultaneous_updates_by_adam() -> None:
    """Four steps of StyleGAN2 equal a plain loop: both losses before either update, R1 at every second step in the
    discriminator's loss, rate and betas scaled for it (Karras et al. 2020, appendix B), then the average."""
    config = small_config(
        "stylegan2, lazy, projection",
        network=dataclasses.replace(SMALL_STYLEGAN2, minibatch_group=4),
        optimization=OptimizerConfig(betas=(0.0, 0.99), lazy_scaling=True, ema_decay=0.9, epsilon=1e-3),
        learning_rate=2e-2,
    )
    trainer = make_trainer(config)
    objective = copy.deepcopy(trainer.objective).train()
    phases, players = objective.phases(), objective.networks
    ours = {name: list(players[name].parameters()) for name in ("generator", "discriminator")}
    scaled = 2 / 3
    optimizers = {
        "generator": torch.optim.Adam(ours["generator"], 2e-2, (0.0, 0.99), 1e-3),
        "discriminator": torch.optim.Adam(ours["discriminator"], 2e-2 * scaled, (0.0, 0.99**scaled), 1e-3),
    }
    average = {name: value.detach().clone() for name, value in players.named_parameters()}
    for step in range(4):
        images, labels = trainer.batches.micro_batch(step, 0)
        batch = Batch(images, labels, torch.tensor([config.seed, step]), 0, penalized=step % 2 == 0)
        generated = phases["generator"](batch)
        discriminated = phases["discriminator"](batch._replace(carried=generated.carried))
        for name, loss in (("generator", generated.loss), ("discriminator", discriminated.loss)):
            for weight, gradient in zip(ours[name], torch.autograd.grad(loss, ours[name]), strict=True):
                weight.grad = gradient
        for name, optimizer in optimizers.items():
            factor = learning_rate_at(config, step) / config.learning_rate * (scaled if name == "discriminator" else 1)
            optimizer.param_groups[0]["lr"] = 2e-2 * factor
            optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        average = {name: value.lerp(average[name], decay) for name, value in players.named_parameters()}
        trainer.run_step(step)
    for name, value in players.named_parameters():
        torch.testing.assert_close(trainer.tensors()["networks"][name], value.detach(), rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(trainer.tensors()["averaged"][name], average[name], rtol=1e-4, atol=1e-5, msg=name)


def test_batch_statistics_are_averaged_and_other_buffers_copied() -> None:
    network = ResnetConfig(feature_maps=(4, 6), latent_dim=5, generator_norm="batch", spectral_norm=True)
    trainer = make_trainer(small_config("gan", network=network))
    before = {name: value.clone() for name, value in trainer.tensors()["networks"].items()}
    for _ in range(4):
        trainer.run_step(0)  # a step with newest weight 0.9
        trainer.load(_checkpoint_of(trainer, 1))
        before = {name: 0.1 * value + 0.9 * trainer.tensors()["networks"][name] for name, value in before.items()}
    kinds, moved = set(), set()
    for name, value in trainer.tensors()["averaged"].items():
        newest = trainer.tensors()["networks"][name]
        kind = name.rsplit(".", 1)[1]
        is_copied = kind in ("num_batches_tracked", "_u", "_v")
        torch.testing.assert_close(value, newest if is_copied else before[name], rtol=1e-4, atol=1e-6)
        kinds.add(kind)
        if not torch.equal(value, newest):
            moved.add(kind)
    assert kinds >= {"num_batches_tracked", "_u", "_v"}
    assert moved >= {"running_mean", "running_var", "bias"}


@pytest.mark.parametrize("objective", ["autoencoder", "vae", "vae, convolutional", "vae, learned Gaussian scale"])
def test_latents_decode_to_about_the_mean_image_before_training(objective: str) -> None:
    trainer = make_trainer(small_config(objective))
    mean = torch.from_numpy(trainer.dataset.train.images).float().mean(0) / 255

    def error(started: Objective) -> float:
        with torch.no_grad():
            decoded = started.pixels(started.decode(torch.zeros(1, 5)))[0]
        if objective == "vae, convolutional":  # one bias for all pixels of a channel
            return float((decoded.mean() - mean.mean()).abs())
        return float((decoded - mean).abs().mean())

    uncentred = build_objective(trainer.config, trainer.dataset.image_shape, classes=10)
    assert error(trainer.objective) < 0.8 * error(uncentred)


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    def rates(decay: str) -> list[float]:
        optimization = OptimizerConfig(warmup_steps=4, decay=decay)  # type: ignore[arg-type]
        config = TrainConfig(steps=12, learning_rate=0.8, optimization=optimization)
        return [round(learning_rate_at(config, step), 6) for step in range(12)]

    assert rates("constant") == [0.2, 0.4, 0.6] + [0.8] * 9
    assert rates("linear") == [0.2, 0.4, 0.6, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates("cosine")[8] == pytest.approx(0.4)
    assert rates("cosine") == rates("cosine")[:4] + sorted(rates("cosine")[4:], reverse=True)


def test_evaluation_does_not_depend_on_its_batch_size() -> None:
    trainer = make_trainer(small_config("iwae"))
    run_steps(trainer, 0, 5)
    split = trainer.dataset.test
    whole = trainer.evaluate(split, decoded_per_batch=4 * len(split.images))
    parts = trainer.evaluate(split, decoded_per_batch=28)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert list(whole) == ["negative_elbo", "nll", "kl", "negative_bound_k4"]
    assert whole["negative_elbo"] == pytest.approx(whole["nll"] + whole["kl"])
    assert whole["negative_bound_k4"] < whole["negative_elbo"]


def test_evaluation_leaves_the_run_as_it_was() -> None:
    disturbed, undisturbed = make_trainer(small_config("vae")), make_trainer(small_config("vae"))
    for step in range(6):
        disturbed.run_step(step)
        disturbed.evaluate(disturbed.dataset.test)
        undisturbed.run_step(step)
    assert_same_bits(all_tensors(disturbed), all_tensors(undisturbed))


def test_a_checkpoint_of_other_data_or_networks_is_refused() -> None:
    trainer = make_trainer(small_config("vae"))
    checkpoint = _checkpoint_of(trainer, 3)
    with pytest.raises(CheckpointError, match="another digest"):
        trainer.load(dataclasses.replace(checkpoint, facts={**checkpoint.facts, "data_digest": "0" * 64}))
    with pytest.raises(CheckpointError, match="other networks"):
        make_trainer(small_config("vae, convolutional")).load(checkpoint)


def test_a_too_small_global_batch_names_the_least_size() -> None:
    with pytest.raises(ConfigError, match="use --global-batch-size 25 or more, or --accumulation 24 or less"):
        make_trainer(small_config("vae", accumulation=25))


def test_a_phase_changes_only_the_networks_that_it_trains() -> None:
    players = two_players()

    def changed_by(step: int) -> set[str]:
        before = all_tensors(players)
        logs = players.run_step(step)
        after = all_tensors(players)
        turns.append({name.split("/")[0] for name in logs})
        return {
            name.split("/")[1].split(".")[0]
            for name, value in before.items()
            if name.startswith("networks/") and not torch.equal(after[name], value)
        }

    turns: list[set[str]] = []
    assert changed_by(0) == {"discriminator", "generator"}
    assert changed_by(1) == {"discriminator"}
    assert turns == [{"discriminator", "generator"}, {"discriminator"}]
    assert all(parameter.grad is None for parameter in players.objective.parameters())
    assert all(parameter.requires_grad for parameter in players.objective.parameters())


def test_two_phases_have_optimizers_of_their_own_that_resume() -> None:
    players = two_players()
    for step in range(4):
        players.run_step(step)
    checkpoint = _checkpoint_of(players, 4)
    names = {name: sorted(group) for name, group in checkpoint.tensors.items() if name.startswith("optimizer")}
    assert all(key.startswith("generator.") for key in names["optimizer-generator"])
    assert all(key.startswith("discriminator.") for key in names["optimizer-discriminator"])
    resumed = two_players()
    resumed.load(
        Checkpoint(
            4, {k: {n: t.clone() for n, t in g.items()} for k, g in checkpoint.tensors.items()}, checkpoint.facts
        )
    )
    for trainer in (players, resumed):
        for step in range(4, 8):
            trainer.run_step(step)
    assert_same_bits(all_tensors(players), all_tensors(resumed))
