"""Results of checks, and the runner that collects them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gen_dist.errors import UserError
from gen_dist.testing.place import place_of

Outcome = Literal["running", "passed", "failed", "skipped"]


class Failure(AssertionError):
    """A check that failed; its text names the part and, where one is known, the line of its code."""


class Skipped(Exception):
    """A check that does not apply; its text is the reason."""


class Check(NamedTuple):
    """A named function of a trial, which raises Failure or Skipped."""

    function: Callable[[Any], None]
    after: tuple[str, ...] = ()
    """Checks without which this one says nothing new: if one of them failed, this one is skipped."""

    @property
    def name(self) -> str:
        """Name in reports: that of the function without `check_`, in words."""
        return self.function.__name__.removeprefix("check_").replace("_", " ")


@dataclass(frozen=True)
class Result:
    """Result of one check of one part; `running` is announced when the check begins."""

    part: str
    check: str
    outcome: Outcome
    reason: str
    """Why it failed or was skipped; empty if it passed."""
    seconds: float


Announce = Callable[[Result], None]
"""Takes each check twice: as `running` when it begins, and with its result."""


def nobody(_result: Result) -> None:
    """Announce nothing."""


def run_checks(part: str, checks: Sequence[Check], trial: Any, announce: Announce = nobody) -> list[Result]:
    """Run checks in their order. A check whose preconditions failed is skipped."""
    results: list[Result] = []
    for check in checks:
        announce(Result(part, check.name, "running", "", 0.0))
        started = time.perf_counter()
        failed = [one.check for one in results if one.outcome == "failed"]
        outcome: Outcome = "passed"
        reason = ""
        if blocked := [name for name in failed if name in check.after]:
            outcome, reason = "skipped", f"first mend: {blocked[0]}"
        else:
            try:
                check.function(trial)
            except Skipped as skipped:
                outcome, reason = "skipped", str(skipped)
            except Failure as failure:
                outcome, reason = "failed", str(failure)
            except Exception as error:
                outcome, reason = "failed", _told(error)
        results.append(Result(part, check.name, outcome, reason, time.perf_counter() - started))
        announce(results[-1])
    return results


def raise_failures(results: Sequence[Result]) -> None:
    """Raise Failure with a line for each failed check, if there is one."""
    if failed := [one for one in results if one.outcome == "failed"]:
        raise Failure("\n".join(f"{one.part}: {one.check}: {one.reason}" for one in failed))


def _told(error: Exception) -> str:
    """An error of the part's own code, with the innermost line of that code; what the package refuses is one line."""
    if isinstance(error, UserError):
        return str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    place = next(filter(None, (place_of(frame) for frame in reversed(frames))), None)
    text = " ".join(str(error).split())[:300]
    return f"{f'{place}: ' if place else ''}{type(error).__name__}: {text}"
