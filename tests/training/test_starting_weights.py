"""A run starts from the weights of another one: `--from RUN`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gen_dist.config import ConvConfig, DataConfig, MlpConfig, TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.records.checkpoint import Checkpoint, checkpoint_paths, load, load_newest
from gen_dist.records.reading import read_config
from gen_dist.training.run import train
from tests.support.runs import assert_same_bits, make_trainer, small_config

OTHER_DATA = DataConfig(synthetic_images=96)


def silent(_line: str) -> None:
    pass


def newest(path: Path) -> Checkpoint:
    found = load_newest(path, silent)
    assert found is not None
    return found[0]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("first") / "run"
    config = small_config("vae", steps=3, checkpoint_every=2, run_dir=str(path))
    train(config, say=silent)
    return path


def following(start: Path, path: Path, **changes: object) -> TrainConfig:
    options: dict[str, object] = {"packing": OTHER_DATA, "steps": 4, "checkpoint_every": 2, "start_from": str(start)}
    return small_config("vae", run_dir=str(path), **options | changes)


def test_a_run_starts_at_the_weights_of_another(first: Path, tmp_path: Path) -> None:
    for start in (first, checkpoint_paths(first)[-1]):
        weights = (newest(first) if start == first else load(start)[0]).tensors
        trainer = make_trainer(following(start, tmp_path))
        trainer.start()
        tensors = trainer.tensors()
        assert_same_bits(dict(weights["networks"]), tensors["networks"])
        assert_same_bits(dict(weights["averaged"]), tensors["averaged"])
        (optimizer,) = (group for name, group in tensors.items() if name.startswith("optimizer-"))
        assert not any(tensor.any() for tensor in optimizer.values())
        trainer.close()


def test_without_an_average_both_start_at_the_newest(first: Path, tmp_path: Path) -> None:
    plain = replace(small_config("vae").optimization, ema_decay=None)
    train(small_config("vae", steps=2, run_dir=str(tmp_path / "plain"), optimization=plain), say=silent)
    trainer = make_trainer(following(tmp_path / "plain", tmp_path / "run"))
    trainer.start()
    weights = dict(newest(tmp_path / "plain").tensors["networks"])
    for group in ("networks", "averaged"):
        assert_same_bits(weights, trainer.tensors()[group])
    trainer.close()


def test_it_resumes_exactly_and_without_the_other_run(first: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(first, other)
    config = following(other, tmp_path / "run")
    train(config, say=silent)
    shutil.rmtree(other)
    shutil.copytree(tmp_path / "run", tmp_path / "part")
    shutil.rmtree(checkpoint_paths(tmp_path / "part")[0])
    train(replace(config, run_dir=str(tmp_path / "part")), say=silent)
    whole, part = (newest(tmp_path / name).tensors for name in ("run", "part"))
    for group in whole:
        assert_same_bits(dict(whole[group]), dict(part[group]))
    recorded = read_config(tmp_path / "part" / "config.json").start_digest
    assert recorded is not None
    assert len(recorded) == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start_from": "none"}, "from none: none is not a run or checkpoint directory"),
        (
            {"network": MlpConfig(hidden_sizes=(32,), latent_dim=6)},
            r"is a run of other networks: decoder.layers.0.weight is \[32, 5\] there and \[32, 6\] here; use",
        ),
        ({"packing": DataConfig(synthetic_images=96, image_size="20x28")}, "and images of its size and channels"),
        ({"network": ConvConfig(feature_maps=(4,), hidden_size=8, latent_dim=5)}, "is missing there and"),
        ({"start_digest": "0" * 64}, "are not those that the run started from"),
    ],
)
def test_other_weights_are_refused_in_a_line(
    changes: dict[str, object], words: str, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        train(following(first, tmp_path / "run", **changes), say=silent)
    assert not (tmp_path / "run").exists() or not checkpoint_paths(tmp_path / "run")


@pytest.mark.parametrize(
    ("weight_there", "words"),
    [
        (
            0.0,
            "is a run with no discriminator, and this run trains one; leave .* with --adversarial-weight 0, or start",
        ),
        (0.5, "is a run with a discriminator, and this run has none; give .* term too, with --adversarial-weight"),
    ],
)
def test_a_missing_discriminator_has_a_way_out(weight_there: float, words: str, tmp_path: Path) -> None:
    base = small_config("latent autoencoder, vq, adaptive adversary", steps=2)
    there, here = (
        replace(base, objective=replace(base.objective, adversarial_weight=weight))  # type: ignore[call-arg]
        for weight in (weight_there, 0.5 - weight_there)
    )
    train(replace(there, run_dir=str(tmp_path / "there")), say=silent)
    with pytest.raises(ConfigError, match=words):
        train(replace(here, start_from=str(tmp_path / "there"), run_dir=str(tmp_path / "here")), say=silent)
    assert not checkpoint_paths(tmp_path / "here")


def test_a_network_of_another_objective_has_a_way_out(first: Path, tmp_path: Path) -> None:
    gan = small_config("gan", start_from=str(first), run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"; use the preset and the objective of that run$"):
        train(gan, say=silent)


def test_a_gan_from_one_with_an_encoder_names_it(tmp_path: Path) -> None:
    train(small_config("vae-gan", steps=2, run_dir=str(tmp_path / "there")), say=silent)
    gan = small_config("gan", start_from=str(tmp_path / "there"), run_dir=str(tmp_path / "here"))
    with pytest.raises(ConfigError, match="is a run with an encoder, and this run has none; use the preset"):
        train(gan, say=silent)


def test_a_run_does_not_start_from_itself(first: Path) -> None:
    before = newest(first).tensors["networks"]
    for start in (first, checkpoint_paths(first)[0]):
        with pytest.raises(ConfigError, match="is the run directory itself; choose another --run-dir"):
            train(following(start, first), fresh=True, say=silent)
    after = newest(first).tensors["networks"]
    assert all(torch.equal(before[name], after[name]) for name in before)


GANS = {"gan": 1, "dcgan": 2, "sngan": 1, "r3gan": 2, "stylegan2, lazy, projection": 2}


@pytest.mark.parametrize("name", [pytest.param(one, marks=() if "dcgan" in one else pytest.mark.slow) for one in GANS])
def test_frozen_layers_of_a_discriminator_stay_those_of_the_first_run(name: str, tmp_path: Path) -> None:
    count = GANS[name]
    train(small_config(name, steps=2, checkpoint_every=2, run_dir=str(tmp_path / "first")), say=silent)
    started = newest(tmp_path / "first").tensors["networks"]
    config = small_config(name, start_from=str(tmp_path / "first"), run_dir=str(tmp_path / "second"))
    frozen = replace(config.objective, freeze_discriminator=count, ada=("blit",))  # type: ignore[call-arg]
    config = replace(config, objective=frozen, packing=OTHER_DATA, steps=3, checkpoint_every=3)
    trainer = make_trainer(config)
    discriminator = trainer.objective.networks["discriminator"]
    still = {key for key, weight in discriminator.named_parameters(prefix="discriminator") if not weight.requires_grad}
    assert still
    trainer.close()
    train(config, say=silent)
    tensors = newest(tmp_path / "second").tensors
    assert not any(key.split(":")[0] in still for key in tensors["optimizer-discriminator"])
    weights = {key for key, _ in discriminator.named_parameters(prefix="discriminator")}
    same = {key for key in weights if torch.equal(tensors["networks"][key], started[key])}
    assert same == still


def test_more_layers_than_there_are_cannot_be_frozen() -> None:
    objective = replace(small_config("dcgan").objective, freeze_discriminator=50)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="freeze_discriminator 50 would keep random weights; add --from RUN"):
        small_config("dcgan", objective=objective)
    with pytest.raises(ConfigError, match=r"this discriminator has \d+ layers or blocks before its head; use at most"):
        make_trainer(small_config("dcgan", objective=objective, start_from="somewhere"))
