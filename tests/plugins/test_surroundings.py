"""Importing a plug-in leaves the process as it was, and a line names what it changed."""

from __future__ import annotations

import gc
import locale
import os
import resource
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from gen_dist.errors import ConfigError
from gen_dist.plugins import load, loading
from gen_dist.plugins.surroundings import SETTINGS, Watch, surroundings_kept

pytestmark = pytest.mark.usefixtures("forget", "as_it_was")

CHANGES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "arguments": ("import sys; sys.argv[:] = ['x']", "sys.argv", lambda: list(sys.argv)),
    "streams": (
        "import io, sys; sys.stdout = sys.stderr = io.StringIO()",
        "the standard streams",
        lambda: [sys.stdout, sys.stderr],
    ),
    "directory": ("import os; os.chdir('/')", "the working directory", os.getcwd),
    "new variable": ("import os; os.environ['RANK'] = '1'", "RANK", lambda: os.environ.get("RANK")),
    "lost variable": (
        "import os; os.environ.pop('GEN_DIST_CACHE')",
        "GEN_DIST_CACHE",
        lambda: os.environ["GEN_DIST_CACHE"],
    ),
    "warnings": (
        "import warnings; warnings.simplefilter('error')",
        "warnings to errors",
        lambda: list(warnings.filters),
    ),
    "dtype": (
        "import torch; torch.set_default_dtype(torch.float64)",
        "torch's default dtype",
        torch.get_default_dtype,
    ),
    "device": ("import torch; torch.set_default_device('meta')", "torch's default device", torch.get_default_device),
    "grad": ("import torch; torch.set_grad_enabled(False)", "torch's grad mode", torch.is_grad_enabled),
    "threads": ("import torch; torch.set_num_threads(7)", "torch's threads", torch.get_num_threads),
    "deterministic": (
        "import torch; torch.use_deterministic_algorithms(True)",
        "torch's deterministic mode",
        torch.get_deterministic_debug_mode,
    ),
    "anomaly": (
        "import torch; torch.autograd.set_detect_anomaly(True)",
        "torch's anomaly detection",
        torch.is_anomaly_enabled,
    ),
    "autocast": (
        "import torch; torch.set_autocast_enabled('cpu', True)",
        "torch's autocast",
        lambda: torch.is_autocast_enabled("cpu"),
    ),
    "precision": (
        "import torch; torch.set_float32_matmul_precision('medium')",
        "torch's precision of float32",
        torch.get_float32_matmul_precision,
    ),
    "new precision": (
        "import torch; torch.backends.fp32_precision = 'tf32'",
        "torch's precision of float32",
        torch.get_float32_matmul_precision,
    ),
    "benchmark": (
        "import torch; torch.backends.cudnn.benchmark = True",
        "cuDNN's benchmark mode",
        lambda: torch.backends.cudnn.benchmark,
    ),
    "denormals": (
        "import torch; torch.set_flush_denormal(True)",
        "the treatment of denormals",
        lambda: bool((torch.full((1,), sys.float_info.min, dtype=torch.float64) / 2 > 0).item()),
    ),
    "oneDNN": (
        "import torch; torch.backends.mkldnn.set_flags(False)",
        "the use of oneDNN",
        lambda: torch._C._get_mkldnn_enabled(),
    ),
    "numpy": ("import numpy; numpy.seterr(all='raise')", "NumPy's floating-point errors", np.geterr),
    "pixels": (
        "import PIL.Image; PIL.Image.MAX_IMAGE_PIXELS = 10",
        "PIL's limit of pixels",
        lambda: Image.MAX_IMAGE_PIXELS,
    ),
    "truncated": (
        "import PIL.ImageFile; PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True",
        "PIL's LOAD_TRUNCATED_IMAGES",
        lambda: ImageFile.LOAD_TRUNCATED_IMAGES,
    ),
}
"""Statements of a plug-in, the name of their change in the warning, and a function whose result must be as before."""
OF_PYTHON: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "recursion": ("import sys; sys.setrecursionlimit(60)", "the recursion limit", sys.getrecursionlimit),
    "path": ("import sys; sys.path.clear()", "sys.path", lambda: list(sys.path)),
    "no path": ("import sys; sys.path = None", "sys.path", lambda: list(sys.path)),
    "other module": (
        "import sys, types; sys.modules['json'] = types.ModuleType('json')",
        "sys.modules",
        lambda: sys.modules["json"],
    ),
    "no modules": ("import sys; sys.modules.clear()", "sys.modules", lambda: [*map(sys.modules.get, ("sys", "torch"))]),
    "finders": ("import sys; sys.meta_path.clear()", "sys.meta_path", lambda: len(sys.meta_path) > 2),
    "hooks": ("import sys; sys.path_hooks.clear()", "sys.path_hooks", lambda: list(sys.path_hooks)),
    "builtins": ("import builtins; builtins.open = None", "builtins", lambda: open),
    "signals": (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "the handlers of signals",
        lambda: signal.getsignal(signal.SIGTERM),
    ),
    "garbage": ("import gc; gc.disable()", "the collection of garbage", gc.isenabled),
    "locale": (
        "import locale; locale.setlocale(locale.LC_ALL, 'C.UTF-8')",
        "the locale",
        lambda: locale.setlocale(locale.LC_ALL),
    ),
    "mask": ("import os; os.umask(0o777)", "the permissions of new files", lambda: os.umask(os.umask(0o22))),
    "open files": (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (100, r.getrlimit(r.RLIMIT_NOFILE)[1]))",
        "the limits of resources",
        lambda: resource.getrlimit(resource.RLIMIT_NOFILE),
    ),
}
CHANGES |= OF_PYTHON


