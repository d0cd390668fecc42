"""One trainer for generative models.

`gen_dist.train(config)` trains, `gen_dist.load(run)` gives the trained model. Both are imported at first use, so that
`import gen_dist` and every --help stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen_dist.inference.model import load
    from gen_dist.training.run import train

__all__ = ["__version__", "load", "train"]
__version__ = "0.1.0"

_HOME_OF = {"load": "gen_dist.inference.model", "train": "gen_dist.training.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gen_dist' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
