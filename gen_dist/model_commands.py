"""The commands of `gen-dist` that use a trained model."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from gen_dist.config.checked import at_least
from gen_dist.errors import ConfigError, number_of
from gen_dist.startup import tell

if TYPE_CHECKING:
    from torch import Tensor

    from gen_dist.inference.model import GenerativeModel


def sample(
    run: tyro.conf.Positional[Path],
    /,
    count: int = 64,
    out: Path = Path("samples.png"),
    columns: int = 8,
    labels: tuple[str, ...] = (),
    seed: int = 0,
    truncation: float = 1.0,
    prior: Literal["normal", "fitted"] = "normal",
    device: Literal["cpu", "cuda"] = "cpu",
    checkpoint: Literal["newest", "best"] = "newest",
) -> None:
    """Draw new images from a trained model into one picture.

    Args:
        run: Run directory, or one checkpoint in it.
        count: Number of images.
        out: File to write: .png, .jpg or .webp.
        columns: Images a row.
        labels: Labels that a conditional model draws in turn: names or numbers of classes; for attributes and numbers
            a value of each with commas between, as yes,no or 31.5,2; `unknown` for a missing one. All classes, or
            labels as training images have them, if none is given.
        seed: Key of the latents. The same seed gives the same images.
        truncation: Distance of styles from their mean, as a fraction (network stylegan2): less gives better images that
            are more alike.
        prior: Distribution of the latents: standard normal, or the one that gen-dist fit-prior fitted.
        device: Where to compute.
        checkpoint: Checkpoint of a run directory; `best` is that of --keep-best.
    """
    from gen_dist.files import reason_of
    from gen_dist.inference.loading import load
    from gen_dist.inference.model import label_tensor
    from gen_dist.pictures.grids import format_of, save_grid
    from gen_dist.pictures.plots import bar_of, tiles

    format_of(out)  # before anything that takes seconds
    if columns < 1:
        raise ConfigError(f"columns {columns} is less than 1")
    model = load(run, device=device, announce=tell, checkpoint=checkpoint)
    # A model that is not conditional refuses any label.
    rows = [model.labels.row_of(label) if model.conditional else model.labels.in_turn(1)[0] for label in labels]
    asked = label_tensor(model.labels, [rows[place % len(rows)] for place in range(count)]) if rows else None
    images = model.sample(count, asked, seed, truncation=truncation, prior=prior)
    try:
        save_grid(out, tiles(images.cpu().numpy(), model.scale), columns, bar=bar_of(model.scale))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {reason_of(error)}") from None
    print(out)


def export(
    run: tyro.conf.Positional[Path],
    /,
    format: Literal["safetensors", "onnx", "torch-export", "diffusers"],
    out: Path | None = None,
    parts: tuple[Literal["decoder", "encoder"], ...] = (),
    truncation: float = 1.0,
    data: str | None = None,
    data_root: str | None = None,
    checkpoint: Literal["newest", "best"] = "newest",
) -> None:
    """Write the decoder or generator of a trained model, and its encoder, for other programs to use.

    Args:
        run: Run directory, or one checkpoint in it.
        format: Plain weights (safetensors), whole programs for any number of images (onnx, torch-export), or a
            directory that AutoencoderKL or VQModel of diffusers loads, with the scale of latents (diffusers).
        out: Directory to write. If not given, export-FORMAT in the run directory.
        parts: Parts to write. All that the model has if none is named.
        truncation: Distance of styles from their mean in an exported program, as a fraction (network stylegan2).
        data: For diffusers, the training data under their present place, if they have moved since the run.
        data_root: For diffusers, the directory with the torchvision data sets, if it has moved since the run.
        checkpoint: Checkpoint of a run directory; `best` is that of --keep-best.
    """
    from gen_dist.inference.export import export as write_export

    where = partial(write_export, data=data, data_root=data_root, checkpoint=checkpoint)
    print(where(run, format, out, parts, tell, truncation=truncation))


def encode(
    run: tyro.conf.Positional[Path],
    /,
    out: Path,
    data: str | None = None,
    data_root: str | None = None,
    split: Literal["train", "test"] | None = None,
    format: Literal["parquet", "safetensors", "npz", "csv"] = "parquet",
    shard_size: int = 2000,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Write the latents of all images of a data set, each with its reconstruction error and KL. Started again, it
    goes on.

    Args:
        run: Run directory, or one checkpoint in it.
        out: Directory to write.
        data: Source of the images, such as folder:holiday/. The run's own data if not given.
        data_root: Directory with the torchvision data sets, if it is not the run's.
        split: Split to encode. Both if not given.
        format: Shards (parquet, safetensors), or one file a split for small sets (npz, csv).
        shard_size: Images of a shard.
        device: Where to compute.
    """
    from gen_dist.inference import encoding

    options = {"data": data, "data_root": data_root, "split": split, "device": device, "shard_size": shard_size}
    path = encoding.encode(run, out, file_format=format, announce=tell, **options)  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":
        print(path)


