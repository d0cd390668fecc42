"""The InceptionV3 in whose features FID and KID are defined: torch-fidelity's, with the weights in general use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from gen_dist.errors import UserError

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Full SHA-256 of the weights of 2015-12-05: the 32-bit prefix in the file name could be forged by brute force."""


class Inception(nn.Module):
    """InceptionV3 up to its last pooling: images uint8 [B, 1 or 3, H, W] to features float32 [B, 2048].

    Images of other values, float32 in 0..255, are rounded to 8 bits.
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features. Grey images get three equal channels; sizes are resized as TensorFlow does."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.is_floating_point():  # its published weights are of 8-bit images
            images = images.round().to(torch.uint8)
        features: Tensor = self.extractor(images)[0]
        return features


def load_inception(weights: Path | None) -> tuple[Inception, str]:
    """The network, and the SHA-256 of its weights.

    Args:
        weights: their file. None looks where torch keeps downloads, and downloads them to there.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are missing, cannot be downloaded, or are others.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            "features inception needs the package torch-fidelity; run `pip install torch-fidelity`, or use "
            "--features digits"
        ) from None
    file = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if weights is None and not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), SHA256)
        except (OSError, RuntimeError) as error:  # RuntimeError is another digest than the file's name says
            reason = " ".join(str(error).split())
            raise UserError(
                f"the weights of InceptionV3 are not in {file} and cannot be downloaded ({reason}); fetch "
                f"{URL_INCEPTION_V3} elsewhere and name it by --inception-weights, or use --features digits"
            ) from None
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"the weights of InceptionV3 cannot be read from {file}: {error.strerror}; they are at {URL_INCEPTION_V3}"
        ) from None
    # torch-fidelity unpickles the file, so only the known one is safe. Other weights would also give another FID.
    if digest != SHA256:
        raise UserError(
            f"{file} has the SHA-256 {digest[:8]}..., not {SHA256[:8]}...: these are not the weights of "
            f"{URL_INCEPTION_V3}"
        )
    extractor = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    return Inception(extractor).eval(), digest
