"""Wall time of an evaluation by stage: `python bench/costs/evaluation_cost.py --data-root DIR`.

Each preset is trained for a few steps, since the cost of a metric does not depend on the model's quality. It is then
evaluated twice in a new process each, without and with the reference statistics in the cache.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.temporary import temporary_directory

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STAGES = ["whole", "reference", "samples", "diversity", "fid", "kid", "neighbours", "walks", "posterior", "likelihood"]


def main(
    data_root: Path,
    presets: tuple[str, ...] = ("vae-mnist", "dcgan-mnist", "r3gan-mnist"),
    samples: int = 10_000,
    nll: tuple[str, ...] = (),
    nll_images: int | None = None,
) -> None:
    """Print a table of stages in Markdown; its last line is the conditions.

    Args:
        data_root: directory with torchvision's MNIST; a missing one is downloaded to there.
        presets: names of presets to evaluate.
        samples: images drawn from each.
        nll: presets whose likelihood of 5,000 samples is measured as well: minutes.
        nll_images: test images for that; all of them if not given.
    """
    before = conditions()
    print(f"| seconds of {samples:,} samples | {' | '.join(STAGES)} |\n|---|{'---|' * len(STAGES)}", flush=True)
    with temporary_directory() as directory:
        os.environ["GEN_DIST_CACHE"] = f"{directory}/cache"
        for preset in tqdm(presets, desc="presets", unit="preset", leave=False):
            run = directory / preset
            options = ["--steps", 20, "--data", "mnist", "--data-root", data_root, "--run-dir", run]
            _python("launch/train.py", preset, *options)
            for file in (directory / "cache").glob("reference-*"):
                file.unlink()
            quick = ["--samples", samples, "--metrics", *_all_but_likelihood()]
            _print_row(f"`{preset}`", run, quick)
            _print_row(f"`{preset}`, again", run, quick)
            if preset in nll:
                images = "all" if nll_images is None else str(nll_images)
                _print_row(f"`{preset}`, nll", run, ["--metrics", "nll", "--nll-images", images])
    print("\n" + json.dumps(before))


def _print_row(label: str, run: Path, options: Sequence[object]) -> None:
    """Evaluate in a new process; its wall time and that of its stages."""
    started = time.perf_counter()
    (run / "evaluation.json").unlink(missing_ok=True)
    _python("-m", "gen_dist.commands", "evaluate", run, *options)
    seconds = {"whole": time.perf_counter() - started, **json.loads((run / "evaluation.json").read_text())["seconds"]}
    print(
        f"| {label} | {' | '.join(f'{seconds[name]:.1f}' if name in seconds else '' for name in STAGES)} |", flush=True
    )


def _all_but_likelihood() -> list[str]:
    from gen_dist.evaluation.metrics import measured_metrics

    return [name for name, metric in measured_metrics().items() if not metric.takes_minutes]


def _python(*words: object) -> None:
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr}")


if __name__ == "__main__":
    tyro.cli(main)
