"""Streams, variables and launchers that a process did not choose end and change no run; imports without collector."""

from __future__ import annotations

import errno
import gc
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gen_dist import startup
from gen_dist.parallel.barrier import is_alive
from gen_dist.startup import forgiving, is_adopted, lost_output, quick_import, take_ranks, tell
from tests.conftest import REPOSITORY


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _dead_terminal() -> int:
    controller, terminal = pty.openpty()
    os.close(controller)
    return terminal


def _full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize(("opened", "lost"), [(_closed_pipe, None), (_dead_terminal, None), (_full_disk, errno.ENOSPC)])
def test_no_write_to_a_standard_stream_fails(opened: object, lost: int | None) -> None:
    """A reader that left wants no more; a full disk is told at the end, once."""
    descriptor = opened()  # type: ignore[operator]
    stream = forgiving(None, descriptor, "backslashreplace")
    for _ in range(3):
        print("x" * 9000, file=stream, flush=True)
    found = lost_output(stream)
    assert (found and found.errno) == lost
    assert lost_output(stream) is None
    stream.close()
    os.close(descriptor)


@pytest.mark.parametrize(
    ("encoding", "errors", "text", "written"),
    [
        ("ascii", "backslashreplace", "rün", b"r\\xfcn"),
        ("ascii", startup._PATHS_AS_THEY_ARE, "rün", b"r\\xfcn"),
        ("utf-8", startup._PATHS_AS_THEY_ARE, "rün/r\udce9un", b"r\xc3\xbcn/r\xe9un"),
        ("latin-1", startup._PATHS_AS_THEY_ARE, "r\udce9un \u6570", b"r\xe9un \\u6570"),
    ],
)
def test_standard_streams_take_any_text(encoding: str, errors: str, text: str, written: bytes, tmp_path: Path) -> None:
    """Standard output has a path's own bytes, so that the next command finds it."""
    with open(tmp_path / "out", "w", encoding=encoding) as before:
        stream = forgiving(before, before.fileno(), errors)
        print(text, end="", file=stream, flush=True)
        stream.close()
    assert (tmp_path / "out").read_bytes() == written


def test_a_pipe_that_does_not_block_gets_all(tmp_path: Path) -> None:
    """Another program at the same terminal may have switched it so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    cat = subprocess.Popen(["wc", "-c"], stdin=reader, stdout=subprocess.PIPE)
    stream = forgiving(None, writer, "strict")
    print("x" * 2_000_000, file=stream, flush=True)
    stream.close()
    os.close(writer)
    os.close(reader)
    assert cat.communicate()[0].split() == [b"2000001"]


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_descriptor_is_no_files_number(closed: str, tmp_path: Path) -> None:
    """Else what C libraries print to standard error goes into the next file that is opened."""
    code = (
        "import os; from gen_dist.startup import settle; settle(); "
        "print('shown', flush=True); file = open('written', 'w'); "
        "os.write(2, b'warning of a library'); file.write(str(file.fileno())); file.close()"
    )
    words = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    assert int((tmp_path / "written").read_text()) > 2


def test_telling_without_standard_error_is_silent(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    tell("unheard")
    assert capsys.readouterr().out == ""


_MPIRUN = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
}
_RANK_3 = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
_HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("found", "left"),
    [
        ({"LOCAL_RANK": "3"}, {}),
        ({"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, {}),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, {}),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "MV2_COMM_WORLD_SIZE": "2"}, {}),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}),
        (_RANK_3 | {"OMPI_COMM_WORLD_SIZE": "1"}, _RANK_3 | {"OMPI_COMM_WORLD_SIZE": "1"}),
        (_MPIRUN, _MPIRUN | _RANK_3),
        (_MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, _RANK_3 | {"LOCAL_WORLD_SIZE": "4"} | _HERE),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, _RANK_3 | {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"} | _HERE),
    ],
)
def test_ranks_are_those_of_the_launch(
    found: dict[str, str], left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(found))
    take_ranks()
    of_launch = {name: value for name, value in os.environ.items() if name in left}
    assert of_launch == left
    assert not (os.environ.keys() - left.keys()) & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}


def test_foreign_variables_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import torch` fails at the first of them."""
    ours = {"GEN_DIST_THREADS": "2", "WANDB_MODE": "offline"}
    foreign = {
        "TQDM_MININTERVAL": "abc",
        "TQDM_DISABLE": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    monkeypatch.setattr(os, "environ", ours | foreign)
    startup.forget_foreign_variables()
    assert os.environ == ours


@pytest.mark.parametrize(
    ("parent", "name", "words", "adopted"),
    [
        (1, "systemd", "/sbin/init", True),
        (1, "bash", "bash\0/job.sh", True),
        (1, "python", "/usr/bin/python\0/usr/bin/accelerate\0launch\0train.py", False),
        (700, "systemd", "/lib/systemd/systemd\0--user", True),
        (700, "containerd-shim", "/usr/bin/containerd-shim-runc-v2", True),
        (700, "torchrun", "python\0/bin/torchrun\0--nproc-per-node\x002", False),
        (700, "bash", "bash\0wrapper.sh", False),
    ],
)
def test_a_launchers_orphan_knows_it(parent: int, name: str, words: str, adopted: bool, tmp_path: Path) -> None:
    (tmp_path / str(parent)).mkdir()
    (tmp_path / str(parent) / "comm").write_text(f"{name}\n")
    (tmp_path / str(parent) / "cmdline").write_text(words)
    assert is_adopted(parent, tmp_path) == adopted


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize("settles", ["before", "after"])
def test_a_process_ends_with_its_launcher(settles: str, tmp_path: Path) -> None:
    """Also where the launcher died before it was looked at."""
    wait = "" if settles == "before" else "time.sleep(0.3); "
    child = f"import time; from gen_dist.startup import settle; {wait}settle(); time.sleep(600)"
    launcher = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"print(p.pid, flush=True); time.sleep({0.5 if settles == 'before' else 0.05})"
    )
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "PYTHONPATH": str(REPOSITORY)}
    # The first word makes it look like the launcher while it lives.
    done = subprocess.run(
        [sys.executable, "-c", launcher, "accelerate"], env=os.environ | launched, stdout=subprocess.PIPE, text=True
    )
    process = int(done.stdout)
    for _ in range(3000):  # a process may take seconds to begin
        if not is_alive(process):
            return
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    raise AssertionError("it goes on")


def test_the_collector_is_off_within_and_restored_afterwards() -> None:
    assert gc.isenabled()
    with quick_import():
        assert not gc.isenabled()
        with quick_import():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_is_on_again_after_a_failed_import() -> None:
    with pytest.raises(ImportError), quick_import():
        raise ImportError
    assert gc.isenabled()
