"""Shards made by the processes of a Ray cluster, as rows of a data set of Ray Data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from gen_dist.errors import DataError, UserError
from gen_dist.launch.cluster.mailbox import settings_of_file_systems, take_settings
from gen_dist.launch.packing.making import Report
from gen_dist.launch.packing.plan import Tasks, task_of
from gen_dist.launch.packing.running import Job


def on_ray(job: Job, tasks: Tasks) -> Iterator[Report]:
    """Make shards by all free CPUs of the cluster that this process has joined; those of a lost process are begun anew.

    Raises:
        DataError: as `Job.make`; nothing that was finished is lost.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Each row is a block of its own: its images are many, and processes come and go.
    items = [{"task": packed} for packed in tasks.packed]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    settings: Any = ray.put(settings_of_file_systems())

    def make(row: dict[str, Any]) -> dict[str, str]:
        take_settings(ray.get(settings))
        try:
            return {"report": json.dumps(asdict(job.make(task_of(row["task"])))), "error": ""}
        except UserError as error:  # one line, which Ray would bury in a traceback
            return {"report": "", "error": str(error)}

    for row in rows.map(make, num_cpus=1).iter_rows():
        if row["error"]:
            raise DataError(row["error"])
        yield Report(**json.loads(row["report"]))
