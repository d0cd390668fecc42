"""Images per second and peak memory of `kl-f4-cifar10` against a plain loop on diffusers' modules.

Each trainer has a process of its own, on as many threads as ours, and takes the same batches in the same order, held in
memory, and the same noise for its latents. All start from our weights and first train the same steps. Their losses in
the first steps and the PSNR of test images after all of them have to be equal, or their speeds do not compare. Then
they take turns, a block of steps each. What differs is how they compute: see bench/README.md.
"""

import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.spread import spread, spread_of_ratios
from bench.measuring.temporary import temporary_directory
from bench.peers.autoencoder_trainers import EXACT_STEPS, Learned, block, learn, start
from bench.peers.compare import SETTLE_SECONDS
from gen_dist.cli import call_parsed, run_command
from gen_dist.config import TrainConfig
from gen_dist.data import open_dataset
from gen_dist.errors import ConfigError
from gen_dist.parallel.processes import threads_by_default
from gen_dist.presets import get_preset

PRESET = "kl-f4-cifar10"
OURS, LOOP = "ours", "loop"
Block = Mapping[str, Any]
"""Answer of `block`."""
Name = Literal["ours", "ours-compiled", "ours-checkpointing", "ours-torch-norm", "loop", "loop-checkpointing", "script"]


@dataclass(frozen=True)
class Row:
    """A trainer to measure."""

    label: str
    speed_bar: float | None = None
    """Least acceptable ratio of its images per second to the loop's."""
    memory_bar: float | None = None
    """Greatest acceptable ratio of its peak memory to the loop's."""


ROWS: dict[Name, Row] = {
    "ours": Row(PRESET, speed_bar=1.3, memory_bar=0.8),
    "ours-compiled": Row(f"{PRESET} --compile, after compiling", speed_bar=1.3),
    "ours-checkpointing": Row(f"{PRESET} with checkpointing", memory_bar=0.5),
    "ours-torch-norm": Row(f"{PRESET} with torch's norm and SiLU"),
    "loop": Row("the loop on diffusers' modules"),
    "loop-checkpointing": Row("the loop with checkpointing"),
    "script": Row("the loop, and what its script does in vain"),
}
LOSS_TOLERANCES = (1e-4, 1e-2, 1e-2)
"""Relative, and absolute below 1, of the losses of the first EXACT_STEPS steps. Adam's first updates have the size of
the rate, however small a gradient is, so rounding moves the weights of tiny gradients elsewhere."""
PSNR_TOLERANCE = 0.1
"""dB."""


