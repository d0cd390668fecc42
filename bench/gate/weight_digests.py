"""SHA-256 of what every preset has learned after a few steps: `python bench/gate/weight_digests.py --help`.

A change that claims to leave the arithmetic alone leaves these digests alone. Run it before and after, on one machine
with one version of torch and one number of threads, and compare the lines.
"""

import contextlib
import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.temporary import temporary_directory
from gen_dist.cli import call_parsed, run_command
from gen_dist.config import LatentAutoencoderConfig, TrainConfig
from gen_dist.errors import UserError
from gen_dist.presets import get_preset, presets
from gen_dist.training.run import train

LEFT_OUT = {"r3gan-cifar10-paper", "few-images-64"}
"""Presets of many minutes on a CPU, and those that need the extra `perceptual`."""


def main(names: tyro.conf.Positional[tuple[str, ...]] = (), /, steps: int = 30, batch_size: int = 16) -> None:
    """Train each preset on small synthetic images on the CPU, eager, and print a digest of its checkpoint's tensors.

    Args:
        names: Names of presets. All of them if none is named, but `LEFT_OUT` and those of images larger than 64 x 64.
        steps: Optimizer steps.
        batch_size: Images per step.
    """
    small = [name for name, one in presets().items() if max(one.config.packing.size or (0,)) <= 64]
    for name in names or [name for name in small if name not in LEFT_OUT]:
        print(f"{digest_of(get_preset(name), steps, batch_size)}  {name}", flush=True)


def digest_of(config: TrainConfig, steps: int, batch_size: int) -> str:
    """SHA-256 of weights, averaged weights and optimizer state after a short run on synthetic images."""
    packing = replace(
        config.packing,
        synthetic_images=256,
        image_size=config.packing.image_size or 32,
        channels=3 if config.data == "cifar10" else 1,
    )
    with temporary_directory("gen_dist-digest-") as directory, open(os.devnull, "w") as nowhere:
        if isinstance(config.objective, LatentAutoencoderConfig):  # whose discriminator may begin later
            config = replace(config, objective=replace(config.objective, adversarial_start=0))
        small = replace(
            config,
            data="synthetic",
            packing=packing,
            steps=steps,
            global_batch_size=batch_size,
            device="cpu",
            run_dir=str(directory),
            sample_every=steps,
            evaluate_every=steps,
            checkpoint_every=steps,
            wandb="disabled",
        )
        with contextlib.redirect_stderr(nowhere):  # the progress bar
            train(small, say=lambda _line: None)
        return _digest(directory / "checkpoints" / f"step_{steps:08d}")


def _digest(checkpoint: Path) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes of all tensors of a checkpoint, in the order of their names."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise UserError(f"the run ended before its last step: it has no {checkpoint.name}")
    digest = hashlib.sha256()
    for file in files:
        for name, tensor in sorted(safetensors.torch.load_file(file).items()):
            digest.update(f"{file.stem} {name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    run_command(lambda: call_parsed(main, sys.argv[1:], "bench/gate/weight_digests.py"))
