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
    """A benchmark or a worker failed in its tree. The message is the reason."""


class LackError(BenchmarkError):
    """The tree lacks something that the benchmark needs, as a tree older than the benchmark may."""


class DiedError(BenchmarkError):
    """The process has died, so its other benchmarks cannot be measured."""


def temporary_directory() -> contextlib.AbstractContextManager[Path]:
    """Temporary directory of the gate, see bench/measuring/temporary.py."""
    return temporary.temporary_directory("gen_dist-gate-")


def commit_of(ref: str) -> str:
    """Full name of the commit that a branch, tag or short name means.

    Raises:
        ConfigError: there is no such commit, or this is not a checkout.
    """
    if not ref or ref.startswith("-"):
        raise ConfigError(f"--base {ref!r} is not a commit; name one, as in --base main")
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(f"--base {ref} is not a commit in {REPOSITORY}; `git log --oneline` lists some") from None


@contextlib.contextmanager
def checked_out(commit: str, path: Path) -> Iterator[Path]:
    """Context with a working tree of a commit at `path`: a real checkout, because a run asks git at its start.

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
        # A worktree whose creation was stopped is locked, which takes the second --force. If it lacks its .git, git
        # refuses to remove it until its directory is missing. (`prune` would remove other people's worktrees as well.)
        for _ in range(2):
            with contextlib.suppress(subprocess.CalledProcessError):
                _git("worktree", "remove", "--force", "--force", str(path))
            shutil.rmtree(path, ignore_errors=True)


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Worker:
    """A new process in one of the trees, which runs one command at a time."""

    def __init__(self, tree: Path, directory: Path, environment: Mapping[str, str]) -> None:
        """Start the process; it writes to `directory`, which must not exist yet."""
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
        """Threads and versions of the process, checked to run its own tree's code.

        Raises:
            BenchmarkError: the tree's code cannot be imported.
        """
        facts: dict[str, Any] = self.result()
        for file in facts["packages"]:
            if not Path(file).resolve().is_relative_to(self._tree.resolve()):
                raise BenchmarkError(f"{file} was imported, which is not of {self._tree}")
        return facts

    def close(self) -> None:
        """End the process and all that it started."""
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
    """A new process in each tree, and their facts. They start at the same time, since nothing is timed yet."""
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
