"""Plug-ins are loaded once, recorded by content, found by other processes, and wrong ones told in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gen_dist
from gen_dist.cli import NoOptions, parse_train
from gen_dist.config import TrainConfig, networks
from gen_dist.errors import ConfigError
from gen_dist.plugins import Plugin, load, loading
from gen_dist.presets import get_preset

pytestmark = pytest.mark.usefixtures("forget")

PLUGIN = '''
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tyro.conf import Suppress

from gen_dist.config import NetworkConfig, networks
from gen_dist.presets import add_preset, get_preset


@networks.register
@dataclass(frozen=True)
class MineConfig(NetworkConfig):
    """A network of mine."""

    encoder: ClassVar[str] = "gen_dist.networks.mlp:MlpEncoder"
    decoder: ClassVar[str] = "gen_dist.networks.mlp:MlpDecoder"
    kind: Suppress[Literal["mine"]] = "mine"
    hidden_sizes: tuple[int, ...] = (8,)
    activation: Literal["relu"] = "relu"
    my_option: int = 3
    """Number of things that are mine."""


add_preset("my-preset", replace(get_preset("vae-mnist"), network=MineConfig()), "mine")
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "my_parts.py"
    path.write_text(PLUGIN)
    return path


def options(words: list[str]) -> TrainConfig:
    return parse_train(words, "train", NoOptions())[0]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_plugin_may_stand_anywhere_in_the_words(plugin: Path, place: int) -> None:
    words = ["my-preset", "--my-option", "4"]
    words[place:place] = ["--plugin", str(plugin)] if place else [f"--plugin={plugin}"]
    config = options(words)
    assert config.plugins == (load(str(plugin)),)
    assert dataclasses.asdict(config.network)["my_option"] == 4
    assert TrainConfig.from_json(config.to_json(), "config.json") == config


def test_help_has_options_and_presets_of_a_plugin(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, texts in ((["--help"], ["my-preset", "--plugin"]), (["my-preset", "--help"], ["--my-option", "mine"])):
        with pytest.raises(SystemExit):
            options([f"--plugin={plugin}", *words])
        said = capsys.readouterr().out
        assert all(text in said for text in texts)
    assert "Number of things that are mine" in said


def test_a_plugin_is_loaded_once(plugin: Path) -> None:
    assert load(str(plugin)) == load(str(plugin))


def test_a_module_is_loaded_by_its_name(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = plugin.parent / "a_package_of_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    plugin.rename(package / "parts.py")
    monkeypatch.syspath_prepend(plugin.parent)
    first = load("a_package_of_parts.parts")
    assert options(["my-preset"]).plugins == (first,)
    assert networks["mine"].__module__ == "a_package_of_parts.parts"


def test_entry_points_need_no_option(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.rename(plugin.with_name("installed_parts.py"))
    information = plugin.parent / "parts-1.0.dist-info"
    information.mkdir()
    (information / "entry_points.txt").write_text("[gen_dist.plugins]\nparts = installed_parts\nbad = no_such_parts\n")
    monkeypatch.syspath_prepend(plugin.parent)
    monkeypatch.setattr(loading, "_has_searched", False)
    loading.load_installed()
    assert [one.name for one in options(["my-preset"]).plugins] == ["installed_parts"]


def test_a_config_is_pickled_with_its_plugins(plugin: Path) -> None:
    load(str(plugin))
    config = get_preset("my-preset")
    file = plugin.with_suffix(".pickle")
    file.write_bytes(pickle.dumps(config))
    plugin.unlink()
    code = f"import pickle; print(pickle.load(open({str(file)!r}, 'rb')).network)"
    environment = {name: value for name, value in os.environ.items() if name != loading.FILES_VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "my_option=3" in done.stdout


def test_classes_of_a_plugin_unpickle_in_a_child(plugin: Path) -> None:
    load(str(plugin))
    file = plugin.with_suffix(".pickle")
    file.write_bytes(pickle.dumps(get_preset("my-preset").network))
    code = f"import pickle; print(pickle.load(open({str(file)!r}, 'rb')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "my_option=3" in done.stdout


def test_a_run_reads_its_own_copy(plugin: Path, forget: Callable[[], None]) -> None:
    run = plugin.parent / "run"
    (run / "plugins").mkdir(parents=True)
    text = options([f"--plugin={plugin}", "my-preset"]).to_json()
    (run / "config.json").write_text(text)
    plugin.rename(run / "plugins" / plugin.name)
    forget()
    read = TrainConfig.from_json(text, str(run / "config.json"))
    assert read.to_json() == text
    assert not list(run.rglob("__pycache__"))


def test_a_changed_copy_is_refused_before_it_runs(plugin: Path, forget: Callable[[], None]) -> None:
    run = plugin.parent / "run"
    (run / "plugins").mkdir(parents=True)
    text = options([f"--plugin={plugin}", "my-preset"]).to_json()
    (run / "config.json").write_text(text)
    copy = run / "plugins" / plugin.name
    copy.write_text("raise SystemExit('it ran')")
    forget()
    with pytest.raises(ConfigError, match=r"run/plugins/my_parts.py is damaged or changed: its SHA-256 is .*--plugin"):
        TrainConfig.from_json(text, str(run / "config.json"))
    load(str(plugin))
    assert TrainConfig.from_json(text, str(run / "config.json")).to_json() == text


def test_another_version_is_refused_unless_chosen(plugin: Path) -> None:
    text = options([f"--plugin={plugin}", "my-preset"]).to_json()
    other = text.replace(load(str(plugin)).sha256, "0" * 64)
    assert TrainConfig.from_json(other, "runs/a/config.json").plugins == (Plugin(plugin.name, "0" * 64),)
    known = loading._loaded[plugin.name]
    loading._loaded[plugin.name] = dataclasses.replace(known, is_chosen=False)
    with pytest.raises(ConfigError, match=r"my_parts.py of runs/a/config.json has SHA-256 000000000000, .*--plugin"):
        TrainConfig.from_json(other, "runs/a/config.json")
    plugin.write_text(PLUGIN + "\n")
    with pytest.raises(ConfigError, match="other content than"):
        load(str(plugin))


def test_a_missing_plugin_is_named_with_the_way_out(tmp_path: Path) -> None:
    text = dataclasses.replace(gen_dist.preset("vae-mnist"), plugins=(Plugin("gone.py", "0" * 64),)).to_json()
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"needs the plug-in gone.py, but .*missing; name it with --plugin"):
        TrainConfig.from_json(text, str(tmp_path / "config.json"))


WRONG = {
    "syntax": ("x = 1\ndef broken(:\n", r"bad.py, line 2: SyntaxError: invalid syntax"),
    "import": ("\n\nimport no_such_module_of_mine\n", r"bad.py, line 3: ModuleNotFoundError: No module named 'no_such"),
    "fault": ("def f():\n    return 1 / 0\nf()\n", r"bad.py, line 2: ZeroDivisionError: division by zero"),
    "exit": ("raise SystemExit('enough')", r"bad.py, line 1: SystemExit: enough"),
    "taken kind": (
        PLUGIN.replace('"mine"', '"mlp"'),
        r"line \d+: network 'mlp' is registered already, by gen_dist",
    ),
    "taken preset": (PLUGIN.replace("my-preset", "vae-mnist"), r"line \d+: preset 'vae-mnist' is registered already"),
    "not frozen": (PLUGIN.replace("(frozen=True)", ""), r"bad.py, line \d+: .*frozen"),
    "no dataclass": (
        PLUGIN.replace("@dataclass(frozen=True)\n", ""),
        r"line \d+: network config MineConfig is not a ",
    ),
    "exception of no kind": ("class Mine(BaseException):\n    pass\nraise Mine('x')\n", r"bad.py, line 3: Mine: x"),
    "relative import": ("from . import other\n", r"bad.py, line 1: ImportError.*; a single file is loaded alone: make"),
    "relative module": (
        "from .other import x\n",
        r"line 1: ModuleNotFoundError.*; a single file is loaded alone: make",
    ),
    "file beside it": ("import beside_it\n", r"No module named 'beside_it'; a single file is loaded alone: make a pac"),
    "no facts": (
        PLUGIN
        + """
