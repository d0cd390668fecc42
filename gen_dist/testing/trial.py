"""A small run of an objective on tiny images, and the forward passes of its phases under watch."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gen_dist.config import MlpConfig, NetworkConfig, ObjectiveConfig, OptimizerConfig, RoleName, TrainConfig
from gen_dist.data import Dataset, Split
from gen_dist.objectives import Batch, Phase, TurnResult
from gen_dist.parallel.processes import Processes
from gen_dist.testing.beside import TwoProcesses
from gen_dist.testing.graph import GraphWatch, ModuleWatch
from gen_dist.testing.report import Failure
from gen_dist.training.cuda_graphs import RecordedSteps, Recorder
from gen_dist.training.schedule import Schedule
from gen_dist.training.trainer import Trainer

ALONE = Processes(0, 0, 1, torch.device("cpu"))
CLASSES = 3
BATCH = 6


class Forward(NamedTuple):
    """A forward and backward pass of one phase, at random or at trained weights."""

    phase_name: str
    phase: Phase
    result: TurnResult
    watch: GraphWatch
    modules: ModuleWatch
    trained: dict[str, nn.Parameter]
    """Parameters that the phase trains, by name."""
    gradients: dict[str, Tensor | None]


class ObjectiveTrial:
    """Small runs of an objective."""

    beside: TwoProcesses | None = None
    """Two processes that train it meanwhile, if they were started."""

    def __init__(
        self,
        objective: ObjectiveConfig,
        network: NetworkConfig | None = None,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        roles: Mapping[RoleName, NetworkConfig] = MappingProxyType({}),
    ) -> None:
        """`network` is small, so that a step takes milliseconds; None is a fully connected one."""
        self.image_shape = image_shape
        own: dict[str, Any] = {str(role): one for role, one in roles.items()}
        self.config = TrainConfig(
            preset="check",
            data="synthetic",
            steps=1000,
            global_batch_size=BATCH,
            learning_rate=5e-4,
            log_every=1,
            network=MlpConfig(hidden_sizes=(16,), latent_dim=4) if network is None else network,
            objective=objective,
            # The epsilon keeps Adam from amplifying differences of gradients near 0, so that two ways to compute a step
            # can be compared.
            optimization=OptimizerConfig(betas=(0.5, 0.999), epsilon=1e-3, ema_decay=0.99),
            **own,
        )

    @property
    def few_steps(self) -> int:
        """Steps in which every phase has taken its turn once, and another one."""
        return 1 + max(2, *self.config.objective.periods)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """Random images, with labels of three classes."""
        return small_dataset(self.image_shape)

    def trainer(self, recorder: Recorder | None = None, **changes: Any) -> Trainer:
        """Make a trainer from the same seed. With a recorder, it trains as on a GPU."""
        config = replace(self.config, **changes)
        trainer = Trainer(config, self.dataset, ALONE)
        if recorder is not None:
            trainer._schedule = Schedule(config, ALONE.device, in_tensors=True)
            trainer._recorded = RecordedSteps(lambda: recorder)
        return trainer

    @functools.cached_property
    def trained(self) -> Trainer:
        """A trainer after a few steps. Not to be trained further."""
        trainer = self.trainer()
        for step in range(self.few_steps):
            trainer.run_step(step)
        return trainer

    @functools.cached_property
    def forwards(self) -> list[Forward]:
        """Passes of each phase at random weights, then at trained ones: some layers start at zero."""
        return [*self._passes(self.trainer(), 0), *self._passes(self.trained, self.few_steps)]

    @property
    def has_batch_statistics(self) -> bool:
        """True if a network normalizes by the statistics of its batch."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.trained.objective.modules())

    def batch(self, step: int = 0, rows: int = BATCH) -> Batch:
        """The first images as a micro-batch of a step."""
        images, labels = (
            torch.from_numpy(array[:rows]) for array in (self.dataset.train.images, self.dataset.train.labels)
        )
        return Batch(images, labels, torch.tensor([self.config.seed, step]), 0)

    def _passes(self, trainer: Trainer, step: int) -> Iterator[Forward]:
        objective = trainer.objective
        objective.carries_graphs = False
        batch = self.batch(step)
        for name, phase in objective.phases().items():
            trained = {
                full: parameter
                for network in phase.trains
                for full, parameter in objective.networks[network].named_parameters(prefix=network)
                if parameter.requires_grad
            }
            phase.train()
            with only_requiring(objective.networks, trained), GraphWatch() as watch, ModuleWatch(phase) as modules:
                result = TurnResult(*phase(batch))
            gradients = _gradients(result.loss, trained)
            yield Forward(name, phase, result, watch, modules, trained, gradients)
            batch = batch._replace(carried={**batch.carried, **{k: v.detach() for k, v in result.carried.items()}})


