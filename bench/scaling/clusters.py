"""Forecast of training on up to 1,024 GPUs: `python bench/scaling/clusters.py --help`. Nothing of it is measured there.

The step of one GPU is a measured one, of bench/README.md. `kl-f8` has none: it is taken to reach half of the H100's
peak, more than any measured step here, so that sending shows as much as it can. When a bucket of gradients may be sent
is the share of a CPU's step from there to the end of the backward pass. The network is `cost_model.Cluster`.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.temporary import temporary_directory
from bench.scaling.cost_model import Bucket, Cluster, exposed_seconds
from bench.scaling.overlap import bucket_leads
from gen_dist.cli import run_command
from gen_dist.config import LatentAutoencoderConfig
from gen_dist.data import open_dataset
from gen_dist.parallel.processes import start_processes
from gen_dist.presets import get_preset
from gen_dist.training.device_peak import vendor_peak
from gen_dist.training.machine_use import flops_per_image
from gen_dist.training.trainer import Trainer

WORKERS = (8, 16, 64, 256, 1024)
STEPS = 5
"""Steps of a CPU, a whole round of all phases."""
ENOUGH = 0.9
"""Data parallelism is said to pay where each GPU keeps this share of its images per second."""


@dataclass(frozen=True)
class Device:
    """A step of one GPU in bf16 with CUDA graphs."""

    rows: int
    images_per_second: float | None
    """From the table of bench/README.md, of an H200. None: at half of an H100's peak."""


DEVICES = {"dcgan-64": Device(64, 31_436), "sngan-cifar10": Device(64, 14_309), "kl-f8": Device(8, None)}


@dataclass(frozen=True)
class Profile:
    """A preset's step on a CPU."""

    buckets: dict[str, list[Bucket]]
    """Buckets by phase, their leads as shares of the step's time."""
    per_step: dict[str, float]
    flops_per_image: float
    """Operations of a step, the mean over the steps of a round."""


def main(cpu_rows: int = 4, out: Path | None = None) -> None:
    """Print the table and, as the last line, all figures in JSON.

    Args:
        cpu_rows: images of the steps that a CPU takes.
        out: file for the JSON as well.
    """
    check_out(out)
    before = conditions()
    cluster, found = Cluster(), {}
    peak = vendor_peak("H100 SXM", torch.bfloat16)
    assert peak is not None
    for preset, device in DEVICES.items():
        profile = profile_of(preset, cpu_rows)
        rate = device.images_per_second or peak / 2 / profile.flops_per_image
        found[preset] = {"images_per_second": rate, "rows": device.rows} | forecast(
            profile, device.rows / rate, device.rows, cluster
        )
    print_table(found)
    print_and_write(json.dumps({"conditions": before, "cluster": asdict(cluster), "presets": found}), out)


def profile_of(preset: str, rows: int) -> Profile:
    """Measure a preset's step on a CPU, on coloured shapes. Adversaries that begin later have not begun."""
    config = get_preset(preset)
    side = 64 if preset == "kl-f8" else int(config.packing.image_size or 32)
    if isinstance(config.objective, LatentAutoencoderConfig):
        config = replace(config, objective=replace(config.objective, perceptual_weight=0.0))
    packing = replace(config.packing, synthetic_images=64, channels=3, image_size=side)
    config = replace(config, data="synthetic", packing=packing, global_batch_size=rows, device="cpu")
    with temporary_directory() as cache:
        config = replace(config, packing=replace(packing, cache_dir=str(cache)))
        dataset = open_dataset(config.data, config.data_root, config.packing)
        trainer = Trainer(config, dataset, start_processes(config))
        try:
            trainer.run_step(0)
            leads, seconds = bucket_leads(trainer, STEPS, STEPS)
            kinds = flops_per_image(trainer)
            due = [tuple(trainer.due_at(step).items()) for step in range(STEPS, 2 * STEPS)]
        finally:
            trainer.close()
    pixels = (256 / side) ** 2 if preset == "kl-f8" else 1.0  # convolutions are in proportion to pixels
    return Profile(
        {name: [Bucket(one.bytes, one.lead_seconds / seconds) for one in buckets] for name, buckets in leads.items()},
        {name: sum(name in dict(one) for one in due) / STEPS for name in leads},
        pixels * sum(kinds[one] for one in due) / STEPS,
    )


def forecast(profile: Profile, step_seconds: float, rows: int, cluster: Cluster) -> dict[str, Any]:
    """Share of one GPU's images per second that each of many keeps, and images for ENOUGH of it, by number of GPUs."""

    def share(workers: int, images: float) -> float:
        alone = step_seconds * images / rows
        sent = sum(
            profile.per_step[name]
            * exposed_seconds(
                [Bucket(one.bytes, one.lead_seconds * alone) for one in buckets],
                lambda count: cluster.all_reduce_seconds(count, workers),
            )
            for name, buckets in profile.buckets.items()
        )
        return alone / (alone + sent)

    return {
        "step_seconds": step_seconds,
        "bytes": {name: [one.bytes for one in buckets] for name, buckets in profile.buckets.items()},
        "share": {workers: share(workers, rows) for workers in WORKERS},
        "least_rows": {workers: least_rows(functools.partial(share, workers)) for workers in WORKERS},
    }


def least_rows(share: Callable[[int], float]) -> int:
    """Least number of images of a GPU with which it keeps ENOUGH of its images per second."""
    too_few, enough = 0, 1
    while share(enough) < ENOUGH:
        too_few, enough = enough, 2 * enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if share(middle) >= ENOUGH else (middle, enough)
    return enough


def print_table(found: dict[str, Any]) -> None:
    """Print a row for each preset, in Markdown."""
    heads = " | ".join(f"{workers:,} GPUs" for workers in WORKERS)
    print(f"| preset, images of a GPU | its step, ms | gradients, MB | {heads} |\n|---|---|---|{'---|' * len(WORKERS)}")
    for preset, figures in found.items():
        size = sum(sum(of_phase) for of_phase in figures["bytes"].values()) / 1e6
        cells = [f"{share:.0%}; {figures['least_rows'][workers]}" for workers, share in figures["share"].items()]
        name = f"`{preset}`, {figures['rows']}"
        print(f"| {name} | {1e3 * figures['step_seconds']:.2f} | {size:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_command(lambda: tyro.cli(main))
