"""Python processes that start with torch already imported, for tests that start many commands.

Importing torch costs a process two seconds of CPU. `warm_python()` returns a command to put in place of
`[sys.executable]`: a small client (`warm_client.py`) that has its program run by a fork of one process with torch in
it. Environment, working directory, standard streams, signals and exit code are those of the client.

Only third-party modules are imported beforehand; those of gen_dist, launch and bench are imported by each program.
Tests of imports or interpreter flags, and tests that kill whole sessions, use `sys.executable`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

from tests.support.children import end_with_parent
from tests.support.warm_client import CLIENT, MESSAGE_BYTES, Program, read_message

PRELOADED = ("accelerate", "filelock", "numpy", "PIL.Image", "psutil", "safetensors.torch", "torch", "tqdm", "tyro")
"""None of them imports Triton, which decides at its import whether kernels are interpreted."""


@functools.cache
def warm_python() -> list[str]:
    """Command that runs a Python program, to be followed by the program's words (a script, `-m` or `-c`)."""
    if sys.platform != "linux":  # elsewhere libraries do not survive a fork
        return [sys.executable]
    directory = tempfile.mkdtemp(prefix="gen_dist-warm-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    address = f"{directory}/socket"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, "-c", "from tests.support.warm_python import main; main()", address],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        preexec_fn=end_with_parent,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "the process that starts others has ended"
    atexit.register(server.terminate)
    return [sys.executable, "-ISB", str(CLIENT), address]


def in_two_ranks() -> list[str]:
    """Command that runs a Python program in two processes on CPUs, joined as by `accelerate launch`."""
    return [sys.executable, "-ISB", str(Path(__file__).with_name("two_ranks.py")), *warm_python(), "--"]


def main() -> None:
    """Serve clients; in a fork, run the program of one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the programs
    for name in PRELOADED:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "__main__")]:
        if name != "__main__":
            del sys.modules[name]
    gc.collect()
    gc.freeze()  # so that pages of memory stay shared with the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(64)
        print("ready", flush=True)
        program, streams = _serve(listener)
    _end(_become(program, streams))  # in the fork of a client's program


def _serve(listener: socket.socket) -> tuple[Program, list[int]]:
    """Fork for each client, and tell it the exit status. Returns in the forks alone."""
    clients: dict[int, socket.socket] = {}  # by the number of the process
    wakes, wakens = os.pipe()
    os.set_blocking(wakens, False)
    signal.set_wakeup_fd(wakens)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(wakes, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    program, streams = read_message(client)
                    if (process := os.fork()) == 0:
                        signal.set_wakeup_fd(-1)
                        for fd in (wakes, wakens, client.fileno(), *(other.fileno() for other in clients.values())):
                            os.close(fd)
                        return program, streams
                    for stream in streams:
                        os.close(stream)
                    clients[process] = client
                    client.sendall(process.to_bytes(8, "little"))
                    ready.register(client, selectors.EVENT_READ, process)
                elif key.fileobj == wakes:
                    os.read(wakes, MESSAGE_BYTES)
                    _tell_exits(clients, ready)
                elif key.data in clients:  # the client sent nothing: it was killed
                    os.kill(key.data, signal.SIGKILL)
                    ready.unregister(key.fileobj)


def _tell_exits(clients: dict[int, socket.socket], ready: selectors.BaseSelector) -> None:
    while clients:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        client = clients.pop(process)
        if client.fileno() in ready.get_map():
            ready.unregister(client)
            with contextlib.suppress(OSError):  # the client ended with its program, by the same signal
                client.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
        client.close()


def _become(program: Program, streams: list[int]) -> int:
    """Run these words as a newly started Python would. Returns the exit code."""
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # type: ignore[misc]
    os.chdir(program.directory)
    os.environ.clear()
    os.environ.update(program.environment)
    try:
        _run(program)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """End as Python does, but without destroying all objects of torch, which takes longer than many programs."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run(program: Program) -> None:
    searched = [path for path in program.environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, *words = program.words
    if kind == "-m":
        sys.path[:1] = [program.directory, *searched]
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[:1] = ["", *searched]
        sys.argv = ["-c", *words[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[:1] = [str(Path(kind).resolve().parent), *searched]
        sys.argv = program.words
        runpy.run_path(kind, run_name="__main__")
