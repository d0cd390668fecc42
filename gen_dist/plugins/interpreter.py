"""Settings of Python and of the process without which no other code works, and that a plug-in may change.

A library may add to a list, such as `sys.path`. It is kept as long as it has all that it had.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import os
import signal
import sys
import threading
from importlib import machinery
from typing import Any

from gen_dist.plugins.settings import Setting

_FINDERS = (machinery.BuiltinImporter, machinery.FrozenImporter, machinery.PathFinder)
"""Without these there are no imports. Others come and go: importing setuptools removes its own."""
_LIMITS = ("NOFILE", "FSIZE", "AS", "DATA", "CPU", "NPROC", "STACK")


def _has_all(before: list[Any], now: Any) -> bool:
    return isinstance(now, list) and all(one in now for one in before)


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _set_paths(before: list[str]) -> None:
    now = _list(sys.path) or []
    sys.path = [*(one for one in now if one not in before), *before]


def _hooks() -> list[Any]:
    return list(sys.path_hooks)


def _set_hooks(before: list[Any]) -> None:
    sys.path_hooks[:] = [*before, *(one for one in sys.path_hooks if one not in before)]
    sys.path_importer_cache.clear()  # it remembers places that no hook took


def _finders() -> list[Any]:
    return [one for one in sys.meta_path if one in _FINDERS]


def _set_finders(before: list[Any]) -> None:
    sys.meta_path[:] = [*(one for one in sys.meta_path if one not in before), *before]


def _has_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    changed = [name for name, value in before.items() if now.get(name, _MISSING) is not value]
    return all(_is_foreign(name) or (name == "print" and callable(now.get(name))) for name in changed)


_MISSING = object()
_GENERATED = "torch._inductor.runtime.compile_tasks."


def _is_foreign(name: str) -> bool:
    """True of names that other programs set: a prompt its last result, setuptools its own distutils, and torch's
    compiler what it generates, each time anew. Ray's progress bars have a `print` of their own, which works as well."""
    return name == "_" or name.partition(".")[0] == "distutils" or name.startswith(_GENERATED)


def _modules() -> dict[str, Any]:
    return dict(sys.modules)


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals() if number not in _FIXED}


_FIXED = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")}


def _set_handlers(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _has_handlers(before: dict[int, Any], now: dict[int, Any]) -> bool:
    # Only the main thread may set one, or give it back.
    return before == now or threading.current_thread() is not threading.main_thread()


def _has_alarm() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _set_alarm(wanted: bool) -> None:
    if not wanted:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _collector() -> tuple[bool, tuple[int, ...], int]:
    return gc.isenabled(), gc.get_threshold(), gc.get_debug()


def _set_collector(before: tuple[bool, tuple[int, ...], int]) -> None:
    (gc.enable if before[0] else gc.disable)()
    gc.set_threshold(*before[1])
    gc.set_debug(before[2])


def _locale() -> str:
    import locale

    return locale.setlocale(locale.LC_ALL)


def _set_locale(before: str) -> None:
    import locale

    locale.setlocale(locale.LC_ALL, before)


def _mask() -> int:
    mask = os.umask(0o077)  # it can be read by setting it alone; a file of another thread is private meanwhile
    os.umask(mask)
    return mask


def _limits() -> dict[str, tuple[int, int]]:
    import resource

    return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in _LIMITS}


def _allow_as_much(before: dict[str, tuple[int, int]], now: dict[str, tuple[int, int]]) -> bool:
    return all(_is_as_much(now[name][0], soft) for name, (soft, _) in before.items())


def _is_as_much(now: int, before: int) -> bool:
    return now == -1 or (before != -1 and now >= before)


def _set_limits(before: dict[str, tuple[int, int]]) -> None:
    import resource

    for name, (soft, _) in before.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        now, hard = resource.getrlimit(kind)
        if not _is_as_much(now, soft):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(kind, (soft if _is_as_much(hard, soft) else hard, hard))


SETTLED: tuple[Setting, ...] = (
    # First: reading the others takes some calls.
    Setting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit, is_kept=lambda old, now: now >= old),
    Setting("builtins", lambda: dict(vars(builtins)), vars(builtins).update, is_kept=_has_same),
    Setting("sys.modules", _modules, lambda before: sys.modules.update(before), is_kept=_has_same),
    Setting("sys.meta_path", _finders, _set_finders, is_kept=_has_all),
    Setting("sys.path_hooks", _hooks, _set_hooks, is_kept=_has_all),
    Setting("sys.path", lambda: _list(sys.path), _set_paths, is_kept=_has_all),
    Setting("the collection of garbage", _collector, _set_collector),
    Setting("the locale", _locale, _set_locale),
)
if os.name == "posix":
    SETTLED += (
        Setting("the permissions of new files", _mask, os.umask),
        Setting("the limits of resources", _limits, _set_limits, is_kept=_allow_as_much),
    )
"""Settings that no command of ours and no library of it changes."""
SETTINGS = (*SETTLED, Setting("the handlers of signals", _handlers, _set_handlers, is_kept=_has_handlers))
if hasattr(signal, "getitimer"):
    SETTINGS += (Setting("the alarm", _has_alarm, _set_alarm),)
