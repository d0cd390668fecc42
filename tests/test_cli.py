"""Command lines: the program is named as the user can type it again."""

import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from gen_dist.cli import NoOptions, parse_train, resume_command, run_subcommand
from gen_dist.commands import FUNCTIONS
from gen_dist.data.catalogue import source_kinds
from gen_dist.errors import ConfigError
from gen_dist.presets import get_preset

SCRIPT, INSTALLED, MODULE = "launch/train.py", "/site-packages/gen_dist/launch/train.py", "gen_dist.launch.train"


@pytest.mark.parametrize(
    ("argv", "module", "command"),
    [
        (["/venv/bin/gen-dist", "train", "vae-mnist"], None, "gen-dist train vae-mnist"),
        ([SCRIPT, "vae-mnist"], None, f"python {SCRIPT} vae-mnist"),
        ([INSTALLED, "vae-mnist"], MODULE, f"python -m {MODULE} vae-mnist"),
    ],
)
def test_the_command_to_resume_works_where_the_user_is(
    argv: list[str], module: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*argv, "--fresh"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and ModuleSpec(module, None))
    assert resume_command() == command
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert resume_command() == f"the same accelerate launch command with {command.removeprefix('python ')}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("sample", "gen-dist sample needs PATH; see gen-dist sample --help"),
        ("encode", "gen-dist encode needs PATH and --out PATH; see gen-dist encode --help"),
        ("data", "gen-dist data needs SOURCE; see gen-dist data --help"),
        (
            "export runs/a",
            "gen-dist export needs --format {safetensors,onnx,torch-export,diffusers}; see gen-dist export --help",
        ),
        ("sample runs/a --classes 3", "Unrecognized options: --classes, 3; see gen-dist sample --help"),
        ("sample runs/a --colums 3", "Unrecognized options: --colums, 3; perhaps you meant --columns; see"),
        (
            "sample runs/a --count x",
            "Error parsing --count: invalid literal for int() with base 10: 'x'; see gen-dist s",
        ),
        ("sample runs/a --count", "--count needs a value; see gen-dist sample --help"),
        (
            "export runs/a --format foo",
            "--format 'foo' is none of safetensors, onnx, torch-export, diffusers; see gen-dist export --help",
        ),
        # An option of another command.
        ("sample runs/a --format onnx", "Unrecognized options: --format, onnx; see gen-dist sample --help"),
        ("sample --format onnx", "Unrecognized options: --format; see gen-dist sample --help"),
        ("sample --format onnx runs/a", "Unrecognized options: --format; see gen-dist sample --help"),
        ("replay --foo 3", "Unrecognized options: --foo; gen-dist replay needs --step INT; see gen-dist replay --help"),
        ("export runs/a --forma onnx", "Unrecognized options: --forma, onnx; gen-dist export needs --format {safe"),
        ("--foo", "'--foo' is not an option of gen-dist, which takes a command first: train, sample, evaluate, "),
        ("--help=1", "'--help=1' is not an option of gen-dist, which takes a command first: train, sample, evaluate, "),
        ("--foo sample runs/a", "'--foo' stands before the command, which is train, sample, evaluate, compare, "),
        ("trian vae-mnist", "unknown command 'trian'; there are train, sample, evaluate, "),
    ],
)
@pytest.mark.parametrize("width", [40, 200])
def test_a_mistake_is_one_sentence_that_names_its_help(
    words: str, line: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(ConfigError) as raised:
        run_subcommand(FUNCTIONS, words.split(), "gen-dist")
    assert str(raised.value).startswith(line)
    assert str(raised.value).endswith(" --help")
    assert ". " not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--betas 0.1", "--betas needs 2 values; see"),
        ("--wandb foo", "--wandb 'foo' is none of disabled, offline, online, None; see"),
        ("--precision foo", "--precision 'foo' is none of auto, float32, bf16, fp16; see"),
        ("--seed x", "Error parsing --seed: invalid literal for int() with base 10: 'x'; see"),
        ("--shards 1x", "Error parsing --shards: invalid literal for int() with base 10: '1x'; use a number or None;"),
        (
            "--ema-decay none",
            "Error parsing --ema-decay: could not convert string to float: 'none'; use a number or None;",
        ),
        ("--augment foo", "augment 'foo' is none of flip, "),
        ("--encoder.activation foo", "--encoder.activation 'foo' is none of "),
    ],
)
def test_a_wrong_option_of_a_preset_is_one_sentence_that_names_its_help(words: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_train(["vae-mnist", *words.split()], "gen-dist train", NoOptions())
    assert str(raised.value).startswith(line)
    assert str(raised.value).endswith("; see gen-dist train vae-mnist --help")
    assert ". " not in str(raised.value)


@pytest.mark.parametrize("words", ["vae-mnist --config a.json", "vae-mnist --steps 3 --config=a.json"])
def test_a_config_beside_a_preset_is_refused_with_its_place(words: str) -> None:
    with pytest.raises(ConfigError, match="in place of a preset, as in gen-dist train --config runs/"):
        parse_train(words.split(), "gen-dist train", NoOptions())


def test_a_second_config_is_refused_as_such(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(get_preset("vae-mnist").to_json())
    with pytest.raises(ConfigError, match=r"--config is given twice"):
        parse_train(["--config", str(file), "--config=a.json"], "gen-dist train", NoOptions())


def test_the_help_names_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train(["vae-mnist", "--help"], "gen-dist train", NoOptions())
    told = capsys.readouterr().out
    told = " ".join(told[told.index("--data STR") : told.index("--data-root")].replace("\u2502", "").split())
    for name, kind in source_kinds().items():
        assert f"{name}:PATH" in told if kind.takes_path else f"{name}," in told
    assert "shards:PATTERN" in told


def test_the_package_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m gen_dist", "presets"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("gen_dist", run_name="__main__")
    assert not ended.value.code and "vae-mnist" in capsys.readouterr().out
