"""The trainers that autoencoder_speed.py measures, each alone in a process, and what such a process is asked to do."""

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.measuring.measured import PeakMemory
from bench.peers.autoencoder_loop import AutoencoderLoop
from bench.peers.turnstile import peak_memory_mib
from gen_dist.config import AutoencoderKlConfig, LatentAutoencoderConfig, TrainConfig
from gen_dist.data import Dataset, TrainBatches, open_dataset
from gen_dist.evaluation.metrics.psnr import peak_signal_to_noise
from gen_dist.kernels import Key, normal
from gen_dist.networks import autoencoder_kl
from gen_dist.networks.diffusers_layout import to_diffusers
from gen_dist.objectives.adversarial import signed_unit
from gen_dist.parallel.processes import start_processes
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer

EXACT_STEPS = 3
"""First steps of which losses are compared."""
TEST_IMAGES, TESTED_AT_ONCE = 512, 32


class Learned(NamedTuple):
    """Answer of `learn`."""

    losses: list[dict[str, float]]
    """Losses of the first EXACT_STEPS steps, by the names of our logs."""
    psnr: float
    """dB of the test images' reconstructions, mean. They are by the averaged weights: the newest ones go up and down by
    half a dB from step to step."""
    first_step_seconds: float
    """Time of the first step, which compiles if the trainer does."""


class AutoencoderTrainer(Protocol):
    """One of the trainers."""

    dataset: Dataset

    def step(self, step: int) -> dict[str, float]:
        """Take the step of this number. Returns losses, by the names of our logs."""
        ...

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions -1..1 of images uint8 [B, C, H, W] by the averaged weights, without noise."""
        ...

    def close(self) -> None:
        """Give up the data."""
        ...


class Ours:
    """The trainer of gen_dist."""

    def __init__(self, config: TrainConfig, *, checkpointing: bool = False, compiled: bool = False) -> None:
        assert isinstance(config.network, AutoencoderKlConfig)
        network = replace(config.network, checkpointing=checkpointing)
        config = replace(config, network=network, compile=compiled)
        processes = start_processes(config)
        self.dataset = open_dataset(config.data, config.data_root, config.packing, lambda _line: None)
        self.trainer = Trainer(config, self.dataset, processes)

    def write_weights(self, file: Path) -> None:
        """Write the weights of both networks as the loop takes them."""
        networks = self.trainer.objective.networks
        autoencoder = to_diffusers({name: networks[name].state_dict() for name in ("encoder", "decoder")})
        patches = enumerate(networks["discriminator"].parameters())
        numbered = {f"discriminator.{index:02}": value.detach().contiguous() for index, value in patches}
        save_file({f"autoencoder.{name}": value for name, value in autoencoder.items()} | numbered, file)

    def step(self, step: int) -> dict[str, float]:
        """See AutoencoderTrainer."""
        return {name: float(value.mean()) for name, value in self.trainer.run_step(step).items()}

    def reconstruct(self, images: Tensor) -> Tensor:
        """See AutoencoderTrainer."""
        objective = self.trainer.averaged
        assert objective is not None
        with torch.no_grad():
            return objective.decode(objective.encode(images)[0])

    def close(self) -> None:
        """See AutoencoderTrainer."""
        self.trainer.close()


class Loop:
    """The loop on diffusers' modules. It takes the same images and noise, and begins with the same weights."""

    def __init__(
        self, config: TrainConfig, weights: Path, *, checkpointing: bool = False, wasteful: bool = False
    ) -> None:
        assert isinstance(config.network, AutoencoderKlConfig) and isinstance(config.objective, LatentAutoencoderConfig)
        self.dataset = open_dataset(config.data, config.data_root, config.packing, lambda _line: None)
        shape, size = self.dataset.image_shape, config.global_batch_size
        self._latents = size, config.network.latent_shape(shape)
        self._seed, self._start = config.seed, config.objective.adversarial_start
        self._batches = TrainBatches(
            self.dataset.train,
            seed=config.seed,
            global_batch_size=size,
            micro_batches=[(0, size)],
            device=torch.device("cpu"),
            resident_budget_bytes=config.packing.resident_budget_mib * 2**20,
        )
        self.loop = AutoencoderLoop(config, shape, checkpointing=checkpointing, wasteful=wasteful)
        tensors = load_file(weights)
        autoencoder = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("a")}
        self.loop.load(autoencoder, [tensors[name] for name in sorted(tensors) if name.startswith("d")])

    def step(self, step: int) -> dict[str, float]:
        """See AutoencoderTrainer."""
        images = signed_unit(self._batches.micro_batch(step, 0)[0])
        key, (count, shape) = Key(torch.tensor([self._seed, step]), Stream.LATENTS, 0), self._latents
        noise = normal(key, count, math.prod(shape)).view(count, *shape)
        return self.loop.step(images, noise, adversarial=step >= self._start)

    def reconstruct(self, images: Tensor) -> Tensor:
        """See AutoencoderTrainer."""
        return self.loop.reconstruct(signed_unit(images))

    def close(self) -> None:
        """See AutoencoderTrainer."""
        self._batches.close()


