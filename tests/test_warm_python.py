"""Programs that run in a fork with torch already imported behave as in a new process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.warm_python import warm_python

PROGRAMS = {
    "arguments, environment, directory": "import os, sys; print(sys.argv, os.environ['MARK'], os.getcwd(), __name__)",
    "standard streams": "import sys; print(sys.stdin.read()); print('words', file=sys.stderr)",
    "exit code": "import sys; sys.exit(3)",
    "message": "import sys; sys.exit('a message')",
    "no exit code": "import sys; sys.exit(None)",
    "end of process": "import os; os._exit(5)",
    "exit functions": "import atexit; atexit.register(print, 'the end')",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('later'))).start()",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "modules": "import sys; print(any(name.startswith(('gen_dist', 'tests')) for name in sys.modules))",
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_warm_program_behaves_as_in_a_new_process(kind: str, tmp_path: Path) -> None:
    found = []
    for python in ([sys.executable], warm_python()):
        done = subprocess.run(
            [*python, "-c", PROGRAMS[kind], "one", "two"],
            cwd=tmp_path,
            env=os.environ | {"MARK": "a mark"},
            input="input",
            capture_output=True,
            text=True,
            timeout=60,
        )
        found.append((done.returncode, done.stdout, done.stderr))
    assert found[0] == found[1]


@pytest.mark.skipif(sys.platform != "linux", reason="programs are forked on Linux alone")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_client_ends_the_warm_program(number: signal.Signals) -> None:
    code = "import os, time; print(os.getpid(), flush=True); [time.sleep(0.05) for _ in range(1200)]"
    client = subprocess.Popen([*warm_python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert client.stdout is not None
    program = int(client.stdout.readline())
    assert program != client.pid
    client.send_signal(number)
    assert client.wait(timeout=60) == -number
    client.stdout.close()
    until = time.monotonic() + 60
    while psutil.pid_exists(program):
        assert time.monotonic() < until
        time.sleep(0.01)
