"""Pictures of a run as PNG files: grids, reconstructions, the latent space, curves. NumPy arrays in, whole files out.

Every picture is written under a temporary name and renamed, so a killed run leaves no half picture.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gen_dist.atomic_files import write_atomically
from gen_dist.progress import readable_number

Images = NDArray[np.uint8]

PLEASANT_WIDTH = 720
"""Pixels: small images are enlarged so that a row of a grid comes near this width."""
MARGIN = 12
FONT_SIZE = 14
INK = 70
PAPER = 255
INK_HEX = "#464646"

# Found by search: least distance of any two at least 24 in CIELAB for normal, protan, deutan and tritan vision (Machado
# et al. 2009), where matplotlib's tab10 has 4.6; none too pale for white paper.
CLASS_COLOURS = (
    "#3169e7", "#cc7100", "#02a35d", "#bb0122", "#9fb9ff", "#fa9abe", "#4c1f25", "#ddc800", "#0100c0", "#94066b",
)  # fmt: skip
TRAIN_COLOUR, TEST_COLOUR, OTHER_COLOUR = "#0072b2", "#d55e00", "#4d4d4d"  # Okabe and Ito

_ACRONYMS = frozenset({"nll", "kl", "elbo", "iwae", "fid", "kid"})
_UNITS = {
    **dict.fromkeys(("nll", "kl", "negative_elbo"), "nats per image"),
    "reconstruction_error": "per image",  # nats or a squared error: the objective's choice
    "images_per_second": "images / s",
}
_PANEL_ORDER = ("loss", "negative_elbo", "nll", "kl")
_LAST_PANELS = ("learning_rate", "images_per_second")
_LEGEND_CLASSES = 20


def save_grid(path: Path, images: Images, columns: int = 8) -> None:
    """Images in rows of `columns`, with thin separators.

    Args:
        path: the PNG file.
        images: uint8 [N, C, H, W], N >= 1, C = 1 or 3.
        columns: images a row; fewer images make fewer columns.

    Raises:
        ValueError: the array is no batch of images.
    """
    _check_images(images)
    columns = min(columns, len(images))
    _save_canvas(path, _mosaic(images, [2] * columns, 2, _scale(columns * images.shape[3])))


def save_reconstructions(path: Path, originals: Images, reconstructions: Images, pairs_per_row: int = 8) -> None:
    """Pairs in rows: originals in odd columns, their reconstructions beside them in even ones.

    Args:
        path: the PNG file.
        originals: uint8 [N, C, H, W], N >= 1, C = 1 or 3.
        reconstructions: uint8 [N, C, H, W], in the order of the originals.
        pairs_per_row: pairs a row; fewer pairs make shorter rows.

    Raises:
        ValueError: an array is no batch of images, or the shapes differ.
    """
    _check_images(originals)
    _check_images(reconstructions)
    if originals.shape != reconstructions.shape:
        raise ValueError(f"originals {originals.shape} and reconstructions {reconstructions.shape} differ in shape")
    pairs = min(pairs_per_row, len(originals))
    both = np.stack([originals, reconstructions], axis=1).reshape(-1, *originals.shape[1:])
    scale = _scale(2 * pairs * originals.shape[3])
    canvas = _mosaic(both, [12, 1] * pairs, 6, scale)
    _save_canvas(path, canvas, title="in each pair: the original on the left, its reconstruction on the right")


def manifold_latents(columns: int, rows: int) -> NDArray[np.float32]:
    """Two latents on a grid of equal steps in prior probability (Kingma & Welling 2014, appendix A).

    Returns:
        float32 [rows * columns, 2], row by row from the top left: the first latent grows to the right, the second
        upwards, each the inverse normal CDF of the middles of equal parts of (0, 1).
    """
    normal = statistics.NormalDist()
    across = [normal.inv_cdf((i + 0.5) / columns) for i in range(columns)]
    upwards = [normal.inv_cdf((i + 0.5) / rows) for i in range(rows)]
    return np.array([(x, y) for y in reversed(upwards) for x in across], dtype=np.float32)


def principal_traversals(
    posterior_means: NDArray[np.floating], rows: int, columns: int, extent: float = 2.5
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Straight walks through the mean of the aggregate posterior along its principal directions.

    Args:
        posterior_means: [N, D], N >= 1; one point has no direction, and all walks stay there.
        rows: directions, those of largest variance first; no more than D are walked.
        columns: latents a direction.
        extent: ends of the walk, in standard deviations along the direction.

    Returns:
        (latents, shares): float32 [rows * columns, D], row by row from -extent to +extent, and float64 [rows], each
        direction's share of the variance, 0..1. A direction points where its largest component is positive.
    """
    mean, directions, deviations, shares = _principal_directions(posterior_means)
    rows = min(rows, len(directions))
    walk = np.linspace(-extent, extent, columns)
    offsets = walk[None, :, None] * (deviations[:rows, None] * directions[:rows])[:, None, :]
    latents = (mean + offsets).reshape(rows * columns, -1).astype(np.float32)
    return latents, shares[:rows]


