"""Train a preset in the workers of a Ray cluster: `python launch/ray_train.py PRESET --workers N [--option value]`."""

import sys
from pathlib import Path

# From a checkout this runs wherever it is called from, installed or not. A wheel has no gen_dist beside this folder.
if (root := Path(__file__).resolve().parent.parent).joinpath("gen_dist").is_dir():
    sys.path.insert(0, str(root))

from gen_dist.cli import own_program, parse_train, run_command, tell_outcome
from gen_dist.launch.cluster.access import connect
from gen_dist.launch.cluster.options import RayOptions, run_location


def main() -> None:
    """Parse the command line, join or start a cluster, train, and say where the results are."""
    config, fresh, options = parse_train(sys.argv[1:], own_program(), RayOptions())
    options.refuse_shards(config.shards)
    location = run_location(config, options.storage)
    with connect(options.address, options.least_cpus, options.workers * options.cpus_per_worker):
        from gen_dist.launch.cluster.watching import train_in_workers  # Ray takes seconds to import

        lines = train_in_workers(config, fresh, options, location)
    tell_outcome(lines)


if __name__ == "__main__":
    run_command(main)
