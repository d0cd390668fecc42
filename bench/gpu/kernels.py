"""Bytes, time and launches of the latent step, beside eager PyTorch's and Inductor's.

All take the same encoder output and give latents and KL divergence; the rivals draw with torch's generator. Outputs and
gradients are checked before anything is timed, and the contestants take turns. On a GPU the device's time counts: each
is recorded as a CUDA graph, because the host would take longer to launch it than the device to compute it.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from gen_dist.cli import run_command
from gen_dist.errors import ConfigError
from gen_dist.kernels import Key, reparameterize_kl
from gen_dist.kernels.latent import reparameterize_kl_operator, twin_backward, twin_forward

LatentStep = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Encoder output [B, 2C, ...] to latents [B, C, ...] and KL [B]."""

SHAPES = ((128, 40), (1024, 128), (256, 8, 32, 32))
LARGE_SHAPES = ((4096, 1024), (64, 32, 4, 64, 64))
"""Shapes of the encoder's output: twice as many channels as latents. The large ones are for GPUs."""
BYTES_SHAPE = (256, 2048)
FLUSHED_BYTES = 2**28
WARMUP = 10
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
NORMALS_TOLERANCE = 6.0
"""Standard errors within which the mean of the noise and of its square have to be: a chance of 2e-9."""


def main(device: Literal["auto", "cpu", "cuda"] = "auto", rounds: int = 50, large: bool = False) -> None:
    """Print the byte table, then the time of each contestant, forward and backward.

    Args:
        device: where to run. auto is the GPU if there is one.
        rounds: turns of each contestant.
        large: time the large shapes as well.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no GPU here; use --device cpu")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    before = conditions()
    torch._functorch.config.donated_buffer = False  # a backward pass is timed many times
    print(byte_table())
    bandwidth = copy_bandwidth(where)
    nothing = idle_seconds(where)
    print(f"\ncopying moves {bandwidth / 1e9:.1f} GB/s here; `of copy` is bytes moved / time, as a share of that;")
    print(f"what does next to nothing takes {nothing * 1e6:.1f} us, timed in the same way\n")
    print("| encoder output | dtype | pass | contestant | median us | p20 | p80 | launches | of copy |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES + (LARGE_SHAPES if large else ()):
        for name, dtype in DTYPES.items():
            for row in timed_rows(shape, name, dtype, where, rounds, bandwidth):
                print(row, flush=True)
    gpu = torch.cuda.get_device_name() if where.type == "cuda" else None
    print()
    print(json.dumps(before | {"gpu": gpu, "cuda": torch.version.cuda, "rounds": rounds}))


def plain(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The formula as everyone writes it, in float32, with torch's noise."""
    mean, logvar = parameters.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar)
    latents = mean + std * torch.randn_like(std)
    kl_nats = 0.5 * (mean * mean + std * std - 1.0 - logvar).flatten(1).sum(1)
    return latents.to(parameters.dtype), kl_nats


def contestants(rng: Tensor) -> dict[str, LatentStep]:
    """Ours and its rivals by name. On CPUs ours draws with NumPy, and the kernel's twin runs beside it."""
    torch._dynamo.reset()  # earlier shapes count towards its limit, beyond which it runs eagerly
    steps: dict[str, LatentStep] = {
        "eager": plain,
        "Inductor": torch.compile(plain, dynamic=False),
        "ours": lambda parameters: reparameterize_kl(parameters, Key(rng, 1, 0)),
    }
    if rng.device.type == "cpu":
        steps["the kernel's twin"] = lambda parameters: reparameterize_kl_operator(
            parameters, None, rng, 1, 0, 1, False
        )
    return steps


@dataclass(frozen=True)
class Passes:
    """Bytes that a forward and a backward pass move, or how long they take."""

    forward: float
    backward: float


