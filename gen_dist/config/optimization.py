"""Config of the optimizers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gen_dist.config.checked import Checked, at_least, finite_and_at_least
from gen_dist.errors import ConfigError

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """Optimizer of every phase, as in torch.optim."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Algorithm; the momentum of `sgd` is the first of the betas."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moments."""
    epsilon: float = 1e-8
    """Adam's term for numerical stability."""
    weight_decay: float = 0.0
    """L2 penalty (`adam`, `sgd`) or decoupled decay (`adamw`)."""
    clip_norm: float | None = None
    """Largest global L2 norm of the gradients; larger ones are scaled down to it. None does not clip."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Decay = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    lazy_scaling: bool = False
    """For phases with a penalty at every k-th of their turns, multiply the learning rate by c = k / (k + 1), and take
    the betas to the power of c, as if its steps were steps of their own (Karras et al. 2020, appendix B)."""
    discriminator_rate_factor: float = 1.0
    """Learning rate of the discriminator as a multiple of `learning_rate`, which all other networks have: two time
    scales (Heusel et al. 2017, section 2)."""
    rate_per_image: bool = False
    """The learning rate is that of a batch of one image, and multiplied by `global_batch_size` (Goyal et al. 2017)."""
    ema_decay: float | None = None
    """Decay per step of the moving average of weights, which sampling and evaluation use. None keeps no average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("ema_decay", self.ema_decay)):
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} {value} is not in [0, 1)")
        finite_and_at_least("epsilon", self.epsilon, 0.0)
        finite_and_at_least("weight_decay", self.weight_decay, 0.0)
        if not (math.isfinite(self.discriminator_rate_factor) and self.discriminator_rate_factor > 0):
            raise ConfigError(f"discriminator_rate_factor {self.discriminator_rate_factor} is not a positive number")
        at_least("warmup_steps", self.warmup_steps, 0)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm {self.clip_norm} is not positive; leave it out to switch clipping off")
