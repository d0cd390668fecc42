"""One trainer for generative models.

`gen_dist.train(config)` trains, `gen_dist.load(run)` gives the trained model. Both are imported at first use, so that
`import gen_dist` and every --help stay quick.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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


def _check_kernels() -> None:
    """Refuse another distribution's `kernels` (PyPI has one) before a missing name deep inside a run tells of it."""
    root = Path(__file__).resolve().parent.parent
    spec = find_spec("kernels")
    places = list(spec.submodule_search_locations or [spec.origin or "a built-in module"]) if spec else []
    if root / "kernels" in [Path(place).resolve() for place in places]:
        return
    found = f"is {places[0]}" if places else "is missing"
    raise ImportError(
        f"the package kernels {found}, but gen_dist needs its own in {root / 'kernels'}; "
        f"run `pip uninstall kernels`, or put ours first with PYTHONPATH={root}",
        name="kernels",
        path=places[0] if places else None,
    )


_check_kernels()
