"""Options of the commands that train on Ray. This file does not import Ray, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError


@dataclass(frozen=True)
class WorkerOptions:
    """Options of the workers of a run."""

    workers: int = 2
    """Processes that train together, one per GPU where there are GPUs."""
    min_workers: int | None = None
    """Train with as few workers as this while hosts are away, and with more again once they are back. None waits for
    all."""
    cpus_per_worker: int = 1
    """CPUs that each worker reserves; also its number of threads."""
    max_failures: int = 3
    """Give up after more than this many failures of workers without a checkpoint or evaluation in between."""

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is less than 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ConfigError(f"min_workers {self.min_workers} is not in 1 .. {self.workers}, the number of workers")
        if self.max_failures < 0:
            raise ConfigError(f"max_failures {self.max_failures} is less than 0")

    @property
    def least_workers(self) -> int:
        """Workers without which the run does not start."""
        return self.min_workers or self.workers

    @property
    def least_cpus(self) -> int:
        """CPUs that the cluster must have for the run to start."""
        return self.cpus_per_worker * self.least_workers

    def refuse_shards(self, shards: int | None) -> None:
        """Raise ConfigError if some group of these workers cannot share out a run's shards evenly."""
        least, most = self.least_workers, self.workers
        odd = next((number for number in range(least, most + 1) if shards and shards % number), None)
        if odd:
            raise ConfigError(
                f"{shards} shards cannot be shared out evenly among {odd} workers, and a group may have {least} to "
                f"{most}; use --workers 1, 2, 4 or another divisor, without --min-workers"
            )


@dataclass(frozen=True)
class RayOptions(WorkerOptions):
    """Options of a run on Ray: its workers, its cluster, and where its directory is kept."""

    storage: str | None = None
    """Directory of the run directory: a path that all hosts share, or a URL such as s3://bucket/runs. None keeps the
    run directory where it is on one host."""
    address: str | None = None
    """HOST:PORT of the head of a running cluster. None starts a cluster on this host, for this command alone."""


def run_location(config: TrainConfig, storage: str | None) -> str:
    """Location of the run directory: an absolute path, or a URL.

    Raises:
        CheckpointError: the URL is of an unknown kind.
    """
    if storage is None:
        return str(config.run_path.absolute())
    if "://" not in storage:
        return str(Path(storage).expanduser().absolute() / config.run_path.name)
    base, mark, query = storage.partition("?")
    location = f"{base.rstrip('/')}/{config.run_path.name}{mark}{query}"
    from gen_dist.records.mirror import file_system_of

    file_system_of(location)
    return location
