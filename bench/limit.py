"""A step's arithmetic alone, the share that it is of the step, and where the rest goes: `python bench/limit.py PRESET`.

One step of a preset is recorded: every matrix product and convolution in it, forward and backward, with the tensors it
took. These alone, one after another on the same memory, each by the fastest way that this project knows for it, are the
limit: no loop on these nets is faster without other arithmetic. Limit and whole steps take turns; ratios are of blocks
that follow each other. Gradients that the step does not compute, as those of the images, are not in the limit either.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.conditions import conditions
from bench.out_file import check_out, print_and_write
from bench.spread import spread
from bench.temporary import temporary_directory
from gen_dist import parallel
from gen_dist.cli import call_parsed, run_command
from gen_dist.config import TrainConfig
from gen_dist.data import open_dataset
from gen_dist.errors import ConfigError
from gen_dist.presets import get_preset
from gen_dist.trainer import Trainer
from kernels import pixel_by_pixel
from kernels.convolution import double, weight_gradient
from kernels.linear import onednn_linear

WARMUP_STEPS = 17
"""Noise is drawn for step 0, then for sixteen steps at once: blocks begin and end where such rounds do."""
BLOCK_STEPS = 16
BLOCK_SECONDS = 0.15
"""A block is as many times sixteen steps as take so long, at least."""
TRIALS = 25
"""Of each way to compute a product, before the fastest is chosen."""
PROFILED_STEPS = 64
LARGEST_SHOWN = 12

Way = Callable[[], object]

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
_ARITHMETIC = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "mkldnn::_linear_pointwise",
    "aten::convolution",
    "aten::convolution_backward",
    # Their copies of patches are a part of convolutions here.
    "_Halving",
    "_Doubling",
    "_HalvingBackward",
    "_DoublingBackward",
)
"""What the profiler calls matrix products and convolutions; all that they call in turn belongs to them."""
_LOSSES = ("_CrossEntropy", "_CrossEntropyBackward")
_DRAWS = (
    "kernels.latent.normal",
    "gen_dist.objectives.vae.binarize",
    "gen_dist.objectives.adversarial.normal",
    "gen_dist.augmentation.normal",
)
"""Functions that draw, under the names by which the step calls them."""
KINDS = ("products", "loss", "noise", "other operations", "Python between")


@dataclass
class Product:
    """A matrix product, or a convolution or one of its gradients, on the memory that it had in the step."""

    name: str
    """What it is and its sizes."""
    flops: int
    """Floating-point operations: a multiplication and an addition count as two."""
    ways: dict[str, Way]
    """Functions that compute it, by name; not all in the same layout of memory."""
    chosen: str = ""
    """The fastest way, once `choose` has measured them."""


class Limit:
    """The products of a round of steps, as often as they come."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[Product]]], images: int, device: torch.device) -> None:
        """Take products of single steps, each with the number of such steps in a round, and the images of a step."""
        self.groups = groups
        self.images = images
        self._device = device
        self.round_steps = sum(count for count, _ in groups)
        self._choose()
        self._round = [
            product.ways[product.chosen] for count, products in groups for _ in range(count) for product in products
        ]

    @property
    def flops(self) -> float:
        """Of the mean step."""
        return sum(count * product.flops for count, products in self.groups for product in products) / self.round_steps

    def seconds(self, steps: int) -> float:
        """Wall time of so many steps, a multiple of `round_steps`."""
        assert steps % self.round_steps == 0
        _wait(self._device)
        start = time.perf_counter()
        for _ in range(steps // self.round_steps):
            for way in self._round:
                way()
        _wait(self._device)
        return time.perf_counter() - start

    def times(self) -> list[tuple[Product, float, float]]:
        """Of each product: how often it comes in the mean step, and the seconds of one (20th percentile)."""
        pairs = [(count, product) for count, products in self.groups for product in products]
        times = self._quiet_seconds([product.chosen for _, product in pairs])
        return [
            (product, count / self.round_steps, seconds) for (count, product), seconds in zip(pairs, times, strict=True)
        ]

    def _choose(self) -> None:
        # In the order of the step, not each by itself: what came before has then emptied the caches as it does there.
        products = [product for _, group in self.groups for product in group]
        found: list[dict[str, float]] = [{} for _ in products]
        for index in range(max(len(product.ways) for product in products)):
            names = [list(product.ways)[index % len(product.ways)] for product in products]
            for measured, name, seconds in zip(found, names, self._quiet_seconds(names), strict=True):
                measured[name] = min(seconds, measured.get(name, math.inf))
        for product, measured in zip(products, found, strict=True):
            product.chosen = min(measured, key=measured.__getitem__)

    def _quiet_seconds(self, names: Sequence[str]) -> list[float]:
        """Of each product, in the way that is named for it: the 20th percentile, for a limit has no noise of others."""
        products = [product for _, group in self.groups for product in group]
        ways = [product.ways[name] for product, name in zip(products, names, strict=True)]
        for each in ways:
            each()
        times = np.zeros((TRIALS, len(ways)))
        for trial in times:
            for index, each in enumerate(ways):
                _wait(self._device)
                start = time.perf_counter()
                each()
                _wait(self._device)
                trial[index] = time.perf_counter() - start
        low: list[float] = np.percentile(times, 20, axis=0).tolist()
        return low


@dataclass(frozen=True)
class Fraction:
    """Whole steps against their limit: images per second of each block, in turns."""

    step_images_per_second: list[float]
    limit_images_per_second: list[float]

    def figures(self) -> dict[str, dict[str, float]]:
        """20th, 50th and 80th percentile and number: of both, and of the step's share of the limit, round by round."""
        pairs = zip(self.step_images_per_second, self.limit_images_per_second, strict=True)
        return {
            "step": spread(self.step_images_per_second),
            "limit": spread(self.limit_images_per_second),
            "fraction": spread([step / limit for step, limit in pairs]),
        }


def main(
    presets: tyro.conf.Positional[tuple[str, ...]] = ("vae-mnist",),
    data: str | None = None,
    data_root: str = "data",
    batch_size: int | None = None,
    rounds: int = 20,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Measure presets one after another, print the figures and, as the last line, all of them in JSON.

    Args:
        presets: what to measure.
        data: source of images. None takes the preset's, and synthetic ones in place of a download.
        data_root: directory with torchvision's data sets.
        batch_size: images of a step. None takes the preset's.
        rounds: blocks of the limit and of whole steps, in turns.
        seed: key of weights, images and noise.
        out: file for the JSON as well.
    """
    if rounds < 1:
        raise ConfigError(f"rounds {rounds} is less than 1")
    if not presets:
        raise ConfigError("name at least one preset, such as vae-mnist")
    check_out(out)
    configs = [config_of(preset, data, data_root, batch_size, seed) for preset in presets]
    before = conditions()
    reports = {}
    for config in configs:
        with trainer_of(config) as trainer:
            limit = limit_of(trainer)
            fraction = fraction_of_limit(trainer, limit, rounds=rounds, show_progress=True)
            figures = fraction.figures()
            print_fraction(config, limit, figures)
            print_products(limit)
            where = None
            if trainer.processes.device.type == "cpu":
                where = step_by_kind(trainer)
                print_kinds(where, config.global_batch_size / figures["step"]["median"], limit_ms(limit, figures))
        reports[config.preset] = {
            "figures": figures,
            "gflop_of_a_step": limit.flops / 1e9,
            "batch_size": config.global_batch_size,
            "images_per_second": asdict(fraction),
            "where": where,
        }
    text = json.dumps({"presets": reports, "conditions": conditions() | {"load_average": before["load_average"]}})
    print_and_write(text, out)


def config_of(preset: str, data: str | None, data_root: str, batch_size: int | None, seed: int) -> TrainConfig:
    """A preset as it is measured: without compiling, and without a download."""
    config = replace(get_preset(preset), data_root=data_root, seed=seed, compile=False)
    if data is None and config.data != "mnist5k":
        colour = replace(config.packing, channels=3, image_size=config.packing.image_size or 32)
        config = replace(config, data="synthetic", packing=colour)
    elif data is not None:
        config = replace(config, data=data)
    return config if batch_size is None else replace(config, global_batch_size=batch_size)


@contextlib.contextmanager
def trainer_of(config: TrainConfig) -> Iterator[Trainer]:
    """The trainer of a config; its data are packed into a directory that is removed afterwards."""
    with temporary_directory() as cache:
        processes = parallel.start_processes(config)
        packing = replace(config.packing, cache_dir=config.packing.cache_dir or str(cache))
        dataset = open_dataset(config.data, config.data_root, packing, lambda _line: None)
        trainer = Trainer(config, dataset, processes)
        try:
            yield trainer
        finally:
            trainer.close()


def limit_of(trainer: Trainer) -> Limit:
    """The limit of a trainer's steps; a few of them are made for it.

    Raises:
        ConfigError: its phases are compiled, and their operations cannot be seen.
    """
    if trainer.config.compile:
        raise ConfigError(
            "a compiled step does not show its products; take the limit of the same one without --compile"
        )
    with plain_layers():
        groups = [(count, record(functools.partial(trainer.run_step, step))) for step, count in kinds_of_steps(trainer)]
    return Limit(groups, trainer.config.global_batch_size, trainer.processes.device)


def kinds_of_steps(trainer: Trainer) -> list[tuple[int, int]]:
    """One step of each kind, by which phases and penalties are due, and how many a round has of it."""
    phases = trainer.objective.phases().values()
    everys = [every for phase in phases for every in (phase.every, phase.penalty_every)]
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for step in range(math.lcm(*everys)):
        kinds.setdefault(tuple(step % every == 0 for every in everys), []).append(step)
    return [(steps[0], len(steps)) for steps in kinds.values()]


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Within it, layers compute as torch's do: their products and convolutions are then seen as what they are."""
    with (
        mock.patch("kernels.linear.onednn_is_faster", lambda: False),
        mock.patch("kernels.convolution.products_are_faster", lambda *_: False),
    ):
        yield


def record(action: Callable[[], object]) -> list[Product]:
    """The products that an action computes, in order. They keep the tensors that it took."""
    recorder = _Recorder()
    with recorder:
        action()
    return recorder.products


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        taken = [value.detach() if isinstance(value, Tensor) else value for value in args]  # the same memory
        if packet in _PRODUCTS:
            self.products.append(_matrix_product(*taken))
        elif packet == torch.ops.aten.convolution:
            self.products.append(_convolution(*taken))
        elif packet == torch.ops.aten.convolution_backward:
            self.products += _convolution_gradients(*taken)
        return func(*args, **(kwargs or {}))


def _matrix_product(*operands: Tensor) -> Product:
    """`mm`, `bmm` of two operands, or `addmm`, `baddbmm` of a bias and two."""
    left, right = operands[-2:]
    bias = operands[0] if len(operands) == 3 else None
    output = left.new_empty(*left.shape[:-1], right.shape[-1])
    is_matrix = left.ndim == 2
    if bias is None:
        multiply = functools.partial(torch.mm if is_matrix else torch.bmm, left, right, out=output)
    else:
        multiply = functools.partial(torch.addmm if is_matrix else torch.baddbmm, bias, left, right, out=output)
    ways: dict[str, Way] = {"torch": multiply}
    plain_bias = bias is None or bias.ndim == 1
    if is_matrix and left.device.type == "cpu" and left.dtype == torch.float32 and plain_bias and _has_onednn():
        ways["oneDNN"] = functools.partial(onednn_linear, left, right.t(), bias)
    sizes = (*left.shape, right.shape[-1])
    return Product(f"product {' x '.join(map(str, sizes))}", 2 * math.prod(sizes), ways)


def _has_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _convolution(maps: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Product:
    """Either kind of convolution, in both layouts of memory."""
    ways: dict[str, Way] = {}
    for layout, (maps_in, weight_in) in _layouts(maps, weight):
        ways[layout] = functools.partial(torch.ops.aten.convolution, maps_in, weight_in, bias, *geometry)
    if _doubles(weight, geometry):
        ways["kernels"] = lambda: double(maps, weight)
    return Product(_name("convolution", maps, weight, geometry), _flops(maps, weight, geometry), ways)


def _convolution_gradients(
    gradient: Tensor, maps: Tensor, weight: Tensor, _bias_sizes: Any, *rest: Any
) -> list[Product]:
    """Those of a convolution's gradients that its backward computes."""
    *geometry, (wants_maps, wants_weight, _) = rest
    products = []
    for wanted, part, mask in (
        (wants_maps, "input gradient", [True, False, False]),
        (wants_weight, "weight gradient", [False, True, False]),
    ):
        if not wanted:
            continue
        ways: dict[str, Way] = {}
        for layout, operands in _layouts(gradient, maps, weight):
            ways[layout] = functools.partial(torch.ops.aten.convolution_backward, *operands, None, *geometry, mask)
        if _doubles(weight, geometry):
            # The gradients of a transposed convolution are those of a convolution whose maps change places.
            if part == "weight gradient":
                ways["kernels"] = lambda: weight_gradient(gradient, maps, weight)
        elif _halves(maps, weight, geometry):
            if part == "input gradient":
                ways["kernels"] = lambda: double(gradient, weight)
            else:
                ways["kernels"] = lambda: weight_gradient(maps, gradient, weight)
        products.append(Product(_name(part, maps, weight, geometry), _flops(maps, weight, geometry), ways))
    return products


def _layouts(*tensors: Tensor) -> list[tuple[str, list[Tensor]]]:
    """The tensors in both layouts of memory; a layout that they have is the memory that they had in the step."""
    if any(tensor.ndim != 4 for tensor in tensors):
        return [("torch", list(tensors))]
    return [
        ("channels first", [tensor.contiguous() for tensor in tensors]),
        ("channels last", [pixel_by_pixel(tensor) for tensor in tensors]),
    ]


def _geometry(geometry: Sequence[Any]) -> tuple[bool, bool]:
    """Whether stride and padding are those of kernels/convolution.py, and whether the convolution is transposed."""
    stride, padding, dilation, transposed, output_padding, groups = geometry
    plain = (list(stride), list(padding), list(dilation), list(output_padding)) == ([2, 2], [1, 1], [1, 1], [0, 0])
    return plain and groups == 1, transposed


def _doubles(weight: Tensor, geometry: Sequence[Any]) -> bool:
    plain, transposed = _geometry(geometry)
    return plain and transposed and weight.shape[2:] == (4, 4) and weight.dtype == torch.float32


def _halves(maps: Tensor, weight: Tensor, geometry: Sequence[Any]) -> bool:
    plain, transposed = _geometry(geometry)
    even = not any(side % 2 for side in maps.shape[2:])
    return plain and not transposed and even and weight.shape[2:] == (4, 4) and weight.dtype == torch.float32


def _flops(maps: Tensor, weight: Tensor, geometry: Sequence[Any]) -> int:
    """Of a convolution or of either gradient: every weight meets every place that the kernel is put to."""
    stride, padding, dilation, transposed, *_ = geometry
    if transposed:  # the kernel is put to every pixel of the maps
        places = math.prod(maps.shape[2:])
    else:
        sides = zip(maps.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        places = math.prod((side + 2 * pad - reach * (size - 1) - 1) // by + 1 for side, size, by, pad, reach in sides)
    return 2 * maps.shape[0] * places * weight.numel()


def _name(part: str, maps: Tensor, weight: Tensor, geometry: Sequence[Any]) -> str:
    kind = "transposed " if geometry[3] else ""
    sizes = " x ".join(map(str, maps.shape))
    kernel = "x".join(map(str, weight.shape[2:]))
    return f"{kind}{part} {sizes}, {weight.shape[0]}:{weight.shape[1]} of {kernel}"


def fraction_of_limit(
    trainer: Trainer, limit: Limit | None = None, *, rounds: int = 10, show_progress: bool = False
) -> Fraction:
    """Whole steps of a trainer and its limit in turns, a block of each a round. The trainer goes on from step 0."""
    limit = limit or limit_of(trainer)
    device, batch = trainer.processes.device, trainer.config.global_batch_size
    done = 0

    def steps_seconds(count: int) -> float:
        nonlocal done
        _wait(device)
        start = time.perf_counter()
        for step in range(done, done + count):
            trainer.run_step(step)
        _wait(device)
        done += count
        return time.perf_counter() - start

    steps_seconds(WARMUP_STEPS)
    limit.seconds(limit.round_steps)
    smallest = math.lcm(BLOCK_STEPS, limit.round_steps)
    block = smallest * max(1, math.ceil(BLOCK_SECONDS / steps_seconds(smallest)))
    step_rates, limit_rates = [], []
    for turn in tqdm(range(rounds), desc=trainer.config.preset, disable=not show_progress, leave=False):
        for part in ("step", "limit") if turn % 2 else ("limit", "step"):  # neither always follows the other
            if part == "step":
                step_rates.append(block * batch / steps_seconds(block))
            else:
                limit_rates.append(block * batch / limit.seconds(block))
    return Fraction(step_rates, limit_rates)


def limit_ms(limit: Limit, figures: Mapping[str, Mapping[str, float]]) -> float:
    """Milliseconds of the limit of a step, in the median."""
    return 1000 * limit.images / figures["limit"]["median"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_by_kind(trainer: Trainer, first_step: int = 10_000) -> dict[str, Any]:
    """Where the time of a step goes on the CPU, from the profiler, which slows it: milliseconds of a step.

    Returns:
        `parts`: of each part of a step, in their order, the milliseconds of each of KINDS; `operations`: of the
        operations that take longest outside the products; `profiled_ms`: of the whole step under the profiler.
    """
    names: list[str] = []
    segment = contextlib.ExitStack()

    def enter() -> None:
        segment.enter_context(record_function(f"segment {len(names)}"))

    def lap(part: str) -> None:
        segment.close()
        names.append(part)
        enter()

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks of GPUs where there are none
    first_step -= first_step % math.lcm(BLOCK_STEPS, *(count for _, count in kinds_of_steps(trainer)))
    first_step += 1
    for step in range(first_step - WARMUP_STEPS, first_step):
        trainer.run_step(step)
    with marked_draws(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        enter()
        for step in range(first_step, first_step + PROFILED_STEPS):
            trainer.run_step(step, lap)
            lap("other")
        segment.close()
    milliseconds: dict[str, Counter[str]] = {name: Counter() for name in names}
    operations: Counter[str] = Counter()
    for event in profiler.events():
        line = [event]
        while line[-1].cpu_parent is not None:
            line.append(line[-1].cpu_parent)
        if not line[-1].name.startswith("segment "):
            continue  # other threads
        index = int(line[-1].name.removeprefix("segment "))
        if index == len(names):
            continue
        kind = _kind(event.name, [each.name for each in line])
        value = event.self_cpu_time_total / 1000 / PROFILED_STEPS
        milliseconds[names[index]][kind] += value
        if kind in ("loss", "other operations"):
            operations[event.name] += value
    parts = {name: {kind: found[kind] for kind in KINDS} for name, found in milliseconds.items()}
    return {
        "parts": parts,
        "operations": dict(operations.most_common(LARGEST_SHOWN)),
        "profiled_ms": sum(sum(found.values()) for found in parts.values()),
    }


def _kind(name: str, line: Sequence[str]) -> str:
    """Of KINDS, that of an event with its ancestors: those that are no operations are Python or autograd's engine."""
    if "noise" in line:
        return "noise"
    is_operation = "::" in name and not name.startswith("autograd::")
    if not is_operation:
        return "Python between"
    if any(each in _ARITHMETIC for each in line):
        return "products"
    return "loss" if any(each in _LOSSES for each in line) else "other operations"


@contextlib.contextmanager
def marked_draws() -> Iterator[None]:
    """Within it, the profiler sees which time goes to drawing noise."""

    def marked(draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function("noise"):
                return draw(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for place in _DRAWS:
            module, _, name = place.rpartition(".")
            stack.enter_context(mock.patch(place, marked(getattr(sys.modules[module], name))))
        yield


def print_fraction(config: TrainConfig, limit: Limit, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Step and limit for people."""
    size = config.global_batch_size
    print(f"\n{config.preset}, {size} images a step, {limit.flops / 1e9:.3f} GFLOP in its products")
    print(f"{'':28}{'p20':>10}{'median':>10}{'p80':>10}{'n':>5}{'ms a step':>12}{'GFLOP/s':>10}")
    for name in ("step", "limit"):
        figure = figures[name]
        values = "".join(f"{figure[key]:10,.0f}" for key in ("p20", "median", "p80"))
        seconds = size / figure["median"]
        print(
            f"{name + ', images/s':28}{values}{figure['n']:5}{1000 * seconds:12.3f}{limit.flops / seconds / 1e9:10.1f}"
        )
    share = figures["fraction"]
    values = "".join(f"{share[key]:10.3f}" for key in ("p20", "median", "p80"))
    print(f"{'fraction of the limit':28}{values}{share['n']:5}")


def print_products(limit: Limit) -> None:
    """The products of the limit, those that take longest first; equal ones together."""
    together: dict[tuple[str, str], tuple[float, float, int]] = {}
    for product, count, seconds in limit.times():
        key = product.name, product.chosen
        before = together.get(key, (0.0, 0.0, 0))
        together[key] = before[0] + count, before[1] + count * seconds, product.flops
    print(f"\n{'the limit is made of':60}{'a step':>8}{'ms':>9}{'GFLOP/s':>10}  by")
    ordered = sorted(together.items(), key=lambda item: -item[1][1])
    for (name, way), (count, seconds, flops) in ordered[:LARGEST_SHOWN]:
        print(f"{name:60}{count:8.3g}{1000 * seconds:9.3f}{count * flops / seconds / 1e9:10.1f}  {way}")
    if len(ordered) > LARGEST_SHOWN:
        rest = sum(seconds for _, (_, seconds, _) in ordered[LARGEST_SHOWN:])
        print(f"{f'{len(ordered) - LARGEST_SHOWN} more':68}{1000 * rest:9.3f}")


def print_kinds(where: Mapping[str, Any], step_seconds: float, products_ms: float) -> None:
    """Where the step's time goes, for people."""
    parts, profiled = where["parts"], where["profiled_ms"]
    print(f"\nwhere a step goes, ms, profiled ({profiled:.3f} ms; {1000 * step_seconds:.3f} ms without the profiler)")
    print(f"{'':28}{''.join(f'{kind:>18}' for kind in KINDS)}{'total':>10}")
    sums = {kind: sum(found[kind] for found in parts.values()) for kind in KINDS}
    for name, found in {**parts, "step": sums}.items():
        print(f"{name:28}{''.join(f'{found[kind]:18.3f}' for kind in KINDS)}{sum(found.values()):10.3f}")
    print(f"{'share':28}{''.join(f'{sums[kind] / profiled:18.1%}' for kind in KINDS)}")
    print(f"{'limit':28}{products_ms:18.3f}")
    print("\nlargest operations outside the products, ms a step")
    for name, value in where["operations"].items():
        print(f"{name:60}{value:8.3f}")


if __name__ == "__main__":
    run_command(lambda: call_parsed(main, sys.argv[1:], "bench/limit.py"))
