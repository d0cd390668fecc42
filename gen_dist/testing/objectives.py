"""Checks of objectives: gradients, noise, state, and the ways to compute a step that have to agree."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Mapping
from types import FrameType, MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gen_dist.config import NetworkConfig, ObjectiveConfig, RoleName
from gen_dist.inference.export import _parts_of, _program
from gen_dist.inference.model import GenerativeModel
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.testing.beside import started_beside
from gen_dist.testing.compiled import check_compiled_equals_eager
from gen_dist.testing.graph import generator_states, leaves_of, rounding_share
from gen_dist.testing.place import place_of
from gen_dist.testing.report import Announce, Check, Failure, Result, Skipped, nobody, raise_failures, run_checks
from gen_dist.testing.tape import ComparingRecorder, device_noise_on_cpu
from gen_dist.testing.trial import ObjectiveTrial, compare_trainings, losses, run_steps, state_of
from gen_dist.testing.two_processes import as_json, check_two_processes_equal_one
from gen_dist.training.trainer import Trainer

LEARNING_RATE = 2e-4
"""A small learning rate of Adam's, as GANs have it."""


def check_every_phase_trains_networks_of_its_own(trial: ObjectiveTrial) -> None:
    """Each phase trains at least one weight, and no weight has two optimizers."""
    objective = trial.trainer().objective
    phases = objective.phases()
    if not phases:
        raise Failure(f"{type(objective).__name__} has no phases, so it trains nothing")
    owners: dict[int, str] = {}
    for name, phase in phases.items():
        if missing := [network for network in phase.trains if network not in objective.networks]:
            raise Failure(f"phase {name} trains {missing[0]!r}; there are {', '.join(objective.networks)}")
        parameters = [p for network in phase.trains for p in objective.networks[network].parameters()]
        if not any(p.requires_grad for p in parameters):
            raise Failure(f"phase {name} trains nothing: name networks with weights in its `trains`")
        for parameter in parameters:
            if owners.setdefault(id(parameter), name) != name:
                raise Failure(f"phases {owners[id(parameter)]} and {name} train one weight with two optimizers")


def check_the_loss_is_a_number(trial: ObjectiveTrial) -> None:
    """Losses are float32 and finite, and logs are detached."""
    for one in trial.forwards:
        loss = one.result.loss
        if loss.ndim or loss.dtype != torch.float32:
            kind = str(loss.dtype).removeprefix("torch.")
            raise Failure(f"phase {one.phase_name}: the loss is {kind} {list(loss.shape)}, not one float32 number")
        if not bool(loss.isfinite()):
            raise Failure(f"phase {one.phase_name}: the loss is {float(loss.detach())} on random images")
        if attached := [name for name, value in one.result.logs.items() if value.requires_grad]:
            raise Failure(f"phase {one.phase_name}: log {attached[0]!r} has a graph; detach it")


def check_every_term_of_the_loss_has_a_gradient(trial: ObjectiveTrial) -> None:
    """No value that depends on trained weights enters the loss without its gradient."""
    for one in trial.forwards:
        if one.phase.stops_gradients:
            continue
        if cuts := one.watch.cuts_before(one.result.loss):
            raise Failure(
                f"phase {one.phase_name}: the loss depends on {', '.join(one.phase.trains)} through a value without "
                f"gradient, made at {', '.join(cuts)} (no_grad, detach or item); keep its graph, or give the reason in "
                "the phase's `stops_gradients`"
            )


def check_gradients_reach_every_trained_weight(trial: ObjectiveTrial) -> None:
    """Each weight that a phase trains is part of the graph of its loss."""
    for one in trial.forwards:
        if missing := [name for name, gradient in one.gradients.items() if gradient is None]:
            raise Failure(
                f"phase {one.phase_name} trains {missing[0]}, on which its loss does not depend"
                + (f" (nor on {len(missing) - 1} more)" if len(missing) > 1 else "")
            )