def fit_prior(
    run: tyro.conf.Positional[Path],
    /,
    components: int = 50,
    data: str | None = None,
    data_root: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    checkpoint: Literal["newest", "best"] = "newest",
) -> None:
    """Fit a mixture of Gaussians to the latents of the training images, for sample --prior fitted and evaluate.

    It stands in the run directory and belongs to the weights of this checkpoint: after more training, fit it again.

    Args:
        run: Run directory, or one checkpoint in it.
        components: Gaussians of the mixture.
        data: The data under their present place, such as folder:/new/place, if they have moved since the run.
        data_root: Directory with the torchvision data sets, if it has moved since the run.
        device: Where to encode.
        checkpoint: Checkpoint of a run directory; `best` is that of --keep-best.
    """
    from gen_dist.inference import prior_fitting

    places = {"data": data, "data_root": data_root, "device": device, "checkpoint": checkpoint}
    print(prior_fitting.fit_prior(run, components, announce=tell, **places))  # type: ignore[arg-type]


def walk(
    run: tyro.conf.Positional[Path],
    /,
    out: Path = Path("walk.webp"),
    count: int = 16,
    columns: int = 4,
    stops: int = 6,
    frames: int = 20,
    fps: float = 20.0,
    labels: tuple[str, ...] = (),
    walk_labels: bool = False,
    seed: int = 0,
    truncation: float = 1.0,
    prior: Literal["normal", "fitted"] = "normal",
    device: Literal["cpu", "cuda"] = "cpu",
    checkpoint: Literal["newest", "best"] = "newest",
) -> None:
    """Animate a walk through a trained model's latents that ends where it begins.

    Args:
        run: Run directory, one checkpoint in it, or an export in safetensors.
        out: File to write: .webp, or .mp4 where the package av is installed.
        count: Images at once, each on a walk of its own.
        columns: Images a row.
        stops: Latents that each walk passes, by great circles.
        frames: Frames from one of them to the next.
        fps: Frames a second.
        labels: Labels of a conditional model, as of gen-dist sample. Images hold them in turn.
        walk_labels: All images pass from label to label instead, with the latents.
        seed: Key of the latents. The same seed gives the same walk.
        truncation: Distance of styles from their mean, as a fraction (network stylegan2).
        prior: Distribution of the latents: standard normal, or the one that gen-dist fit-prior fitted.
        device: Where to compute.
        checkpoint: Checkpoint of a run directory; `best` is that of --keep-best.
    """
    from tqdm import tqdm

    from gen_dist.files import reason_of
    from gen_dist.inference.loading import load
    from gen_dist.inference.walking import Walk, frames_of
    from gen_dist.pictures.animation import check_animation, save_animation
    from gen_dist.pictures.grids import grid
    from gen_dist.pictures.plots import tiles

    check_animation(out)  # before anything that takes seconds
    refuse_unwritable(out)
    for name, value in {"count": count, "columns": columns, "frames": frames}.items():
        at_least(name, value, 1)
    at_least("stops", stops, 2)
    if not 0.1 <= fps <= 1000:
        raise ConfigError(f"fps {fps:g} is not in 0.1..1000")
    model = load(run, device=device, announce=tell, checkpoint=checkpoint)
    rows = [model.labels.row_of(label) if model.conditional else model.labels.in_turn(1)[0] for label in labels]
    asked = Walk(count, stops, frames, seed, truncation, prior)
    decoded = frames_of(model, asked, rows, walk_labels=walk_labels)
    shown = tqdm(decoded, total=asked.frames, desc="walking", unit="frame", leave=False, disable=None)
    drawn = [grid(tiles(images.cpu().numpy(), model.scale), columns) for images in shown]
    try:
        save_animation(out, drawn, fps)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {reason_of(error)}") from None
    print(out)