from gen_dist.config import ObjectiveConfig, objectives


@objectives.register
@dataclass(frozen=True)
class MineToo(ObjectiveConfig):
    kind: Literal["mine-too"] = "mine-too"
    lacks: ClassVar[dict] = {}
""",
        r"line \d+: objective config MineToo does not say its implementation, family, family_name; see",
    ),
    "no kind": (PLUGIN.replace('= "mine"\n', '= ""\n'), r"line \d+: network config MineConfig has no kind"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_plugin_is_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    content, expected = WRONG[case]
    path = tmp_path / "bad.py"
    path.write_text(content)
    (tmp_path / "beside_it.py").touch()
    with pytest.raises(ConfigError, match=expected) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    path.write_text(PLUGIN)
    load(str(path))  # the corrected file can be loaded


OPTIONS = {
    "path": ("Path = Path('x')", "my_option has the type Path, which config.json cannot hold"),
    "optional path": ("Path | None = None", "my_option has the type Path, which config.json cannot hold"),
    "several sets": ("tuple[frozenset[int], ...] = ()", r"my_option has the type frozenset"),
    "enumeration": ("Colour = Colour.RED", "my_option has the type Colour, which"),
    "dataclass": ("Inner = Inner()", "my_option has the type Inner, which"),
    "function": ("Callable[[], int] = int", "my_option has the type Callable, which"),
    "default of another type": ("int = 'x'", "the default 'x' of my_option is not of its type"),
    "truth for a number": ("int = True", "the default True of my_option is not of its type"),
    "too short": ("tuple[int, int] = (1,)", r"the default \(1,\) of my_option is not of its type"),
    "outside of the choices": ("Literal['a', 'b'] = 'c'", "the default 'c' of my_option is not of its type"),
    "no default": ("int = field(kw_only=True)", "my_option has no default, and every option has one"),
    "no argument": ("int = field(default=3, init=False)", "my_option has init=False, so config.json cannot"),
}
"""Options that would be lost, or end in a traceback, when a run is written down or resumed."""
MORE_IMPORTS = """
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

