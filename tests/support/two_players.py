"""A two-phase objective like a GAN's with noise keyed by row, and counters of their communication."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from gen_dist.config import OptimizerConfig
from gen_dist.kernels import normal
from gen_dist.objectives import Batch, Objective, Phase, TurnResult
from gen_dist.parallel.gradients import FlatReduction
from gen_dist.parallel.shared_weights import SharedWeights
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer
from gen_dist.training.turn import Turn
from tests.support.runs import make_trainer, small_config

LATENT_DIM = 4
GENERATOR_EVERY = 2
STEPS = 12


class TwoPlayers(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.latent_shape = (LATENT_DIM,)
        self.networks = nn.ModuleDict(
            {
                "generator": nn.Sequential(nn.Linear(LATENT_DIM, 16), nn.ReLU(), nn.Linear(16, 784), nn.Sigmoid()),
                "discriminator": nn.Sequential(nn.Linear(784, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)),
            }
        )

    def phases(self) -> dict[str, Phase]:
        return {"discriminator": DiscriminatorPhase(self), "generator": GeneratorPhase(self)}

    def fakes(self, batch: Batch) -> Tensor:
        latents = normal(batch.key(Stream.PRIOR), len(batch.images), LATENT_DIM)
        return self.networks["generator"](latents)


class DiscriminatorPhase(Phase):
    objective: TwoPlayers

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.trains = ("discriminator",)

    def forward(self, batch: Batch) -> TurnResult:
        discriminator = self.objective.networks["discriminator"]
        real = discriminator(batch.images.flatten(1) / 255.0)
        loss = softplus(-real).mean() + softplus(discriminator(self.objective.fakes(batch))).mean()
        return TurnResult(loss, {"loss": loss.detach(), "real": real.detach().mean()})


class GeneratorPhase(Phase):
    objective: TwoPlayers
    every = GENERATOR_EVERY

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.trains = ("generator",)

    def forward(self, batch: Batch) -> TurnResult:
        loss = softplus(-self.objective.networks["discriminator"](self.objective.fakes(batch))).mean()
        return TurnResult(loss, {"loss": loss.detach()})


def two_players(**changes: Any) -> Trainer:
    # Not Adam, whose updates do not change with the scale of gradients.
    optimization = OptimizerConfig(optimizer="sgd", betas=(0.9, 0.999), ema_decay=0.9)
    config = small_config("vae", steps=STEPS, optimization=optimization, learning_rate=0.05, **changes)
    with mock.patch("gen_dist.training.trainer.build_objective", lambda *_: TwoPlayers()):
        return make_trainer(config)


def all_logs(trainer: Trainer) -> list[dict[str, Any]]:
    """Logs of all steps."""
    return trainer.average_logs([trainer.run_step(step) for step in range(STEPS)])


def state_norms(trainer: Trainer) -> dict[str, float]:
    """Norms of each network's weights and of their average."""
    groups = trainer.tensors()
    return {
        f"{group}/{name}": float(value.double().norm())
        for group in ("networks", "averaged")
        for name, value in groups[group].items()
    }


@contextlib.contextmanager
def watched_collectives() -> Iterator[dict[str, list[int]]]:
    """Count the elements that are reduced, by the phase whose turn it is, or `other`.

    With weights in shared memory, gradients count as reduced.
    """
    reduced: dict[str, list[int]] = {"other": []}
    whose = ["other"]
    take, average, all_reduce = Turn.take, SharedWeights.average_gradients, dist.all_reduce
    send = FlatReduction._send_next

    def taking(turn: Turn, *arguments: Any) -> Any:
        whose.append(type(turn.phase).__name__)
        reduced.setdefault(whose[-1], [])
        try:
            return take(turn, *arguments)
        finally:
            whose.pop()

    def averaging(weights: SharedWeights) -> None:
        reduced[whose[-1]].append(sum(parameter.numel() for parameter in weights._parameters))
        average(weights)

    def sending(reduction: FlatReduction) -> None:
        bucket = reduction._buckets[reduction._sent]
        reduced[whose[-1]].append(sum(parameter.numel() for parameter in bucket.parameters))
        send(reduction)

    def counting(values: Tensor, *arguments: Any, **options: Any) -> dist.Work | None:
        reduced["other"].append(values.numel())
        return all_reduce(values, *arguments, **options)

    with (
        mock.patch.object(Turn, "take", taking),
        mock.patch.object(SharedWeights, "average_gradients", averaging),
        mock.patch.object(FlatReduction, "_send_next", sending),
        mock.patch.object(dist, "all_reduce", counting),
    ):
        yield reduced


def without_shared_weights() -> contextlib.AbstractContextManager[object]:
    """Context manager in which trainers get flat gradients, as between hosts."""
    return mock.patch("gen_dist.parallel.choice.share_weights", lambda _parameters: None)
