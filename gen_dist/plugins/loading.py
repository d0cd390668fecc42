"""Loading of plug-ins: Python files and modules from outside the package that register parts of their own.

A single file becomes the module `gen_dist.plugins.files.NAME`, whose classes are named and pickled as those of any
module. Its content is kept, since a run directory and other hosts get a copy of it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import linecache
import os
import pkgutil
import re
import sys
import threading
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gen_dist.errors import ConfigError, PluginError
from gen_dist.files import read_regular, temporary_directory
from gen_dist.plugins.entry_points import entry_points
from gen_dist.plugins.neighbours import uncovered_imports
from gen_dist.plugins.surroundings import surroundings_kept
from gen_dist.plugins.tables import FILES, has_registered, registering
from gen_dist.startup import tell

FILES_VARIABLE = "GEN_DIST_PLUGIN_FILES"
"""Environment variable by which processes that this one starts find the single files, one a line."""


@dataclass(frozen=True)
class Plugin:
    """A plug-in as a config records it."""

    name: str
    """Name of its file, such as `my_gan.py`, or of its module, such as `my_package.gan`."""
    sha256: str
    """Digest of the file, or of all Python files of the module or package."""


@dataclass(frozen=True)
class _Loaded:
    plugin: Plugin
    module: str
    place: str
    """Path of the file, or name of the module, in errors."""
    content: bytes | None
    """Content of a single file."""
    is_chosen: bool
    """True if a user named it for this process: it then stands for other versions of it, which runs recorded."""


_until_exit = contextlib.ExitStack()
atexit.register(_until_exit.close)
_loaded: dict[str, _Loaded] = {}
_has_searched = False
_lock = threading.RLock()
"""Held while plug-ins are loaded: another thread must not take one for loaded whose code still runs."""


def load(word: str) -> Plugin:
    """Load a plug-in for this process, and return its record for `TrainConfig.plugins`. The second time does nothing.

    Args:
        word: path of a Python file, or name of a module that can be imported.

    Raises:
        PluginError: there is no such file or module, it fails, or another version of it is loaded. One line with the
            file's line that failed.
    """
    is_file = word.endswith(".py") or os.sep in word
    with _lock:
        plugin = _load_file(Path(word).expanduser(), True) if is_file else _load_module(word, True)
        known = _loaded[plugin.name]
    if not has_registered(plugin.name, known.module):
        tell(f"warning: plug-in {word} registers nothing")
    return plugin


def load_installed() -> None:
    """Load the entry points of installed packages, once. One that fails is left out with a warning."""
    global _has_searched
    with _lock:
        if _has_searched:
            return
        _has_searched = True
        for name in sorted(set(entry_points())):
            try:
                _load_module(name, False)
            except PluginError as error:
                tell(f"warning: {error}; it is left out")


@functools.cache
def find_parts(folder: str) -> None:
    """Import every module of a package, so that its parts are registered, and installed plug-ins. Once a package.

    Args:
        folder: name of the package, such as `gen_dist.evaluation.metrics`.
    """
    for module in pkgutil.iter_modules(importlib.import_module(folder).__path__):
        importlib.import_module(f"{folder}.{module.name}")
    load_installed()


def load_recorded(records: Iterable[Plugin], source: str) -> None:
    """Load the plug-ins that a config names, unless they are loaded: single files from the copies beside it.

    Args:
        records: of the config.
        source: file of the config, such as `runs/x/config.json`, or another name of it in errors.

    Raises:
        PluginError: one is missing, fails, or has other content than recorded, unless a user chose that one.
    """
    directory = Path(source).parent if Path(source).is_file() else None
    if directory is not None and directory.parent.name == "checkpoints":
        directory = directory.parent.parent
        records = _of_run(records, directory / "config.json")
    for record in records:
        with _lock:
            if record.name not in _loaded:
                _load_record(record, directory, source)
            known = _loaded[record.name]
        if known.plugin.sha256 != record.sha256 and not known.is_chosen:
            raise PluginError(
                f"plug-in {record.name} of {source} has SHA-256 {record.sha256[:12]}, but {known.place} has "
                f"{known.plugin.sha256[:12]}, and a process holds one version; --plugin {known.place} reads all with "
                "that one, and training goes on with changed code under --accept-changed-plugins as well"
            )


def plugins_of(parts: Iterable[object]) -> tuple[Plugin, ...]:
    """Records of the loaded plug-ins that define the classes of some objects."""
    modules = {type(part).__module__ for part in parts}
    return tuple(one.plugin for one in _loaded.values() if any(_is_within(name, one.module) for name in modules))


def place_within(module: str, file: str) -> str | None:
    """The path of a plug-in's file as it was named, if a module with this file is of a loaded plug-in."""
    for known in _loaded.values():
        if _is_within(module, known.module):
            return known.place if known.content is not None else file
    return None


