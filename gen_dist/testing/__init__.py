"""Checks of objectives, networks, sources and metrics, ours and those of plug-ins.

from gen_dist.testing import check_objective

def test_my_objective() -> None:
    check_objective(MyConfig())
"""

from gen_dist.testing.metrics import check_metric
from gen_dist.testing.networks import check_network
from gen_dist.testing.objectives import check_objective
from gen_dist.testing.report import Failure, Result
from gen_dist.testing.sources import check_source

__all__ = ["Failure", "Result", "check_metric", "check_network", "check_objective", "check_source"]