@pytest.fixture
def as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Settings of before the test; then no failing test changes those of the next one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEN_DIST_CACHE", str(tmp_path))
    before = [one.read() for one in SETTINGS]
    filters: Any = warnings.filters
    saved = list(filters)
    yield
    filters[:] = saved
    for one, value in zip(SETTINGS, before, strict=True):
        one.put_back(value)


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


SLOW = {"deterministic"}
"""torch imports its compiler to change this one."""


@pytest.mark.parametrize("case", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in CHANGES])
def test_a_plugin_leaves_the_process_as_it_was(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, name, read = CHANGES[case]
    plugin = _write(tmp_path / "rude.py", code)
    before, settings = read(), [one.read() for one in SETTINGS]
    load(plugin)
    assert read() == before
    assert not [one.name for one, value in zip(SETTINGS, settings, strict=True) if not one.is_kept(value, one.read())]
    told = [line for line in capsys.readouterr().err.splitlines() if "registers nothing" not in line]
    assert told == [
        f"warning: plug-in {plugin} changed {name} while it was imported; put back, since runs depend on that: make "
        "such a change in the function that needs it"
    ]


@pytest.mark.parametrize("case", OF_PYTHON)
def test_code_that_runs_later_leaves_the_process_alone(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, name, read = CHANGES[case]
    load(_write(tmp_path / "rude.py", f"def change():\n    {code}"))
    change, before, watch = sys.modules["gen_dist.plugins.files.rude"].change, read(), Watch()
    capsys.readouterr()
    for _ in range(2):  # a step that does it each time is told once
        change()
        watch.settle()
        assert read() == before
    told = [line for line in capsys.readouterr().err.splitlines() if "changed" in line]
    assert len(told) == 1 and told[0].startswith(f"warning: code of plug-in {tmp_path}/rude.py changed {name} and left")


def test_an_alarm_of_a_plugin_is_stopped(tmp_path: Path) -> None:
    limit_of_this_test = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        load(_write(tmp_path / "rude.py", "import signal; signal.alarm(100)"))
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *limit_of_this_test)


def test_another_print_is_no_change_that_runs_depend_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's progress bars put their own in its place."""
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", print)  # put back at the end
        load(_write(tmp_path / "rude.py", "import builtins, functools; builtins.print = functools.partial(print)"))
    assert " changed " not in capsys.readouterr().err


def test_a_plugin_may_add_to_what_others_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adds = """
import sys, types, resource
sys.path.insert(0, "/nowhere")
sys.modules["module_of_rude"] = types.ModuleType("module_of_rude")
sys.setrecursionlimit(sys.getrecursionlimit() + 1)
"""
    load(_write(tmp_path / "rude.py", adds))
    assert " changed " not in capsys.readouterr().err
    assert sys.path.pop(0) == "/nowhere"
    del sys.modules["module_of_rude"]
    sys.setrecursionlimit(sys.getrecursionlimit() - 1)


def test_code_that_torch_compiles_anew_is_no_change_of_a_plugin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compiler puts a module of the same name in place of the last one whenever it loads a graph."""
    load(_write(tmp_path / "mine.py", ""))
    name = "torch._inductor.runtime.compile_tasks.key_of_a_graph"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    watch, again = Watch(), types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, again)
    watch.settle()
    assert sys.modules[name] is again
    assert " changed " not in capsys.readouterr().err


def test_changes_of_a_plugin_that_fails_are_put_back(tmp_path: Path) -> None:
    before = torch.get_default_dtype()
    with pytest.raises(ConfigError, match=r"rude.py, line 2: ZeroDivisionError"):
        load(_write(tmp_path / "rude.py", "import torch; torch.set_default_dtype(torch.float64)\n1 / 0"))
    assert torch.get_default_dtype() == before


def test_a_package_is_put_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rude_package").mkdir()
    _write(tmp_path / "rude_package/__init__.py", "import os; os.environ['RANK'] = '3'")
    _write(tmp_path / "rude_package/parts.py", "import torch; torch.set_grad_enabled(False)")
    monkeypatch.syspath_prepend(tmp_path)
    load("rude_package.parts")
    assert torch.is_grad_enabled() and "RANK" not in os.environ
    said = capsys.readouterr().err
    assert "changed RANK while" in said and "changed torch's grad mode while" in said


def test_a_plugin_that_loads_another_one_is_not_blamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = _write(tmp_path / "other.py", "")
    load(_write(tmp_path / "first.py", f"import gen_dist.plugins; gen_dist.plugins.load({other!r})"))
    assert " changed " not in capsys.readouterr().err
    assert os.environ[loading.FILES_VARIABLE].split("\n") == [other, str(tmp_path / "first.py")]


def test_what_a_plugin_prints_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(_write(tmp_path / "loud.py", "print('hello')"))
    assert capsys.readouterr().out == ""


def test_a_setting_of_a_new_library_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = dict(sys.modules)
    for name in ("torch", "numpy", "PIL.Image", "PIL.ImageFile", "torch.backends.cudnn"):
        monkeypatch.delitem(sys.modules, name)
    with surroundings_kept("mine.py"):
        sys.modules.update(modules)
        torch.set_default_dtype(torch.float16)
        np.seterr(all="raise")
    assert torch.get_default_dtype() == torch.float32 and np.geterr()["divide"] == "warn"
    defaults = {one.name: one.default for one in SETTINGS if one.default is not None}
    assert defaults == {one.name: one.read() for one in SETTINGS if one.name in defaults}
