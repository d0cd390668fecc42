"""Time of a training step on the CPU by kind of work, from torch's profiler, for `bench/costs/limit.py`."""

import contextlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

from gen_dist.training.trainer import Trainer

WARMUP_STEPS = 17
"""Noise is drawn for step 0, then for sixteen steps at once: blocks begin and end where such rounds do."""
BLOCK_STEPS = 16
PROFILED_STEPS = 64
LARGEST_SHOWN = 12
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
"""The profiler's names of matrix products and convolutions. Events nested in them belong to them."""
_LOSSES = ("_CrossEntropy", "_CrossEntropyBackward")
_DRAWS = (
    "gen_dist.kernels.latent.normal",
    "gen_dist.objectives.vae.binarize",
    "gen_dist.objectives.adversarial.normal",
    "gen_dist.objectives.augmentation.normal",
)
"""Functions that draw, under the names by which the step calls them."""
KINDS = ("products", "loss", "noise", "other operations", "Python between")


def kinds_of_steps(trainer: Trainer) -> list[tuple[int, int]]:
    """One step of each kind, by which phases and penalties are due, and how many a round has of it."""
    phases = trainer.objective.phases().values()
    everys = [every for phase in phases for every in (phase.every, phase.penalty_every)]
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for step in range(math.lcm(*everys)):
        kinds.setdefault(tuple(step % every == 0 for every in everys), []).append(step)
    return [(steps[0], len(steps)) for steps in kinds.values()]


def step_by_kind(trainer: Trainer, first_step: int = 10_000) -> dict[str, Any]:
    """Milliseconds of a step by kind of work, from the profiler, which slows the step.

    Returns:
        `parts`: milliseconds of each of KINDS by part of a step, in order; `operations`: milliseconds of the longest
        operations outside the products; `profiled_ms`: milliseconds of the whole step under the profiler.
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
    """One of KINDS for an event with its ancestors. Events that are not operations are Python or autograd's engine."""
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
    """Mark the time of drawing noise for the profiler."""

    def marked(draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function("noise"):
                return draw(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for place in _DRAWS:
            module, _, name = place.rpartition(".")
            if module in sys.modules:  # objectives that are not used are not imported
                stack.enter_context(mock.patch(place, marked(getattr(sys.modules[module], name))))
        yield


def print_kinds(where: Mapping[str, Any], step_seconds: float, products_ms: float) -> None:
    """Print the step's time by kind of work."""
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