def byte_table() -> str:
    """Bytes a latent element, forward / backward, counted from the tensors that operators and fused graphs touch."""
    rng = torch.tensor([0, 0])
    ours: LatentStep = lambda parameters: reparameterize_kl_operator(parameters, None, rng, 1, 0, 1, False)  # noqa: E731
    lines = ["| bytes a latent element, forward / backward | eager | Inductor, at least | fused |", "|---|---|---|---|"]
    for name, dtype in DTYPES.items():
        counted = (operator_bytes(plain, dtype), fused_graph_bytes(plain, dtype), operator_bytes(ours, dtype))
        cells = " | ".join(f"{count.forward:.0f} / {count.backward:.0f}" for count in counted)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def operator_bytes(step: LatentStep, dtype: torch.dtype) -> Passes:
    """Bytes of the inputs and outputs of every operator that runs, each of which is a pass over memory."""
    parameters = torch.randn(BYTES_SHAPE).to(dtype).requires_grad_()
    with _CountBytes() as forward:
        outputs = step(parameters)
    gradients = [torch.randn_like(output) for output in outputs]
    with _CountBytes() as backward:
        torch.autograd.grad(outputs, parameters, gradients)
    return _per_latent(forward.count, backward.count)


class _CountBytes(TorchDispatchMode):
    """Sums the bytes of what operators read and write; views move nothing, and constants fill no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        named = func.__qualname__ if hasattr(func, "__qualname__") else str(func)
        if not func.is_view and not named.startswith(("empty", "_unsafe_view", "detach")):
            self.count += _bytes_of((args, kwargs, outputs))
        return outputs


def fused_graph_bytes(step: LatentStep, dtype: torch.dtype) -> Passes:
    """Bytes of the inputs and outputs of the two graphs that torch.compile makes, as if each were one kernel."""
    counts: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def run(values: list[Any]) -> Any:
            outputs = graph(*values)
            counts.append(_bytes_of((values, outputs)))
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    parameters = torch.randn(BYTES_SHAPE).to(dtype).requires_grad_()
    torch._dynamo.reset()
    partition = functools.partial(
        torch._functorch.partitioners.min_cut_rematerialization_partition, compiler="inductor"
    )
    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition))
    outputs = compiled(parameters)
    torch.autograd.grad(outputs, parameters, [torch.randn_like(output) for output in outputs])
    torch._dynamo.reset()
    forward, backward = counts
    return _per_latent(forward, backward)


def _bytes_of(values: Any) -> int:
    """Bytes of all tensors among the values but those of a number a row; memory that several share counts once."""
    latents_or_more = (
        value for value in tree_leaves(values) if isinstance(value, Tensor) and value.numel() > BYTES_SHAPE[0]
    )
    sizes = {value.data_ptr(): min(value.nbytes, value.untyped_storage().nbytes()) for value in latents_or_more}
    return sum(sizes.values())


def _per_latent(forward: int, backward: int) -> Passes:
    latents = math.prod(BYTES_SHAPE) // 2
    return Passes(forward / latents, backward / latents)


def timed_rows(
    shape: tuple[int, ...], name: str, dtype: torch.dtype, device: torch.device, rounds: int, bandwidth: float
) -> Iterator[str]:
    """A row of the table for each contestant and pass."""
    parameters = torch.randn(shape, device=device).to(dtype).requires_grad_()
    rng = torch.tensor([0, 0], device=device)
    steps = contestants(rng)
    outputs = {}
    for contestant, step in steps.items():
        with on_stream_of_recordings(device):  # where backward then runs as well
            outputs[contestant] = step(parameters)
        check(contestant, outputs[contestant], parameters)
    check_ours(outputs["ours"], parameters, rng)
    latents, kl_nats = outputs["ours"]
    gradients = [torch.randn_like(latents), torch.randn_like(kl_nats)]
    forward: dict[str, Callable[[], Any]] = {
        contestant: functools.partial(step, parameters) for contestant, step in steps.items()
    }
    backward: dict[str, Callable[[], Any]] = {
        contestant: functools.partial(torch.autograd.grad, output, parameters, gradients, retain_graph=True)
        for contestant, output in outputs.items()
    }
    # Bytes that any implementation must move: encoder output, latents and sums; in backward their gradients as well.
    moved = {"forward": 1.5, "backward": 2.5}
    for label, calls in (("forward", forward), ("backward", backward)):
        times = in_turns(calls, device, rounds)
        for contestant, seconds in times.items():
            low, median, high = np.percentile(seconds, (20, 50, 80))
            share = moved[label] * parameters.numel() * parameters.element_size() / median / bandwidth
            launches = count_launches(calls[contestant], device) if device.type == "cuda" else None
            yield (
                f"| {' x '.join(map(str, shape))} | {name} | {label} | {contestant} | {median * 1e6:.1f} | "
                f"{low * 1e6:.1f} | {high * 1e6:.1f} | {'-' if launches is None else launches} | {share:.0%} |"
            )


def check(contestant: str, outputs: tuple[Tensor, Tensor], parameters: Tensor) -> None:
    """The divergence equals the formula in float64, and what was added to the mean is standard normal noise."""
    latents, kl_nats = (output.detach().double() for output in outputs)
    mean, logvar = parameters.detach().double().chunk(2, dim=1)
    expected = 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
    torch.testing.assert_close(kl_nats, expected, rtol=1e-5, atol=1e-4, msg=f"{contestant}: wrong KL divergence")
    # Rounding to half precision adds up to 2^-8 of a latent; it shows in no figure that is asked for here.
    noise = (latents - mean) * torch.exp(-0.5 * logvar)
    error = max(abs(noise.mean().item()), abs((noise**2).mean().item() - 1.0) / math.sqrt(2.0)) * math.sqrt(
        noise.numel()
    )
    rounding = 0.02 * math.sqrt(noise.numel()) if latents.numel() and outputs[0].dtype != torch.float32 else 0.0
    assert error < NORMALS_TOLERANCE + rounding, f"{contestant}: the noise is not standard normal"


def check_ours(outputs: tuple[Tensor, Tensor], parameters: Tensor, rng: Tensor) -> None:
    """On a GPU the kernel's outputs and gradient equal those of its twin in float64."""
    if parameters.device.type == "cpu":
        return
    wide = parameters.detach().double()
    arguments = (None, rng, 1, 0, 1, False)
    relative, absolute = (2e-6, 4e-6) if parameters.dtype == torch.float32 else (8e-3, 1e-5)
    expected, expected_kl = twin_forward(wide, *arguments)
    torch.testing.assert_close(outputs[0].detach().double(), expected, rtol=relative, atol=absolute)
    torch.testing.assert_close(outputs[1].detach().double(), expected_kl, rtol=1e-5, atol=1e-4)
    gradients = [torch.randn_like(output) for output in outputs]
    (gradient,) = torch.autograd.grad(outputs, parameters, gradients, retain_graph=True)
    (expected_gradient,) = twin_backward(gradients[0].double(), gradients[1].double(), wide, *arguments)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=relative, atol=absolute)