class Colour(enum.Enum):
    RED = "red"

@dataclass(frozen=True)
class Inner:
    x: int = 1
"""


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_be_written_is_refused(case: str, tmp_path: Path) -> None:
    option, expected = OPTIONS[case]
    (path := tmp_path / "bad.py").write_text(
        MORE_IMPORTS + PLUGIN.replace("my_option: int = 3", f"my_option: {option}")
    )
    with pytest.raises(ConfigError, match=rf"bad.py, line \d+: network config MineConfig: {expected}"):
        load(str(path))


@pytest.mark.parametrize(
    "option",
    [
        *("float = 3", "str = ''", "bool = False", "int | None = None", "tuple[int, float] = (1, 2)"),
        *(
            "Literal[1, 2] = 2",
            "list[int] = field(default_factory=list)",
            "dict[str, int] = field(default_factory=dict)",
        ),
        *("tuple[int, ...] | int = 3", "'int' = 3"),
    ],
)
def test_a_writable_option_comes_back_equal(option: str, tmp_path: Path) -> None:
    (path := tmp_path / "good.py").write_text(
        MORE_IMPORTS + PLUGIN.replace("my_option: int = 3", f"my_option: {option}")
    )
    config = options([f"--plugin={path}", "my-preset"])
    assert TrainConfig.from_json(config.to_json(), "config.json") == config


@pytest.mark.parametrize(
    ("name", "owner"),
    [("steps", "every config"), ("encoder", "every config"), ("beta", "network mine"), ("fresh", "the command line")],
)
def test_an_option_of_two_parts_is_one_line(name: str, owner: str, tmp_path: Path) -> None:
    (path := tmp_path / "mine.py").write_text(PLUGIN.replace("my_option", name))
    with pytest.raises(ConfigError, match=f"^option {name} of .* is one of {owner} too"):
        options([f"--plugin={path}", "my-preset"])
    if name == "beta":
        with pytest.raises(ConfigError, match="option 'beta' is one of network and of objective"):
            get_preset("my-preset").with_options(beta=2)


def test_plain_kinds_of_two_parts_are_no_options(tmp_path: Path) -> None:
    objective = """
