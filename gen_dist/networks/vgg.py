"""VGG16 (Simonyan & Zisserman 2015, table 1, D) with LPIPS's weights of its features (Zhang et al. 2018).

Both files come from elsewhere: torchvision's weights of VGG16 are a download of 528 MB, the heads a part of the package
`lpips`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from gen_dist.errors import UserError

WEIGHTS_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Convolutions of each size; a pooling lies between sizes."""


class Vgg16(nn.Module):
    """VGG16 up to the last ReLU before its last pooling."""

    least_side = 64
    """Side to which smaller images are enlarged: LPIPS's heads were fitted to patches of 64 x 64."""
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        self.last_of_a_size = []
        for channels, count in zip(CHANNELS, CONVOLUTIONS, strict=True):
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
                inputs = channels
            self.last_of_a_size.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        # LPIPS's constants: ImageNet's mean and standard deviation, for images in -1..1.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of 64, 128, 256, 512 and 512 channels at 1 to 1/16 of the sides, from images in -1..1."""
        maps = (images - self.shift) / self.scale
        found = []
        for place, layer in enumerate(self.features):
            maps = layer(maps)
            if place in self.last_of_a_size:
                found.append(maps)
        return found


def load_vgg16(weights: Path | None) -> tuple[Vgg16, list[Tensor], str]:
    """The network, frozen and in eval mode; LPIPS's weight of each channel of each map; and the SHA-256 of the weights.

    Args:
        weights: torchvision's file `vgg16-397923af.pth`. The heads are those of the installed package `lpips`.

    Raises:
        UserError: a file is missing, unreadable, or has other weights.
    """
    if weights is None:
        raise UserError(
            f"features vgg16 need the file of its weights; download {WEIGHTS_URL} (528 MB) and name it, or use "
            "efficientnet-lite0"
        )
    published, digest = _tensors(weights)
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("features vgg16 need the heads of the package lpips; run `pip install lpips`")
    heads_file = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
    heads, heads_digest = _tensors(heads_file)
    if heads_digest != HEADS_SHA256:
        raise UserError(
            f"{heads_file} has the SHA-256 {heads_digest[:8]}..., not {HEADS_SHA256[:8]}...; run "
            "`pip install --force-reinstall lpips==0.1.4`"
        )
    network = Vgg16()
    try:
        network.load_state_dict({name: value for name, value in published.items() if name.startswith("features.")})
    except RuntimeError:
        raise UserError(
            f"{weights} (SHA-256 {digest[:8]}...) has no weights of VGG16 by torchvision's names and shapes; use "
            f"{WEIGHTS_URL}"
        ) from None
    channel_weights = [heads[f"lin{place}.model.1.weight"][0] for place in range(len(CHANNELS))]
    return network.eval().requires_grad_(False), channel_weights, digest


def _tensors(file: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file of torch by name, and its SHA-256. Nothing but tensors is unpickled."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; features vgg16 need it from {WEIGHTS_URL}") from None
    digest = hashlib.sha256(content).hexdigest()
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception:  # whatever the bytes make the unpickler raise
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} (SHA-256 {digest[:8]}...) is no file of torch weights; download it from {WEIGHTS_URL}")
    return found, digest
