"""One process of the gate, which runs benchmarks on command. `bench/gate/gate.py` starts it in either tree.

Both trees use the present tree's copy of this file, so that old commits are measured in the same way. Everything that
it imports of the project is the tree's own (`python -P`, with the tree as PYTHONPATH). Commands and answers are lines
of JSON.
"""

import functools
import hashlib
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

SLOWDOWN = "GEN_DIST_GATE_SLOWDOWN"
"""Environment variable: share of each operation's time that is spent idle after it. It simulates a regression, to prove
that the gate notices one."""
CHECKED_STEPS = 4
"""Steps whose losses must agree in both trees. Later losses would show rounding, which training amplifies."""
ROWS, LATENT_DIM = 192, 20  # of `vae-mnist`


class RefusedError(Exception):
    """A command does not know its options."""


LACKS = (ImportError, AttributeError, TypeError, KeyError, NameError, FileNotFoundError, RefusedError)
"""Errors of an old tree that lacks something."""
Outputs = dict[str, float | str]


@dataclass(frozen=True)
class Place:
    """Tree and directory in which a benchmark works."""

    tree: Path
    directory: Path
    """Directory of this process alone, empty at first."""
    again: bool
    """True if an earlier process of the same tree has prepared the benchmark, so that compiled files and data exist."""


@dataclass(frozen=True)
class Operation:
    """A timed operation, ready to run in this process."""

    run: Callable[[int], object]
    """Function of an operation's number. Both trees do the same numbers."""
    images: int | None = None
    """Images per operation. None if it has no images."""
    outputs: Outputs = field(default_factory=dict)
    """Computed numbers, and digests of data that must be equal bit for bit."""


@dataclass(frozen=True)
class Benchmark:
    """Preparation of an operation, and how to measure it."""

    prepare: Callable[[Place], Operation]
    at_once: int = 1
    """Operations per block are a multiple of this."""
    starts: bool = False
    """True if operations start processes, which takes seconds: a block has one, and a turn one block of each tree."""


def training_step(preset: str, place: Place) -> Operation:
    """Data, noise, forward, backward, optimizer and moving average."""
    trainer = _trainer(preset)
    first = trainer.average_logs([trainer.run_step(step) for step in range(CHECKED_STEPS)])
    outputs: Outputs = {
        f"step {step} {name}": value
        for step, logs in enumerate(first)
        for name, value in logs.items()
        if isinstance(value, float) and "accuracy" not in name  # accuracies jump if rounding moves one image
    }
    return Operation(lambda number: trainer.run_step(CHECKED_STEPS + number), trainer.config.global_batch_size, outputs)


def gathering(place: Place) -> Operation:
    """The keyed order, and images and labels gathered from memory."""
    import torch

    from gen_dist.data import TrainBatches

    batches = TrainBatches(
        _digits().train,
        seed=1,
        global_batch_size=ROWS,
        micro_batches=[(0, ROWS)],
        device=torch.device("cpu"),
        resident_budget_bytes=2**31,
    )
    images, labels = batches.micro_batch(0, 0)[:2]
    return Operation(
        lambda number: batches.micro_batch(1 + number, 0),
        ROWS,
        {"images digest": _digest(images), "labels digest": _digest(labels)},
    )


def noise(place: Place) -> Operation:
    """Standard normals and binarized images of one step."""
    import torch

    from gen_dist.randomness import Stream

    kernels = module_of("gen_dist.kernels", "kernels")
    binarize, normal = kernels.binarize, kernels.normal
    images = torch.from_numpy(_digits().train.images[:ROWS].copy())

    def draw(step: int) -> list[torch.Tensor]:
        rng = torch.tensor([1, step])
        if hasattr(kernels, "Key"):
            prior, pixels = kernels.Key(rng, Stream.PRIOR, 0), kernels.Key(rng, Stream.BINARIZATION, 0)
            return [normal(prior, ROWS, LATENT_DIM), binarize(images, pixels)]
        return [
            normal(rng, Stream.PRIOR, 0, ROWS, LATENT_DIM),
            binarize(images, rng, Stream.BINARIZATION, 0),
        ]

    normals, pixels = draw(0)
    outputs: Outputs = {"normals digest": _digest(normals), "pixels digest": _digest(pixels)}
    return Operation(lambda number: draw(1 + number), ROWS, outputs)


