"""Settings of the process that runs depend on, and that a plug-in may change while it is imported: they are put back.

A line on standard error names the changes. Nothing is imported to read a setting: a library that is not there yet has
its own defaults.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gen_dist.plugins import float32_precision
from gen_dist.startup import forgiving, tell

_VARIABLES = (
    *("ACCELERATE_", "CUDA_VISIBLE_DEVICES", "GEN_DIST_", "LOCAL_", "MASTER_", "MPLBACKEND"),
    *("OMPI_COMM_WORLD_", "PMI_", "RANK", "TQDM_", "WORLD_SIZE"),
)
"""Environment variables, or their first letters, that decide how a run goes."""
_LOADED_FILES = "GEN_DIST_PLUGIN_FILES"
"""The one of ours that a plug-in may change: it loads another one."""


@contextlib.contextmanager
def surroundings_kept(plugin: str) -> Iterator[None]:
    """Context manager for the import of a plug-in. At its end all settings are as before, and a warning names changes.

    Within it, standard output is standard error: programs read the results of commands from standard output.
    """
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdout = sys.stderr
    variables = _variables()
    before = [one.read() if one.library in sys.modules else one.default for one in _SETTINGS]
    try:
        yield
    finally:
        changed = [*_streams_put_back(streams), *_variables_put_back(variables)]
        for one, value in zip(_SETTINGS, before, strict=True):
            if one.library in sys.modules and value is not None and one.read() != value:
                one.write(value)
                changed.append(one.name)
        if changed:
            tell(
                f"warning: plug-in {plugin} changed {', '.join(changed)} while it was imported; put back, since runs "
                "depend on that: make such a change in the function that needs it"
            )


def _streams_put_back(streams: tuple[Any, Any, Any]) -> list[str]:
    """Put the standard streams back, and open those again that were closed. Name them if they were changed."""
    changed = (sys.stdin, sys.stdout, sys.stderr) != (streams[0], streams[2], streams[2])
    sys.stdin, sys.stdout, sys.stderr = streams
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(getattr(sys, name), "closed", False):
            setattr(sys, name, forgiving(getattr(sys, name), number, "backslashreplace"))
            changed = True
    return ["the standard streams"] if changed else []


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES) and name != _LOADED_FILES}


def _variables_put_back(before: dict[str, str]) -> list[str]:
    """Give environment variables their values of before, and return the names of those that had others."""
    after = _variables()
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    return changed


class _Setting(NamedTuple):
    name: str
    """Name in the warning."""
    read: Callable[[], Any]
    write: Callable[[Any], object]
    library: str = "sys"
    """Module without which there is no such setting."""
    default: Any = None
    """Value while the library is not imported. A setting whose value is None is not put back."""


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


def _called(name: str, library: str, read: str, write: str, default: Any) -> _Setting:
    """A setting that a library reads and writes by functions."""
    return _Setting(
        name,
        lambda: getattr(sys.modules[library], read)(),
        lambda value: getattr(sys.modules[library], write)(value),
        library,
        default,
    )


def _held(name: str, library: str, attribute: str, default: Any) -> _Setting:
    """A setting that is an attribute of a module."""
    return _Setting(
        name,
        lambda: getattr(sys.modules[library], attribute),
        lambda value: setattr(sys.modules[library], attribute, value),
        library,
        default,
    )


_SETTINGS = (
    _Setting("sys.argv", lambda: list(sys.argv), lambda value: setattr(sys, "argv", value)),
    _Setting("the working directory", _directory, os.chdir),
    _Setting("warnings to errors", _warnings_as_errors, _leave_warnings_as_errors),
    _Setting("the treatment of denormals", _keeps_denormals, _keep_denormals),
    _Setting("torch's default dtype", lambda: str(_torch().get_default_dtype()), _set_dtype, "torch", "torch.float32"),
    _Setting("torch's default device", lambda: str(_torch().get_default_device()), _set_device, "torch", "cpu"),
    _called("torch's grad mode", "torch", "is_grad_enabled", "set_grad_enabled", True),
    # Unknown until torch is imported. Training and evaluation choose their threads themselves.
    _called("torch's threads", "torch", "get_num_threads", "set_num_threads", None),
    _called("torch's deterministic mode", "torch", "get_deterministic_debug_mode", "set_deterministic_debug_mode", 0),
    _Setting("torch's anomaly detection", lambda: _torch().is_anomaly_enabled(), _set_anomaly, "torch", False),
    _Setting("torch's autocast", _autocast, _set_autocast, "torch", [False, False]),
    _Setting(
        "torch's precision of float32",
        float32_precision.read,
        float32_precision.put_back,
        "torch",
        float32_precision.DEFAULT,
    ),
    _held("cuDNN's benchmark mode", "torch.backends.cudnn", "benchmark", False),
    _Setting(
        "NumPy's floating-point errors",
        lambda: sys.modules["numpy"].geterr(),
        lambda value: sys.modules["numpy"].seterr(**value),
        "numpy",
        {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
    ),
    _held("PIL's limit of pixels", "PIL.Image", "MAX_IMAGE_PIXELS", 1024 * 1024 * 1024 // 4 // 3),
    _held("PIL's LOAD_TRUNCATED_IMAGES", "PIL.ImageFile", "LOAD_TRUNCATED_IMAGES", False),
)
