"""Runs of `iwae-mnist` beside table 1 of the IWAE paper (Burda et al. 2016).

Each row has a run's epochs and seconds of training, the metrics of `gen-dist evaluate RUN --metrics nll negative_elbo
active_units`, and the paper's figures for as many importance samples. The picture shows the bounds on the test images
over the epochs.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.out_file import check_out
from gen_dist.cli import call_parsed, run_command
from gen_dist.errors import UserError
from gen_dist.pictures.figures import CLASS_COLOURS, INK_HEX, figure_of, save_figure
from gen_dist.reports.run_record import RunRecord, read_run

PAPER_NLL = {1: 86.76, 5: 85.54, 50: 84.78}
"""Nats, of 5,000 samples: one stochastic layer, by importance samples, after 3,280 epochs (Table 1 there)."""
PAPER_ACTIVE_UNITS = {1: 19, 5: 22, 50: 25}
_SKIPPED_SHARE = 0.05
"""Share of the epochs that the picture's vertical axis need not show."""


def main(runs: tyro.conf.Positional[tuple[Path, ...]], picture: Path | None = None) -> None:
    """Print the table and, as the last line, its rows in JSON.

    Args:
        runs: run directories of `iwae-mnist`, trained on MNIST and evaluated.
        picture: PNG file for the bounds over the epochs.
    """
    check_out(picture)
    if not runs:
        raise UserError("no run is given; name at least one run directory")
    records = [read_run(path) for path in runs]
    rows = [row_of(record) for record in records]
    print(
        f"{'K':>3}{'epochs':>8}{'training, s':>13}{'negative ELBO':>15}{'NLL':>8}{'paper':>8}{'units':>7}{'paper':>7}"
    )
    for row in rows:
        paper_nll = "" if row["paper_nll"] is None else f"{row['paper_nll']:.2f}"
        paper_units = "" if row["paper_active_units"] is None else str(row["paper_active_units"])
        figures = f"{row['negative_elbo']:15.2f}{row['nll_k5000']:8.2f}{paper_nll:>8}{row['active_units']:7}"
        print(f"{row['samples']:3}{row['epochs']:8.0f}{row['training_seconds']:13,.0f}{figures}{paper_units:>7}")
    if picture is not None:
        save_bounds(picture, records)
    print(json.dumps(rows))


def row_of(run: RunRecord) -> dict[str, Any]:
    """A row of the table.

    Raises:
        UserError: the run is of another preset or other data, or not finished, or not evaluated.
    """
    if run.config.preset != "iwae-mnist" or run.config.data != "mnist":
        raise UserError(f"{run.path} is a run of {run.config.preset} on {run.config.data}, not of iwae-mnist on mnist")
    if not run.finished or run.summary is None:
        raise UserError(f"{run.path} is at step {run.step} of {run.config.steps}; go on with it first")
    wanted = ("nll_k5000", "negative_elbo", "active_units")
    found = run.evaluation.metrics if run.evaluation else {}
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"{run.path} has no {' and no '.join(missing)} of its newest checkpoint; "
            f"gen-dist evaluate {run.path} --metrics nll negative_elbo active_units"
        )
    samples = samples_of(run)
    return {
        "samples": samples,
        "epochs": epochs_at(run, run.step),
        "training_seconds": run.training_seconds,
        **{name: found[name] for name in wanted},
        "paper_nll": PAPER_NLL.get(samples),
        "paper_active_units": PAPER_ACTIVE_UNITS.get(samples),
    }


def samples_of(run: RunRecord) -> int:
    """Importance samples that the run trained with."""
    samples: int = getattr(run.config.objective, "importance_samples", 1)
    return samples


def epochs_at(run: RunRecord, step: int) -> float:
    """Epochs of the training images up to a step of a finished run."""
    assert run.summary is not None
    epochs: float = run.summary["epochs"]
    return epochs * step / run.step


def bounds_of(run: RunRecord) -> dict[str, list[tuple[float, float]]]:
    """(epochs, nats) of each bound that was tested on the way: the negative ELBO, and that of K samples."""
    samples = samples_of(run)
    names = {"test/negative_elbo": f"K = {samples}, negative ELBO"}
    if samples > 1:
        names[f"test/negative_bound_k{samples}"] = f"K = {samples}, bound of {samples} samples"
    return {
        label: [
            (epochs_at(run, record["step"]), record[name]) for record in run.metrics if record.get(name) is not None
        ]
        for name, label in names.items()
    }


def save_bounds(path: Path, runs: Sequence[RunRecord]) -> None:
    """A line for each bound; a dot for the likelihood at the end, and the paper's as a dotted line of its colour."""
    width, height = 7.2, 4.4
    with figure_of(width, height) as figure:
        axes = figure.add_axes((0.75 / width, 0.6 / height, 6.2 / width, 3.4 / height))
        shown = []
        for run, colour in zip(runs, itertools.cycle(CLASS_COLOURS), strict=False):
            row = row_of(run)
            for style, (label, points) in zip(("-", "--"), bounds_of(run).items(), strict=False):
                axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.4, label=label)
                shown += [nats for epochs, nats in points if epochs >= _SKIPPED_SHARE * row["epochs"]]
            label = f"K = {row['samples']}, NLL of 5,000 samples: {row['nll_k5000']:.2f}"
            axes.plot([row["epochs"]], [row["nll_k5000"]], "o", color=colour, label=label, clip_on=False, zorder=3)
            shown.append(row["nll_k5000"])
            if row["paper_nll"] is not None:
                axes.axhline(row["paper_nll"], color=colour, linestyle=":", linewidth=1.2)
                shown.append(row["paper_nll"])
                axes.annotate(
                    f"paper, K = {row['samples']}, after 3,280 epochs: {row['paper_nll']:.2f}",
                    (0.01, row["paper_nll"]),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 2),
                    textcoords="offset points",
                    fontsize=8,
                    color=INK_HEX,
                )
        axes.set_ylim(min(shown) - 0.5, max(shown) + 0.5)
        axes.set_xlim(0, None)
        axes.set_xlabel("epochs of MNIST")
        axes.set_ylabel("nats per image, test images")
        axes.set_title("bounds of the negative log-likelihood, pixels binarized anew")
        axes.grid(True)
        axes.legend(loc="upper right")
        save_figure(path, figure)


if __name__ == "__main__":
    run_command(lambda: call_parsed(main, sys.argv[1:], "bench/quality/iwae_table.py"))
