"""One evaluator for all families: figures equal the metrics' definitions, on any number of processes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import gen_dist
from gen_dist import commands
from gen_dist.cli import run_command, run_subcommand
from gen_dist.config import DataConfig, VaeConfig
from gen_dist.config.labels import LabelScheme
from gen_dist.data import Dataset, Split, image_indices, open_dataset
from gen_dist.errors import ConfigError, UserError
from gen_dist.evaluation import plan as evaluation_plan
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.features import feature_network, inception
from gen_dist.evaluation.features.digits import CARD_FILE, WEIGHTS_FILE
from gen_dist.evaluation.guide import base_name
from gen_dist.evaluation.marginal_likelihood import negative_log_likelihoods
from gen_dist.evaluation.metrics import classes as class_metrics
from gen_dist.evaluation.metrics import measured_metrics, path_length
from gen_dist.evaluation.record import Evaluation, read_evaluation
from gen_dist.inference.model import GenerativeModel
from gen_dist.networks import efficientnet_lite
from gen_dist.objectives import Batch
from gen_dist.objectives.vae import Vae
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.runs import OBJECTIVES, each_of, small_config
from tests.support.warm_python import in_two_ranks, warm_python

OF_SAMPLES = {"fid", "kid", "precision", "recall", "density", "coverage", "sharpness", "diversity", "path_length"}
OF_CLASSES = {"classes", "class_shares", "class_variation"}
OF_LATENTS = {"latent_mean", "latent_std", "scaling_factor"}
OF_SHARPNESS = {"reconstruction_sharpness", "reconstruction_sharpness_data"}
OF_DATA = {f"{name}_data" for name, metric in measured_metrics().items() if metric.better == "data"}
OF_DATA.add("memorization_data")
SMALL = {"samples": 260, "nll_samples": 30, "nll_images": 7}
ONE_OF_A_KIND = {"autoencoder", "vae, learned Gaussian scale", "iwae", "conditional gan", "vae-gan"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def _run_of(runs: Path, objective: str, **changes: Any) -> Path:
    """A run of a few steps on real digits, trained at its first use."""
    name = "-".join([str(list(OBJECTIVES).index(objective)), *map(str, changes.values())])
    path = runs / hashlib.sha256(name.encode()).hexdigest()[:16]
    if not path.exists():
        config = small_config(objective, steps=4, data="mnist5k", run_dir=str(path))
        train(replace(config, **changes), say=_silent)
    return path


def _silent(_line: str) -> None:
    pass


def _evaluate(run: Path, *names: str, **options: Any) -> Evaluation:
    return evaluate(run, names or None, **({"announce": _silent} | SMALL | options))


@each_of(OBJECTIVES, left_out=OBJECTIVES.keys() - ONE_OF_A_KIND)
def test_every_objective_has_its_metrics_or_says_why_not(objective: str, runs: Path) -> None:
    found = _evaluate(_run_of(runs, objective))
    config = OBJECTIVES[objective][0]
    expected = set()
    if "samples" not in config.lacks:
        expected |= {f"{name}_260" for name in OF_SAMPLES | OF_CLASSES} | OF_DATA - OF_SHARPNESS
        expected |= {"memorization"}
    if "conditional" in objective or "projection" in objective:
        expected.add("label_accuracy_260")
    if "encoder" not in config.lacks:
        expected |= {"reconstruction_error", "psnr", "ssim", "rfid_digits_1k", *OF_LATENTS, *OF_SHARPNESS}
        expected |= {"perceptual_distance_efficientnet-lite0_7"} if efficientnet_lite.is_installed() else set()
    if config.kind in ("vae", "vae-gan"):
        expected.add("active_units")
    if config.kind in ("vae", "vae-gan") or getattr(config, "bottleneck", "") == "kl":
        expected.add("bits_per_latent")
    if getattr(config, "bottleneck", "") in ("vq", "fsq"):
        expected |= {"bits_per_latent", "codebook_usage", "codebook_perplexity"}
    if config.kind == "vae":
        expected |= {"negative_elbo", "nll_k30_7"}
    if isinstance(config, VaeConfig) and config.likelihood == "bernoulli":
        expected.add("bits_per_dimension_k30_7")
    assert set(found.metrics) == expected
    plain = {base_name(name) for name in (*found.metrics, *found.unavailable)}
    assert plain - OF_DATA == set(measured_metrics())
    assert all(reason and "\n" not in reason for reason in found.unavailable.values())
    numbers = [value for value in found.metrics.values() if not isinstance(value, list)]
    assert np.isfinite(numbers).all()
    assert read_evaluation(_run_of(runs, objective)) == found
    assert any("fid" in line for line in found.lines())


def test_the_negative_elbo_is_that_of_the_training(runs: Path) -> None:
    for objective in ("vae", "vae, dynamic binarization"):
        run = _run_of(runs, objective)
        found = _evaluate(run, "negative_elbo")
        trained = json.loads((run / "summary.json").read_text())["final"]["test/negative_elbo"]
        assert found.metrics["negative_elbo"] == pytest.approx(trained, rel=1e-5)
        assert found.pixels["negative_elbo"] == ("binarized" if "binarization" in objective else "real-valued")


def test_a_likelihood_of_fewer_images_has_another_name(runs: Path) -> None:
    run = _run_of(runs, "vae, dynamic binarization")
    objective, test = gen_dist.load(run).objective, open_dataset("mnist5k", "data", DataConfig(), _silent).test
    assert isinstance(objective, Vae)
    found = _evaluate(run, "nll", nll_images=2).metrics["nll_k30_2"]
    rng = torch.tensor([gen_dist.load(run).config.seed, 0])
    with torch.no_grad():
        expected = [
            float(negative_log_likelihoods(objective, Batch(*_one(test, row), rng, row), 30)) for row in (0, 500)
        ]
    assert found == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert "nll_k30_2" in _evaluate(run, "nll", nll_images=3).metrics  # another one does not take its place


@pytest.mark.parametrize(("words", "asked"), [("", 1000), ("--nll-images all", None), ("--nll-images 7", 7)])
def test_a_thousand_images_are_measured_unless_told(
    words: str, asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def measure(_run: Path, *_names: Any, **options: Any) -> Any:
        found.append(inspect.signature(evaluate).bind(_run, *_names, **options))
        found[-1].apply_defaults()
        raise UserError("that is all")

    monkeypatch.setattr("gen_dist.evaluation.evaluator.evaluate", measure)
    with pytest.raises(UserError, match="that is all"):
        run_subcommand([commands.evaluate, commands.report], ["evaluate", "run", *words.split()], "gen-dist")
    assert found[0].arguments["nll_images"] == asked
    with pytest.raises(UserError, match="that is all"):
        commands._evaluate(Path("run"))  # of report and compare
    assert found[1].arguments["nll_images"] == 1000


@pytest.mark.parametrize("words", ["--nll-images 0", "--nll-images some", "--nll-images -3"])
def test_numbers_of_images_that_are_none_are_refused(words: str, runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"nll.images"):
        run_subcommand([commands.evaluate, commands.report], ["evaluate", str(runs), *words.split()], "gen-dist")


@pytest.mark.parametrize("names", [("nll",), ("bits_per_dimension", "nll"), ("bits_per_dimension", "negative_elbo")])
def test_what_takes_long_is_told_before_it_starts(names: tuple[str, ...], runs: Path) -> None:
    lines: list[str] = []
    _evaluate(_run_of(runs, "vae"), *names, announce=lines.append)
    (told,) = [line for line in lines if "about" in line]
    expected = r"negative log-likelihood of 7 test images with 30 importance samples each: about \d+\.\d s; "
    assert re.fullmatch(expected + "the other figures are written already", told)


def test_nothing_is_told_of_a_quick_evaluation(runs: Path) -> None:
    lines: list[str] = []
    _evaluate(_run_of(runs, "vae"), "negative_elbo", "active_units", announce=lines.append)
    assert not [line for line in lines if "about" in line]


def _one(split: Split, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(split.images[row : row + 1]), torch.from_numpy(split.labels[row : row + 1])


def test_a_test_split_too_small_has_no_classes_either(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_plan, "LEAST_SAMPLES", 1001)
    assert "fewer than 1001" in _evaluate(_run_of(runs, "gan"), "classes", samples=1001).unavailable["classes_1001"]


def test_the_frechet_distance_of_a_run_is_torch_fidelitys(runs: Path) -> None:
    run = _run_of(runs, "conditional gan")
    model = gen_dist.load(run)
    dataset = open_dataset("mnist5k", "data", DataConfig(), _silent)
    network = feature_network("digits", torch.device("cpu"))
    # As many samples as test images: their classes are then those of the test images, in another order.
    count = len(dataset.test.images)
    found = _evaluate(run, "fid", "label_accuracy", "class_shares", samples=count)
    order = torch.from_numpy(image_indices(count, 0, 0, 1, 0, count))
    labels = torch.from_numpy(dataset.test.labels)[order]
    assert torch.equal(labels.sort().values, torch.from_numpy(np.sort(dataset.test.labels)))
    images = model.sample(count, labels)
    features, classes = network.of_images(images)
    real, _ = network.of_images(torch.from_numpy(dataset.test.images))
    statistics = (fid_features_to_statistics(some.double()) for some in (real, features))
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found.metrics["fid_1k"] == pytest.approx(expected, rel=1e-5)
    assert classes is not None
    assert found.metrics["label_accuracy_1k"] == pytest.approx(float((classes == labels).double().mean()), abs=2e-3)
    assert sum(found.metrics["class_shares_1k"]) == pytest.approx(1)  # type: ignore[arg-type]


def test_an_unknown_class_is_none_to_find() -> None:
    scheme = LabelScheme("classes", ("a", "b", "unknown"), unknown=(True,))
    context: Any = SimpleNamespace(dataset=SimpleNamespace(labels=scheme))
    share = class_metrics.share_right(context, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 1, 2]))
    assert share == pytest.approx(2 / 3)
    assert class_metrics.share_right(context, torch.tensor([0]), torch.tensor([2])) == 0.0


def test_samples_of_another_count_begin_with_the_same_ones(runs: Path) -> None:
    model = gen_dist.load(_run_of(runs, "gan"))
    assert torch.equal(model.prior_latents(10)[3:], model.prior_latents(7, first_row=3))


@pytest.mark.parametrize("objective", ["vae", "conditional gan"])
def test_two_ranks_equal_one_whatever_their_shares(objective: str, runs: Path) -> None:
    """510 samples make three blocks, 1,000 test images four; the seven images of nll are cut into four and three."""
    run = _run_of(runs, objective)
    for leftover in run.glob("evaluation.json"):
        leftover.unlink()
    one = _evaluate(run, samples=510)
    (run / "evaluation.json").unlink()
    words = ["--samples", 510, "--nll-samples", 30, "--nll-images", 7]
    cache = f"{os.environ['GEN_DIST_CACHE']} of two for {objective}"  # so that both processes compute the reference too
    done = subprocess.run(
        [str(word) for word in (*in_two_ranks(), "-m", "gen_dist.commands", "evaluate", run, *words)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "GEN_DIST_CACHE": cache},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("against the test split of mnist5k") == 1
    two = read_evaluation(run)
    assert two is not None
    assert two.unavailable == one.unavailable
    assert two.features == one.features
    assert two.metrics.keys() == one.metrics.keys()
    for name, value in one.metrics.items():
        assert two.metrics[name] == pytest.approx(value, rel=1e-6), name


def test_metrics_add_up_for_one_checkpoint_alone(runs: Path) -> None:
    run = _run_of(runs, "vae", seed=5)
    first = _evaluate(run, "sharpness", "label_accuracy")
    assert set(first.metrics) == {"sharpness_260", "sharpness_data"}
    assert first.features is None or first.features["name"] == "digits"
    second = _evaluate(run, "negative_elbo")
    assert second.metrics == first.metrics | {"negative_elbo": second.metrics["negative_elbo"]}
    assert second.unavailable == first.unavailable
    assert second.features == first.features
    train(small_config("vae", steps=6, data="mnist5k", run_dir=str(run), seed=5), say=_silent, fresh=True)
    assert read_evaluation(run) is None  # a fresh run removes the figures of the old one
    file = run / "evaluation.json"
    file.write_text(json.dumps(first.fields()))
    third = _evaluate(run, "negative_elbo")
    assert set(third.metrics) == {"negative_elbo"}
    assert third.checkpoint_step == 6


def test_other_features_replace_only_feature_metrics(runs: Path) -> None:
    run = _run_of(runs, "vae", seed=6)
    first = _evaluate(run, "negative_elbo", "sharpness", "fid", "classes")
    assert first.features
    other = replace(first, features=first.features | {"digest": "another"})
    (run / "evaluation.json").write_text(json.dumps(other.fields()))
    second = _evaluate(run, "kid")
    assert set(second.metrics) == {"negative_elbo", "sharpness_260", "sharpness_data", "kid_260"}
    assert second.features == first.features


def test_the_accuracy_of_the_digit_network_is_kept(runs: Path) -> None:
    run = _run_of(runs, "vae", seed=6)
    (run / "evaluation.json").unlink(missing_ok=True)
    first = _evaluate(run, "classes")
    assert first.metrics.keys() == {"classes_260"}  # alone, without a metric of features
    assert first.features and "accuracy" in first.features
    assert _evaluate(run, "rfid").features == first.features  # the same network, without samples


def test_the_reference_is_computed_again_only_if_damaged(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run_of(runs, "gan")
    monkeypatch.setenv("GEN_DIST_CACHE", str(tmp_path))
    first = _evaluate(run, "kid", "coverage", "sharpness", "diversity")
    (kept,) = tmp_path.glob("reference-*.tensors")
    content = kept.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Context, "test_batch", None)  # no test image is looked at
        assert _evaluate(run, "kid", "coverage", "sharpness", "diversity").metrics == first.metrics
    place = content.index(b'"radii') + 3  # the name of a tensor
    flipped = [content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :] for at, bit in ((place, 1), (-5, 64))]
    for damaged in (content[:1000], *flipped):
        kept.write_bytes(damaged)
        assert _evaluate(run, "kid", "coverage", "sharpness", "diversity").metrics == first.metrics
        assert kept.read_bytes() == content


def test_non_digits_have_features_but_no_classes(runs: Path) -> None:
    run = _run_of(runs, "gan", data="synthetic")
    found = _evaluate(run, "fid", "classes")
    assert "fid_260" in found.metrics
    assert "they are no digits" in found.unavailable["classes_260"]


def test_colour_images_without_inception_have_pixel_metrics(runs: Path, tmp_path: Path) -> None:
    packing = DataConfig(synthetic_images=256, image_size=32, channels=3)
    run = _run_of(runs, "vae", data="synthetic", packing=packing)
    found = _evaluate(run)
    assert {"sharpness_260", "diversity_260", "negative_elbo", "nll_k30_7"} <= set(found.metrics)
    assert "3 x 32 x 32" in found.unavailable["fid_260"]
    assert "--features inception" in found.unavailable["path_length_260"]
    with pytest.raises(UserError, match=r"are 3 x 32 x 32, .*; use --features inception"):
        _evaluate(run, features="digits")


def test_no_features_are_offered_for_images_of_5_channels() -> None:
    """InceptionV3 does not take them either."""
    images = Split("", np.zeros((20, 5, 8, 8), np.uint8), np.zeros(20, np.int64))
    line = evaluation_plan.refused_by_digits(Dataset(images, images, ("all",), ""))
    assert line == "images are 5 x 8 x 8, and features are of 1 or 3 channels"


def _gen_dist(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [*warm_python(), "-m", "gen_dist.commands", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), **more}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=REPOSITORY, env=environment
    )


def test_wrong_options_are_one_line_and_exit_code_2(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run_of(runs, "vae")
    other = tmp_path / "weights.pth"
    other.write_bytes(b"other weights")
    checkpoint = checkpoint_paths(run)[0]
    for words, message in (
        ((run, "--metrics", "fid", "inception_score"), "unknown metrics inception_score; there are fid, kid,"),
        ((run, "--samples", 3), "samples 3 is less than 10"),
        ((checkpoint,), "is one checkpoint; name the run directory"),
        ((tmp_path,), "is not a run or checkpoint directory"),
        ((run, "--features", "inception", "--inception-weights", other), "not 6726825d...: these are not the weights"),
        ((run, "--features", "inception", "--inception-weights", tmp_path / "none.pth"), "cannot be read from"),
    ):
        command = ["evaluate", *map(str, words)]
        capsys.readouterr()  # the first time is that of a training
        with pytest.raises(SystemExit) as ended:
            run_command(lambda command=command: run_subcommand([commands.evaluate], command, "gen-dist"))  # type: ignore[misc]
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (2, ""), said.err
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        assert message in said.err
    assert checkpoint_paths(run)[0] == checkpoint
    assert not list(checkpoint.glob("evaluation*"))


def test_inception_features_equal_those_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with random weights: the real ones are a download."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = tmp_path / "weights.pth"
    with torch.random.fork_rng(), monkeypatch.context() as patched:
        torch.manual_seed(0)
        patched.setattr(torch, "load", lambda *_args, **_kwargs: {})
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_args: None)
        made = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(made.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest)
    network = feature_network("inception", torch.device("cpu"), file)
    grey = torch.from_numpy(open_dataset("mnist5k", "data", DataConfig(), _silent).test.images[:2])
    features, classes = network.of_images(grey)
    assert classes is None
    assert network.digest == digest
    assert network.of_intensities is None
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, made(grey.repeat(1, 3, 1, 1))[0])


def test_the_digit_network_is_its_cards_and_classifies() -> None:
    card = json.loads(CARD_FILE.read_text())
    network = feature_network("digits", torch.device("cpu"))
    assert network.digest == card["sha256"] == hashlib.sha256(WEIGHTS_FILE.read_bytes()).hexdigest()
    assert card["test_accuracy"] >= 0.993
    assert WEIGHTS_FILE.stat().st_size < 2**20
    test = open_dataset("mnist5k", "data", DataConfig(), _silent).test
    images = torch.from_numpy(test.images)
    features, classes = network.of_images(images)
    assert (features.dtype, features.shape) == (torch.float32, (1000, 64))
    assert float(features.square().mean()) == pytest.approx(1, abs=0.1)
    assert classes is not None
    assert float((classes == torch.from_numpy(test.labels)).double().mean()) >= 0.99
    assert network.of_intensities is not None
    torch.testing.assert_close(network.of_intensities(images.float() / 255), features)


def test_a_run_that_is_on_wandb_gets_its_metrics_there(runs: Path) -> None:
    run = _run_of(runs, "vae", seed=7)
    words = ["evaluate", run, "--metrics", "negative_elbo"]
    assert _gen_dist(*words, WANDB_MODE="offline").returncode == 0
    assert not (run / "wandb").exists()  # there never was such a run
    (run / "wandb").mkdir()
    done = _gen_dist(*words, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    wandb_id = (run / "wandb-id").read_text()
    (kept,) = (run / "wandb").glob(f"offline-run-*/run-{wandb_id}.wandb")
    assert b"evaluation/negative_elbo" in kept.read_bytes()


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) is None
    fields = {name: None for name in Evaluation.__dataclass_fields__} | {"format": 1, "metrics": [1]}
    for content in ("{", "[]", '{"format": 2}', '{"format": 1, "preset": "vae"}', json.dumps(fields)):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(UserError, match=r"evaluation\.json"):
            read_evaluation(tmp_path)


def test_walks_are_as_long_as_images_change(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run_of(runs, "gan")
    found = _evaluate(run, "path_length").metrics["path_length_260"]
    assert isinstance(found, float) and found > 0
    # The definition in float64, with steps of another length: the mean squared speed does not depend on the length.
    monkeypatch.setattr(path_length, "WALK_STEP", 1e-3)
    assert _evaluate(run, "path_length").metrics["path_length_260"] == pytest.approx(found, rel=0.02)
    monkeypatch.setattr(GenerativeModel, "decode", lambda self, latents, labels: torch.zeros(len(latents), 1, 28, 28))
    assert _evaluate(run, "path_length").metrics["path_length_260"] == 0
