"""Reports of one run or several, each a self-contained HTML file."""

from gen_dist.reports.page import write_report

__all__ = ["write_report"]
