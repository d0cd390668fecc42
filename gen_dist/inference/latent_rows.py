"""Rows of a set of latents: their columns, one batch of them computed by a model, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.config.labels import LabelScheme
from gen_dist.data import Split
from gen_dist.data.forms import as_held
from gen_dist.errors import UserError
from gen_dist.inference.latent_files import TEXT, Column, Rows
from gen_dist.inference.model import GenerativeModel
from gen_dist.kernels import Key, reparameterize_kl
from gen_dist.objectives.evaluating import largest_tensor
from gen_dist.objectives.losses import squared_error
from gen_dist.objectives.phase import unit_interval
from gen_dist.randomness import Stream

_MOST_ROWS = 250
_MOST_NUMBERS = 2**20
_MOST_BYTES = 2**26
_MOST_BYTES_OF_ALL = 2**30


def columns_of(model: GenerativeModel, labels: LabelScheme, named: bool) -> list[Column]:
    """Columns of the latents of a model; `labels` are those of the images, `named` if the images have names."""
    shape = model.objective.latent_shape
    found = [
        Column("row", "int64", (), "place of the image in its split, from 0 on"),
        Column("label", labels.dtype, labels.shape, _meaning_of(labels)),
    ]
    if named:
        found.append(Column("name", TEXT, (), "its file in the source, or its row there"))
    if model.objective.gives_logvar:
        found += [
            Column("mean", "float32", shape, "mean of the posterior"),
            Column("logvar", "float32", shape, "logarithm of its variance: sigma = exp(logvar / 2)"),
            Column("kl_nats", "float32", (), "KL divergence of the posterior from N(0, I), nats, summed over latents"),
        ]
    else:
        if codes := model.objective.codebook_size:
            found.append(Column("codes", "int32", shape[1:] or (1,), f"code of each place, 0 to {codes - 1}"))
        found.append(Column("latents", "float32", shape, "output of the encoder, which decodes to the image"))
    range_of = "" if model.scale.is_plain else f", the range of {model.scale}"
    meaning = f"squared error of the reconstruction from mean, summed over pixels; intensities are 0..1{range_of}"
    if not model.objective.gives_logvar:
        meaning = meaning.replace("mean", "latents", 1)
    return [*found, Column("squared_error", "float32", (), meaning)]


def _meaning_of(labels: LabelScheme) -> str:
    return "number of its class; 0 without classes" if labels.kind == "classes" else labels.meaning


class RowsAtOnce(NamedTuple):
    """Size of the batches of a model."""

    rows: int
    """Rows of one batch: a function of the model alone, since the size of a batch may change the bits."""
    batches: int
    """Batches in memory at once, each on a thread of its own."""


def rows_at_once(model: GenerativeModel) -> RowsAtOnce:
    """Size of the batches of a model. One image is encoded and decoded to measure its memory.

    A batch holds about four tensors like its largest one, of 64 MiB or of one image, and all batches together about 4
    GiB.
    """
    image = torch.zeros(1, *model.image_shape, dtype=model.scale.torch_dtype)
    label = model.labels_in_turn(1) if model.conditional else None
    bytes_of_a_row = largest_tensor(lambda: model.decode(model.encode(image)[0], label))
    most = min(_MOST_ROWS, _MOST_NUMBERS // math.prod(model.image_shape), _MOST_BYTES // bytes_of_a_row)
    rows = max(1, most)
    return RowsAtOnce(rows, max(1, _MOST_BYTES_OF_ALL // (rows * bytes_of_a_row)))


def encoded_rows(model: GenerativeModel, split: Split, first: int, last: int) -> Rows:
    """Rows of one batch, without names.

    Raises:
        UserError: latents are not finite.
    """
    rows, *arrays = split.some_rows(first, last)
    images, labels = map(torch.from_numpy, arrays)
    mean, logvar = model.encode(images)
    if not bool(torch.isfinite(mean).all()) or (logvar is not None and not bool(torch.isfinite(logvar).all())):
        raise UserError(
            f"the model's latents of images {first} to {last - 1} of the {split.name} are not finite: its training "
            "has diverged; name an earlier checkpoint, or train it again"
        )
    decoded = as_held(model.scale.form, model.decode(mean, labels if model.conditional else None))
    pixels = model.objective.pixels(decoded)
    seen = model.scale.for_model(images.to(model.device))
    found: dict[str, Any] = {"row": rows, "label": np.array(arrays[1])}
    if model.objective.codebook_size:
        with torch.no_grad():
            codes = model.objective.codes(seen).view(-1, *model.objective.latent_shape[1:] or (1,))
        found["codes"] = codes.int().cpu().numpy()
    if logvar is None:
        found["latents"] = _array(mean)
    else:
        key = Key(torch.zeros(2, dtype=torch.int64, device=mean.device), Stream.TEST_LATENTS, 0)
        kl_nats = reparameterize_kl(torch.cat([mean, logvar], dim=1), key, deterministic=True)[1]
        found |= {"mean": _array(mean), "logvar": _array(logvar), "kl_nats": _array(kl_nats)}
    return found | {"squared_error": _array(squared_error(pixels, unit_interval(seen)))}


def sums_of(latents: np.ndarray[Any, Any], logvar: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    """Sums of latents float32 [n, C, ...] over all but the channels: `count`, `sum`, and `squares` of latents drawn.

    With a log-variance, the mean square of a draw is mean^2 + exp(logvar).
    """
    axes = tuple(axis for axis in range(latents.ndim) if axis != 1)
    wide = latents.astype(np.float64)
    squares = wide * wide
    if logvar is not None:
        squares += np.exp(logvar.astype(np.float64))
    return {
        "count": latents.size // latents.shape[1],
        "sum": wide.sum(axes).tolist(),
        "squares": squares.sum(axes).tolist(),
    }


@np.errstate(all="ignore")  # sums of an edited record may overflow
def statistics_of(sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each channel of the latents drawn, and the factor that scales them all to 1.

    `scaling_factor` is 1 / (standard deviation over all latents), as in Rombach et al. 2022, appendix G.
    """
    mean, squares = _moments(sums)
    deviation = deviation_of(sums)
    return {
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(squares - mean * mean, 0.0)).tolist(),
        "scaling_factor": 1.0 / deviation if deviation > 0.0 else None,
    }


@np.errstate(all="ignore")
def deviation_of(sums: Sequence[Mapping[str, Any]]) -> float:
    """Standard deviation of all entries of the latents drawn, over all channels; NaN if one is not finite."""
    mean, squares = _moments(sums)
    center = float(mean.mean())
    variance = float(squares.mean()) - center * center  # Python's ** raises an error for a result beyond floats
    return math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan


def _moments(sums: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and mean square of each channel."""
    count = sum(one["count"] for one in sums)
    mean, squares = (np.sum([one[name] for one in sums], axis=0) / count for name in ("sum", "squares"))
    return mean, squares


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as a float32 array in C order."""
    return np.ascontiguousarray(tensor.float().cpu().numpy())
