"""Settings of libraries and of the process that runs depend on, and that a plug-in may change.

Nothing is imported to read a setting: a library that is not there yet has its own defaults.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from gen_dist.plugins import float32_precision


class Setting(NamedTuple):
    """A setting, and how it is read and written."""

    name: str
    """Name in the warning."""
    read: Callable[[], Any]
    write: Callable[[Any], object]
    library: str = ""
    """Module without which there is no such setting, if there is one."""
    default: Any = None
    """Value while the library is not imported. A setting whose value is None is not put back."""
    is_kept: Callable[[Any, Any], Any] = operator.eq
    """Function of the values before and after: false if the setting has to be put back."""

    def now(self) -> Any:
        """Value, or the default of a library that is not imported."""
        return self.read() if self._is_there() else self.default

    def put_back(self, value: Any) -> bool:
        """Set the value of before, if it has changed. True if it has."""
        if value is None or not self._is_there() or self.is_kept(value, self.read()):
            return False
        self.write(value)
        return True

    def _is_there(self) -> bool:
        return not self.library or self.library in sys.modules


def _directory() -> str | None:
    with contextlib.suppress(OSError):  # it may have been removed
        return os.getcwd()
    return None


def _warnings_as_errors() -> list[Any]:
    """Filters that turn the warnings of all modules into errors."""
    return [one for one in warnings.filters if one[0] == "error" and one[3] is None]


def _leave_warnings_as_errors(wanted: list[Any]) -> None:
    filters: Any = warnings.filters
    filters[:] = [one for one in filters if one in wanted or one not in _warnings_as_errors()]


def _torch() -> Any:
    return sys.modules["torch"]


def _set_device(name: str) -> None:
    _torch().set_default_device(None if name == "cpu" else name)


def _set_dtype(name: str) -> None:
    _torch().set_default_dtype(getattr(_torch(), name.removeprefix("torch.")))


def _set_anomaly(value: bool) -> None:
    _torch().autograd.set_detect_anomaly(value)


def _autocast() -> list[bool]:
    return [_torch().is_autocast_enabled(device) for device in ("cpu", "cuda")]


def _set_autocast(values: list[bool]) -> None:
    for device, value in zip(("cpu", "cuda"), values, strict=True):
        _torch().set_autocast_enabled(device, value)


def _keeps_denormals() -> bool:
    smallest = sys.float_info.min
    return smallest / 2 > 0.0


def _keep_denormals(value: bool) -> None:
    importlib.import_module("torch").set_flush_denormal(not value)


def _called(name: str, library: str, read: str, write: str, default: Any) -> Setting:
    """A setting that a library reads and writes by functions."""
    return Setting(
        name,
        lambda: getattr(sys.modules[library], read)(),
        lambda value: getattr(sys.modules[library], write)(value),
        library,
        default,
    )


def _held(name: str, library: str, attribute: str, default: Any) -> Setting:
    """A setting that is an attribute of a module."""
    return Setting(
        name,
        lambda: getattr(sys.modules[library], attribute),
        lambda value: setattr(sys.modules[library], attribute, value),
        library,
        default,
    )


SETTINGS = (
    Setting("sys.argv", lambda: list(sys.argv), lambda value: setattr(sys, "argv", value)),
    Setting("the working directory", _directory, os.chdir),
    Setting("warnings to errors", _warnings_as_errors, _leave_warnings_as_errors),
    Setting("the treatment of denormals", _keeps_denormals, _keep_denormals),
    Setting("torch's default dtype", lambda: str(_torch().get_default_dtype()), _set_dtype, "torch", "torch.float32"),
    Setting("torch's default device", lambda: str(_torch().get_default_device()), _set_device, "torch", "cpu"),
    _called("torch's grad mode", "torch", "is_grad_enabled", "set_grad_enabled", True),
    # Unknown until torch is imported. Training and evaluation choose their threads themselves.
    _called("torch's threads", "torch", "get_num_threads", "set_num_threads", None),
    _called("torch's deterministic mode", "torch", "get_deterministic_debug_mode", "set_deterministic_debug_mode", 0),
    Setting("torch's anomaly detection", lambda: _torch().is_anomaly_enabled(), _set_anomaly, "torch", False),
    Setting("torch's autocast", _autocast, _set_autocast, "torch", [False, False]),
    Setting(
        "torch's precision of float32",
        float32_precision.read,
        float32_precision.put_back,
        "torch",
        float32_precision.DEFAULT,
    ),
    _held("cuDNN's benchmark mode", "torch.backends.cudnn", "benchmark", False),
    _held("cuDNN's deterministic mode", "torch.backends.cudnn", "deterministic", False),
    _held("the use of cuDNN", "torch.backends.cudnn", "enabled", True),
    _held("the use of oneDNN", "torch.backends.mkldnn", "enabled", True),
    Setting(
        "NumPy's floating-point errors",
        lambda: sys.modules["numpy"].geterr(),
        lambda value: sys.modules["numpy"].seterr(**value),
        "numpy",
        {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
    ),
    _held("PIL's limit of pixels", "PIL.Image", "MAX_IMAGE_PIXELS", 1024 * 1024 * 1024 // 4 // 3),
    _held("PIL's LOAD_TRUNCATED_IMAGES", "PIL.ImageFile", "LOAD_TRUNCATED_IMAGES", False),
)
