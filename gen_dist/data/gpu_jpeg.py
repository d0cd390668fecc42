"""JPEG files that are decoded on a GPU while training, by torchvision's decoder (NVIDIA's nvJPEG).

Its bits are not those of PIL: other arithmetic for the cosine transform and for the colours of neighbours. So a run
says that it wants them, and the digest of its data says so too. No image goes to another decoder in silence.
torchvision has deprecated its decoders in version 0.29; `decode_jpegs` is the only function here that calls one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gen_dist.data.dataset import Dataset, Split
from gen_dist.data.fitting import Fitting
from gen_dist.data.headers import ORIENTATION, TURNED, Header
from gen_dist.data.image_files import registered_formats
from gen_dist.data.on_demand import ImagesOnDemand
from gen_dist.errors import DataError

DIGEST_SUFFIX = ", JPEG decoded by nvJPEG"
"""Text behind the digest of encoded images, hashed with it to the digest of the same images decoded on a GPU."""
_WAY_OUT = "use --decoded-on cpu"
_RGB_IDS = (ord("R"), ord("G"), ord("B"))
_LOOKED_AT = 16
_KINDS = ("JPEG RGB", "JPEG gray", "MPO RGB", "MPO gray")
_COLOURED_REASON = "it has colours, and gray is wanted"
_TURNED_REASON = "its EXIF data say that it lies on its side or is mirrored"


def decoded_on(dataset: Dataset, device: torch.device) -> Dataset:
    """The data set with its encoded images decoded on a device. Packed values, such as the test split of shards, stay.

    Args:
        dataset: images that are decoded on demand.
        device: a GPU; tests take the CPU, for which torchvision has the same function.

    Raises:
        DataError: images are not 8-bit, or the first ones are not JPEG files of their size.
    """
    train, test = (_split_on(split, device) for split in (dataset.train, dataset.test))
    digest = hashlib.sha256(f"{dataset.digest}{DIGEST_SUFFIX}".encode()).hexdigest()
    return dataclasses.replace(dataset, train=train, test=test, digest=digest)


def decode_jpegs(contents: Sequence[bytes], channels: int, device: torch.device) -> list[Tensor]:
    """Decode JPEG files together.

    Args:
        contents: the files.
        channels: 1 for grayscale, 3 for RGB.
        device: where they are decoded.

    Returns:
        uint8 [channels, H, W] of each, on the device.

    Raises:
        RuntimeError: one cannot be decoded; none is given then.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    # torch.frombuffer warns about bytes that cannot be written to, which the decoder never does.
    given = [torch.from_numpy(np.frombuffer(bytearray(content), np.uint8)) for content in contents]
    found: list[Tensor] = decode_jpeg(given, mode=mode, device=device)
    return found


class ImagesOnGpu(ImagesOnDemand):
    """Images [N, C, H, W] as those that they are made of, with the pixels of another decoder."""

    def __init__(self, images: ImagesOnDemand, device: torch.device) -> None:
        """
        Args:
            images: 8-bit images, in colour or gray.
            device: where they are decoded.
        """
        super().__init__(
            images._encoded,
            images._fitting,
            images.shape[1:],
            str(images.dtype),
            images._keeping,
            reduces_colour=images._reduces_colour,
        )
        self._device = device

    def _task_size(self, count: int) -> int:
        return count  # the decoder has one lock, and is quicker with more images

    def _decode_some(self, rows: NDArray[np.int64], out: NDArray[Any], taken: NDArray[np.int64]) -> None:
        contents = [self._encoded.read(row) for row in rows.tolist()]
        if any(self._unfit(content) for content in contents):
            super()._decode_some(rows, out, taken)
            return
        try:
            decoded = decode_jpegs(contents, self.shape[1], self._device)
        except RuntimeError:  # of one of them, which that of each will find
            super()._decode_some(rows, out, taken)
            return
        out[...] = torch.stack(decoded).cpu().numpy()
        taken[...] = rows

    def _decode_one(self, row: int, out: NDArray[Any]) -> None:
        super()._decode_one(row, out)  # by PIL, which tells damaged images
        content = self._encoded.read(row)
        reason = self._unfit(content)
        if not reason:
            try:
                out[...] = decode_jpegs([content], self.shape[1], self._device)[0].cpu().numpy()
            except RuntimeError as error:
                reason = _one_line(error)
        if reason:
            raise DataError(f"{self._encoded.name(row)} cannot be decoded on a GPU: {reason}; {_WAY_OUT}")

    def refuse_unfit(self) -> None:
        """Raise DataError for an image among the first that the decoder does not take."""
        for row in range(min(len(self), _LOOKED_AT)):
            self[row]

    def _unfit(self, content: bytes) -> str:
        """Reason why an image is not for the decoder, by its header; empty if it is."""
        try:
            with Image.open(io.BytesIO(content), formats=registered_formats()) as opened:
                return _unfit_header(opened, *self.shape[1:])
        except Exception as error:  # damaged: PIL's decoding says how
            return str(error) or type(error).__name__