def check_no_gradient_reaches_another_phase(trial: ObjectiveTrial) -> None:
    """The graph of a phase ends at the weights that the phase trains, and carried tensors have no graph."""
    for one in trial.forwards:
        if attached := [name for name, value in one.result.carried.items() if value.requires_grad]:
            raise Failure(
                f"phase {one.phase_name} carries {attached[0]!r} with the graph of {', '.join(one.phase.trains)}: the "
                "next phase's gradient would flow into it; carry it detached"
            )
        ours = set(map(id, one.trained.values()))
        others = [
            leaf for leaf in leaves_of(one.result.loss) if isinstance(leaf, nn.Parameter) and id(leaf) not in ours
        ]
        known = {id(p): name for name, p in one.phase.objective.networks.named_parameters()}
        if named := [known[id(leaf)] for leaf in others if id(leaf) in known]:
            raise Failure(f"phase {one.phase_name}: its gradient reaches {named[0]}, which it does not train")


def check_the_forward_pass_stays_within_the_networks(trial: ObjectiveTrial) -> None:
    """Only modules of the phase are called, so processes average their gradients and checkpoints have their weights."""
    for one in trial.forwards:
        for place, name in one.modules.others.items():
            raise Failure(
                f"{place}: phase {one.phase_name} calls a {name} that is not in the objective's `networks`: it is "
                "neither trained nor averaged over processes nor saved; add it to `networks`"
            )


def check_noise_is_keyed(trial: ObjectiveTrial) -> None:
    """Phases draw nothing from the global generators of torch, numpy and Python."""
    trainer = trial.trainer()
    before = generator_states()
    run_steps(trainer, 0, trial.few_steps)
    if generator_states() == before:
        return
    place = _where(lambda: run_steps(trainer, 0, 1), generator_states)
    raise Failure(
        f"{place or 'a phase'}: a draw from a global generator; draw with gen_dist.kernels.normal and a batch's key, "
        "so that a resumed run and other processes draw the same"
    )


def _where(work: Callable[[], object], state: Callable[[], Any]) -> str | None:
    """Place of the part's code after which a state has changed for the first time."""
    found: list[str | None] = []
    before = state()

    def note(frame: FrameType, event: str, _value: Any) -> None:
        if not found and event in ("return", "c_return") and state() != before:
            found.append(place_of(frame))

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(previous)
    return found[0] if found else None


def check_updates_are_larger_than_the_spacing_of_the_weights(trial: ObjectiveTrial) -> None:
    """An update of Adam's at a learning rate of 2e-4 is not lost to rounding."""
    for one in trial.forwards:
        for name, parameter in one.trained.items():
            gradient = one.gradients[name]
            if gradient is None:
                continue
            if (lost := rounding_share(parameter, gradient, LEARNING_RATE)) > 0.02:
                kind = str(parameter.dtype).removeprefix("torch.")
                raise Failure(
                    f"{name} is {kind}: rounding changes an update of {LEARNING_RATE:g} by {lost:.0%}; keep weights in "
                    "float32, and leave lower precision to --precision bf16"
                )


def check_changing_buffers_are_saved(trial: ObjectiveTrial) -> None:
    """No buffer outside the checkpoint changes in training."""
    trainer = trial.trainer()
    objective = trainer.objective
    saved = set(objective.networks.state_dict(keep_vars=True).keys())
    before = {name: value.clone() for name, value in objective.named_buffers()}
    run_steps(trainer, 0, trial.few_steps)
    for name, value in objective.named_buffers():
        if name.removeprefix("networks.") not in saved and not torch.equal(before[name], value):
            raise Failure(
                f"buffer {name} of {type(objective).__name__} changes in training and is in no checkpoint; register it "
                "in a network, without persistent=False"
            )


def check_modules_keep_no_state(trial: ObjectiveTrial) -> None:
    """No attribute of a module changes from step to step: it would be lost at a resume, and constant in a recording."""
    trainer = trial.trainer()
    phases = [turn.phase for turn in trainer._turns.values()]
    modules = {id(module): module for root in (trainer.objective, *phases) for module in root.modules()}
    run_steps(trainer, 0, 1)  # what a first step makes for good is no state
    before = {key: _attributes(module) for key, module in modules.items()}
    run_steps(trainer, 1, 1 + trial.few_steps)
    for key, module in modules.items():
        for name, value in _attributes(module).items():
            if name not in before[key] or not _same(before[key][name], value):
                raise Failure(
                    f"{type(module).__name__}.{name} changes in a step, and no checkpoint has it; keep it in a buffer "
                    "of a network, or carry it to later phases in TurnResult.carried"
                )


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, Tensor | int | float | str | list | tuple | type(None))
    }


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and (first is second or bool(first == second))


