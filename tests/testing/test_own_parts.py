"""Our own parts pass the checks that plug-ins have to pass."""

from __future__ import annotations

from gen_dist.testing.objectives import OBJECTIVE_CHECKS
from gen_dist.testing.report import raise_failures, run_checks
from gen_dist.testing.trial import ObjectiveTrial
from tests.support.runs import COSTLY, OBJECTIVES, WITH_BATCH_STATISTICS, each_of


@each_of(OBJECTIVES, costly=COSTLY | {"r3gan, lazy, conditional, augmented"})
def test_our_objectives_pass(objective: str) -> None:
    results = run_checks(objective, OBJECTIVE_CHECKS, ObjectiveTrial(*OBJECTIVES[objective]))
    raise_failures(results)
    skipped = [one.check for one in results if one.outcome == "skipped"]
    assert skipped == (["micro batches equal the batch"] if objective in WITH_BATCH_STATISTICS else [])
