"""Pack images into shards on a Ray cluster: `python launch/ray_pack.py folder:PATH --out URL [--option value]`."""

import sys
from pathlib import Path

# From a checkout this runs wherever it is called from, installed or not. A wheel has no gen_dist beside this folder.
if (root := Path(__file__).resolve().parent.parent).joinpath("gen_dist").is_dir():
    sys.path.insert(0, str(root))

from gen_dist.cli import own_program, parse_options, run_command
from gen_dist.launch.cluster.access import connect
from gen_dist.launch.packing.options import PackOptions
from gen_dist.startup import tell


def main() -> None:
    """Parse the command line, join or start a cluster, and make the shards that are missing."""
    options = parse_options(PackOptions, sys.argv[1:], own_program())
    from gen_dist.launch.packing.running import pack  # and with it torch

    with connect(options.address, 1, options.workers):
        from gen_dist.launch.packing.on_ray import on_ray  # Ray takes seconds to import

        pack(options, on_ray, tell)


if __name__ == "__main__":
    run_command(main)