def in_turns(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each in turn, its inputs out of the caches before it."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    flushed = torch.empty(FLUSHED_BYTES // 4, device=device)
    ready = {name: recorded(call, device) for name, call in calls.items()}
    for call in ready.values():
        for _ in range(WARMUP):
            call()
    for _ in range(rounds):
        for name, call in ready.items():
            flushed.zero_()  # takes a GPU longer than the host takes to launch what follows
            with timing(device) as elapsed:
                call()
            seconds[name].append(elapsed())
    return seconds


def recorded(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The GPU work of a call as one launch; on a CPU the call itself."""
    if device.type != "cuda":
        return call
    with on_stream_of_recordings(device) as stream:
        for _ in range(3):
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()

    def replay(_kept: Any = results) -> None:
        graph.replay()

    return replay


@contextmanager
def on_stream_of_recordings(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Context in which a GPU works on the recorded stream. It waits for all other work before and after."""
    if device.type != "cuda":
        yield None
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream_of_recordings()):
        yield _stream_of_recordings()
    torch.cuda.synchronize()


@functools.cache
def _stream_of_recordings() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def idle_seconds(device: torch.device) -> float:
    """Cost of timing itself: the median time of a call that writes one number."""
    number = torch.zeros((), device=device)
    return float(np.median(in_turns({"nothing": number.zero_}, device, 20)["nothing"]))


@contextmanager
def timing(device: torch.device) -> Iterator[Callable[[], float]]:
    """Context that measures time. Its value returns the seconds afterwards, on a GPU between events of its stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def between_events() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        start.record()
        yield between_events
        end.record()
    else:
        times = [time.perf_counter()]
        yield lambda: times[1] - times[0]
        times.append(time.perf_counter())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of memory, the median of 20."""
    source = torch.ones(FLUSHED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = in_turns({"copy": lambda: target.copy_(source)}, device, 20)["copy"]
    return 2 * source.nbytes / float(np.median(seconds))


def count_launches(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels that a call starts on the GPU."""
    with on_stream_of_recordings(device):
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