def checkpoint(place: Place) -> Operation:
    """Save a checkpoint, digests and fsync with it, and load it again."""
    import torch

    checkpoints = module_of("gen_dist.records.checkpoint", "gen_dist.checkpoint")
    trainer = _trainer("vae-mnist")
    trainer.run_step(0)  # before it the optimizer has no state

    def save_and_load(number: int) -> Any:
        facts = {"data_digest": trainer.dataset.digest, "loss_scales": trainer.loss_scales()}
        state = checkpoints.Checkpoint(1 + number, trainer.tensors(), facts)
        path = checkpoints.save(place.directory, state, trainer.config, keep=2)
        loaded = checkpoints.load(path)[0]
        trainer.load(loaded)
        return loaded

    saved = {(group, name): t.clone() for group, tensors in trainer.tensors().items() for name, t in tensors.items()}
    loaded = {(group, name): t for group, tensors in save_and_load(0).tensors.items() for name, t in tensors.items()}
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in saved.items())
    return Operation(lambda number: save_and_load(1 + number), None, {"tensors": float(len(loaded))})


def evaluation(place: Place) -> Operation:
    """Metrics of the test split."""
    trainer = _trainer("vae-mnist")
    for step in range(CHECKED_STEPS):
        trainer.run_step(step)
    test = trainer.dataset.test
    return Operation(lambda _number: trainer.evaluate(test), len(test.images), dict(trainer.evaluate(test)))


