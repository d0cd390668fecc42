"""Early stopping by successive halving, asynchronous: who is not among the best at a rung trains no further."""

from __future__ import annotations

import math

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError

_SMALLEST_SHARE = 9
"""The grace period is such a part of the steps at most, so that with a factor of 3 there are two rungs or more."""


class Halving:
    """Asynchronous successive halving (ASHA, Li et al. 2020), for trials that are stopped rather than paused.

    Rungs are at the grace period and at each `factor` times as many steps. A trial goes on while it is among the best
    1 / factor, rounded up, of all that came to the highest rung that it has reached itself. That is asked at each of
    its evaluations, so that who came first does not pass for that alone.
    """

    def __init__(self, steps: int, grace_period: int, factor: float, less_is_better: bool) -> None:
        self._factor = factor
        self._sign = 1.0 if less_is_better else -1.0
        self._rungs: dict[float, dict[int, float]] = {}
        """Values of trials at each rung, the highest first; less is better."""
        count = math.ceil(math.log(steps / grace_period, factor) - 1e-9)
        for power in reversed(range(count)):
            self._rungs[grace_period * factor**power] = {}

    def goes_on(self, trial: int, step: int, value: float) -> bool:
        """Whether a trial is to train further, after an evaluation at this step."""
        reached = next((found for rung, found in self._rungs.items() if step >= rung), None)
        if reached is None:
            return True
        own = reached.setdefault(trial, self._sign * value)
        better = sum(other < own for other in reached.values())
        return better < math.ceil(len(reached) / self._factor)


def grace_period_of(config: TrainConfig, asked: int | None) -> int:
    """Steps before a trial may be stopped.

    Args:
        config: of the trials.
        asked: what the user wants; None is each evaluation's or a ninth of the steps, whichever is less, but not less
            than the warm-up, in which learning rates tell little.

    Raises:
        ConfigError: it is longer than the run.
    """
    usual = max(config.steps // _SMALLEST_SHARE, config.optimization.warmup_steps, 1)
    grace_period = min(config.evaluate_every, usual, config.steps) if asked is None else asked
    if grace_period > config.steps:
        raise ConfigError(
            f"grace_period {grace_period} is more than steps {config.steps}; use --grace-period {config.steps}"
        )
    return grace_period
