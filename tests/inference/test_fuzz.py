"""Damaged files of diffusers, of another run that a run starts from, and of latents: read, or one line.

`make test` tries some, the slow tests as many as fit into their minutes (GEN_DIST_FUZZ_MINUTES). A failure names its
seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from gen_dist.config import DataConfig, LatentAutoencoderConfig, TrainConfig
from gen_dist.errors import UserError
from gen_dist.inference import diffusers_format
from gen_dist.inference.export import export
from gen_dist.inference.fitted_prior import prior_bytes, read_fitted_prior, weights_digest
from gen_dist.inference.latent_files import Column, Rows
from gen_dist.inference.latent_rows import statistics_of, sums_of
from gen_dist.inference.latent_set import LatentSet
from gen_dist.inference.loading import load
from gen_dist.inference.prior_fitting import fit_prior, fitted
from gen_dist.networks.diffusers_layout import diffusers_config, to_diffusers
from gen_dist.objectives import Objective, build_objective
from gen_dist.records.reading import read_config, write_object
from gen_dist.records.run_paths import RunPaths
from gen_dist.training.run import train
from gen_dist.training.starting_weights import take_starting_weights
from tests.records.test_run_mark import OLD_RUN
from tests.support.diffusers_classes import SMALL
from tests.support.fuzzing import MINUTES, for_minutes, strange_json, tried, write_sums
from tests.support.runs import small_config

Fuzzed = tuple[dict[str, bytes], Callable[[str, bytes], None]]
"""Files by name, and all that reads them with one of them damaged."""
_SHAPE = (1, 16, 16)


def _chance(content: bytes) -> random.Random:
    return random.Random(hashlib.sha256(content).digest())


def _start(config: TrainConfig, objective: Objective) -> None:
    try:
        take_starting_weights([objective], config)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 900, error


# Directories of diffusers


def directory_of_diffusers(path: Path) -> Fuzzed:
    """The directories of a continuous and of a quantized autoencoder, and the start of a training from them."""
    files: dict[str, bytes] = {}
    starts = {}
    for bottleneck in ("kl", "vq"):
        base = dataclasses.replace(small_config("vae"), packing=DataConfig(image_size=16), network=SMALL)
        kind = LatentAutoencoderConfig(bottleneck=bottleneck, codebook_size=8)
        config = dataclasses.replace(base, objective=kind, start_from=f"diffusers:{path / bottleneck}")
        objective = build_objective(config, _SHAPE, 10)
        starts[bottleneck] = config, objective
        fields = diffusers_config(SMALL, _SHAPE, 1.0, objective.codebook_size)
        weights = {name: objective.networks[name].state_dict() for name in ("encoder", "decoder")}
        files[f"{bottleneck}/config.json"] = json.dumps(fields, indent=2).encode()
        files[f"{bottleneck}/{diffusers_format.WEIGHTS}"] = safetensors.torch.save(to_diffusers(weights))
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)

    def read(name: str, content: bytes) -> None:
        chance = _chance(content)
        if name.endswith("json") and chance.random() < 0.7:
            content = strange_json(files[name], chance)
        elif chance.random() < 0.5:
            content = _strange_header(files[name], chance)
        (path / name).write_bytes(content)
        try:
            _start(*starts[name.split("/")[0]])
        finally:
            (path / name).write_bytes(files[name])

    return files, read


def _strange_header(content: bytes, chance: random.Random) -> bytes:
    """A file of safetensors with one other value in its header."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = strange_json(b"{\n" + content[9:end], chance)
    return len(header).to_bytes(8, "little") + header + content[end:]


# A run that another one starts from


def run_to_start_from(path: Path) -> Fuzzed:
    """Files of a run, and the start of a training from its weights."""
    run = path / "run"
    shutil.copytree(OLD_RUN, run)
    files = {entry.relative_to(run).as_posix(): entry.read_bytes() for entry in run.rglob("*") if entry.is_file()}
    config = dataclasses.replace(read_config(RunPaths(run).config), start_from=str(run))
    objective = build_objective(config, (1, 28, 28), 10)

    def read(name: str, content: bytes) -> None:
        chance = _chance(content)
        if name.endswith("json") and chance.random() < 0.5:
            content = strange_json(files[name], chance)
        (run / name).write_bytes(content)
        checkpoint = (run / name).parent
        sums = checkpoint / "SHA256SUMS"
        if checkpoint != run and name != sums.relative_to(run).as_posix() and chance.random() < 0.7:
            write_sums(checkpoint)
        try:
            _start(config, objective)
        finally:
            (run / name).write_bytes(files[name])
            if checkpoint != run:
                sums.write_bytes(files[sums.relative_to(run).as_posix()])

    return files, read


# Exports


def exported_run(path: Path) -> Fuzzed:
    """Files of an export in safetensors with a fitted prior, and all that loads them. The card lists the digests of the
    damaged files in half of the tries."""
    config = small_config("vae", steps=2, checkpoint_every=2, data="mnist5k", run_dir=str(path / "run"))
    train(config, say=_unheard)
    fit_prior(path / "run", 3, announce=_unheard)
    out = export(path / "run", "safetensors", path / "out", announce=_unheard)
    files = {entry.name: entry.read_bytes() for entry in out.iterdir()}

    def read(name: str, content: bytes) -> None:
        chance = _chance(content)
        if name.endswith("json") and chance.random() < 0.5:
            content = strange_json(files[name], chance)
        elif name.endswith("safetensors") and chance.random() < 0.5:
            content = _strange_header(files[name], chance)
        (out / name).write_bytes(content)
        if name != "README.md" and chance.random() < 0.5:
            was, now = (hashlib.sha256(one).hexdigest() for one in (files[name], content))
            (out / "README.md").write_text(files["README.md"].decode().replace(was, now))
        try:
            for prior in ("standard", "fitted"):
                load(out, announce=_unheard).sample(2, prior=prior)  # type: ignore[arg-type]
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 900, error
        finally:
            for other in {name, "README.md"}:
                (out / other).write_bytes(files[other])

    return files, read


def prior_of_a_run(path: Path) -> Fuzzed:
    """The fitted prior of a run, alone: read, or one line. Its digest is made anew in half of the tries."""
    latents = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    content = prior_bytes(fitted(latents, 2, {"step": "1", "weights": "none", "images": "300", "components": "2"}, 0))

    def read(name: str, damaged: bytes) -> None:
        if _chance(damaged).random() < 0.5:
            damaged = _strange_header(content, _chance(damaged))
        else:
            with contextlib.suppress(Exception):  # whatever makes them no tensors any more
                damaged = _with_digest(damaged)
        (path / name).write_bytes(damaged)
        try:
            drawn = read_fitted_prior(path / name, None, "again").sample(3, 0)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 900, error
        else:
            assert drawn.shape[0] == 3

    return {"prior.safetensors": content}, read


def _with_digest(content: bytes) -> bytes:
    """A prior whose digest is that of its tensors, whatever they are."""
    tensors = safetensors.torch.load(content)
    facts = {"step": "1", "weights": "none", "images": "300", "components": "2", "format": "1"}
    return safetensors.torch.save(tensors, {"facts": json.dumps(facts | {"sha256": weights_digest(tensors)})})


def _unheard(_line: str) -> None:
    pass


# Sets of latents that a start completes


def interrupted_set(path: Path) -> Fuzzed:
    """Files of interrupted sets of latents, and the start that completes them. Records fit the damage in some tries."""
    columns = [Column("row", "int64", (), ""), Column("name", "text", (), ""), Column("latents", "float32", (2,), "")]
    about = {"run": "a", "step": 1, "preset": "a", "data": "a", "class_names": ["a"]}
    numbers = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    rows: Rows = {"row": np.arange(8), "name": [f"{place}.png" for place in range(8)], "latents": numbers}
    sets, files = {}, {}

    def fill(one: LatentSet) -> None:
        for shard in one.begin(lambda _line: None):
            part = {name: values[shard.first : shard.last] for name, values in rows.items()}
            one.write(shard.file, part, sums_of(part["latents"], None))

    for form in ("parquet", "npz"):
        one = LatentSet(path / form, {"weights": "a"}, about, columns, {"train": 8}, form, 3)
        sets[form] = one
        fill(one)
        for file in (path / form).iterdir():
            files[f"{form}/{file.name}"] = file.read_bytes()

    def read(name: str, content: bytes) -> None:
        chance, one = _chance(content), sets[name.split("/")[0]]
        if name.endswith("json"):
            if chance.random() < 0.7:
                content = strange_json(files[name], chance)
            (path / name).write_bytes(content)
            if chance.random() < 0.5:
                _seal_again(path / name)
        else:
            (path / name).write_bytes(content)
        try:
            fill(one)
            one.complete(statistics_of)
            one.clear_up()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 900, error
        finally:
            shutil.rmtree(one.path)
            one.path.mkdir()
            for other, whole in files.items():
                if (path / other).parent == one.path:
                    (path / other).write_bytes(whole)

    return files, read


def _seal_again(file: Path) -> None:
    try:
        fields: Any = json.loads(file.read_bytes())
        write_object(file, {name: value for name, value in fields.items() if name != "sha256"})
    except (ValueError, AttributeError, RecursionError):
        pass


READERS = {
    "directories of diffusers": directory_of_diffusers,
    "a run to start from": run_to_start_from,
    "interrupted sets of latents": interrupted_set,
    "exports": exported_run,
    "fitted priors": prior_of_a_run,
}


FOUND = {"directories of diffusers": (477514461871,), "interrupted sets of latents": (22, 257, 123316866886)}
"""Seeds that once found a fault."""


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_one_line(reader: str, tmp_path: Path) -> None:
    files, read = READERS[reader](tmp_path)
    seeds = [*range(20), *FOUND.get(reader, ())]
    assert tried(files, read, iter(seeds)) == len(seeds)


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
@pytest.mark.parametrize("reader", READERS)
def test_readers_are_fuzzed_for_minutes(reader: str, tmp_path: Path) -> None:
    for_minutes(reader, *READERS[reader](tmp_path))