def save_manifold(
    path: Path, images: Images, columns: int, captions: Sequence[str] | None = None, title: str | None = None
) -> None:
    """Decoded latents edge to edge, so that they read as one surface; with captions, rows stand apart.

    Args:
        path: the PNG file.
        images: uint8 [N, C, H, W], row by row, C = 1 or 3.
        columns: images a row.
        captions: one text a row, written to its left.
        title: one line above.

    Raises:
        ValueError: the array is no batch of images, or the captions are not one a row.
    """
    _check_images(images)
    rows = -(-len(images) // columns)
    if captions is not None and len(captions) != rows:
        raise ValueError(f"{len(captions)} captions for {rows} rows")
    scale = _scale(columns * images.shape[3])
    canvas = _mosaic(images, [0] * columns, 0 if captions is None else 4, scale)
    _save_canvas(path, canvas, title=title, captions=captions)


def save_scatter(
    path: Path, posterior_means: NDArray[np.floating], labels: NDArray[np.integer], class_names: Sequence[str]
) -> None:
    """Posterior means in the plane, coloured by class and named at each class's median.

    Two latents are drawn as they are, more by their first two principal components, one against the class.

    Args:
        path: the PNG file.
        posterior_means: [N, D], N >= 1; up to about 5,000 points stay readable.
        labels: [N], 0 .. len(class_names) - 1.
        class_names: names by label; one class is drawn without a legend, and so are more than 20.

    Raises:
        ValueError: the shapes do not go together.
    """
    if posterior_means.ndim != 2 or labels.shape != posterior_means.shape[:1]:
        raise ValueError(f"posterior means {posterior_means.shape} and labels {labels.shape} do not go together")
    names = list(class_names)
    points, axis_names = _plane(posterior_means, labels)
    with_legend = 1 < len(names) <= _LEGEND_CLASSES
    width, height = (8.4 if with_legend else 7.0), 6.6
    with _figure(width, height) as figure:
        from matplotlib.colors import ListedColormap
        from matplotlib.patheffects import withStroke

        axes = figure.add_axes((0.85 / width, 0.65 / height, 6.0 / width, 5.5 / height))
        colours = _class_colours(len(names))
        # Drawn in one shuffled order: in the order of the classes, the last would hide the others.
        order = np.random.default_rng(0).permutation(len(points))
        axes.scatter(
            *points[order].T,
            s=float(np.clip(40_000 / len(points), 6, 30)),
            c=labels[order],
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(names) - 0.5,
            alpha=0.7,
            linewidths=0,
        )
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])
        axes.set_title(f"posterior means of {len(points):,} images by class")
        axes.grid(True)
        if posterior_means.shape[1] > 1:
            axes.set_aspect("equal", adjustable="datalim")
        if with_legend:
            halo = [withStroke(linewidth=3.5, foreground="white")]
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 12, "fontweight": "bold"}
            for label in np.unique(labels):
                x, y = np.median(points[labels == label], axis=0)
                axes.text(x, y, names[label], color=INK_HEX, path_effects=halo, **style)
            handles = [
                axes.scatter([], [], s=45, color=colour, label=name)
                for colour, name in zip(colours, names, strict=True)
            ]
            axes.legend(handles=handles, title="class", loc="center left", bbox_to_anchor=(1.01, 0.5))
        _save_figure(path, figure)