def check_a_recorded_step_equals_a_launched_one(trial: ObjectiveTrial) -> None:
    """Steps replayed from a tape, which knows tensors alone as a CUDA graph does, have the same bits."""
    steps = 4 * int(np.lcm.reduce(trial.config.objective.periods))
    with device_noise_on_cpu():
        recorded = trial.trainer(ComparingRecorder())
        plain = trial.trainer()
        plain._schedule = type(plain._schedule)(plain.config, plain.processes.device, in_tensors=True)
        found, wanted = run_steps(recorded, 0, steps), run_steps(plain, 0, steps)
    _equal_bits("the recorded steps", state_of(recorded), state_of(plain))
    if losses(found) != losses(wanted):
        raise Failure("the recorded steps have other losses than the launched ones")


def check_two_runs_of_one_config_are_equal(trial: ObjectiveTrial) -> None:
    """A run depends on its config alone, not on global generators or on what ran before."""
    first = trial.trainer()
    run_steps(first, 0, trial.few_steps)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    try:
        second = trial.trainer()
        run_steps(second, 0, trial.few_steps)
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
    _equal_bits("a second run of the same config", state_of(second), state_of(first))


def check_resume_is_bit_equal(trial: ObjectiveTrial) -> None:
    """A run that is resumed from its checkpoint equals one that was not stopped."""
    middle, end = trial.few_steps, 2 * trial.few_steps
    whole = trial.trainer()
    run_steps(whole, 0, middle)
    tensors = {
        group: {name: value.clone() for name, value in named.items()} for group, named in whole.tensors().items()
    }
    facts = {"data_digest": trial.dataset.digest, "loss_scales": whole.loss_scales()}
    wanted = losses(run_steps(whole, middle, end))
    resumed = trial.trainer()
    resumed.load(Checkpoint(middle, tensors, facts))
    if (found := losses(run_steps(resumed, middle, end))) != wanted:
        raise Failure(f"the resumed run has loss {found[-1]}, the uninterrupted one {wanted[-1]}")
    _equal_bits("the resumed run", state_of(resumed), state_of(whole))


def _equal_bits(what: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if other := [name for name in wanted if not torch.equal(found[name], wanted[name])]:
        raise Failure(f"{what} has other values of {other[0]}" + (f" and {len(other) - 1} more" if other[1:] else ""))


def check_micro_batches_equal_the_batch(trial: ObjectiveTrial) -> None:
    """Gradients added up over micro-batches are those of the whole batch."""
    if trial.has_batch_statistics:
        raise Skipped("batch normalization has the statistics of each micro-batch, as in the papers")
    parts = trial.trainer(accumulation=3)
    logs = run_steps(parts, 0, trial.few_steps)
    compare_trainings(trial, "micro-batches", logs, state_of(parts))


def check_the_model_keeps_its_shapes(trial: ObjectiveTrial) -> None:
    """`encode`, `decode`, `pixels` and `evaluate` give what the config and the image shape say."""
    model = _model(trial, trial.trained)
    objective, batch = model.objective, trial.batch(rows=3)
    with torch.no_grad():
        if objective.encodes:
            latents, logvar = model.encode(batch.images)
            if logvar is not None and logvar.shape != latents.shape:
                raise Failure(f"encode: mean {list(latents.shape)} and log-variance {list(logvar.shape)} differ")
        if objective.generates or not objective.encodes:
            latents = model.prior_latents(3)
        pixels = objective.pixels(objective.decode(latents, batch.labels if objective.conditional else None))
        if tuple(pixels.shape[1:]) != trial.image_shape or not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise Failure(f"pixels of {list(pixels.shape)} are not intensities in 0..1 of [3, {trial.image_shape}]")
        figures = objective.evaluate(batch)
    if tuple(figures) != (names := trial.config.objective.test_metrics):
        raise Failure(f"evaluate gives {', '.join(figures)}; the config's test_metrics are {', '.join(names)}")
    if wrong := [name for name, value in figures.items() if value.shape != (3,)]:
        raise Failure(f"evaluate gives {wrong[0]} as {list(figures[wrong[0]].shape)}, not one value an image")


def check_export_equals_the_model(trial: ObjectiveTrial) -> None:
    """Exported programs compute what the model does, for any number of images."""
    model = _model(trial, trial.trained)
    for one in _parts_of(model, "torch-export", ()):
        program = _program(one).module()
        for rows in (1, 3):
            inputs = [
                torch.zeros(rows, *port.shape, dtype=torch.int64)
                if port.dtype == "int64"
                else torch.rand(rows, *port.shape, generator=torch.Generator().manual_seed(rows))
                for port in one.part.inputs
            ]
            with torch.no_grad():
                found, wanted = program(*inputs), one.function(*inputs)
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)), strict=True):
                if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
                    raise Failure(
                        f"the exported {one.part.name} differs from the model by {float((a - b).abs().max()):.2g}"
                    )