def starting(words: tuple[str, ...], place: Place) -> Operation:
    """A command in a new process, from its start to its end."""
    run = place.directory / "run"
    options = ["--fresh", "--run-dir", str(run)] if "--steps" in words else []
    command = [sys.executable, "launch/train.py", *words, *options]

    def start(_number: int) -> None:
        done = subprocess.run(
            command, cwd=place.tree, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            kind = RefusedError if done.returncode == 2 else RuntimeError
            raise kind(f"{' '.join(command[1:])} ended with {done.returncode}: {_last_line(done.stderr)}")

    outputs: Outputs = {}
    if not place.again:
        start(0)
    if options and not place.again:
        record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        outputs = {name: value for name, value in record.items() if name.startswith(("train/", "test/"))}
    return Operation(start, None, outputs)


def machine(place: Place) -> Operation:
    """Matrix products, a pass over memory and Python's own work: nothing of the project, so no change of it shows."""
    import torch

    left, right = torch.ones(192, 784), torch.ones(784, 400)
    large = torch.zeros(2**20)

    def work(_number: int) -> int:
        for _ in range(4):
            torch.relu(left @ right)
        large.add_(1.0)
        return sum(number & 3 for number in range(20_000))

    return Operation(work)


CONTROL = "machine"
"""Reference task, which shows if the machine is as fast as when figures were stored."""
# Noise is drawn for 16 steps at once, where that is much of a step.
_PRESETS = {"vae-mnist": 16, "iwae-mnist": 16, "vae-conv-mnist": 2, "dcgan-mnist": 4, "r3gan-mnist": 4}
BENCHMARKS: dict[str, Benchmark] = {
    **{
        f"step-{preset}": Benchmark(functools.partial(training_step, preset), at_once)
        for preset, at_once in _PRESETS.items()
    },
    "gather-batch": Benchmark(gathering, 16),
    "keyed-noise": Benchmark(noise, 16),
    "checkpoint": Benchmark(checkpoint),
    "evaluate": Benchmark(evaluation),
    CONTROL: Benchmark(machine),
    "start-help": Benchmark(functools.partial(starting, ("--help",)), starts=True),
    "start-one-step": Benchmark(functools.partial(starting, ("vae-mnist", "--steps", "1")), starts=True),
}
"""All that the gate can compare, by name."""


def module_of(*names: str) -> Any:
    """The first of these modules that the tree has: a module's name today, then the names it had in older trees.

    Raises:
        ModuleNotFoundError: the tree has none of them.
    """
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A missing dependency of the module is an error of its own; a missing parent is another layout.
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise
    raise ModuleNotFoundError(f"no module named {' or '.join(names)}", name=names[0])


@functools.cache
def _digits() -> Any:
    from gen_dist.config import DataConfig
    from gen_dist.data import open_dataset

    return open_dataset("mnist5k", "data", DataConfig(), lambda _line: None)


def _trainer(preset: str) -> Any:
    from dataclasses import replace

    from gen_dist.presets import get_preset

    trainer = module_of("gen_dist.training.trainer", "gen_dist.trainer")
    processes = module_of("gen_dist.parallel.processes", "gen_dist.parallel")
    # The schedule must not end while measuring: past its end the learning rate is negative.
    config = replace(get_preset(preset), device="cpu", steps=10**6)
    return trainer.Trainer(config, _digits(), processes.start_processes(config))


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


class Worker:
    """Operations of this process, and its commands."""

    def __init__(self, place: Place, slowdown: float) -> None:
        self._place = place
        self._slowdown = slowdown
        self._operations: dict[str, Operation] = {}

    def facts(self) -> dict[str, Any]:
        """Paths of the project's packages, versions, and threads of this process once trainers have set them."""
        import torch

        import gen_dist
        from gen_dist.config import TrainConfig

        kernels = module_of("gen_dist.kernels", "kernels")
        module_of("gen_dist.parallel.processes", "gen_dist.parallel").start_processes(TrainConfig(device="cpu"))
        return {
            "packages": [str(gen_dist.__file__), str(kernels.__file__)],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def prepare(self, name: str, again: bool) -> dict[str, Any]:
        """Prepare an operation and return its outputs."""
        directory = self._place.directory / name
        directory.mkdir()
        operation = BENCHMARKS[name].prepare(Place(self._place.tree, directory, again))
        self._operations[name] = operation
        return {"images": operation.images, "outputs": operation.outputs}

    def block(self, name: str, first: int, count: int) -> float:
        """Seconds of one operation, from a block of `count` of them."""
        run = self._operations[name].run
        slowdown = self._slowdown
        result: object = None
        start = time.perf_counter()
        for number in range(first, first + count):
            if slowdown:
                began = time.perf_counter()
                result = run(number)
                now = time.perf_counter()
                until = now + slowdown * (now - began)
                while time.perf_counter() < until:
                    pass
            else:
                result = run(number)
        seconds = time.perf_counter() - start
        if isinstance(result, Mapping):  # logs, or metrics
            assert all(math.isfinite(float(value)) for value in result.values() if not getattr(value, "ndim", 0))
        return seconds / count


def is_lack(error: Exception) -> bool:
    """True if an error shows that something is missing or takes other arguments, rather than fails."""
    # A preset that is not there is a ConfigError, which an old tree may have elsewhere, if at all.
    return isinstance(error, LACKS) or type(error).__name__ == "ConfigError"


def serve(tree: Path, directory: Path, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until the input ends, when the gate has ended."""
    worker = Worker(Place(tree, directory, again=False), float(os.environ.get(SLOWDOWN, "0")))
    for line in commands:
        method, *arguments = json.loads(line)
        try:
            answer = {"result": getattr(worker, method)(*arguments)}
        except Exception as error:  # an old tree may lack anything; the gate decides what an error means
            reason = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {reason}"[:400], "lacks": is_lack(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve commands from standard input; answers go to standard output, prints of the code to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Path(sys.argv[1]), Path(sys.argv[2]), sys.stdin, answers)
    os._exit(0)  # threads that gather batches would be waited for


if __name__ == "__main__":
    main()