def save_curves(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Curves over the steps: a panel for each name, `train/NAME` and `test/NAME` together.

    The first tenth of the steps does not set the limits of an axis, so that a steep start does not flatten the rest.

    Args:
        path: the PNG file.
        records: the objects of metrics.jsonl; a null leaves a gap.

    Raises:
        ValueError: no record has a scalar.
    """
    curves = _curves(records)
    if not curves:
        raise ValueError("no record has a scalar to draw")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    width, height = 4.3 * columns, 3.1 * rows
    with _figure(width, height) as figure:
        # Fixed margins in inches: matplotlib's own layout engines would double the drawing time.
        spacing = {
            "left": 0.75 / width,
            "right": 1 - 0.15 / width,
            "bottom": 0.5 / height,
            "top": 1 - 0.35 / height,
            "wspace": 0.8 / (4.3 - 0.8),
            "hspace": 0.85 / (3.1 - 0.85),
        }
        grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=spacing).ravel()
        for axes, (name, lines) in zip(grid, curves.items(), strict=False):
            _draw_panel(axes, name, _unit(name, curves), lines)
            axes.set_xlim(0, 1.02 * max(record["step"] for record in records) or 1)
        for position, axes in enumerate(grid):
            axes.set_visible(position < len(curves))
        _save_figure(path, figure)


def _check_images(images: Images) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or images.size == 0:
        raise ValueError(f"expected uint8 [N, 1 or 3, H, W] with N >= 1, got {images.dtype} {list(images.shape)}")


def _scale(width: int) -> int:
    """Whole factor that brings a row of images near the pleasant width."""
    return max(1, round(PLEASANT_WIDTH / width))


def _mosaic(images: Images, gaps: Sequence[int], row_gap: int, scale: int) -> Images:
    """Lay enlarged images out on paper: [height, width, C].

    `gaps[i]` is the space in pixels before column i; the space before the first is dropped.
    """
    count, channels, height, width = images.shape
    enlarged = images.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    columns, rows = len(gaps), -(-count // len(gaps))
    lefts = np.cumsum([0, *gaps[1:]]) + np.arange(columns) * width * scale
    tops = np.arange(rows) * (height * scale + row_gap)
    canvas = np.full((tops[-1] + height * scale, lefts[-1] + width * scale, channels), PAPER, dtype=np.uint8)
    for index, image in enumerate(enlarged):
        top, left = tops[index // columns], lefts[index % columns]
        canvas[top : top + height * scale, left : left + width * scale] = image
    return canvas


def _save_canvas(path: Path, canvas: Images, title: str | None = None, captions: Sequence[str] | None = None) -> None:
    """Write a mosaic on paper with a margin, a title above and evenly spaced captions on its left."""
    font = ImageFont.load_default(size=FONT_SIZE)
    left = MARGIN + (0 if captions is None else max(int(font.getlength(text)) for text in captions) + MARGIN)
    top = MARGIN + (0 if title is None else FONT_SIZE + MARGIN)
    height, width, channels = canvas.shape
    width = max(width, 0 if title is None else int(font.getlength(title)))
    mode = "L" if channels == 1 else "RGB"
    page = Image.new(mode, (left + width + MARGIN, top + height + MARGIN), (PAPER,) * channels)
    page.paste(Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas), (left, top))
    draw = ImageDraw.Draw(page)
    ink = (INK,) * channels
    if title is not None:
        draw.text((left, MARGIN), title, fill=ink, font=font)
    for row, text in enumerate(captions or ()):
        middle = top + height * (row + 0.5) / len(captions or ())
        draw.text((left - MARGIN, middle), text, fill=ink, font=font, anchor="rm")
    buffer = io.BytesIO()
    page.save(buffer, format="PNG", compress_level=3)
    write_atomically(path, buffer.getvalue())


def _principal_directions(
    points: NDArray[np.floating],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean [D], directions [D, D] in rows, standard deviations [D] and shares of the variance [D], largest first."""
    if points.ndim != 2 or points.size == 0:
        raise ValueError(f"expected [N, D] with N >= 1, got {list(points.shape)}")
    points = points.astype(np.float64)
    mean = points.mean(axis=0)
    centred = points - mean
    _, variances, directions = np.linalg.svd(centred.T @ centred / max(len(points) - 1, 1), hermitian=True)
    largest = np.argmax(np.abs(directions), axis=1)
    directions *= np.where(directions[np.arange(len(directions)), largest] < 0, -1.0, 1.0)[:, None]
    total = variances.sum()
    shares = variances / total if total > 0 else np.zeros_like(variances)
    return mean, directions, np.sqrt(variances), shares


def _plane(
    posterior_means: NDArray[np.floating], labels: NDArray[np.integer]
) -> tuple[NDArray[np.float64], tuple[str, str]]:
    """Points [N, 2] that stand for the posterior means, and the names of their axes."""
    dimensions = posterior_means.shape[1]
    if dimensions == 1:
        jitter = np.random.default_rng(0).uniform(-0.35, 0.35, len(labels))
        return np.column_stack([posterior_means[:, 0], labels + jitter]), ("latent 1", "class (jittered)")
    if dimensions == 2:
        return posterior_means.astype(np.float64), ("latent 1", "latent 2")
    mean, directions, _, shares = _principal_directions(posterior_means)
    first, second = (f"principal component {i + 1} ({shares[i]:.0%} of the variance)" for i in range(2))
    return (posterior_means - mean) @ directions[:2].T, (first, second)


def _class_colours(count: int) -> list[str]:
    if count <= len(CLASS_COLOURS):
        return list(CLASS_COLOURS[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.02, 0.98, count))]


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Panels by name; in each, lines [points, (step, value)] by split, "" where a name has no split."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        for key, value in record.items():
            if key in ("step", "images_seen"):
                continue
            split, _, name = key.rpartition("/")
            number = float("nan") if value is None else float(value)
            points.setdefault(name, {}).setdefault(split, []).append((record["step"], number))
    order = [*_PANEL_ORDER, *sorted(points.keys() - {*_PANEL_ORDER, *_LAST_PANELS}), *_LAST_PANELS]
    return {
        name: {split: np.array(points[name][split]) for split in sorted(points[name], reverse=True)}
        for name in order
        if name in points
    }