def _model(trial: ObjectiveTrial, trainer: Trainer) -> GenerativeModel:
    import copy

    objective = copy.deepcopy(trainer.best_objective).eval()
    return GenerativeModel(objective, trainer.config, trial.image_shape, trial.dataset.class_names)


_GRADIENTS = "every term of the loss has a gradient"
_ROUNDED = "updates are larger than the spacing of the weights"
_STATE = ("changing buffers are saved", "modules keep no state")
_HIDDEN = (*_STATE, "noise is keyed", "a recorded step equals a launched one")
OBJECTIVE_CHECKS = (
    Check(check_every_phase_trains_networks_of_its_own),
    Check(check_the_loss_is_a_number),
    Check(check_the_forward_pass_stays_within_the_networks),
    Check(check_every_term_of_the_loss_has_a_gradient),
    Check(check_no_gradient_reaches_another_phase),
    Check(check_gradients_reach_every_trained_weight, (_GRADIENTS, "the forward pass stays within the networks")),
    Check(check_noise_is_keyed),
    Check(check_updates_are_larger_than_the_spacing_of_the_weights),
    Check(check_changing_buffers_are_saved),
    Check(check_modules_keep_no_state),
    Check(check_a_recorded_step_equals_a_launched_one, (*_STATE, "noise is keyed")),
    Check(check_two_runs_of_one_config_are_equal, _HIDDEN),
    Check(check_resume_is_bit_equal, _HIDDEN),
    Check(check_micro_batches_equal_the_batch, (*_HIDDEN, _ROUNDED)),
    Check(check_the_model_keeps_its_shapes),
    Check(check_export_equals_the_model),
)
"""Checks that take about a second together, in this process."""
SLOW_OBJECTIVE_CHECKS = (
    Check(check_two_processes_equal_one, (*_HIDDEN, _ROUNDED, "micro batches equal the batch")),
    Check(check_compiled_equals_eager, (*_HIDDEN, _ROUNDED)),
)
"""Checks that take up to a minute of one core together; one starts two processes, the other compiles."""


def check_objective(
    objective: ObjectiveConfig,
    network: NetworkConfig | None = None,
    *,
    roles: Mapping[RoleName, NetworkConfig] = MappingProxyType({}),
    image_shape: tuple[int, int, int] = (1, 28, 28),
    slow: bool = True,
    announce: Announce = nobody,
) -> list[Result]:
    """Check an objective in small runs on random images.

    Args:
        objective: its config.
        network: a small network for it; None is a fully connected one.
        roles: networks of single roles, such as `{"discriminator": MyConfig()}`.
        image_shape: (C, H, W) of the images.
        slow: also compile it, and train it in two processes: up to a minute of one core.
        announce: takes each check as it begins, and its result.

    Raises:
        Failure: a line for each check that failed.
    """
    trial = ObjectiveTrial(objective, network, image_shape, roles)
    checks = [*OBJECTIVE_CHECKS, *(SLOW_OBJECTIVE_CHECKS if slow else ())]
    with contextlib.ExitStack() as stack:
        if slow:  # most of their time is that of imports; what hinders them, the check says
            with contextlib.suppress(Exception):
                trial.beside = stack.enter_context(started_beside(as_json(trial)))
        results = run_checks(objective.kind or type(objective).__name__, checks, trial, announce)
    raise_failures(results)
    return results
