"""Encoding of a whole data set by a trained model, in any number of processes.

Rows are computed in fixed batches, each on one thread, so that every bit is the same whoever computes it: one process
or many, with few threads or many, at once or after a kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset, Split
from gen_dist.data.sources.source import SPLITS, SplitName
from gen_dist.errors import ConfigError, DataError, UserError
from gen_dist.files import file_lock, write_atomically
from gen_dist.inference.latent_card import latent_card
from gen_dist.inference.latent_files import TEXT, Column, FileFormat, Rows, joined
from gen_dist.inference.latent_set import CARD, LOCK, LatentSet, Shard, statistics_of, sums_of, written_to
from gen_dist.inference.model import GenerativeModel, model_of, read_same_checkpoint
from gen_dist.kernels import Key, reparameterize_kl
from gen_dist.objectives.losses import squared_error
from gen_dist.objectives.phase import unit_interval
from gen_dist.parallel.collectives import agree, errors_shared, in_main
from gen_dist.parallel.processes import Processes, settings_kept, start_processes
from gen_dist.randomness import Stream
from gen_dist.records.checkpoint import Checkpoint, is_checkpoint
from gen_dist.records.run_data import open_run_data

_MOST_ROWS_AT_ONCE = 250
_PIXELS_AT_ONCE = 2**20
_MOST_NUMBERS_IN_ONE_FILE = 10**8
_MOST_NUMBERS_IN_A_SHARD = 2**28  # each process holds one shard and its bytes


def encode(
    run: Path,
    out: Path,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: SplitName | None = None,
    file_format: FileFormat = "parquet",
    shard_size: int = 2000,
    device: Literal["cpu", "cuda"] = "cpu",
    announce: Callable[[str], None] = print,
) -> Path:
    """Write the latents of all images of a data set into a directory; returns the directory. Call it in every process.

    A start in the directory of an interrupted one goes on; see `gen_dist.inference.latent_set`.

    Args:
        run: run directory, whose newest whole checkpoint encodes, or one checkpoint directory.
        out: directory to write: new, empty of the set's files, or of the same set.
        data: source of the images, as `--data` of a training; they are brought to the model's size and channels. None
            is the data of the run.
        data_root: directory with torchvision's data sets. None is that of the run.
        split: `train` or `test`. None is both.
        file_format: `parquet` or `safetensors` in shards, `npz` or `csv` in one file a split.
        shard_size: rows of a shard.
        device: where to compute.
        announce: takes a line before work that takes long, in the main process.

    Raises:
        ConfigError: an option is invalid, or the directory holds something else or cannot be written to.
        CheckpointError: there is no run or checkpoint, or a file of it or of the set is damaged.
        DataError: the images cannot be read, or have another shape than the model's.
        UserError: the model has no encoder, or gives latents that are not finite.
    """
    _check(file_format, shard_size, split)
    with settings_kept():
        processes = start_processes(TrainConfig(device=device))
        say = announce if processes.is_main else _silent
        agree(
            {"out": str(out), "split": split or "both", "format": file_format, "shard size": str(shard_size)}, processes
        )
        checkpoint, config = read_same_checkpoint(run, say, processes)
        model = model_of(checkpoint, config, processes.device)
        if not model.objective.encodes:
            raise UserError(f"a model of preset {config.preset} cannot encode: {config.objective.lacks['encoder']}")
        dataset = _open_data(run, model, data, data_root, say)
        splits = [split] if split else [one for one in SPLITS if len(getattr(dataset, one).labels)]
        _tell_missing_names(dataset, splits, say)
        wanted = _latent_set(run, out, model, checkpoint, dataset, splits, (file_format, shard_size), data)
        with _only_one(out, processes, say):
            _fill(wanted, model, dataset, processes, say)
    return out


def _check(file_format: str, shard_size: int, split: str | None) -> None:
    if file_format not in get_args(FileFormat):
        raise ConfigError(f"format {file_format!r} is not one of {', '.join(get_args(FileFormat))}")
    if split not in (None, *SPLITS):
        raise ConfigError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if shard_size < 1:
        raise ConfigError(f"shard size {shard_size} is less than 1")


def _open_data(
    run: Path, model: GenerativeModel, data: str | None, data_root: str | None, say: Callable[[str], None]
) -> Dataset:
    """Images of the run or of another source, in the model's shape."""
    config = model.config
    _, height, width = model.image_shape
    if data not in (None, config.data):
        side = height if height == width else config.packing.image_size
        config = replace(
            config, packing=replace(config.packing, image_size=side, channels=1 if model.image_shape[0] == 1 else 3)
        )
    dataset = open_run_data(run, config, say, digest=None, data=data, data_root=data_root)
    if dataset.image_shape != model.image_shape:
        shapes = [" x ".join(map(str, shape)) for shape in (dataset.image_shape, model.image_shape)]
        raise DataError(f"images of {data or config.data} are {shapes[0]}; the model of {run} takes {shapes[1]}")
    return dataset


