"""One trainer for generative models: autoencoders, VAEs and GANs.

    outcome = gen_dist.train("vae-mnist")
    images = gen_dist.load(outcome.run_path).sample(16)

Options have the names of the command line: `gen_dist.train(gen_dist.preset("vae-mnist").with_options(steps=200))`.
Images may be an argument: `gen_dist.train(config, data=array)`.
Each public name is imported at its first use, so that `import gen_dist` and every --help stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen_dist.config import TrainConfig
    from gen_dist.inference.loading import load
    from gen_dist.presets import get_preset as preset
    from gen_dist.training.run import train

__all__ = ["TrainConfig", "__version__", "load", "preset", "train"]
__version__ = "0.1.0"

_HOMES = {
    "TrainConfig": ("gen_dist.config", "TrainConfig"),
    "load": ("gen_dist.inference.loading", "load"),
    "preset": ("gen_dist.presets", "get_preset"),
    "train": ("gen_dist.training.run", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gen_dist' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
