"""Checks of objectives, networks, sources and metrics, ours and those of plug-ins.

from gen_dist.testing import check_objective

def test_my_objective() -> None:
    check_objective(MyConfig())
"""

from gen_dist.testing.objectives import check_objective
from gen_dist.testing.report import Failure, Result

__all__ = ["Failure", "Result", "check_objective"]
