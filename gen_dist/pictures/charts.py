"""Charts of a model as PNG files: its latent space, and the classes and scores of its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.inference.latent_walks import principal_directions
from gen_dist.pictures.figures import (
    FAKE_COLOUR,
    INK_HEX,
    REAL_COLOUR,
    class_colours,
    figure_of,
    percent,
    save_figure,
)
from gen_dist.pictures.lettering import lettering_of
from gen_dist.records.score_bins import SCORE_EDGES

CLASS_SHARES = "samples/class_shares"
REAL_SCORES, FAKE_SCORES = "scores/real", "scores/fake"
"""Names in metrics.jsonl of the data of these charts."""

_LEGEND_CLASSES = 20


def save_scatter(
    path: Path, posterior_means: NDArray[np.floating], labels: NDArray[np.integer], class_names: Sequence[str]
) -> None:
    """Draw posterior means as points in the plane, coloured by class, with the name of each class at its median.

    Two latents are drawn as they are, more as their first two principal components, and one against the class.

    Args:
        path: the PNG file.
        posterior_means: [N, D], N >= 1. Up to about 5,000 points stay readable.
        labels: [N], 0 .. len(class_names) - 1.
        class_names: names by label. There is a legend for 2 to 20 classes.

    Raises:
        ValueError: the shapes do not match.
    """
    if posterior_means.ndim != 2 or labels.shape != posterior_means.shape[:1]:
        raise ValueError(f"posterior means {posterior_means.shape} and labels {labels.shape} do not go together")
    with_legend = 1 < len(class_names) <= _LEGEND_CLASSES
    lettering = lettering_of(class_names if with_legend else ())
    points, axis_names = _plane(posterior_means, labels)
    width, height = 7.0 + (max(1.4, _legend_inches(lettering.inches(9))) if with_legend else 0.0), 6.6
    with figure_of(width, height, lettering.font and lettering.font.family) as figure:
        from matplotlib.colors import ListedColormap
        from matplotlib.patheffects import withStroke

        axes = figure.add_axes((0.85 / width, 0.65 / height, 6.0 / width, 5.5 / height))
        colours = class_colours(len(class_names))
        # Shuffled: in the order of the classes, the last one would hide the others.
        order = np.random.default_rng(0).permutation(len(points))
        axes.scatter(
            *points[order].T,
            s=float(np.clip(40_000 / len(points), 6, 30)),
            c=labels[order],
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(class_names) - 0.5,
            alpha=0.7,
            linewidths=0,
        )
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])
        title = f"posterior means of {len(points):,} images by class"
        axes.set_title(f"{title}\n({lettering.note})" if lettering.note else title)
        axes.grid(True)
        if posterior_means.shape[1] > 1:
            axes.set_aspect("equal", adjustable="datalim")
        if with_legend:
            halo = [withStroke(linewidth=3.5, foreground="white")]
            weight = "normal" if lettering.font else "bold"  # a font with many letters often has one weight
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 12, "fontweight": weight}
            texts = [
                axes.text(
                    *np.median(points[labels == label], axis=0),
                    lettering.names[label],
                    color=INK_HEX,
                    path_effects=halo,
                    **style,
                )
                for label in np.unique(labels)
            ]
            handles = [
                axes.scatter([], [], s=45, color=colour, label=name)
                for colour, name in zip(colours, lettering.names, strict=True)
            ]
            _keep_inside(axes, texts)
            axes.legend(handles=handles, title="class", loc="center left", bbox_to_anchor=(1.01, 0.5))
        save_figure(path, figure)


def save_class_shares(path: Path, records: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> None:
    """Draw the share of each class among the samples over the steps, stacked.

    Args:
        path: the PNG file.
        records: the objects of metrics.jsonl. Those with finite `samples/class_shares` are shown.
        class_names: names in the order of the shares. There is a legend for up to 20 classes.

    Raises:
        ValueError: no record has as many shares as there are classes.
    """
    checked = {record["step"]: record[CLASS_SHARES] for record in records if has_class_shares(record, class_names)}
    if not checked:
        raise ValueError(f"no record has the shares of {len(class_names)} classes")
    steps, shares = list(checked), np.array(list(checked.values()), dtype=np.float64).T
    with_legend = len(class_names) <= _LEGEND_CLASSES
    lettering = lettering_of(class_names if with_legend else ())
    width, height = 7.3 + (0.4 + _legend_inches(lettering.inches(9)) if with_legend else 0.0), 4.6
    with figure_of(width, height, lettering.font and lettering.font.family) as figure:
        axes = figure.add_axes((0.85 / width, 0.6 / height, 6.2 / width, 3.55 / height))
        colours = class_colours(len(class_names))
        border: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.6} if with_legend else {"linewidth": 0}
        if len(steps) == 1:
            bottoms = np.cumsum(shares[:, 0]) - shares[:, 0]
            axes.bar([steps[0]], shares[:, 0], bottom=bottoms, color=colours, **border)
            axes.set_xticks(steps)
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
        else:
            axes.stackplot(steps, shares, colors=colours, **border)
            axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(percent)
        axes.set_xlabel("step")
        axes.set_ylabel("share of the samples")
        title = f"classes of the samples{'' if with_legend else f', {len(class_names)} of them'}"
        axes.set_title(f"{title}\n({lettering.note})" if lettering.note else title)
        if with_legend:
            handles = [
                axes.bar([0], [0], color=colour, label=f"{name}  {share:.0%}")
                for colour, name, share in zip(colours, lettering.names, shares[:, -1], strict=True)
            ]
            # In the order of the stack, with the first class lowest.
            axes.legend(handles=handles[::-1], title="class, last share", loc="center left", bbox_to_anchor=(1.01, 0.5))
        save_figure(path, figure)


def _legend_inches(names: float) -> float:
    """Width of a legend right of the axes, by that of its names."""
    return 0.75 + names


def _keep_inside(axes: Any, texts: Sequence[Any]) -> None:
    """Move texts that reach over the edge of the axes to the inside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.apply_aspect()
    renderer, box = FigureCanvasAgg(axes.figure).get_renderer(), axes.get_window_extent()
    to_data = axes.transData.inverted()
    for text in texts:
        extent = text.get_window_extent(renderer)
        right, up = (
            max(low - first, 0.0) - max(last - high, 0.0)
            for low, high, first, last in (
                (box.x0, box.x1, extent.x0, extent.x1),
                (box.y0, box.y1, extent.y0, extent.y1),
            )
        )
        if right or up:
            x, y = axes.transData.transform(text.get_position())
            text.set_position(to_data.transform((x + right, y + up)))


