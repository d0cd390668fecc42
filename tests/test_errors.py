"""User errors: each prints one line with the values and the way out, and exits with code 2."""

from __future__ import annotations

import errno
import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gen_dist import commands
from gen_dist.cli import run_command
from gen_dist.config import TrainConfig
from gen_dist.data.losses import KINDS
from gen_dist.errors import ConfigError, DataError, UserError, agreeing, number_of
from gen_dist.parallel.barrier import PeerDiedError
from gen_dist.training.run import train
from tests.bad_input import CASES, Place
from tests.conftest import REPOSITORY
from tests.support.runs import OBJECTIVES, small_config, write_config


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    train(small_config("vae", steps=4, checkpoint_every=2, run_dir=str(path)), say=lambda _line: None)
    return path


@contextmanager
def _without_compiler(cache: Path) -> Iterator[None]:
    """Take away the compiler and its results: a process that has compiled the same step keeps them in memory."""
    from torch._inductor import config, utils

    torch._dynamo.reset()
    # config.patch, as monkeypatch would lose the name on undoing.
    with utils.fresh_cache(dir=str(cache)), config.patch({"cpp.cxx": (None, "/no/compiler")}):
        yield


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_one_line_and_exit_code_2(
    name: str,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, mentioned = CASES[name]
    monkeypatch.chdir(tmp_path)
    if name == "no number of threads":
        monkeypatch.setenv("GEN_DIST_THREADS", "two")
    if name == "no such wandb mode":
        monkeypatch.setenv("WANDB_MODE", "shout")
    arguments = [str(word) for word in words(Place(tmp_path, finished_run))]
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *arguments])
    with _without_compiler(tmp_path) if name == "no compiler" else nullcontext(), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "launch/train.py"), run_name="__main__")
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2, output.err
    assert len(errors) == 1, output.err
    assert mentioned in errors[0]
    assert output.err.rstrip().endswith(errors[0])
    assert "Traceback" not in output.err
    assert len(errors[0].replace(str(tmp_path), "")) < 450


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--fresh", "--data", "minst"],
        ["--fresh", "--global-batch-size", "5000"],
        ["--fresh", "--accumulation", "50"],
        ["--fresh", "--network.hidden-sizes"],
    ],
    ids=" ".join,
)
def test_what_was_written_survives_a_refusal(
    words: list[str], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    config = write_config(tmp_path / "config.json", small_config("vae", steps=4, seed=3, run_dir=str(path)))
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--config", str(config), *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "launch/train.py"), run_name="__main__")
    assert stop.value.code == 2
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("error", "environment", "printed"),
    [
        (ConfigError("seed -1"), {}, "error: seed -1\n"),
        (ConfigError("seed -1"), {"LOCAL_RANK": "3"}, "error: seed -1\n"),  # left over from another launch
        (ConfigError("seed -1"), {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "error: seed -1\n"),
        (ConfigError("seed -1"), {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, ""),
        (ConfigError("seed -1"), {"WORLD_SIZE": "9", "RANK": "8", "LOCAL_RANK": "0"}, "rank 8: error: seed -1\n"),
        (ConfigError("seed -1"), {"WORLD_SIZE": "4", "RANK": "3"}, "rank 3: error: seed -1\n"),
        (DataError("no images"), {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "rank 1: error: no images\n"),
    ],
)
def test_one_process_a_host_says_what_is_wrong_with_a_config(
    error: UserError,
    environment: dict[str, str],
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unset = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    monkeypatch.setattr(
        os, "environ", {name: value for name, value in os.environ.items() if name not in unset} | environment
    )

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == printed


_ALLOCATION = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "6272000000 bytes. Error code 12 (Cannot allocate memory)\nframe #0: c10::ThrowEnforceNotMet"
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), ["/root/x: Permission denied", "may read"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "y" * 4000), ["yyy ... yyy", "use a shorter one"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["error: No space left on device; free some space"]),
        (OSError(errno.EROFS, "Read-only file system", b"/mnt/a"), ["/mnt/a: Read-only file system; use one that"]),
        (OSError(errno.EMFILE, "Too many open files", "a"), ["ulimit -n"]),
        (OSError(errno.EIO, "Input/output error", "a", None, "b"), ["a to b: Input/output error; fix that"]),
        (OSError("a library's own words"), ["error: a library's own words; fix that"]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ["error: Broken pipe"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "r\n\x1b[2Jun"), [r"r\n\x1b[2Jun"]),
        (RuntimeError("Symlink loop from '/a/loop'"), ["/a/loop", "leads to itself"]),
        (MemoryError(), ["out of memory (MemoryError)", "--accumulation 2"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ["out of memory", "a smaller batch"]),
        (RuntimeError(_ALLOCATION), ["out of memory", "6272000000 bytes", "a smaller network"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["out of memory (CUDA", "2 GiB"]),
        (RuntimeError("std::bad_alloc"), ["out of memory (std::bad_alloc)"]),
        (RuntimeError("can't start new thread"), ["ulimit -u"]),
        (PeerDiedError("rank 1 (process 7) of this run died"), ["rank 1 (process 7) of this run died", "its output"]),
        (
            RuntimeError("[/a/gloo/pair.cc:545] Read error [127.0.0.1]:3: Connection reset by peer. This often means"),
            ["has ended or cannot be reached (Read error [127.0.0.1]:3: Connection reset by peer); see its output"],
        ),
    ],
    ids=repr,
)
def test_what_the_machine_refuses_is_told_in_one_line(
    error: Exception, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(fail)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in told), line
    assert len(line) < 500


@pytest.mark.parametrize("fault", [AssertionError("a fault"), KeyError("name"), RuntimeError("shapes differ")])
def test_a_fault_of_the_program_keeps_its_traceback(fault: Exception) -> None:
    def fail() -> None:
        raise fault

    with pytest.raises(type(fault)):
        run_command(fail)


@pytest.mark.parametrize(
    ("predicate", "of_one"),
    [
        *[(text, text.replace("have", "has", 1)) for text in (KINDS["frames"], KINDS["channels"], KINDS["range"])],
        (KINDS["levels"], KINDS["levels"].replace("lose", "loses").replace("their", "its")),
        (
            KINDS["depth"],
            "has more than 8 bits and is reduced to 8, by --dtype uint8 or because images are of several types",
        ),
        (KINDS["ppm"], "is 16-bit colour PPM, of which the upper 8 bits are read; convert them to PNG or TIFF"),
        ("are gray and get three equal channels", "is gray and gets three equal channels"),
    ],
)
def test_a_count_of_one_has_a_verb_of_one(predicate: str, of_one: str) -> None:
    assert agreeing(1, predicate) == of_one
    assert agreeing(2, predicate) == agreeing(0, predicate) == predicate
    assert [number_of(count, "shard") for count in (0, 1, 2_000)] == ["0 shards", "1 shard", "2,000 shards"]


@pytest.mark.parametrize("nouns", ["process processes", "micro-batch micro-batches", "box boxes", "mesh meshes"])
def test_nouns_have_their_plural(nouns: str) -> None:
    one, several = nouns.split()
    assert number_of(2, one) == f"2 {several}"
    assert number_of(1, one) == f"1 {one}"
    assert (number_of(2, "directory"), number_of(2, "array")) == ("2 directories", "2 arrays")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "{run}", "--out", ""], "--out is empty"),
        (["sample", "{run}", "--out="], "--out is empty"),
        (["evaluate", ""], "an argument is empty"),
        (["train", "vae-mnist", "--run-dir", ""], "--run-dir is empty"),
        (["train", "", "--fresh"], "an argument is empty"),
        (["compare", "{run}", "{run}", "--out", ""], "--out is empty"),
    ],
)
def test_an_empty_word_is_not_the_current_directory(
    words: list[str], told: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gen-dist", *(word.format(run=finished_run) for word in words)])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_a_run_directory_in_a_home_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert TrainConfig(run_dir="~/runs/first").run_path == Path("/home/of/someone/runs/first")
    with pytest.raises(ConfigError, match="~nobody-of-this-name/run: there is no such home"):
        TrainConfig(run_dir="~nobody-of-this-name/run").run_path  # noqa: B018


@pytest.mark.parametrize(
    "name", ["r\udce9un", "\udcff", "r\xfcn", "\U0001f480 \\udce9 \U0010ffff", "[b]*[/b]", "a\\\udc80"]
)
def test_a_config_keeps_a_path_that_is_no_utf_8(name: str) -> None:
    config = small_config("vae", run_dir=f"/runs/{name}", data=f"folder:/{name}")
    config = replace(config, packing=replace(config.packing, cache_dir=name))
    assert TrainConfig.from_json(config.to_json(), "config.json") == config


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_config_comes_back_equal_from_its_json(objective: str) -> None:
    config = small_config(objective)
    assert TrainConfig.from_json(config.to_json(), "config.json") == config
