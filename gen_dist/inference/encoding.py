"""Encoding of a whole data set by a trained model, in any number of processes.

Rows are computed in fixed batches, each on one thread, so that every bit is the same whoever computes it: one process
or many, with few threads or many, at once or after a kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from tqdm import tqdm

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset, Split
from gen_dist.data.forms import written
from gen_dist.data.sources.source import SPLITS, SplitName
from gen_dist.errors import ConfigError, DataError, UserError, agreeing, number_of, shortened
from gen_dist.files import file_lock, write_atomically
from gen_dist.inference.latent_card import latent_card
from gen_dist.inference.latent_files import FileFormat, joined
from gen_dist.inference.latent_rows import RowsAtOnce, columns_of, encoded_rows, rows_at_once, statistics_of, sums_of
from gen_dist.inference.latent_set import CARD, LOCK, LatentSet, Shard, manifest_at, written_to
from gen_dist.inference.loading import model_of, read_same_checkpoint
from gen_dist.inference.model import GenerativeModel
from gen_dist.parallel.collectives import agree, errors_shared, from_main, in_main
from gen_dist.parallel.processes import Processes, settings_kept, start_processes
from gen_dist.records.checkpoint import Checkpoint, is_checkpoint
from gen_dist.records.run_data import open_run_data

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
        data: source of the images, as `--data` of a training; they are brought to the model's size and channels by the
            run's `fit`, or cropped if that is none. None is the data of the run.
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
        batch = RowsAtOnce(*from_main(rows_at_once(model), processes))
        sizes = file_format, shard_size, batch.rows
        named = _takes_names(out, dataset, splits, say)
        wanted = _latent_set(run, out, model, checkpoint, dataset, splits, sizes, data, named)
        with _only_one(out, processes, say):
            _fill(wanted, model, dataset, batch, processes, say)
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
    if data is not None and data != config.data and (form := model.scale.form) != "images":
        packing = replace(config.packing, label_columns=(), array_of=form)
        config = replace(config, packing=packing)
    elif data is not None and data != config.data:
        packing = config.packing
        of_images: Mapping[int, Literal[1, 3]] = {} if packing.pages == "channels" else {1: 1, 3: 3}
        if data.startswith("shards:"):  # whose pages need no options
            missing = packing.missing_labels if model.conditional else "unknown"
            packing = replace(packing, missing_labels=missing, layout=None, pages=None)
        # Labels of other data need not be there.
        if not (model.conditional and data.startswith(("parquet:", "shards:"))):
            packing = replace(packing, label_columns=())
        packing = replace(
            packing,
            test_shards=None,
            array_of=None,
            image_size=f"{width}x{height}",
            fit="crop" if packing.fit == "none" else packing.fit,
            channels=of_images.get(model.image_shape[0]),
            dtype="uint8" if model.scale.dtype == "uint8" else packing.dtype,  # deeper files are reduced
            packed_as=packing.packed_as if data.startswith(("folder:", "parquet:")) else "raw",
            decoded_on="cpu",  # a GPU resizes nothing
        )
        config = replace(config, packing=packing)
    dataset = open_run_data(run, config, say, digest=None, data=data, data_root=data_root)
    if (dataset.image_shape, dataset.scale.form) != (model.image_shape, model.scale.form):
        is_of, takes = (written(one.scale.form, one.image_shape) for one in (dataset, model))
        raise DataError(f"images of {data or config.data} are {is_of}; the model of {run} takes {takes}")
    if model.conditional and not model.labels.takes(dataset.labels):
        raise DataError(
            f"labels of {data or config.data} are not those of the model of {run}, which decodes images by their "
            f"label: {shortened(dataset.labels.meaning)}, not {shortened(model.labels.meaning)}; encode data with these"
        )
    if (found := dataset.scale.dtype) != model.scale.dtype:
        raise DataError(
            f"images of {data or config.data} have {found} values; the model of {run} takes {model.scale}: convert them"
        )
    return dataset


def _tell_missing_names(dataset: Dataset, splits: list[SplitName], say: Callable[[str], None]) -> None:
    unnamed: list[Split] = [getattr(dataset, split) for split in splits if getattr(dataset, split).names is None]
    if unnamed:
        say(f"the {unnamed[0].name} has no names of files; the rows have numbers alone")


def _takes_names(out: Path, dataset: Dataset, splits: list[SplitName], say: Callable[[str], None]) -> bool:
    """True if the set has names of images. One that was begun without them, by an old version, goes on without."""
    if not all(getattr(dataset, split).names is not None for split in splits):
        return False
    begun = manifest_at(out)
    if begun is None or "name" in begun["made_of"].get("columns", ["name"]):
        return True
    say(f"{out} was begun without names of images, and goes on without; choose another --out for them")
    return False


# ------------------------------------------------------------------------------------------------------------ the set


def _latent_set(
    run: Path,
    out: Path,
    model: GenerativeModel,
    checkpoint: Checkpoint,
    dataset: Dataset,
    splits: list[SplitName],
    sizes: tuple[FileFormat, int, int],
    data: str | None,
    named: bool,
) -> LatentSet:
    columns = columns_of(model, dataset.labels, named)
    rows = {split: len(getattr(dataset, split).labels) for split in splits}
    of_a_row = sum(column.size for column in columns)
    numbers = sum(rows.values()) * of_a_row
    file_format, shard_size, rows_at_once = sizes
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
        "rows_at_once": rows_at_once,
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
    wanted: LatentSet,
    model: GenerativeModel,
    dataset: Dataset,
    batch: RowsAtOnce,
    processes: Processes,
    say: Callable[[str], None],
) -> None:
    """Compute the shards that are missing, and complete the set."""

    def begin() -> list[Shard]:
        with written_to(wanted.path):
            return wanted.begin(say)

    pending = in_main(begin, processes)
    images = sum(wanted.rows.values())
    if there := images - sum(shard.last - shard.first for shard in pending):
        say(f"{there:,} of {number_of(images, 'image')} {agreeing(there, 'are')} encoded already")
    with errors_shared(processes):
        _compute(wanted, pending[processes.rank :: processes.world_size], model, dataset, batch, processes)

    def complete() -> None:
        with written_to(wanted.path):
            manifest = wanted.complete(statistics_of)
            if not (wanted.path / CARD).exists():  # a card with a license in it stays
                write_atomically(wanted.path / CARD, latent_card(wanted, manifest, model))
            wanted.clear_up()

    in_main(complete, processes)


def _compute(
    wanted: LatentSet,
    shards: list[Shard],
    model: GenerativeModel,
    dataset: Dataset,
    batch: RowsAtOnce,
    processes: Processes,
) -> None:
    rows = sum(shard.last - shard.first for shard in shards)
    workers = min(torch.get_num_threads(), batch.batches) if model.device.type == "cpu" else 1
    hidden = not processes.is_main or None
    with (
        tqdm(total=rows, desc="encoding", unit=" images", leave=False, disable=hidden) as bar,
        _one_thread_each(workers) as pool,
    ):
        for shard in shards:
            split: Split = getattr(dataset, shard.split)
            firsts = range(shard.first, shard.last, batch.rows)
            ranges = [(first, min(first + batch.rows, shard.last)) for first in firsts]
            parts = []
            for encoded in [pool.submit(encoded_rows, model, split, first, last) for first, last in ranges]:
                parts.append(encoded.result())
                bar.update(len(parts[-1]["row"]))
            found = joined(parts)
            if split.names is not None and any(column.name == "name" for column in wanted.columns):
                found["name"] = [split.names[row] for row in found["row"].tolist()]
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


def _silent(_line: str) -> None:
    pass