def start(name: str, config: TrainConfig, weights: Path, threads: int) -> None:
    """Make this process a trainer's: one of ours, which writes its initial weights, or a loop that begins with them.

    A step on one image comes before all, so that the libraries are in memory, which no trainer can help. It compiles
    nothing: a second size of batch would make the compiler's shapes dynamic. Its cache is empty unless
    TORCHINDUCTOR_CACHE_DIR names one.
    """
    global _trainer, _memory
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(weights.parent / "inductor"))
    torch.set_num_threads(threads)
    if name == "ours-torch-norm":
        vars(autoencoder_kl)["group_norm_silu"] = torch_group_norm_silu
    warm = _make(name.removesuffix("-compiled"), replace(config, global_batch_size=1), weights)
    warm.step(0)
    warm.close()
    del warm
    _memory = PeakMemory(torch.device("cpu"))
    _trainer = _make(name, config, weights)


def torch_group_norm_silu(maps: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group normalization and SiLU by torch's two operations."""
    return F.silu(F.group_norm(maps, norm.num_groups, norm.weight, norm.bias, norm.eps))


def _make(name: str, config: TrainConfig, weights: Path) -> AutoencoderTrainer:
    checkpointing = name.endswith("checkpointing")
    if not name.startswith("ours"):
        return Loop(config, weights, checkpointing=checkpointing, wasteful=name == "script")
    ours = Ours(config, checkpointing=checkpointing, compiled=name.endswith("compiled"))
    if not weights.exists():
        ours.write_weights(weights)
    return ours


def learn(steps: int) -> Learned:
    """Train this process's trainer from its first step on."""
    start = time.perf_counter()
    losses = [_trainer.step(0)]
    first_step_seconds = time.perf_counter() - start
    losses += [_trainer.step(step) for step in range(1, steps)]
    images = torch.from_numpy(_trainer.dataset.test.images[:TEST_IMAGES].copy())
    found = []
    for some in images.split(TESTED_AT_ONCE):
        pixels = (_trainer.reconstruct(some) * 127.5 + 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
        found.append(peak_signal_to_noise(pixels, some))
    return Learned(losses[:EXACT_STEPS], float(torch.cat(found).mean()), first_step_seconds)


def block(first: int, steps: int) -> dict[str, float | None]:
    """Train this process's trainer for some steps, from number `first` on.

    Returns:
        `seconds` of the block, and those of the processor over all threads, `cpu_seconds`; and the peak memory in MiB
        since the start, `process_mib` of the whole process and `training_mib` above what it had, libraries and all,
        before it made networks. None is unknown.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    for step in range(first, first + steps):
        _trainer.step(step)
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
    peak = _memory.peak_bytes()
    return {**times, "process_mib": peak_memory_mib(), "training_mib": peak and round(peak / 2**20, 1)}


_trainer: AutoencoderTrainer
_memory: PeakMemory