def main(
    data: str = "synthetic",
    data_root: str = "data",
    trainers: tuple[Name, ...] = ("ours", "ours-checkpointing", "loop", "script"),
    adversarial: bool = False,
    learn_steps: int = 100,
    rounds: int = 9,
    steps: int = 3,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Check that all learn the same, measure them, print the figures and, as the last line, all of them in JSON.

    Args:
        data: images of 32 x 32 pixels and 3 channels: cifar10, parquet:DIR, synthetic, or any other source.
        data_root: directory with torchvision's data sets; a missing one is downloaded to there.
        trainers: what to measure: the loop always is.
        adversarial: with the discriminator and its term, from the first step on; else before they begin.
        learn_steps: steps after which reconstructions are compared.
        rounds: blocks of each.
        steps: steps of a block.
        seed: key of weights, images and noise.
        out: file for the JSON as well.
    """
    for name, value in {"rounds": rounds, "steps": steps, "learn_steps": learn_steps}.items():
        if value < 1:
            raise ConfigError(f"{name} {value} is less than 1")
    check_out(out)
    chosen: list[Name] = [name for name in ROWS if name in {*trainers, LOOP}]
    threads = threads_by_default(1)
    before = conditions() | {"threads": threads}
    with temporary_directory() as directory, contextlib.ExitStack() as stack:
        config = config_of(data, data_root, seed, str(directory), adversarial=adversarial)
        open_dataset(config.data, config.data_root, config.packing, lambda _line: None)  # packed once, here
        processes = {name: stack.enter_context(new_process()) for name in chosen}
        weights = directory / "weights.safetensors"
        for name in tqdm(chosen, desc="starting", leave=False):
            processes[name].submit(start, name, config, weights, threads).result()
        learned = {}
        for name in tqdm(chosen, desc="learning", leave=False):
            learned[name] = processes[name].submit(learn, learn_steps).result()
        print_learned(learned, learn_steps)
        refuse_differences(learned)
        blocks = take_turns(processes, first=learn_steps, steps=steps, rounds=rounds)
    figures = summarize(blocks, steps * config.global_batch_size)
    print_report(figures, adversarial=adversarial, threads=threads)
    facts = {"data": data, "adversarial": adversarial, "steps_of_a_block": steps, "learn_steps": learn_steps}
    learned_facts = {name: answer._asdict() for name, answer in learned.items()}
    text = {"figures": figures, "conditions": before, **facts, "learned": learned_facts, "blocks": blocks}
    print_and_write(json.dumps(text), out)


def config_of(data: str, data_root: str, seed: int, cache: str, *, adversarial: bool) -> TrainConfig:
    """The preset on a CPU."""
    config = replace(get_preset(PRESET), data=data, data_root=data_root, seed=seed, device="cpu", precision="float32")
    config = replace(config, packing=replace(config.packing, image_size=32, channels=3, cache_dir=cache))
    return config.with_options(adversarial_start=0) if adversarial else config


def new_process() -> ProcessPoolExecutor:
    """A fresh interpreter that runs one call after another."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def refuse_differences(learned: Mapping[Name, Learned]) -> None:
    """Exit unless losses and reconstructions are those of the loop, up to rounding."""
    reference = learned["loop"]
    for name, answer in learned.items():
        wrong = [f"PSNR {answer.psnr:.2f} dB, not {reference.psnr:.2f}"] * (
            not abs(answer.psnr - reference.psnr) <= PSNR_TOLERANCE
        )
        for step, (losses, expected) in enumerate(zip(answer.losses, reference.losses, strict=True)):
            tolerance = LOSS_TOLERANCES[step]
            common = losses.keys() & expected.keys() if name != "script" else ()  # its discriminator sees others
            for loss in sorted(common):
                if not abs(losses[loss] - expected[loss]) <= tolerance * max(abs(expected[loss]), 1.0):
                    wrong.append(f"{loss} {losses[loss]:.4f} at step {step}, not {expected[loss]:.4f}")
        if wrong:
            sys.exit(f"{ROWS[name].label} does not learn the same: {wrong[0]}; their speeds do not compare")


def take_turns(
    processes: Mapping[Name, ProcessPoolExecutor], *, first: int, steps: int, rounds: int
) -> dict[Name, list[Block]]:
    """Blocks of each trainer, one a round. Every other round is in the opposite order."""
    blocks: dict[Name, list[Block]] = {name: [] for name in processes}
    for turn in tqdm(range(rounds), desc="measuring", leave=False):
        for name in list(processes)[:: -1 if turn % 2 else 1]:
            time.sleep(SETTLE_SECONDS)
            blocks[name].append(processes[name].submit(block, first + turn * steps, steps).result())
    return blocks


def summarize(blocks: Mapping[Name, Sequence[Block]], images: int) -> dict[str, Any]:
    """Images per second, their ratio to the loop's by rounds, the ratio of the loop's processor time, and memory.

    Args:
        blocks: of each trainer, one a round.
        images: images of a block.
    """
    times = {name: [one["seconds"] for one in measured] for name, measured in blocks.items()}
    cpu_times = {name: [one["cpu_seconds"] for one in measured] for name, measured in blocks.items()}
    figures: dict[str, Any] = {}
    for name, measured in blocks.items():
        figures[name] = {
            "images_per_second": spread([images / value for value in times[name]]),
            "ratio": spread_of_ratios(times["loop"], times[name]),
            "cpu_ratio": spread_of_ratios(cpu_times["loop"], cpu_times[name]),
        }
        for kind in ("process", "training"):
            mine, loop = measured[-1][f"{kind}_mib"], blocks["loop"][-1][f"{kind}_mib"]
            figures[name] |= {f"{kind}_mib": mine, f"{kind}_ratio": mine / loop if mine and loop else None}
    return figures


def print_learned(learned: Mapping[Name, Learned], steps: int) -> None:
    """Print what each learned before the measurement."""
    print(f"{f'after {steps} steps':40}{'PSNR, dB':>10}{'first step, s':>15}  losses of step {EXACT_STEPS - 1}")
    for name, answer in learned.items():
        losses = ", ".join(f"{loss} {value:.5g}" for loss, value in answer.losses[-1].items())
        print(f"{ROWS[name].label:40}{answer.psnr:10.3f}{answer.first_step_seconds:15.1f}  {losses}")


def print_report(figures: Mapping[str, Any], *, adversarial: bool, threads: int) -> None:
    """Print the figures."""
    heads = ("images/s", "p20", "p80", "n", "to loop", "p20", "p80", "of CPU", "MiB", "to loop", "training", "to loop")
    state = "with the adversary" if adversarial else "before the adversary"
    print(f"\n{f'{state}, threads: {threads}':40}{''.join(f'{head:>9}' for head in heads)}  bars")
    for name, row in ROWS.items():
        if name not in figures:
            continue
        figure = figures[name]
        rate, ratio = figure["images_per_second"], figure["ratio"]
        cells = [f"{rate[key]:.2f}" for key in ("median", "p20", "p80")] + [str(rate["n"])]
        cells += [f"{ratio[key]:.2f}" for key in ("median", "p20", "p80")] + [f"{figure['cpu_ratio']['median']:.2f}"]
        for kind in ("process", "training"):
            cells += [_text(figure[f"{kind}_mib"], 0), _text(figure[f"{kind}_ratio"], 2)]
        bars = [f"speed >= {row.speed_bar}"] * bool(row.speed_bar) + [f"memory <= {row.memory_bar}"] * bool(
            row.memory_bar
        )
        print(f"{row.label:40}{''.join(f'{cell:>9}' for cell in cells)}  {', '.join(bars)}")


def _text(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    run_command(lambda: call_parsed(main, sys.argv[1:], "bench/peers/autoencoder_speed.py"))
