"""Worker of test_sync_batch_norm.py in two processes: normalizes its rows of each case and writes the results."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gen_dist.config import TrainConfig
from gen_dist.parallel.processes import end_process, start_processes
from gen_dist.parallel.sync_batch_norm import synchronize

ROWS = 8
ROWS_OF_FIRST = 5
"""Rows of the main process; the other has the rest."""
CASES = ("maps", "vectors", "far from zero", "average of all steps, no weights")
STEPS = 2


def make_case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Make a layer with random weights, its inputs at each step, [STEPS, ROWS, ...], and factors of the loss."""
    generator = torch.Generator().manual_seed(3)
    layer: nn.Module = nn.BatchNorm1d(6) if name == "vectors" else nn.BatchNorm2d(6)
    if name == "average of all steps, no weights":
        layer = nn.BatchNorm2d(6, momentum=None, affine=False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.3, generator=generator)
    shape = (STEPS, ROWS, 6) if name == "vectors" else (STEPS, ROWS, 6, 5, 4)
    inputs = torch.randn(shape, generator=generator) * (1 + torch.arange(float(ROWS)).view(-1, *[1] * (len(shape) - 2)))
    if name == "far from zero":
        inputs += 300.0
    return layer, inputs, torch.randn(shape, generator=generator)


def run_case(module: nn.Module, layer: nn.Module, inputs: Tensor, factors: Tensor) -> dict[str, Tensor]:
    """Return outputs, gradients and running statistics for a loss of `factors` times a function of the outputs."""
    results: dict[str, Tensor] = {}
    for step, (values, factor) in enumerate(zip(inputs, factors, strict=True)):
        values = values.clone().requires_grad_()
        outputs = module(values)
        ((outputs + 0.1 * outputs**2) * factor).sum().backward()
        assert values.grad is not None
        results |= {f"outputs {step}": outputs.detach(), f"gradients {step}": values.grad}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        results[f"gradient of {name}"] = parameter.grad
    return results | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def main() -> None:
    processes = start_processes(TrainConfig(device="cpu"))
    assert processes.world_size == 2
    own = slice(0, ROWS_OF_FIRST) if processes.is_main else slice(ROWS_OF_FIRST, None)
    results: dict[str, Tensor] = {}
    for name in CASES:
        layer, inputs, factors = make_case(name)
        module = synchronize(nn.Sequential(layer))
        if sys.argv[2] == "compiled":
            module.compile(fullgraph=True)
        found = run_case(module, layer, inputs[:, own], factors[:, own])
        results |= {f"{name}: {key}": value.contiguous() for key, value in found.items()}
    save_file(results, Path(sys.argv[1]) / f"{processes.rank}.safetensors")
    end_process(0)


if __name__ == "__main__":
    main()