def _tell_missing_names(dataset: Dataset, splits: list[SplitName], say: Callable[[str], None]) -> None:
    unnamed: list[Split] = [getattr(dataset, split) for split in splits if getattr(dataset, split).names is None]
    if unnamed:
        say(f"the {unnamed[0].name} has no names of files; the rows have numbers alone")


# ------------------------------------------------------------------------------------------------------------ the set


def _latent_set(
    run: Path,
    out: Path,
    model: GenerativeModel,
    checkpoint: Checkpoint,
    dataset: Dataset,
    splits: list[SplitName],
    files: tuple[FileFormat, int],
    data: str | None,
) -> LatentSet:
    named = all(getattr(dataset, split).names is not None for split in splits)
    columns = columns_of(model, named)
    rows = {split: len(getattr(dataset, split).labels) for split in splits}
    of_a_row = sum(column.size for column in columns)
    numbers = sum(rows.values()) * of_a_row
    file_format, shard_size = files
    if min(shard_size, max(rows.values())) * of_a_row > _MOST_NUMBERS_IN_A_SHARD:
        raise ConfigError(
            f"shard size {shard_size} is too large for memory, with {of_a_row:,} numbers an image; use --shard-size "
            f"{max(1, _MOST_NUMBERS_IN_A_SHARD // of_a_row)} or less"
        )
    if file_format in ("npz", "csv") and numbers > _MOST_NUMBERS_IN_ONE_FILE:
        raise ConfigError(
            f"format {file_format} is for small sets, and this one has {numbers:,} numbers; use --format parquet"
        )
    home = run.resolve().parent.parent if is_checkpoint(run) else run.resolve()
    made_of = {
        "weights": _digest(model),
        "data_digest": dataset.digest,
        "rows": rows,
        "columns": [column.name for column in columns],
        "format": file_format,
        "shard_size": shard_size,
        "rows_at_once": rows_at_once(model.image_shape),
        "device": model.device.type,
    }
    about = {
        "run": home.name,
        "step": checkpoint.step,
        "preset": model.config.preset,
        "data": data or model.config.data,
        "class_names": list(dataset.class_names),
    }
    return LatentSet(out, made_of, about, columns, rows, file_format, shard_size)


