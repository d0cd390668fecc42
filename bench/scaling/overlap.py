"""Buckets of gradients that are sent during backward: how long before its end their gradients are computed."""

import contextlib
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np
from torch import Tensor, nn

from bench.scaling.cost_model import Bucket
from gen_dist.objectives.phase import Phase
from gen_dist.parallel import gradients
from gen_dist.parallel.choice import full_bucket_bytes
from gen_dist.parallel.gradients import FlatReduction, in_buckets
from gen_dist.training.trainer import Trainer


def trained_by(phase: Phase) -> list[nn.Parameter]:
    """Parameters that a phase trains."""
    networks = phase.objective.networks
    return [p for name in phase.trains for p in networks[name].parameters() if p.requires_grad]


@contextlib.contextmanager
def buckets_as_on_gpus() -> Iterator[None]:
    """Context in which trainers of several processes send buckets during backward, on any device."""

    def choose(parameters: list[nn.Parameter], *_: object, **__: object) -> FlatReduction:
        return FlatReduction(parameters, full_bucket_bytes(parameters))

    with mock.patch("gen_dist.training.turn.choose_reduction", choose):
        yield


class _BucketsThatStay(FlatReduction):
    """Gradients that are copied into a bucket as if to be sent, and are then averaged over one process."""

    def _send(self, bucket: gradients.Bucket) -> None:
        """See FlatReduction."""


@contextlib.contextmanager
def buckets_that_stay() -> Iterator[None]:
    """Context in which trainers of a single process do all that those of several do to average, but for sending."""

    def choose(parameters: list[nn.Parameter], *_: object, **__: object) -> FlatReduction:
        return _BucketsThatStay(parameters, None)

    with mock.patch("gen_dist.training.turn.choose_reduction", choose):
        yield


def bucket_leads(trainer: Trainer, first: int, steps: int) -> tuple[dict[str, list[Bucket]], float]:
    """Buckets of each phase, as GPUs have them, with their median leads, and the mean seconds of a step."""
    watch = _Watch(trainer)
    seconds = []
    try:
        for step in range(first, first + steps):
            start = time.perf_counter()
            trainer.run_step(step, watch.lap)
            seconds.append(time.perf_counter() - start)
    finally:
        watch.remove()
    return watch.leads(), float(np.mean(seconds))


class _Watch:
    """Stopwatch for backward passes and for the moments at which gradients are complete."""

    def __init__(self, trainer: Trainer) -> None:
        self._buckets: dict[str, list[list[nn.Parameter]]] = {}
        self._seconds: dict[str, list[list[float]]] = {}
        self._complete: dict[Tensor, float] = {}
        for name, phase in trainer.objective.phases().items():
            trained = trained_by(phase)
            self._buckets[name] = in_buckets(trained[::-1], full_bucket_bytes(trained))
        watched = {p for buckets in self._buckets.values() for bucket in buckets for p in bucket}
        self._hooks = [p.register_post_accumulate_grad_hook(self._computed) for p in watched]

    def _computed(self, parameter: Tensor) -> None:
        self._complete[parameter] = time.perf_counter()

    def lap(self, part: str) -> None:
        """Note the end of a part of the step."""
        phase, _, name = part.rpartition("/")
        if name == "forward":
            self._complete.clear()  # penalties have computed gradients within it
        if name == "backward":
            now, sent = time.perf_counter(), 0.0
            leads = []
            for bucket in self._buckets[phase]:
                sent = max(sent, *(self._complete.get(p, now) for p in bucket))  # buckets keep their order
                leads.append(now - sent)
            self._seconds.setdefault(phase, []).append(leads)

    def leads(self) -> dict[str, list[Bucket]]:
        """Medians over the laps, by phase."""
        return {
            phase: [
                Bucket(sum(p.nbytes for p in bucket), float(np.median(seconds)))
                for bucket, seconds in zip(self._buckets[phase], zip(*of_laps, strict=True), strict=True)
            ]
            for phase, of_laps in self._seconds.items()
        }

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
