"""The process of one peer: `python -m bench.peers.process MODULE DATA_ROOT DIRECTORY SEED`, started by compare.py.

It takes commands from standard input and answers on standard output (see turnstile.py); what the peer itself prints
goes to standard error.
"""

import importlib
import os
import sys
from pathlib import Path

from bench.peers.turnstile import Turnstile


def main(module: str, data_root: str, directory: str, seed: str) -> None:
    """Train the peer of this module."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    peer = importlib.import_module(f"bench.peers.{module}")
    peer.train(Path(data_root), Path(directory), int(seed), Turnstile(commands, answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