def _unit(name: str, curves: Collection[str]) -> str | None:
    """Unit of one of the panels. A loss is in nats where nll or kl, the terms of its sum, have a panel too."""
    if name == "loss":
        return "nats per image" if {"nll", "kl"} & set(curves) else "per image"
    return "nats per image" if name.startswith("negative_bound_k") else _UNITS.get(name)


def _draw_panel(axes: Any, name: str, unit: str | None, lines: Mapping[str, NDArray[np.float64]]) -> None:
    colours = {"train": TRAIN_COLOUR, "test": TEST_COLOUR}
    for split, points in lines.items():
        finite = points[np.isfinite(points[:, 1])]
        last = readable_number(finite[-1, 1]) if len(finite) else "never finite"
        marker = "o" if split == "test" or len(points) < 15 else None
        axes.plot(
            *points.T,
            color=colours.get(split, OTHER_COLOUR),
            marker=marker,
            markersize=3.5,
            linewidth=1.4,
            label=f"{split} {last}".strip(),
            zorder=3 if split == "test" else 2,
        )
    spelled = " ".join(word.upper() if word in _ACRONYMS else word for word in name.split("_"))
    axes.set_title(spelled)
    axes.set_xlabel("step")
    axes.set_ylabel(unit or spelled)
    axes.grid(True)
    axes.legend(title="last value")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    everything = np.concatenate(list(lines.values()))
    if name in _LAST_PANELS:
        axes.set_ylim(0, 1.08 * np.max(everything[:, 1], initial=0, where=np.isfinite(everything[:, 1])) or 1)
    else:
        axes.set_ylim(*_limits(everything))


def _limits(points: NDArray[np.float64]) -> tuple[float, float]:
    """Limits of an axis from what comes after the first tenth of the steps, lone spikes left out."""
    points = points[np.isfinite(points[:, 1])]
    settled = points[points[:, 0] > 0.1 * points[:, 0].max(initial=0), 1]
    values = settled if len(settled) >= 4 else points[:, 1]
    if not len(values):
        return 0, 1
    low, high = np.percentile(values, [1, 99]) if len(values) >= 200 else (values.min(), values.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of so many inches in our style, whatever the user's own style; no pyplot, no state."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "axes.edgecolor": "#b0b0b0",
        "axes.axisbelow": True,
        "axes.labelcolor": INK_HEX,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK_HEX,
        "axes.titlesize": 11,
        "axes.labelsize": 9,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.7,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.title_fontsize": 9,
        "text.color": INK_HEX,
        "xtick.color": INK_HEX,
        "ytick.color": INK_HEX,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield Figure(figsize=(width, height), dpi=110)


def _save_figure(path: Path, figure: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, buffer.getvalue())