def columns_of(model: GenerativeModel, named: bool) -> list[Column]:
    """Columns of the latents of a model; `named` if the images have names."""
    shape = model.objective.latent_shape
    found = [
        Column("row", "int64", (), "place of the image in its split, from 0 on"),
        Column("label", "int64", (), "number of its class; 0 without classes"),
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
    meaning = "squared error of the reconstruction from mean, summed over pixels; intensities are 0..1"
    if not model.objective.gives_logvar:
        meaning = meaning.replace("mean", "latents", 1)
    return [*found, Column("squared_error", "float32", (), meaning)]


def rows_at_once(image_shape: tuple[int, int, int]) -> int:
    """Rows of one batch: a function of the image's shape alone, since the size of a batch may change the bits."""
    return max(1, min(_MOST_ROWS_AT_ONCE, _PIXELS_AT_ONCE // math.prod(image_shape)))


def _digest(model: GenerativeModel) -> str:
    """SHA-256 of the weights and of the config that builds the networks around them."""
    config = model.config
    digest = hashlib.sha256(json.dumps([config.objective.kind, config.network.kind, model.image_shape]).encode())
    for name, tensor in sorted(model.objective.networks.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        digest.update(array.view(-1).view(torch.uint8).numpy().data if array.numel() else b"")
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- the work


@contextlib.contextmanager
def _only_one(out: Path, processes: Processes, say: Callable[[str], None]) -> Iterator[None]:
    """Context manager in which no other start writes into the directory.

    Raises:
        ConfigError: another one does.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            with written_to(out):
                out.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(file_lock(out / LOCK, say))
            if not held:
                raise ConfigError(f"another process writes into {out}; wait for it, or choose another --out")

        in_main(lock, processes)
        yield


def _fill(
    wanted: LatentSet, model: GenerativeModel, dataset: Dataset, processes: Processes, say: Callable[[str], None]
) -> None:
    """Compute the shards that are missing, and complete the set."""

    def begin() -> list[Shard]:
        with written_to(wanted.path):
            return wanted.begin(say)

    pending = in_main(begin, processes)
    images = sum(wanted.rows.values())
    if there := images - sum(shard.last - shard.first for shard in pending):
        say(f"{there:,} of {images:,} images are encoded already")
    with errors_shared(processes):
        _compute(wanted, pending[processes.rank :: processes.world_size], model, dataset, processes)

    def complete() -> None:
        with written_to(wanted.path):
            manifest = wanted.complete(statistics_of)
            if not (wanted.path / CARD).exists():  # a card with a license in it stays
                write_atomically(wanted.path / CARD, latent_card(wanted, manifest, model))
            wanted.clear_up()

    in_main(complete, processes)


def _compute(
    wanted: LatentSet, shards: list[Shard], model: GenerativeModel, dataset: Dataset, processes: Processes
) -> None:
    rows = sum(shard.last - shard.first for shard in shards)
    workers = torch.get_num_threads() if model.device.type == "cpu" else 1
    step = rows_at_once(model.image_shape)
    hidden = not processes.is_main or None
    with (
        tqdm(total=rows, desc="encoding", unit=" images", leave=False, disable=hidden) as bar,
        _one_thread_each(workers) as pool,
    ):
        for shard in shards:
            split: Split = getattr(dataset, shard.split)
            firsts = range(shard.first, shard.last, step)
            batches = [pool.submit(_encoded, model, split, first, min(first + step, shard.last)) for first in firsts]
            parts = []
            for batch in batches:
                parts.append(batch.result())
                bar.update(len(parts[-1]["row"]))
            found = joined(parts)
            if split.names is not None:
                found["name"] = split.names[shard.first : shard.last]
            latents = found["mean"] if model.objective.gives_logvar else found["latents"]
            with written_to(wanted.path):
                wanted.write(shard.file, found, sums_of(latents, found.get("logvar")))


@contextlib.contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Context manager that yields a pool whose workers compute on one thread each: sums that several threads share are
    rounded in an order that depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _encoded(model: GenerativeModel, split: Split, first: int, last: int) -> Rows:
    """Rows of one batch, without names.

    Raises:
        UserError: latents are not finite.
    """
    images, labels = (torch.from_numpy(array[first:last]) for array in (split.images, split.labels))
    mean, logvar = model.encode(images)
    if not bool(torch.isfinite(mean).all()) or (logvar is not None and not bool(torch.isfinite(logvar).all())):
        raise UserError(
            f"the model's latents of images {first} to {last - 1} of the {split.name} are not finite: its training "
            "has diverged; name an earlier checkpoint, or train it again"
        )
    pixels = model.objective.pixels(model.decode(mean, labels if model.conditional else None))
    found: dict[str, Any] = {"row": np.arange(first, last), "label": split.labels[first:last].astype(np.int64)}
    if model.objective.codebook_size:
        with torch.no_grad():
            codes = model.objective.codes(images.to(model.device)).view(-1, *model.objective.latent_shape[1:] or (1,))
        found["codes"] = codes.int().cpu().numpy()
    if logvar is None:
        found["latents"] = _array(mean)
    else:
        key = Key(torch.zeros(2, dtype=torch.int64, device=mean.device), Stream.TEST_LATENTS, 0)
        kl_nats = reparameterize_kl(torch.cat([mean, logvar], dim=1), key, deterministic=True)[1]
        found |= {"mean": _array(mean), "logvar": _array(logvar), "kl_nats": _array(kl_nats)}
    return found | {"squared_error": _array(squared_error(pixels, unit_interval(images.to(model.device))))}


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as a float32 array in C order."""
    return np.ascontiguousarray(tensor.float().cpu().numpy())


def _silent(_line: str) -> None:
    pass