def place_of_file(file: str) -> str | None:
    """As `place_within`, by the file alone."""
    modules = (name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) == file)
    return next(filter(None, (place_within(name, file) for name in modules)), None)


def contents_of(plugins: Iterable[Plugin]) -> dict[str, bytes]:
    """Contents of the loaded single files among some plug-ins, by name."""
    found = {plugin.name: _loaded[plugin.name].content for plugin in plugins if plugin.name in _loaded}
    return {name: content for name, content in found.items() if content is not None}


def changed_files(plugins: Iterable[Plugin]) -> list[str]:
    """Paths of the single files among some plug-ins that have other content than this process has loaded."""
    known = [_loaded[plugin.name] for plugin in plugins if plugin.name in _loaded]
    files = [(one.place, one.content) for one in known if one.content is not None]
    return [place for place, content in files if Path(place).is_file() and Path(place).read_bytes() != content]


def load_contents(contents: Mapping[str, bytes]) -> None:
    """Load single files by their contents, as a process on another host does.

    Raises:
        PluginError: as `load`.
    """
    with _lock:
        missing = {name: content for name, content in contents.items() if not _is_same(name, content)}
        if not missing:
            return
        directory = _until_exit.enter_context(temporary_directory("plugins"))
        for name, content in missing.items():
            (directory / name).write_bytes(content)
            _load_file(directory / name, True, shown=name)


def _is_same(name: str, content: bytes) -> bool:
    return name in _loaded and _loaded[name].content == content


def _of_run(records: Iterable[Plugin], file: Path) -> list[Plugin]:
    """Records of a checkpoint as the run has them now, after changed code was accepted."""
    try:
        now = {one["name"]: one["sha256"] for one in json.loads(read_regular(file))["plugins"]}
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return list(records)
    return [Plugin(record.name, now.get(record.name, record.sha256)) for record in records]


def _load_record(record: Plugin, directory: Path | None, source: str) -> None:
    if not record.name.endswith(".py"):
        try:
            _load_module(record.name, False)
        except PluginError as error:
            raise PluginError(f"{source} needs the plug-in {record.name}: {error}") from None
        return
    copy = directory / "plugins" / record.name if directory and Path(record.name).name == record.name else None
    if copy is None or not copy.exists():
        where = f"{copy} is missing" if copy else "no directory has it"
        raise PluginError(f"{source} needs the plug-in {record.name}, but {where}; name it with --plugin FILE")
    _load_file(copy, False, record.sha256)


def _load_file(path: Path, is_chosen: bool, recorded: str | None = None, shown: str | None = None) -> Plugin:
    """Load a single file, if its SHA-256 is the recorded one: nobody knows what damaged code would do.

    Args:
        path: the file.
        is_chosen: see `_Loaded`.
        recorded: its SHA-256 in the config that names it.
        shown: name in errors, if the user does not know the path.
    """
    if path.suffix != ".py":
        reason = "is no Python file: its name does not end with .py"
        if path.is_dir():
            reason = f"is a directory; name a package as `import` does: {path.name}, with PYTHONPATH={path.parent}"
        raise PluginError(f"plug-in {path} {reason}")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PluginError(f"there is no plug-in {path}; name a Python file, or a module to import") from None
    except OSError as error:
        raise PluginError(f"plug-in {path} cannot be read: {error.strerror or error}") from None
    module = f"{FILES}.{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    plugin = Plugin(path.name, hashlib.sha256(content).hexdigest())
    if recorded not in (None, plugin.sha256):
        raise PluginError(
            f"plug-in {path} is damaged or changed: its SHA-256 is {plugin.sha256[:12]}, and its run recorded "
            f"{recorded[:12]}; put the old file back, or read the run with another one by --plugin FILE"
        )
    if _is_loaded(plugin, str(path), module, is_chosen):
        return plugin
    place = str(path.absolute())
    loaded = _Loaded(plugin, module, shown or str(path), content, is_chosen)
    before = set(sys.modules)
    with surroundings_kept(loaded.place), _failures_told(loaded, {place}), registering(plugin.name):
        parent = sys.modules.setdefault(FILES, types.ModuleType(FILES))
        parent.__path__ = []
        spec = importlib.util.spec_from_file_location(module, place)
        assert spec
        made = importlib.util.module_from_spec(spec)
        sys.modules[module] = made
        # The lines are kept for tracebacks and compilers: a copy in a run directory may be removed.
        text = importlib.util.decode_source(content)
        linecache.cache[place] = (len(content), None, text.splitlines(keepends=True), place)
        exec(compile(content, place, "exec", dont_inherit=True), made.__dict__)  # leaves no __pycache__ behind
    if beside := uncovered_imports(made, before, {place}, Path(place).parent):
        tell(
            f"warning: plug-in {path} imports {', '.join(beside)} beside it, of which runs keep neither copy nor "
            "digest; make a package of them and name that"
        )
    os.environ[FILES_VARIABLE] = "\n".join(filter(None, (os.environ.get(FILES_VARIABLE), place)))
    return plugin


