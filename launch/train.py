"""Train a preset: `accelerate launch launch/train.py PRESET [--option value]`, or plain `python` for one process.

`gen-dist train` is the same command, and `accelerate launch -m gen_dist.launch.train` needs no checkout.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# From a checkout this runs wherever it is called from, installed or not. A wheel has no gen_dist beside this folder.
if (root := Path(__file__).resolve().parent.parent).joinpath("gen_dist").is_dir():
    sys.path.insert(0, str(root))

from gen_dist.cli import NoOptions, own_program, parse_train, resume_command, run_command, tell_outcome
from gen_dist.startup import quick_import


def main(words: Sequence[str], program: str) -> None:
    """Parse the words of the command line, train, and say where the results are."""
    config, fresh, _ = parse_train(words, program, NoOptions())
    with quick_import():  # torch takes seconds: --help and mistyped options need not wait for it
        from gen_dist.training import run

    outcome = run.train(config, fresh=fresh)
    if outcome.is_main:
        tell_outcome(outcome.report(resume_command()))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], own_program()))
