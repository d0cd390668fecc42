"""Code blocks of the README files, and how a test checks and runs their commands.

Checking a command calls its own parser, so an option or preset that does not exist is an error. Running it takes few
steps, small batches and few samples, in this process; `in_processes` starts the launchers that the guide names instead.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from gen_dist import commands
from gen_dist.cli import NoOptions, parse_options, parse_train, run_command
from gen_dist.config import DcganConfig
from gen_dist.launch.cluster.options import RayOptions
from gen_dist.launch.packing.options import PackOptions
from gen_dist.launch.sweep.plan import SweepOptions
from gen_dist.presets import presets
from tests.conftest import REPOSITORY

SHELL, PYTHON = ("sh", "bash", "console"), ("python", "py")

_NO_CODE = ("", "text", "json", "yaml", "toml")
_FENCE = re.compile(r"^ *```(\w*)")
_NOT_RUN = re.compile(r"^ *<!-- not run: *(.*?) *-->$")
_SMALL_RUN = ("--steps=3", "--global-batch-size=8", "--evaluate-every=3", "--sample-every=3", "--checkpoint-every=1")
_SMALL_EVALUATION = ("--samples=64", "--nll-samples=4", "--nll-images=4")

_SMALL_USE = {
    "walk": ["--stops=2", "--frames=2"],
    "invert": ["--steps=3", "--perceptual-weight=0"],
    "fit-prior": ["--components=2"],
}


class Block(NamedTuple):
    """A fenced block of code."""

    guide: Path
    line: int
    """Line of its fence, from 1."""
    language: str
    text: str
    reason: str | None
    """Reason not to run it, from the comment on the line before the fence; None if it is run."""

    def __str__(self) -> str:
        return f"{self.guide.relative_to(REPOSITORY)}:{self.line}"


def guides() -> list[Path]:
    """Every README.md of the repository, and CONTRIBUTING.md."""
    found = [REPOSITORY / "README.md", *(REPOSITORY / ".github").glob("*.md")]
    for top in ("gen_dist", "kernels", "launch", "bench", "tests"):
        for folder, _, files in os.walk(REPOSITORY / top):  # symbolic links are not followed: each file is met once
            found += [Path(folder) / name for name in files if name == "README.md"]
    return sorted(found)


def blocks_of(guide: Path) -> Iterator[Block]:
    """Find the blocks of a guide that are shell commands or Python."""
    lines = guide.read_text().splitlines()
    start: int | None = None
    for index, line in enumerate(lines):
        if not (fence := _FENCE.match(line)):
            continue
        if start is None:
            start, language = index, fence[1]
            continue
        assert language in SHELL + PYTHON + _NO_CODE, f"{guide}:{start + 1}: unknown language {language}"
        if language in SHELL + PYTHON:
            marked = _NOT_RUN.match(lines[start - 1]) if start else None
            text = inspect.cleandoc("\n".join(lines[start + 1 : index])) + "\n"
            yield Block(guide, start + 1, language, text, marked[1] if marked else None)
        start = None
    assert start is None, f"{guide}: the fence of line {(start or 0) + 1} has no end"


def words_of(text: str) -> Iterator[list[str]]:
    """Split a shell block into commands, each a list of words without comments."""
    text = text.replace("\\\n", " ").replace("$(gen-dist launchers)", "launch")
    for line in text.splitlines():
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


class Command(NamedTuple):
    """A command of a guide, with its check and its small version."""

    check: Callable[[], None]
    """Raise an error if the command could not even start: an option, preset, file or target does not exist."""
    run: Callable[[], None] | None = None
    """Run a small version of it in this process and directory. None: it needs processes of its own."""
    small: list[str] | None = None
    """Words of the small version, for a process of its own. None with no `run`: it can only be checked."""


def command_of(words: list[str]) -> Command:
    """Find the check and the small version of a command.

    Raises:
        AssertionError: a test has no way to check it.
    """
    match words:
        case ["cd", *_] | ["git", *_] | ["export", *_] | ["python3" | "python", "-m", "venv", *_]:
            return Command(_nothing, _nothing)
        case [".", ".venv/bin/activate"]:
            return Command(_nothing, _nothing)
        case ["make", *targets]:
            return Command(lambda: _check_targets(targets), _nothing)
        case ["pip" | ".venv/bin/pip", "install", *what]:
            return Command(lambda: _check_extras(what), _nothing)
        case ["ssh", *_]:
            return Command(_nothing)
        case ["pre-commit", "install"]:
            return Command(lambda: _exists(REPOSITORY / ".pre-commit-config.yaml"), _nothing)
        case ["gen-dist", "train", *rest] | ["python", "-m", "gen_dist.launch.train", *rest]:
            return _training(rest, words[: len(words) - len(rest)])
        case ["python", "launch/train.py", *rest]:
            return _training(rest, words[:2])
        case ["accelerate", "launch", *rest]:
            return _accelerate(rest)
        case ["torchrun", *rest]:
            return _torchrun(rest)
        case ["gen-dist", name, *rest] | ["python", "-m", "gen_dist.commands", name, *rest]:
            return _subcommand(name, rest)
        case ["sbatch", *rest]:
            script = next(word for word in rest if not word.startswith("-"))
            arguments = rest[rest.index(script) + 1 :]
            return Command(_in_turn([lambda: _exists(REPOSITORY / script), lambda: _parse(arguments, NoOptions())]))
        case ["python", str(script), *rest] if script.endswith((".py", "bench/suite")):
            return _script(script, rest)
        case ["python", "-m", "pytest", *rest] | ["pytest", *rest]:
            return Command(lambda: _check_pytest(rest))
        case ["python", "-m", str(module), *rest] if module.startswith(("gen_dist.launch.", "bench.")):
            return _script(module.removeprefix("gen_dist.").replace(".", "/") + ".py", rest)
    raise AssertionError(f"no test knows how to check or run `{shlex.join(words)}`")


def in_process(words: list[str]) -> Callable[[], None]:
    """Make a call that runs one of our commands in this process, as `gen-dist` or `python launch/train.py` would."""

    def call() -> None:
        if words[:2] == ["gen-dist", "train"] or words[1:2] == ["launch/train.py"]:
            main = import_module("gen_dist.launch.train").main
            _ends_well(lambda: run_command(lambda: main(words[2:], shlex.join(words[:2]))))
        else:
            sys.argv = words
            _ends_well(commands.main)

    return call


def in_processes(words: list[str]) -> None:
    """Run a command in processes of its own, and assert that its exit code is 0."""
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout[-1000:]}\n{ended.stderr[-3000:]}"


def small_options(preset: str) -> list[str]:
    """Options with which a run of a preset takes a second or two."""
    narrow = preset in presets() and isinstance(presets()[preset].config.network, DcganConfig)
    return [*_SMALL_RUN, *(["--feature-maps=4"] if narrow else [])]


def _training(rest: list[str], program: list[str], launcher: list[str] | None = None) -> Command:
    """Read a training command. `launcher` are the words before the script."""

    def check() -> None:
        _parse(rest, NoOptions())

    if "--help" in rest:
        return Command(_nothing, in_process([*program, *rest]), [*program, *rest])
    small = [*rest, *small_options(rest[0])]
    direct = ["gen-dist", "train"] if program[0] == "gen-dist" or "-m" in program else ["python", "launch/train.py"]
    return Command(check, in_process([*direct, *small]), [*(launcher or program), *small])


def _accelerate(rest: list[str]) -> Command:
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(rest)
    if parsed.config_file:
        _exists(REPOSITORY / parsed.config_file)
    return _launched(["accelerate", "launch"], rest, parsed.training_script, parsed.training_script_args)


def _torchrun(rest: list[str]) -> Command:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(rest)
    return _launched(["torchrun"], rest, parsed.training_script, parsed.training_script_args)


def _launched(launcher: list[str], rest: list[str], script: str, arguments: list[str]) -> Command:
    words = [*launcher, *rest[: len(rest) - len(arguments)]]
    match script:
        case "launch/train.py" | "gen_dist.launch.train":
            return _training(arguments, ["python", "launch/train.py"], words)
        case "gen_dist.commands":
            command = command_of(["gen-dist", *arguments])
            small = command.small and [*words, *command.small[1:]]
            return command._replace(small=small)
    return command_of(["python", script, *arguments])


def _subcommand(name: str, rest: list[str]) -> Command:
    function = getattr(commands, name.replace("-", "_"))
    words = ["gen-dist", name, *rest]
    if name == "evaluate":
        words += _SMALL_EVALUATION
    words += _SMALL_USE.get(name, [])
    if name == "report":
        words.append("--no-step-times")
    run = in_process(words)
    if name in ("report", "compare"):
        runs = [word for word in rest if word.startswith("runs/")]
        run = _in_turn([*(in_process(["gen-dist", "evaluate", one, *_SMALL_EVALUATION]) for one in runs), run])
    parameters = inspect.signature(function).parameters
    flat = {one.name for given in parameters.values() if is_dataclass(given.default) for one in fields(given.default)}
    return Command(lambda: _check_options(rest, {"plugin", *parameters, *flat}), run, words)


def _script(script: str, rest: list[str]) -> Command:
    """Read a command with a script of this repository. Scripts that start clusters or measure are checked, not run."""

    def check() -> None:
        _exists(REPOSITORY / script)
        match Path(script).name, rest:
            case "ray_train.py", _:
                _parse(rest, RayOptions())
            case "ray_sweep.py", _:
                _parse(rest, SweepOptions())
            case "ray_job.py", ["submit", *more]:
                _parse(more, RayOptions())
            case "ray_pack.py", _:
                parse_options(PackOptions, rest, "command")
            case _:
                source = (REPOSITORY / script).read_text()
                options = {word.split("=")[0] for word in rest if word.startswith("--")}
                for option in options:
                    names = (option, option.lstrip("-").replace("-", "_"), option.removeprefix("--no-"))
                    assert any(name in source for name in names), f"{script} has no option {option}"

    match Path(script).name:
        case "ray_train.py":
            return Command(check, small=["python", script, *rest, *_SMALL_RUN])
        case "ray_sweep.py":
            return Command(check, small=["python", script, *rest])
    return Command(check)


def _parse(rest: list[str], more: object) -> None:
    parse_train(rest, "command", more)


def _check_targets(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets, f"the Makefile has no target {word}"


def _check_extras(words: list[str]) -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert not any(word.startswith(("gen_dist", "gen-dist")) for word in words), "that is another project on the index"
    for word in words:
        for extra in re.findall(r"\[(.+)\]", word):
            assert extra in project["optional-dependencies"], f"there is no extra {extra}"


def _check_pytest(words: list[str]) -> None:
    for word in words:
        if "/" in word and not word.startswith("-"):
            _exists(REPOSITORY / word.split("::")[0])


def _check_options(words: list[str], names: set[str]) -> None:
    for word in words:
        if word.startswith("--"):
            name = word.split("=")[0].lstrip("-").replace("-", "_")
            assert {name, name.removeprefix("no_")} & names, f"there is no option {word}"


def _exists(path: Path) -> None:
    assert path.exists(), f"{path.relative_to(REPOSITORY)} does not exist"


def _in_turn(calls: list[Callable[[], None]]) -> Callable[[], None]:
    def call() -> None:
        for one in calls:
            one()

    return call


def _ends_well(command: Callable[[], object]) -> None:
    try:
        command()
    except SystemExit as stop:
        assert stop.code in (0, None), f"exit code {stop.code}"


def _nothing() -> None:
    pass