def _gradients(loss: Tensor, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    if not loss.requires_grad or loss.ndim:
        return dict.fromkeys(trained)
    return dict(
        zip(
            trained,
            torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=True),
            strict=True,
        )
    )


@contextlib.contextmanager
def only_requiring(networks: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Context manager in which only these parameters require gradients, as in a phase's turn."""
    ours = set(map(id, trained.values()))
    frozen = [p for p in networks.parameters() if p.requires_grad and id(p) not in ours]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def small_dataset(image_shape: tuple[int, int, int]) -> Dataset:
    """Images of random squares, of three classes: 48 to train with, 12 to test with."""
    numbers = np.random.Generator(np.random.Philox(key=7))
    channels, height, width = image_shape
    coarse = numbers.integers(0, 256, (60, channels, -(-height // 4), -(-width // 4)), dtype=np.uint8)
    images = coarse.repeat(4, axis=2).repeat(4, axis=3)[:, :, :height, :width].copy()
    labels = numbers.integers(0, CLASSES, 60)
    train, test = (
        Split(f"{name} split of the check", images[rows], labels[rows])
        for name, rows in (("train", slice(48)), ("test", slice(48, None)))
    )
    return Dataset(train, test, tuple(map(str, range(CLASSES))), "0" * 64)


def run_steps(trainer: Trainer, first: int, last: int) -> list[dict[str, Any]]:
    """Logs of steps first .. last - 1."""
    return trainer.average_logs([trainer.run_step(step) for step in range(first, last)])


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copy of all tensors of a run's state, by group and name."""
    return {
        f"{group}/{name}": value.clone() for group, named in trainer.tensors().items() for name, value in named.items()
    }


def losses(logs: list[dict[str, Any]]) -> list[float]:
    """Losses of the phases, step by step."""
    return [value for row in logs for name, value in row.items() if name.split("/")[-1] == "loss"]


def relative_distance(
    before: Mapping[str, Tensor], first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> dict[str, float]:
    """Difference of two trainings' movements of the weights relative to the movement, by network."""
    apart: dict[str, float] = {}
    moved: dict[str, float] = {}
    for name, start in before.items():
        if name.startswith("networks/") and start.is_floating_point():
            network = name.removeprefix("networks/").split(".")[0]
            apart[network] = apart.get(network, 0.0) + float(
                (first[name].double() - second[name].double()).square().sum()
            )
            moved[network] = moved.get(network, 0.0) + float((first[name].double() - start.double()).square().sum())
    return {name: math.sqrt(value / moved[name]) if moved[name] else math.sqrt(value) for name, value in apart.items()}


def compare_trainings(
    trial: ObjectiveTrial, what: str, logs: list[dict[str, Any]], state: dict[str, Tensor], tolerance: float = 1e-2
) -> None:
    """Raise Failure if steps that were computed in another way differ from those of one process and one batch."""
    whole = trial.trainer()
    before = state_of(whole)
    wanted = run_steps(whole, 0, trial.few_steps)
    size = float(np.median(np.abs(losses(wanted))))
    for number, (row, other) in enumerate(zip(wanted, logs, strict=True)):
        for name, value in row.items():
            if name.split("/")[-1] == "loss" and abs(value - other[name]) > 1e-4 * max(abs(value), size):
                raise Failure(
                    f"{name} of step {number} is {value:.6g} in one batch of one process, {other[name]:.6g} with "
                    f"{what}; a loss has to be a mean over images, each with its own term, and not to know its process"
                )
    for network, apart in relative_distance(before, state_of(whole), state).items():
        if apart > tolerance:
            raise Failure(f"with {what}, {network} moves otherwise than in one batch of one process, by {apart:.1%}")
