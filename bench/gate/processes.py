"""The trees that the gate compares, and the processes that work in them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.measuring import temporary
from gen_dist.errors import ConfigError

WORKER = Path(__file__).resolve().parent / "worker.py"
REPOSITORY = WORKER.parent.parent.parent


class BenchmarkError(Exception):
    """A benchmark, or a worker, that failed in its tree: the message is the reason."""


class LackError(BenchmarkError):
    """What the benchmark asks for is not there, as in a tree that is older than it."""


class DiedError(BenchmarkError):
    """The process is gone, and what else it was to measure cannot be."""


def temporary_directory() -> contextlib.AbstractContextManager[Path]:
    """Of the gate: see bench/measuring/temporary.py."""
    return temporary.temporary_directory("gen_dist-gate-")


def commit_of(ref: str) -> str:
    """The commit that a name of git's means.

    Raises:
        ConfigError: it means none, or this is no checkout.
    """
    if not ref or ref.startswith("-"):
        raise ConfigError(f"--base {ref!r} is no commit; name one, as in --base main")
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(f"--base {ref} is no commit in {REPOSITORY}; `git log --oneline` lists some") from None


@contextlib.contextmanager
def checked_out(commit: str, path: Path) -> Iterator[Path]:
    """Within it, a working tree of a commit at `path`. It is a checkout as the present one is: starting a run asks git.

    Raises:
        ConfigError: git cannot make one.
    """
    try:
        try:
            _git("worktree", "add", "--quiet", "--detach", str(path), commit)
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split())
            raise ConfigError(f"{commit} cannot be checked out at {path}: {reason}") from None
        yield path
    finally:
        # One that was stopped while it was made is locked, which takes the second --force, and may lack its .git:
        # as such it is refused, but not once it is missing. (Pruning all that are missing would also take others'.)
        for _ in range(2):
            with contextlib.suppress(subprocess.CalledProcessError):
                _git("worktree", "remove", "--force", "--force", str(path))
            shutil.rmtree(path, ignore_errors=True)


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Worker:
    """A new process in one of the trees, which does what it is told and waits meanwhile."""

    def __init__(self, tree: Path, directory: Path, environment: Mapping[str, str]) -> None:
        """Start it; `directory` is for what it writes, and does not exist yet."""
        self._tree = tree
        work = directory / "work"
        work.mkdir(parents=True)
        self._errors = directory / "stderr"
        variables = os.environ | {"WANDB_MODE": "disabled"}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER), str(tree), str(work)],
                cwd=tree,
                env={**variables, **environment, "PYTHONPATH": str(tree)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for the gate, which ends its workers
            )

    def begin(self, method: str, *arguments: object) -> None:
        """Send a command without waiting for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DiedError(self._last_words()) from None

    def result(self) -> Any:
        """The answer to the command that was sent.

        Raises:
            LackError: the tree lacks what the command needs.
            DiedError: the process has died.
            BenchmarkError: the command failed otherwise.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise DiedError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise (LackError if answer["lacks"] else BenchmarkError)(answer["error"])
        return answer["result"]

    def call(self, method: str, *arguments: object) -> Any:
        """Send a command and wait for its answer."""
        self.begin(method, *arguments)
        return self.result()

    def facts(self) -> dict[str, Any]:
        """Threads and versions of it; that it runs its own tree's code is checked.

        Raises:
            BenchmarkError: the tree's code cannot be imported.
        """
        facts: dict[str, Any] = self.result()
        for file in facts["packages"]:
            if not Path(file).resolve().is_relative_to(self._tree.resolve()):
                raise BenchmarkError(f"{file} was imported, which is not of {self._tree}")
        return facts

    def close(self) -> None:
        """End it, with all processes that it started."""
        with temporary.uninterrupted():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()

    def _last_words(self) -> str:
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return f"its process died: {lines[-1] if lines else 'it said nothing'}"


@contextlib.contextmanager
def workers(
    trees: Mapping[str, Path], directory: Path, environments: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[dict[str, Worker], dict[str, dict[str, Any]]]]:
    """A new process in each tree, and their facts. They start at once, for nothing is timed yet."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, tree in trees.items():
            packed = {"GEN_DIST_CACHE": str(directory.parent / f"packed-{name}")}  # once, for all pairs
            with temporary.uninterrupted():
                worker = Worker(tree, directory / name, {**packed, **environments.get(name, {})})
                stack.callback(worker.close)
            worker.begin("facts")
            started[name] = worker
        yield started, {name: worker.facts() for name, worker in started.items()}