def _load_module(name: str, is_chosen: bool) -> Plugin:
    before = set(sys.modules)
    try:
        with surroundings_kept(name):
            spec = importlib.util.find_spec(name)
    except (Exception, SystemExit) as error:  # of a package that it is in, whose code runs
        reason = " ".join(str(error).split())[:300]
        kind = "" if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: "
        raise PluginError(f"plug-in {name} cannot be imported: {kind}{reason}") from None
    if spec is None:
        here = f"; PYTHONPATH=. makes {name}/ of this directory importable" if Path(name).is_dir() else ""
        raise PluginError(
            f"there is no plug-in {name}: no module of that name is installed, and a file ends with .py{here}"
        )
    files = _files_of(spec.submodule_search_locations, spec.origin)
    digest = hashlib.sha256()
    for relative, file in files.items():
        digest.update(f"{relative}\n".encode(errors="backslashreplace") + file.read_bytes())
    plugin = Plugin(name, digest.hexdigest())
    if _is_loaded(plugin, name, name, is_chosen):
        return plugin
    loaded = _Loaded(plugin, name, name, None, is_chosen)
    covered = {str(file) for file in files.values()}
    with surroundings_kept(name), _failures_told(loaded, covered), registering(name):
        made = importlib.import_module(name)
    top = name.partition(".")[0]
    folders = getattr(sys.modules.get(top), "__path__", ()) if top != name and is_chosen else ()
    beside = [one for folder in folders for one in uncovered_imports(made, before, covered, Path(folder)) if one != top]
    if beside:
        tell(f"warning: plug-in {name} imports {', '.join(beside)}, whose changes are not noticed; name {top} instead")
    return plugin


def _files_of(folders: Collection[str] | None, origin: str | None) -> dict[str, Path]:
    """Python files of a package or module, by their names within it."""
    if not folders:
        return {Path(origin).name: Path(origin)} if origin and origin.endswith(".py") else {}
    found = {str(file.relative_to(folder)): file for folder in folders for file in Path(folder).rglob("*.py")}
    return dict(sorted(found.items()))


def _is_loaded(plugin: Plugin, place: str, module: str, is_chosen: bool) -> bool:
    """Return True if a plug-in is loaded already.

    Raises:
        PluginError: another version of it is, or another file that would become the same module.
    """
    for known in _loaded.values():
        if known.module != module:
            continue
        if known.plugin == plugin:
            if is_chosen and not known.is_chosen:
                _loaded[plugin.name] = _Loaded(plugin, module, known.place, known.content, True)
            return True
        raise PluginError(
            f"plug-in {place} has other content than {known.place}, which this process has loaded under the same name; "
            "rename one of them, or use two processes"
        )
    return False


@contextlib.contextmanager
def _failures_told(plugin: _Loaded, files: Collection[str]) -> Iterator[None]:
    """Note a plug-in as loaded; make any failure of its own code one line with file and line, and forget it."""
    place = plugin.place
    _loaded[plugin.plugin.name] = plugin
    try:
        yield
    except BaseException as error:
        del _loaded[plugin.plugin.name]
        for name in [name for name in sys.modules if _is_within(name, plugin.module)]:
            del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        file, line = _line_of(error, files)
        where = (place if len(files) == 1 else file or place) + (f", line {line}" if line else "")
        reason = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise PluginError(f"plug-in {where}: {kind}{reason[:300]}{_way_out(plugin, error)}") from None


def _way_out(plugin: _Loaded, error: BaseException) -> str:
    """Advice for a single file that imports a file beside it."""
    if plugin.content is None or not isinstance(error, ImportError) or not error.name:
        return ""
    first = error.name.removeprefix(f"{FILES}.").partition(".")[0]
    beside = Path(plugin.place).parent / first
    if (
        error.name == FILES
        or error.name.startswith(f"{FILES}.")
        or beside.is_dir()
        or beside.with_suffix(".py").exists()
    ):
        return "; a single file is loaded alone: make a package of it and the files beside it, and name that"
    return ""


def _line_of(error: BaseException, files: Collection[str]) -> tuple[str | None, int | None]:
    """File and line of a plug-in that an error came from: the innermost of its own."""
    if isinstance(error, SyntaxError) and error.filename in files:
        return error.filename, error.lineno
    found: tuple[str | None, int | None] = (None, None)
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename in files:
            found = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    return found


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