def save_scores(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw histograms of the discriminator's scores of real and generated images, at the last step that has both.

    Args:
        path: the PNG file.
        records: the objects of metrics.jsonl. `scores/real` and `scores/fake` are shares in the bins of SCORE_EDGES.

    Raises:
        ValueError: no record has both.
    """
    checked = [record for record in records if has_scores(record)]
    if not checked:
        raise ValueError(f"no record has the scores of real and generated images in {len(SCORE_EDGES) - 1} bins")
    last = checked[-1]
    width, height = 7.2, 4.2
    with figure_of(width, height) as figure:
        axes = figure.add_axes((0.75 / width, 0.6 / height, 6.25 / width, 3.15 / height))
        for name, colour, label in (
            (REAL_SCORES, REAL_COLOUR, "real images"),
            (FAKE_SCORES, FAKE_COLOUR, "generated images"),
        ):
            axes.stairs(last[name], SCORE_EDGES, fill=True, color=colour, alpha=0.35, label=label)
            axes.stairs(last[name], SCORE_EDGES, color=colour, linewidth=1.6)
        low, high = SCORE_EDGES[1], SCORE_EDGES[-2]
        inner = [edge for edge in SCORE_EDGES[2:-2] if edge % 2 == 0]
        ends = ((low + SCORE_EDGES[0]) / 2, (high + SCORE_EDGES[-1]) / 2)
        axes.set_xticks([ends[0], *inner, ends[1]])
        axes.set_xticklabels([f"below {low:g}", *(f"{edge:g}" for edge in inner), f"above {high:g}"])
        axes.set_xlim(SCORE_EDGES[0], SCORE_EDGES[-1])
        axes.yaxis.set_major_formatter(percent)
        axes.set_ylim(0, 1.2 * max(*last[REAL_SCORES], *last[FAKE_SCORES]) or 1)
        axes.set_xlabel("score")
        axes.set_ylabel("share of the images")
        axes.set_title(f"scores of the discriminator at step {last['step']:,}")
        axes.grid(True)
        axes.legend(loc="upper center", ncols=2)
        save_figure(path, figure)


def has_class_shares(record: Mapping[str, Any], class_names: Sequence[str]) -> bool:
    """True if a record has finite shares of all these classes."""
    return _are_finite(record.get(CLASS_SHARES), len(class_names))


def has_scores(record: Mapping[str, Any]) -> bool:
    """True if a record has score histograms of real and of generated images."""
    return all(_are_finite(record.get(name), len(SCORE_EDGES) - 1) for name in (REAL_SCORES, FAKE_SCORES))


def _are_finite(numbers: Any, count: int) -> bool:
    return (
        isinstance(numbers, list)
        and len(numbers) == count
        and all(number is not None and math.isfinite(number) for number in numbers)
    )


def _plane(
    posterior_means: NDArray[np.floating], labels: NDArray[np.integer]
) -> tuple[NDArray[np.float64], tuple[str, str]]:
    """Project posterior means to points [N, 2]; returns the points and the names of the axes."""
    dimensions = posterior_means.shape[1]
    if dimensions == 1:
        jitter = np.random.default_rng(0).uniform(-0.35, 0.35, len(labels))
        return np.column_stack([posterior_means[:, 0], labels + jitter]), ("latent 1", "class (jittered)")
    if dimensions == 2:
        return posterior_means.astype(np.float64), ("latent 1", "latent 2")
    mean, directions, _, shares = principal_directions(posterior_means)
    first, second = (f"principal component {i + 1} ({shares[i]:.0%} of the variance)" for i in range(2))
    return (posterior_means - mean) @ directions[:2].T, (first, second)
