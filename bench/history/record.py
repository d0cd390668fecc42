"""One line of the history of speed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.measuring.conditions import fingerprint


@dataclass(frozen=True)
class Record:
    """One line of the history: a benchmark at a commit."""

    benchmark: str
    """Its file and name: `test_step.py::test_whole_step[vae-mnist]`."""
    commit: str
    """It ends in `+` if the checkout had uncommitted changes."""
    subject: str
    commit_date: str
    """ISO 8601, of the commit."""
    measured: str
    """ISO 8601, of the measurement."""
    p50_ms: float
    p20_ms: float | None
    p80_ms: float | None
    n: int | None
    """Rounds from which the percentiles are."""
    images_per_second: float | None
    peak_memory_bytes: float | None
    conditions: Mapping[str, Any]

    @property
    def machine(self) -> str:
        """Hardware and versions. Figures of two machines are not compared."""
        return fingerprint(self.conditions)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Identity of a measurement."""
        return self.benchmark, self.commit, self.measured, self.machine
