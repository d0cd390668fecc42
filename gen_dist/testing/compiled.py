"""The check that compiled phases train as eager ones do."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from gen_dist.testing.report import Skipped
from gen_dist.testing.trial import ObjectiveTrial, compare_trainings, run_steps, state_of


def check_compiled_equals_eager(trial: ObjectiveTrial) -> None:
    """Phases compiled by torch.compile train as eager ones do."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise Skipped("torch.compile needs a C++ compiler, and there is none")
    compiled = trial.trainer(compile=True)
    with _scalar_kernels():
        logs = run_steps(compiled, 0, trial.few_steps)
    compare_trainings(trial, "compiled phases", logs, state_of(compiled))


@contextlib.contextmanager
def _scalar_kernels() -> Iterator[None]:
    """Context manager in which Inductor writes kernels without vector instructions, which a C++ compiler compiles
    faster, and does not first try out which of them this machine has.
    """
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    with config.patch({"cpp.vec_isa_ok": False, "cpp.simdlen": 1}):
        try:
            yield
        finally:
            valid_vec_isa_list.cache_clear()  # later kernels of this process are vectorized again
