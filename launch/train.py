"""Train a preset: `accelerate launch launch/train.py PRESET [--option value]`, or plain `python` for one process."""

import sys
from pathlib import Path

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gen_dist.cli import NoOptions, parse_train, resume_command, run_command
from gen_dist.importing import quick_import


def main() -> None:
    """Parse the command line, train, and say where the results are."""
    config, fresh, _ = parse_train(sys.argv[1:], "launch/train.py", NoOptions())
    with quick_import():  # torch takes seconds: --help and mistyped options need not wait for it
        from gen_dist.parallel.processes import stop_with_launcher
        from gen_dist.training import run

    stop_with_launcher()
    outcome = run.train(config, fresh=fresh)
    if outcome.is_main:
        print(*outcome.report(resume_command()), sep="\n", flush=True)


if __name__ == "__main__":
    run_command(main)
