"""Where an evaluation's time goes: `python bench/evaluation_cost.py --data-root DIR`.

Each preset is trained for a few steps, since what a figure costs does not depend on how good it is, and evaluated in a
new process, as a user does it, twice: without and with the reference statistics in the cache.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.conditions import conditions

REPOSITORY = Path(__file__).resolve().parent.parent


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
        presets: which to evaluate.
        samples: images drawn from each.
        nll: presets whose likelihood of 5,000 samples is measured as well: minutes.
        nll_images: test images for that; all of them if not given.
    """
    before = conditions()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["GEN_DIST_CACHE"] = f"{directory}/cache"
        for preset in tqdm(presets, desc="presets", unit="preset"):
            run = Path(directory) / preset
            options = ["--steps", 20, "--data", "mnist", "--data-root", data_root, "--run-dir", run]
            _python("launch/train.py", preset, *options)
            for file in Path(directory, "cache").glob("reference-*"):
                file.unlink()
            metrics = ["--metrics", *_all_but_likelihood()]
            for label in (f"`{preset}`", f"`{preset}`, again"):
                started = time.perf_counter()
                _python("-m", "gen_dist.cli", "evaluate", run, "--samples", samples, *metrics)
                rows[label] = {"whole": time.perf_counter() - started, **_seconds(run)}
            if preset in nll:
                images = [] if nll_images is None else ["--nll-images", nll_images]
                started = time.perf_counter()
                _python("-m", "gen_dist.cli", "evaluate", run, "--metrics", "nll", *images)
                likelihood = _seconds(run)["likelihood"]
                rows[f"`{preset}`, nll"] = {"whole": time.perf_counter() - started, "likelihood": likelihood}
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
    print(f"| seconds of {samples:,} samples | {' | '.join(stages)} |\n|---|{'---|' * len(stages)}")
    for label, row in rows.items():
        print(f"| {label} | {' | '.join(f'{row[stage]:.1f}' if stage in row else '' for stage in stages)} |")
    print("\n" + json.dumps(before))


def _all_but_likelihood() -> list[str]:
    from gen_dist.evaluation import METRICS

    return [name for name in METRICS if name not in ("nll", "bits_per_dimension")]


def _seconds(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "evaluation.json").read_text())["seconds"]
    return found


def _python(*words: object) -> None:
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr}")


if __name__ == "__main__":
    tyro.cli(main)
