"""Search a space of configs with Ray Tune: `python launch/ray_sweep.py PRESET --space NAME=VALUES ...`."""

import sys
from pathlib import Path

# From a checkout this runs wherever it is called from, installed or not. A wheel has no gen_dist beside this folder.
if (root := Path(__file__).resolve().parent.parent).joinpath("gen_dist").is_dir():
    sys.path.insert(0, str(root))

from gen_dist.cli import own_program, parse_train, run_command
from gen_dist.launch.cluster.access import connect
from gen_dist.launch.sweep.plan import SweepOptions, command_source, conclude, plan_sweep, tell_stopped


def main() -> None:
    """Parse the command line, draw the trials, train what is not yet trained, and show what came out."""
    words = sys.argv[1:]
    config, fresh, options = parse_train(words, own_program(), SweepOptions())
    with plan_sweep(config, fresh, options) as sweep:
        if not all(trial.is_settled for trial in sweep.trials):
            try:
                with connect(options.address, options.least_cpus, options.workers * options.cpus_per_worker):
                    from gen_dist.launch.sweep.trials import run_trials  # Ray takes seconds to import

                    run_trials(sweep, options)
            except KeyboardInterrupt:
                if any(trial.history for trial in sweep.trials):
                    tell_stopped(sweep)
                raise
        conclude(sweep, config, command_source(words))


if __name__ == "__main__":
    run_command(main)
