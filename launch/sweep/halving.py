"""Early stopping by asynchronous successive halving: a trial that is not among the best at a rung stops."""

from __future__ import annotations

import math

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError

_LEAST_PERIODS = 9
"""Grace periods in a run, at least: with a factor of 3 that gives two rungs."""


class Halving:
    """Asynchronous successive halving (ASHA, Li et al. 2020), for trials that are stopped rather than paused.

    Rungs are at the grace period and at each `factor` times as many steps. A trial continues while it is among the best
    1 / factor, rounded up, of all trials at the highest rung that it has reached. Each evaluation asks again, so that
    the first trial at a rung does not pass for being first.
    """

    def __init__(self, steps: int, grace_period: int, factor: float, less_is_better: bool) -> None:
        self._factor = factor
        self._sign = 1.0 if less_is_better else -1.0
        self._rungs: dict[float, dict[int, float]] = {}
        """Values of trials at each rung, the highest first; less is better."""
        count = math.ceil(math.log(steps / grace_period, factor) - 1e-9)
        for power in reversed(range(count)):
            self._rungs[grace_period * factor**power] = {}

    def continues(self, trial: int, step: int, value: float) -> bool:
        """Return True if a trial should train further after an evaluation at this step."""
        reached = next((found for rung, found in self._rungs.items() if step >= rung), None)
        if reached is None:
            return True
        own = reached.setdefault(trial, self._sign * value)
        better = sum(other < own for other in reached.values())
        return better < math.ceil(len(reached) / self._factor)


def grace_period_of(config: TrainConfig, asked: int | None) -> int:
    """Steps before a trial may be stopped.

    Args:
        config: config of the trials.
        asked: the user's choice. None is evaluate_every, or a ninth of the steps if that is less. A ninth that lies
            within the warm-up is extended to its end, because losses say little before it.

    Raises:
        ConfigError: the grace period is longer than the run.
    """
    usual = max(config.steps // _LEAST_PERIODS, config.optimization.warmup_steps, 1)
    grace_period = min(config.evaluate_every, usual, config.steps) if asked is None else asked
    if grace_period > config.steps:
        raise ConfigError(
            f"grace_period {grace_period} is more than steps {config.steps}; use --grace-period {config.steps}"
        )
    return grace_period
