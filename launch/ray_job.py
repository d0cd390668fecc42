"""Train on a remote cluster: `python launch/ray_job.py submit PRESET --storage PATH ...`, status, logs, stop.

A job brings this package along and runs `gen_dist.launch.ray_train` there. The head's job interface listens on the
head's own 127.0.0.1: reach it by `ssh -L 8265:127.0.0.1:8265 HEAD`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# From a checkout this runs wherever it is called from, installed or not. A wheel has no gen_dist beside this folder.
if (root := Path(__file__).resolve().parent.parent).joinpath("gen_dist").is_dir():
    sys.path.insert(0, str(root))

import tyro

from gen_dist.cli import own_program, parse_train, run_command, run_subcommand, without_plugins
from gen_dist.errors import ConfigError, UserError
from gen_dist.files import temporary_directory
from gen_dist.launch.cluster.access import (
    DASHBOARD_PORT,
    assert_reachable,
    forwarded_variables,
    require_token,
    shipped_code,
)
from gen_dist.launch.cluster.options import RayOptions, run_location
from gen_dist.plugins.loading import contents_of
from gen_dist.startup import tell

DASHBOARD = f"http://127.0.0.1:{DASHBOARD_PORT}"
_CONFIG = "job-config.json"
_STOP_SECONDS = "60"
"""Time that a stopped job has to save before Ray kills it."""
_AGENT_SECONDS = 120
"""Time in which a cluster that answers must also have an agent that takes jobs."""


def submit(words: list[str]) -> None:
    """Send a job, follow its output, and end with its result.

    Raises:
        UserError: bad options, an unreachable cluster, or the job failed.
    """
    address = DASHBOARD
    if words[:1] == ["--dashboard"]:
        address, words = words[1] if len(words) > 1 else "", words[2:]
    config, _, options = parse_train(words, f"{own_program()} submit", RayOptions())
    options.refuse_shards(config.shards)
    location = run_location(config, options.storage)
    if options.storage is None and not (config.run_dir and Path(config.run_dir).is_absolute()):
        raise ConfigError(
            "a job's working directory is deleted with it; name a --storage that all hosts share, or an absolute "
            "--run-dir"
        )
    if options.address is not None:
        raise ConfigError("a job runs on the cluster of the dashboard; leave out --address")
    others, plugins = without_plugins(words)
    words, contents = others, contents_of(config.plugins)
    files = dict(contents)  # that the cluster does not have
    if words[0].startswith("--config"):
        words[: 1 if "=" in words[0] else 2] = ["--config", _CONFIG]
        files[_CONFIG] = config.to_json().encode()
    for plugin in [*contents, *(word for word in plugins if Path(word).name not in contents)]:
        words += ["--plugin", plugin]
    if unsent := sorted(name for name in os.environ if name.startswith("FSSPEC_")):
        tell(
            f"warning: {', '.join(unsent)} is not sent with a job, whose environment the cluster shows; set it where "
            "the cluster's hosts start Ray"
        )
    with _client(address) as client, temporary_directory("job") as directory:
        job = _submitted(
            client,
            entrypoint=shlex.join(["python", "-m", "gen_dist.launch.ray_train", *words]),
            runtime_env={
                **shipped_code(files, directory),
                "env_vars": {**forwarded_variables(), "RAY_JOB_STOP_WAIT_TIME_S": _STOP_SECONDS},
            },
        )
        at = "" if address == DASHBOARD else f" --dashboard {address}"
        print(f"{job} trains to {location}; Ctrl-C leaves it running, and to end it: {own_program()} stop {job}{at}")
        _follow(client, job)


def logs(job: tyro.conf.Positional[str], /, dashboard: str = DASHBOARD) -> None:
    """Show the output of a job until it ends.

    Args:
        job: Name that `submit` printed.
        dashboard: URL of the head's job interface.
    """
    with _client(dashboard) as client:
        _follow(client, job)


def status(job: tyro.conf.Positional[str | None] = None, /, dashboard: str = DASHBOARD) -> None:
    """Show the status of a job, or of all jobs.

    Args:
        job: Name that `submit` printed. None shows all jobs.
        dashboard: URL of the head's job interface.
    """
    with _client(dashboard) as client:
        known = sorted(client.list_jobs(), key=lambda one: one.start_time or 0)
        for one in known if job is None else [client.get_job_info(job)]:
            print(f"{one.submission_id or one.job_id}  {one.status.value}  {one.entrypoint}")


def stop(job: tyro.conf.Positional[str], /, dashboard: str = DASHBOARD) -> None:
    """Make a job save and stop; `submit` again resumes the run.

    Args:
        job: Name that `submit` printed.
        dashboard: URL of the head's job interface.
    """
    with _client(dashboard) as client:
        print("stopping" if client.stop_job(job) else "the job has already ended")


@contextmanager
def _client(address: str) -> Iterator[Any]:
    """Give a client of the job interface, whose errors become one line."""
    require_token(create=False)
    assert_reachable(address, DASHBOARD_PORT)
    import aiohttp
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        yield JobSubmissionClient(address if "://" in address else f"http://{address}")
    except AuthenticationError:
        raise ConfigError(f"{address} refuses our token; copy its head's token") from None
    except (OSError, RuntimeError, ValueError, aiohttp.ClientError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{address}: {reason}") from None


def _submitted(client: Any, **job: Any) -> str:
    """Submit a job, and return its name. Wait for the agents of a cluster that has only just started, or is busy."""
    until, has_told = time.monotonic() + _AGENT_SECONDS, False
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
        if not has_told:
            tell("waiting for the cluster, which has no agent yet that takes jobs")
            has_told = True
        time.sleep(1)


def _follow(client: Any, job: str) -> None:
    client.get_job_info(job)  # an unknown job is an error here, with a short message

    async def show() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    asyncio.run(show())
    info = client.get_job_info(job)
    if info.status.value == "FAILED":
        raise UserError(f"{job} failed: {' '.join((info.message or 'no reason given').split())[:300]}")
    if info.status.value in ("PENDING", "RUNNING"):
        raise UserError(
            f"lost the connection to {job}, which is {info.status.value.lower()}; see {own_program()} status"
        )
    print(f"{job} {info.status.value.lower()}")


def main() -> None:
    """Run a subcommand: `submit` takes the options of launch/ray_train.py, the others have their own."""
    if sys.argv[1:2] == ["submit"]:
        submit(sys.argv[2:])
    else:
        run_subcommand([logs, status, stop], sys.argv[1:], own_program())


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "120")
    run_command(main)
