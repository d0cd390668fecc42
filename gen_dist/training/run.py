"""A training run: its directory, the loop over the steps, and the records after a step."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gen_dist.config import TrainConfig
from gen_dist.config.data import Layout
from gen_dist.config.recorded import MORE_IS_BETTER
from gen_dist.data import Dataset, open_dataset, pack_given
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.parallel.collectives import StopVote, agree, from_main
from gen_dist.parallel.facts import facts_of_start
from gen_dist.parallel.processes import Processes, settings_kept, start_processes
from gen_dist.plugins.surroundings import Watch
from gen_dist.presets import get_preset
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.best import Best, best_of_facts, better, measured_on
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.records.metrics_file import metrics_damage
from gen_dist.records.run_data import with_packing_of_run
from gen_dist.records.run_directory import hold
from gen_dist.startup import tell
from gen_dist.training.auto_accumulation import with_accumulation_that_fits
from gen_dist.training.measured import MeasuredMetrics
from gen_dist.training.memory_advice import untried_ways_out
from gen_dist.training.memory_watch import MemoryWatch
from gen_dist.training.opening import opening_lines, resuming_line
from gen_dist.training.outcome import DivergenceError, Outcome
from gen_dist.training.precision import resolve_precision
from gen_dist.training.run_recorder import MainRunRecorder, OnLog, RunRecorder
from gen_dist.training.schedule import logged_at
from gen_dist.training.starting_weights import with_start_digest
from gen_dist.training.step_logs import StepLogs
from gen_dist.training.stopping import stop_signals
from gen_dist.training.supervisor import Supervisor
from gen_dist.training.trainer import Trainer


def train(
    config: TrainConfig | str,
    *,
    data: Any = None,
    test_data: Any = None,
    layout: Layout | None = None,
    fresh: bool = False,
    say: Callable[[str], None] | None = None,
    on_log: OnLog | None = None,
    supervisor: Supervisor | None = None,
) -> Outcome:
    """Train a config to its last step, from the newest undamaged checkpoint of its run directory if there is one.

    Call it in every process that a launcher started; the main process writes the run directory. SIGTERM, SIGINT
    and SIGHUP save a checkpoint and return early. The process is left as it was: signal handlers, threads and settings
    of torch, random state, environment.

    Args:
        config: a config, or the name of a preset.
        data: images to train on instead of `config.data`: an array [N, H, W], [N, H, W, C] or [N, C, H, W], a pair
            (images, labels), a `torch.utils.data.Dataset` or a `datasets.Dataset`; see
            `gen_dist.data.given.images_given`. They are packed once by their content, and the run's config records
            `array:DIGEST`, by which all commands find them in the cache.
        test_data: images to test on, in the same forms. None holds out `config.packing.test_fraction` of `data`.
        layout: NCHW or NHWC, for arrays of images that can be read as both.
        fresh: remove the files of the previous run and start over.
        say: takes the lines to show before and after the steps, in the main process. None prints them to the
            supervisor's screen, or else to standard error. The progress of the steps is always shown there, and so is
            the warning of another thread that memory is nearly used up: see `MemoryWatch`.
        on_log: called in the main process with each step that is logged and its figures by name, as metrics.jsonl has
            them. If it raises, a warning says so, and it is not called again.
        supervisor: owner of these processes, unless a launcher waits for them.

    Raises:
        UserError: config, data or run directory cannot be used, the disk is full, or the loss diverged.
    """
    if isinstance(config, str):
        config = get_preset(config)
    screen = supervisor.screen if supervisor else None
    announce = say or (lambda line: tell(line, screen))
    with settings_kept():
        processes = start_processes(config)
        if not processes.is_main:
            announce = _silent
        with MemoryWatch(processes, screen) as memory:
            if data is not None:
                name = pack_given(data, test_data, layout=layout, packing=config.packing, announce=announce)
                config = dataclasses.replace(config, data=name)
            elif test_data is not None:
                raise ConfigError("test_data was given without data; give both")
            return _train(config, processes, fresh, announce, on_log, supervisor, memory)


def _train(
    config: TrainConfig,
    processes: Processes,
    fresh: bool,
    announce: Callable[[str], None],
    on_log: OnLog | None,
    supervisor: Supervisor | None,
    memory: MemoryWatch,
) -> Outcome:
    screen = supervisor.screen if supervisor else None
    path = (supervisor.directory if supervisor else None) or config.run_path
    stop = supervisor.stop if supervisor else threading.Event()
    with hold(path, config, processes, fresh, supervisor.name if supervisor else None, announce) as holding:
        config = dataclasses.replace(config, accept_changed_plugins=False)  # of this start alone
        config = with_start_digest(config, path, holding.fresh, processes)
        config = with_packing_of_run(config, path, holding.fresh, processes)
        dataset = open_dataset(config.data, config.data_root, config.packing, announce)
        _agree(config, dataset, processes)
        config = with_accumulation_that_fits(config, path, holding.fresh, dataset, processes, announce)
        with contextlib.closing(Trainer(config, dataset, processes)) as trainer, stop_signals(stop):
            memory.ways_out = untried_ways_out(trainer.facts_of_step(config.global_batch_size), config, processes)
            is_main = processes.is_main
            recorder = MainRunRecorder(trainer, holding, screen, on_log) if is_main else RunRecorder(path, processes)
            return _Run(trainer, recorder, announce, supervisor, stop).train(holding.fresh)


def _agree(config: TrainConfig, dataset: Dataset, processes: Processes) -> None:
    """Raise ConfigError in every process if they would not train one model on the same images."""
    if processes.world_size == 1:
        return
    on_cpu = processes.device.type == "cpu"
    start = facts_of_start(config, processes.world_size, on_cpu, torch.get_num_threads())
    precision = resolve_precision(config.precision, processes.device)
    agree(start | {"data": f"digest {dataset.digest[:12]}", "precision": str(precision)}, processes)


class _Run:
    """The training loop and its state between steps. Every process runs it."""

    def __init__(
        self,
        trainer: Trainer,
        recorder: RunRecorder,
        announce: Callable[[str], None],
        supervisor: Supervisor | None,
        stop: threading.Event,
    ) -> None:
        self.config = trainer.config
        self.trainer = trainer
        self.recorder = recorder
        self.announce = announce
        self.supervisor = supervisor
        self.stop = stop
        self.logs = StepLogs(trainer)
        self.measured = MeasuredMetrics(trainer, announce) if self.config.evaluate_metrics else None
        self.step = 0
        self.saved_step = 0
        """Step of the newest checkpoint, 0 without one."""
        self.best: Best | None = None
        """The best evaluation up to `step`, if the config keeps its checkpoint."""
        self.seconds_before = 0.0
        """Training time of the previous starts of this run."""

    def train(self, fresh: bool) -> Outcome:
        """Train from the newest checkpoint to the last step, or until a signal."""
        recorder, processes = self.recorder, self.trainer.processes

        # Start. A refusal changes nothing on disk, so the directory is claimed as late as possible.
        if checkpoint := None if fresh else self._newest():
            self._resume(*checkpoint)
        else:
            self.trainer.start()
            with recorder.writing():
                if fresh:
                    recorder.claim()
                recorder.remove_leftovers()
        if self.step < self.config.steps:
            for line in opening_lines(self.trainer, recorder.path):
                self.announce(line)
            with recorder:
                with recorder.writing():
                    if not fresh:
                        recorder.claim()
                    recorder.begin(self.step)
                self._loop()

        # End.
        with recorder.writing(), self.trainer.whole_average():
            ending = recorder.finish(self.step, self._training_seconds())
        metrics, pictures, collapses = from_main(ending, processes)
        finished = self.step == self.config.steps
        is_main, objective = processes.is_main, self.config.objective
        return Outcome(recorder.path, self.step, finished, metrics, pictures, collapses, is_main, objective)

    def _newest(self) -> tuple[Checkpoint, TrainConfig] | None:
        """The newest checkpoint with its config, the same in all processes; None if there is none."""
        processes, path = self.trainer.processes, self.recorder.path
        found = checkpoints.load_newest(path, self.announce)
        step = found[0].step if found else 0
        if step != (newest := from_main(step, processes)):
            raise CheckpointError(
                f"rank {processes.rank} finds step {step} in {path}, but rank 0 finds step {newest}; "
                "all processes need one shared directory"
            )
        return found

    def _resume(self, checkpoint: Checkpoint, saved: TrainConfig) -> None:
        """Take the state of a checkpoint, whose config is `saved`.

        Raises:
            ConfigError: it is past the last step.
        """
        config, path, step = self.config, self.recorder.path, checkpoint.step
        if step > config.steps:
            raise ConfigError(
                f"{path} is already at step {step}, past steps {config.steps}; "
                f"use --steps {step} or more, --fresh, or another --run-dir"
            )
        if damage := metrics_damage(path, checkpoint.facts):
            self.announce(f"warning: {damage}")
        self.trainer.load(checkpoint)
        self.logs.resume(checkpoint.facts["unlogged"])
        self.best = best_of_facts(config, checkpoint.facts, saved)
        self.step, self.seconds_before = step, checkpoint.facts["training_seconds"]
        self.saved_step = step
        if step < config.steps:
            self.announce(resuming_line(self.trainer, path, checkpoint, supervised=self.supervisor is not None))

    def _loop(self) -> None:
        """Take steps until the end or a signal, with records after each step as they are due."""
        config = self.config
        intervals = {config.log_every, config.evaluate_every, config.sample_every, config.checkpoint_every}
        vote = StopVote(self.trainer.processes)
        stopping = False
        self.watch = Watch()
        while self.step < config.steps and not stopping:
            if self.trainer.batches.waits_for_servers and self._stops_before_step(vote):
                break
            self.logs.add(self.trainer.run_step(self.step))
            self.step += 1
            self.recorder.advance(self.step)
            stopping = vote.agreed(self.stop.is_set())
            if stopping or any(self._is_due(every) for every in intervals):
                self._record(stopping)
        vote.close()

    def _stops_before_step(self, vote: StopVote) -> bool:
        """Wait for the images of the next step. If a signal comes before they do, in any process, save instead.

        A collective call: a server that is gone may keep one process waiting for minutes, and the others with it.
        """
        self.trainer.batches.fetch(self.step, self.stop)
        if not vote.agreed_at_once(self.stop.is_set()):
            return False
        if self.step > self.saved_step:
            self.watch.settle()
            if broken := self.logs.collect(self.step):
                raise self._divergence(broken)
            with self.recorder.pause(), self.trainer.whole_average():
                saved = self._save()
                if self.supervisor:
                    self.supervisor.recorded(self.step, {}, saved)
        return True

    def _record(self, stopping: bool) -> None:
        """Write the records that are due. The checkpoint is last, so a resumed run lacks no record before it."""
        config, trainer, recorder = self.config, self.trainer, self.recorder
        self.watch.settle()
        evaluates = self._is_due(config.evaluate_every)
        saves = stopping or self._is_due(config.checkpoint_every)

        # Logs come first: this waits for the device, whose work up to here counts as training time.
        if broken := self.logs.collect(self.step):
            raise self._divergence(broken)

        draws = evaluates or self._is_due(config.sample_every)
        average = trainer.whole_average() if draws or saves else contextlib.nullcontext()
        with recorder.pause(), average:
            # Metrics.
            metrics: dict[str, float | list[float]] = {}
            if self._is_due(config.log_every):
                metrics |= self.logs.means()
                metrics |= {f"train/{name}": value for name, value in logged_at(config, self.step - 1).items()}
            if evaluates:
                tested = trainer.evaluate(trainer.dataset.test)
                metrics |= {f"test/{name}": value for name, value in tested.items()}
                self.watch.settle()
                if self.measured:
                    metrics |= self.measured.measure()

            # Samples, the line of metrics.jsonl, pictures.
            with recorder.writing():
                if evaluates:
                    metrics |= recorder.check_samples()
                if metrics:
                    recorder.log(self.step, metrics)
                if self._is_due(config.sample_every):
                    recorder.pictures(self.step)

            # Checkpoint.
            if evaluates and self._is_best(metrics):
                saves = True
            saved = self._save() if saves else None
            if self.supervisor and (evaluates or saves):
                self.supervisor.recorded(self.step, metrics, saved)

    def _is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Compare an evaluation with the best before it. A collective call: the main process has all metrics."""
        metric, before = self.config.keep_best, self.best
        if metric is None:
            return False
        key = self.measured.key_of(metric) if self.measured else metric
        value = from_main(metrics.get(key), self.trainer.processes)
        if value is None:
            self.announce(f"warning: evaluations have no {metric}, which --keep-best asks for: no checkpoint is best")
            return False
        more = {*MORE_IS_BETTER, *(self.measured.more_is_better if self.measured else ())}
        self.best = better(before, Best(metric, self.step, value, measured_on(self.config, metric)), more)
        return self.best is not before

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _save(self) -> Path | None:
        """Write a checkpoint of the state of all processes; returns its directory in the main process."""
        trainer = self.trainer
        if trainer.broken_networks():  # the last loss was finite, but the update after it was not
            raise self._divergence(f"the update of step {self.step} is not finite")
        facts = {
            "preset": self.config.preset,
            "data_digest": trainer.dataset.digest,
            "image_shape": trainer.dataset.image_shape,
            "class_names": trainer.dataset.class_names,
            **({} if trainer.dataset.scale.is_plain else {"values": trainer.dataset.scale.as_json()}),
            **({} if trainer.dataset.labels.is_plain else {"labels": trainer.dataset.labels.as_json()}),
            **({} if self.best is None else {"best": self.best.facts()}),
            "world_size": trainer.processes.world_size,
            "training_seconds": self._training_seconds(),
            "loss_scales": trainer.loss_scales(),
            "unlogged": self.logs.unlogged,
        }
        checkpoint = Checkpoint(self.step, trainer.tensors(), facts)
        with self.recorder.writing():
            saved = self.recorder.checkpoint(checkpoint)
        self.saved_step = self.step
        return saved

    def _training_seconds(self) -> float:
        return self.seconds_before + self.recorder.training_seconds

    def _divergence(self, what: str) -> DivergenceError:
        networks = self.trainer.broken_networks()
        where = f"; the weights of {' and '.join(networks)} are broken" if networks else ""
        newest = next((str(path) for path in checkpoints.checkpoint_paths(self.recorder.path)), "none yet")
        return DivergenceError(
            f"{what}{where}; lower --learning-rate or set --clip-norm, with --fresh or another --run-dir "
            f"(newest good checkpoint: {newest})"
        )


def _silent(_line: str) -> None:
    pass