def invert(
    run: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path = Path("inverted.npz"),
    labels: tuple[str, ...] = (),
    steps: int = 500,
    rate: float = 0.05,
    space: Literal["auto", "latents", "styles"] = "auto",
    perceptual_weight: float | None = None,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    checkpoint: Literal["newest", "best"] = "newest",
) -> None:
    """Find latents from which a trained model draws given images, by gradient descent.

    Writes the latents, and a picture of the originals, what is drawn of them, and the difference.

    Args:
        run: Run directory, one checkpoint in it, or an export in safetensors.
        images: Image files. They are brought to the size of the model's.
        out: File of the latents, .npz; the picture has its name with .png.
        labels: Label of each image, of a conditional model; a single one is that of all.
        steps: Steps of the descent.
        rate: Highest rate of the descent.
        space: Latents, or styles of network stylegan2; `auto` takes styles where there are any.
        perceptual_weight: Weight of the perceptual distance beside the squared error of pixels. None is 1 where the
            extra `perceptual` is installed.
        seed: Key of the latents that the descent starts from.
        device: Where to compute.
        checkpoint: Checkpoint of a run directory; `best` is that of --keep-best.
    """
    from gen_dist.inference.inverting import invert as find
    from gen_dist.inference.inverting import read_images
    from gen_dist.inference.loading import load
    from gen_dist.inference.model import label_tensor

    if out.suffix.lower() != ".npz":
        raise ConfigError(f"{out} cannot be written: latents are an .npz file; name it {out.stem}.npz")
    if not images:
        raise ConfigError("invert needs images, as in gen-dist invert runs/dcgan-mnist seven.png")
    picture = out.with_suffix(".png")
    for file in (out, picture):
        refuse_unwritable(file)
    if picture.resolve() in [image.resolve() for image in images]:
        raise ConfigError(f"{picture}, the picture of {out}, is one of the images; name another --out")
    if os.path.lexists(picture) and not os.path.lexists(out):  # with its latents it is of an earlier call
        raise ConfigError(
            f"{picture}, the picture of {out}, is there without it, and is not overwritten; name another --out"
        )
    model = load(run, device=device, announce=tell, checkpoint=checkpoint)
    originals = read_images(model, images)
    if labels and len(labels) not in (1, len(images)):
        raise ConfigError(
            f"{number_of(len(labels), 'label')} for {number_of(len(images), 'image')}; give one for each, or one "
            "for all"
        )
    rows = [model.labels.row_of(label) if model.conditional else model.labels.in_turn(1)[0] for label in labels]
    asked = label_tensor(model.labels, rows * (len(images) // len(rows))) if rows else None
    found = find(
        *(model, originals, asked),
        steps=steps,
        rate=rate,
        space=space,
        perceptual_weight=perceptual_weight,
        seed=seed,
        announce=tell,
    )
    arrays = {"latents": found.latents, "errors": found.errors, "images": found.images, "originals": originals}
    _write_inverted(out, model, arrays | ({} if asked is None else {"labels": asked}), found.space)
    for file, error in zip(images, found.errors.tolist(), strict=True):
        print(f"{file}: mean squared error {error:.5f}")
    print(out, picture, sep="\n")


def refuse_unwritable(out: Path) -> None:
    """Raise ConfigError before minutes of work if a file cannot be written after it."""
    from gen_dist.files import reason_of, refuse_pipes

    if not out.parent.is_dir():
        raise ConfigError(
            f"{out} cannot be written: there is no directory {out.parent}; make it, or name another --out"
        )
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{out} cannot be written: this user may not write in {out.parent}; name another --out")
    try:
        refuse_pipes(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {reason_of(error)}; name another --out") from None


def _write_inverted(out: Path, model: GenerativeModel, arrays: dict[str, Tensor], space: str) -> None:
    """Write arrays, and the picture of originals, images and their difference, one image a row."""
    import io

    import numpy as np

    from gen_dist.files import reason_of, write_atomically
    from gen_dist.pictures.grids import save_strips
    from gen_dist.pictures.plots import bar_of, tiles
    from gen_dist.reports.pairs import visible_difference

    kept: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    originals, images = (tiles(kept[name], model.scale) for name in ("originals", "images"))
    difference, factor = visible_difference(originals, images)
    three = np.stack([originals, images, difference], axis=1).reshape(-1, *originals.shape[1:])
    title = f"original, projection, difference{f' ({factor} times)' if factor > 1 else ''}"
    buffer = io.BytesIO()
    np.savez(buffer, space=np.array(space), **kept)
    try:
        write_atomically(out, buffer.getvalue())
        save_strips(out.with_suffix(".png"), three, 3, title=title, bar=bar_of(model.scale))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {reason_of(error)}") from None
