"""The READMEs' pictures of a VAE beside a GAN: `python bench/quality/side_by_side.py RUN RUN ...`, on evaluated runs.

The pictures are of the first run of each config; the figures below them are of all its seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

# From a checkout, for python bench/quality/side_by_side.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import tyro

from gen_dist.evaluation.guide import base_name
from gen_dist.reports.comparison import comparison_of, read_runs, table_lines
from gen_dist.reports.comparison_picture import save_comparison

SHORT = ("fid", "precision", "recall", "sharpness")
"""Figures below the picture of the first README, where what one sees and what the table says stand together."""


def main(runs: tyro.conf.Positional[tuple[Path, ...]], pictures: Path = Path("bench/pictures")) -> None:
    """Write vae_and_gan.png and comparison.png, and print the comparison.

    Args:
        runs: Evaluated runs on the same data.
        pictures: Directory that takes the pictures.
    """
    comparison = comparison_of(read_runs(runs))
    short = [name for name in comparison.metrics if base_name(name) in SHORT]
    save_comparison(pictures / "vae_and_gan.png", comparison, metrics=short)
    save_comparison(pictures / "comparison.png", comparison)
    print("\n".join(table_lines(comparison)))


if __name__ == "__main__":
    tyro.cli(main)
