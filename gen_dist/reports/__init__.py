"""A report of one run or several: one HTML file that needs nothing else."""

from gen_dist.reports.page import write_report

__all__ = ["write_report"]
