"""Models side by side as one PNG file: samples, reconstructions, interpolations and figures, from the same latents."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gen_dist.data import Dataset
from gen_dist.data.forms import as_own
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import UserError
from gen_dist.evaluation.guide import metric_of
from gen_dist.inference import latent_walks
from gen_dist.inference.loading import load
from gen_dist.inference.model import GenerativeModel
from gen_dist.pictures import grids
from gen_dist.pictures.figures import figure_of, save_figure
from gen_dist.pictures.plots import tiles
from gen_dist.records.run_data import open_run_data
from gen_dist.reports.comparison import Comparison
from gen_dist.reports.groups import Group, readable_values

SIDE = 8
"""Samples a row and a column."""
PAIRS = 16
WALKS = 4
WALK_STEPS = 8
COLUMN_INCHES = 3.6
NAMES_INCHES = 2.2
"""Left of the columns, for the names of rows."""


def save_comparison(
    path: Path,
    comparison: Comparison,
    announce: Callable[[str], None] = print,
    metrics: Sequence[str] | None = None,
    *,
    data: str | None = None,
    data_root: str | None = None,
) -> None:
    """A column for each group, of its first run: the seeds of the latents and the test images are the same in all.

    Args:
        path: the PNG file.
        comparison: groups of runs.
        announce: takes lines about data that are packed.
        metrics: names of the figures below the images. None is all that the comparison has.
        data: where the data are now, such as folder:/new/place, if they have moved since the runs.
        data_root: directory with torchvision's data sets, if it has moved since the runs.

    Raises:
        UserError: a model or the data cannot be loaded.
        OSError: the file cannot be written.
    """
    run = comparison.groups[0].runs[0]
    digest = run.state["data_digest"]
    dataset = open_run_data(run.path, run.config, announce, digest=digest, data=data, data_root=data_root)
    metrics = comparison.metrics if metrics is None else metrics
    columns = len(comparison.groups)
    heights = [COLUMN_INCHES, COLUMN_INCHES / 2, COLUMN_INCHES / 2, 0.26 * len(metrics) + 0.2]
    width, height = COLUMN_INCHES * columns + NAMES_INCHES + 0.1, sum(heights) + 1.2
    with figure_of(width, height) as figure:
        grid = figure.subplots(
            4,
            columns,
            squeeze=False,
            gridspec_kw={
                "height_ratios": heights,
                **{
                    "left": NAMES_INCHES / width,
                    "right": 1 - 0.1 / width,
                    "bottom": 0.1 / height,
                    "top": 1 - 0.4 / height,
                },
                **{"wspace": 0.06, "hspace": 0.06},
            },
        )
        for column, group in enumerate(comparison.groups):
            model = load(group.runs[0].path, announce=announce)
            _draw(grid[0, column], functools.partial(_samples, model))
            _draw(grid[1, column], functools.partial(_reconstructions, model, dataset))
            _draw(grid[2, column], functools.partial(_walks, model))
            grid[0, column].set_title(group.label, fontsize=11, fontweight="bold")
            _write_figures(grid[3, column], group, comparison, metrics)
        for row, name in enumerate(("samples", "originals and\nreconstructions", "walks between\nlatents")):
            grid[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
        _write_names(grid[3, 0], metrics)
        save_figure(path, figure)


def _draw(axes: Any, make: Callable[[], np.ndarray]) -> None:
    """Show a mosaic, or in words why this model has none."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    try:
        mosaic = make()
    except UserError as error:
        axes.text(0.5, 0.5, textwrap.fill(str(error), 36), ha="center", va="center", fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        return
    axes.imshow(mosaic[:, :, 0] if mosaic.shape[2] == 1 else mosaic, cmap="gray", vmin=0, vmax=255)


def _samples(model: GenerativeModel) -> np.ndarray:
    return grids.mosaic(tiles(model.sample(SIDE * SIDE).cpu().numpy(), model.scale), [1] * SIDE, 1, 2)


def _reconstructions(model: GenerativeModel, dataset: Dataset) -> np.ndarray:
    if not model.objective.encodes:
        raise UserError("no encoder, so that it cannot reconstruct")
    places = evenly_spaced(PAIRS, len(dataset.test.images))
    originals = dataset.test.images[places]
    labels = torch.from_numpy(dataset.test.labels[places]) if model.conditional else None
    reconstructions = model.reconstruct(torch.from_numpy(originals), labels).cpu().numpy()
    half = PAIRS // 2
    originals = as_own(model.scale.form, originals)
    rows = [originals[:half], reconstructions[:half], originals[half:], reconstructions[half:]]
    return grids.mosaic(tiles(np.concatenate(rows), model.scale), [1] * half, 1, 2)


def _walks(model: GenerativeModel) -> np.ndarray:
    if not model.objective.generates:
        raise UserError("no prior whose latents to walk between")
    ends = model.prior_latents(2 * WALKS).cpu().numpy()
    walks = torch.from_numpy(latent_walks.great_circles(ends[::2], ends[1::2], WALK_STEPS))
    labels = model.labels_in_turn(WALKS).repeat_interleave(WALK_STEPS, dim=0) if model.conditional else None
    return grids.mosaic(tiles(model.images(walks, labels).cpu().numpy(), model.scale), [0] * WALK_STEPS, 2, 2)


def _write_figures(axes: Any, group: Group, comparison: Comparison, metrics: Sequence[str]) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(metrics), 0)
    for row, name in enumerate(metrics):
        values = group.values(name)
        text = readable_values(values, name) if values else textwrap.shorten(group.reason(name), 50, placeholder=" ...")
        best = group is comparison.best(name)
        style = {"fontweight": "bold"} if best else {} if values else {"fontsize": 6.5, "fontstyle": "italic"}
        axes.text(0.5, row + 0.5, text, ha="center", va="center", **({"fontsize": 9} | style))


def _write_names(axes: Any, metrics: Sequence[str]) -> None:
    for row, name in enumerate(metrics):
        axes.text(-0.03, row + 0.5, textwrap.fill(metric_of(name).label, 34), ha="right", va="center", fontsize=8)