from gen_dist.config import VaeConfig, objectives


@objectives.register
@dataclass(frozen=True)
class OurConfig(VaeConfig):
    kind: Literal["ours"] = "ours"


add_preset("our-preset", replace(get_preset("my-preset"), objective=OurConfig()), "ours")
"""
    (path := tmp_path / "mine.py").write_text(
        PLUGIN.replace('Suppress[Literal["mine"]]', 'Literal["mine"]') + objective
    )
    config = options([f"--plugin={path}", "our-preset", "--my-option", "4"])
    assert (config.objective.kind, config.network.kind) == ("ours", "mine")
    assert TrainConfig.from_json(config.to_json(), "config.json") == config
    with pytest.raises(ConfigError, match="Unrecognized options: --kind"):
        options([f"--plugin={path}", "our-preset", "--kind", "mine"])


def test_a_plugin_that_registers_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "empty.py").touch()
    load(str(path))
    load("colorsys")
    said = capsys.readouterr().err
    assert said == f"warning: plug-in {path} registers nothing\nwarning: plug-in colorsys registers nothing\n"


def test_files_beside_a_plugin_are_told(
    plugin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(plugin.parent)
    plugin.with_name("layers_beside_it.py").touch()
    plugin.write_text("import layers_beside_it\n" + PLUGIN)
    load(str(plugin))
    expected = (
        f"warning: plug-in {plugin} imports layers_beside_it beside it, of which runs keep neither copy nor digest"
    )
    assert capsys.readouterr().err.startswith(expected)


def test_a_module_that_imports_from_its_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package_of_two"
    package.mkdir()
    for name, content in (("__init__", ""), ("layers", ""), ("parts", "from package_of_two import layers\n" + PLUGIN)):
        (package / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    load("package_of_two.parts")
    assert capsys.readouterr().err == (
        "warning: plug-in package_of_two.parts imports package_of_two.layers, whose changes are not noticed; name "
        "package_of_two instead\n"
    )


def test_a_package_that_fails_around_a_module_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_that_fails").mkdir()
    (tmp_path / "package_that_fails/__init__.py").write_text("1 / 0")
    (tmp_path / "package_that_fails/parts.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"package_that_fails.parts cannot be imported: ZeroDivisionError: division"):
        load("package_that_fails.parts")


def test_threads_that_load_a_plugin_at_once_all_have_it(plugin: Path) -> None:
    plugin.write_text("import time\ntime.sleep(0.05)\n" + PLUGIN)
    with ThreadPoolExecutor(2) as threads:
        presets = list(threads.map(lambda _: (load(str(plugin)), get_preset("my-preset"))[1], range(2)))
    assert presets[0] == presets[1]


def test_a_kind_of_two_plugins_names_both(plugin: Path) -> None:
    load(str(plugin))
    second = plugin.with_name("second.py")
    second.write_text(PLUGIN)
    with pytest.raises(ConfigError, match=r"second.py, line \d+: network 'mine' is registered already, by plug-in my"):
        load(str(second))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--plugin", "no/such.py", "vae-mnist"], "there is no plug-in no/such.py"),
        (["--plugin", "no_such_module_of_mine", "vae-mnist"], "there is no plug-in no_such_module_of_mine"),
        (["--plugin", "no_such.module", "vae-mnist"], "cannot be imported"),
        (["vae-mnist", "--plugin"], "--plugin needs a Python file or a module"),
        (["vae-mnist", "--plugin="], "--plugin needs a Python file or a module"),
        (["--plugin", "./text.txt", "vae-mnist"], "does not end with .py"),
        (
            ["--plugin", "./tests", "vae-mnist"],
            "is a directory; name a package as `import` does: tests, with PYTHONPATH=",
        ),
    ],
)
def test_a_plugin_that_is_not_there_is_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        options(words)


def test_a_child_without_plugins_loads_none() -> None:
    with contextlib.suppress(KeyError):
        del os.environ[loading.FILES_VARIABLE]
    done = subprocess.run([sys.executable, "-c", "import gen_dist.plugins.files"], capture_output=True, check=True)
    assert not done.stderr