def _unfit_header(opened: Any, channels: int, height: int, width: int) -> str:
    if opened.format not in ("JPEG", "MPO"):
        return f"it is a {opened.format}, not a JPEG"
    if opened.mode not in ("L", "RGB"):
        return f"it is {opened.mode}, not RGB or gray"
    if opened.mode == "RGB" and channels == 1:
        return _COLOURED_REASON
    if opened.size != (width, height):
        return f"it is {opened.width}x{opened.height}, and nothing resizes it to {width}x{height} there"
    if opened.getexif().get(ORIENTATION, 1) in TURNED:
        return _TURNED_REASON
    # Components that are red, green and blue, not brightness and two colours: nvJPEG does not ask.
    if opened.info.get("adobe_transform") == 0 or tuple(one[0] for one in opened.layer) == _RGB_IDS:
        return "its components are RGB, not YCbCr" if opened.mode == "RGB" else ""
    return ""


def _split_on(split: Split, device: torch.device) -> Split:
    if split.on_demand is None:
        return split
    if split.on_demand.dtype != np.uint8 or split.on_demand.shape[1] not in (1, 3):
        what = f"{split.on_demand.dtype} of {split.on_demand.shape[1]} channels"
        raise DataError(f"{split.name}: images are {what}; a GPU decodes 8-bit JPEG, in colour or gray; {_WAY_OUT}")
    images: Any = ImagesOnGpu(split.on_demand, device)
    images.refuse_unfit()
    return dataclasses.replace(split, images=images)


def refuse_header(name: str, header: Header, fitting: Fitting | None, channels: int | None) -> None:
    """Raise DataError for an image that is not for the decoder, before anything is packed.

    Args:
        name: the image.
        header: what its file says.
        fitting: size that images are brought to.
        channels: those that are asked for.
    """
    reason = ""
    size = header.width, header.height
    if header.kind not in _KINDS:
        reason = f"it is {header.kind}, not a JPEG in RGB or gray"
    elif channels == 1 and not header.gray:
        reason = _COLOURED_REASON
    elif header.turned:
        reason = _TURNED_REASON
    elif fitting and size != fitting[:2]:
        reason = f"it is {header.width}x{header.height}, and nothing resizes it to {fitting} there"
    if reason:
        raise DataError(f"{name} cannot be decoded on a GPU: {reason}; {_WAY_OUT}")


def own_gpu() -> torch.device:
    """The GPU of this process, by its number: `cuda` alone would be GPU 0 in the threads that decode.

    Raises:
        DataError: there is none.
    """
    if not torch.cuda.is_available():
        raise DataError(f"decoded_on cuda needs a GPU with CUDA, and this host shows none; {_WAY_OUT}")
    return torch.device("cuda", torch.cuda.current_device())


def check_decoder(device: torch.device) -> None:
    """Decode a small image.

    Raises:
        DataError: torchvision has no decoder for the device.
    """
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(stream, "JPEG")
    try:
        decode_jpegs([stream.getvalue()], 3, device)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # torchvision may be built without nvJPEG, or have dropped its decoders
        raise DataError(
            f"torchvision does not decode JPEG on {device.type} here: {_one_line(error)}; {_WAY_OUT}"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
