"""The whole run of gen_dist_run.py with `--compile`."""

import functools

from bench.peers import gen_dist_run

train = functools.partial(gen_dist_run.train, compiled=True)
