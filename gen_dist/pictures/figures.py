"""Figures drawn with matplotlib in one style, and their colours."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gen_dist.errors import ConfigError
from gen_dist.files import write_atomically
from gen_dist.startup import quick_import

INK_HEX = "#464646"

# Found by search. Any two are at least 24 apart in CIELAB for normal, protan, deutan and tritan vision (Machado et al.
# 2009); in matplotlib's tab10 the minimum is 4.6. None is too pale for white paper.
CLASS_COLOURS = (
    "#3169e7", "#cc7100", "#02a35d", "#bb0122", "#9fb9ff", "#fa9abe", "#4c1f25", "#ddc800", "#0100c0", "#94066b",
)  # fmt: skip
REAL_COLOUR, FAKE_COLOUR = "#0072b2", "#d55e00"  # Okabe and Ito
COMPRESS_LEVEL = 3
"""zlib's level for PNG files: 6, the default, takes half as long again for files a tenth smaller."""


def percent(share: float, _place: int | None = None) -> str:
    """Label of a tick on an axis of shares: 20%, 12.5%. The signature is that of a matplotlib formatter."""
    return f"{100 * share:.3g}%"


@contextmanager
def figure_of(width: float, height: float, font: str | None = None) -> Iterator[Any]:
    """A matplotlib figure in our style. pyplot and the user's own style are not touched.

    Args:
        width: in inches.
        height: in inches.
        font: family that has letters which the usual one lacks.
    """
    matplotlib = _import_matplotlib()
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "axes.edgecolor": "#b0b0b0",
        "axes.axisbelow": True,
        "axes.labelcolor": INK_HEX,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK_HEX,
        "axes.titlesize": 11,
        "axes.titley": 1.0,  # matplotlib gets the same value by measuring every tick
        "axes.labelsize": 9,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.7,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.title_fontsize": 9,
        "text.color": INK_HEX,
        "text.parse_math": False,  # a dollar in a user's name or path is a dollar
        "xtick.color": INK_HEX,
        "ytick.color": INK_HEX,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        if font is not None:
            matplotlib.rcParams["font.family"] = ["DejaVu Sans", font]
        yield Figure(figsize=(width, height), dpi=110)


def _import_matplotlib() -> Any:
    """Import matplotlib without MPLBACKEND, at whose value the import may fail: Jupyter exports it to all programs."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        with quick_import():
            import matplotlib
            import matplotlib.figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure as a PNG file, whole or not at all.

    Raises:
        ConfigError: the file's name is of another format.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} cannot be written: charts are PNG files; name it {path.with_suffix('.png').name}")
    write_atomically(path, _drawn(figure))


def _drawn(figure: Any) -> bytes:
    """A figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, pil_kwargs={"compress_level": COMPRESS_LEVEL})
    return buffer.getvalue()


def class_colours(count: int) -> list[str]:
    """Colours for `count` classes."""
    if count <= len(CLASS_COLOURS):
        return list(CLASS_COLOURS[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.02, 0.98, count))]
