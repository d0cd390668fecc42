"""Sweeps with figures of trials that never ran."""

import math
from collections.abc import Sequence
from pathlib import Path

from gen_dist.launch.sweep.results import Sweep, choose_metric, make_trials
from gen_dist.launch.sweep.space import draw_trials, parse_space, trial_configs
from gen_dist.presets import get_preset

VAE = get_preset("vae-mnist")


def sweep_of(
    path: Path, words: Sequence[str], count: int, preset: str = "vae-mnist", metric: str | None = None
) -> Sweep:
    """A sweep that has ended: trials that finished, were stopped, and one that failed."""
    config = get_preset(preset)
    space = parse_space(words, config)
    draws = draw_trials(space, 0, count)
    trials = make_trials(path, draws, trial_configs(config, draws))
    sweep = Sweep(path, space, choose_metric(config, metric, None), 900, 100, trials)
    for trial in trials:
        badness = 10 * abs(math.log10(trial.config.learning_rate / 3e-3)) + trial.index / 10
        steps = range(100, 1000 if badness < 8 else 200 if badness > 12 else 400, 100)
        sign = 1 if sweep.metric.mode == "min" else -1
        trial.history = [(step, 100 + sign * (badness + 3000 / step)) for step in steps]
        trial.step, trial.status = steps[-1], "finished" if steps[-1] == 900 else "stopped"
    trials[1].status, trials[1].reason, trials[1].history = "failed", "loss is nan at step 7; lower --lr", []
    return sweep


SPACES = [
    ["learning_rate=log:1e-4:1e-1"],
    ["learning_rate=log:1e-4:1e-1", "optimizer=adam,adamw,sgd"],
    ["learning_rate=log:1e-4:1e-1", "hidden_sizes=400+200,200+400,200", "latent_dim=log:2:64"],
    ["learning_rate=log:1e-4:1e-1", "latent_dim=int:2:64", "betas=0.9+0.98,0.5+0.9", "clip_norm=none,1"],
]
