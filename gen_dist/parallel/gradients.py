"""How gradients become those of all processes: DistributedDataParallel, or weights in memory that they share."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gen_dist.parallel.processes import Processes
from gen_dist.parallel.shared_weights import SharedWeights, share_weights

_ONE_BUCKET_MIB = 2**20  # more than any network has; a bucket is only as large as what is in it


def averaging_gradients(phase: nn.Module, processes: Processes) -> nn.Module:
    """The phase with the gradients of what it trains averaged over the processes in backward.

    Call it while everything that the phase does not train is frozen: what is frozen now is never communicated.
    """
    if processes.world_size == 1:
        return phase
    # The name was changed in torch 2.14; the old one warns in every process.
    signature = inspect.signature(DistributedDataParallel)
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature.parameters else "broadcast_buffers"
    module = DistributedDataParallel(
        phase,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # On CPUs the threads that send need the cores that compute, so nothing is won by sending the first gradients
        # while backward computes the others: all of them go at its end, at once.
        bucket_cap_mb=_ONE_BUCKET_MIB if processes.device.type == "cpu" else None,
        **{sync_buffers: False},  # type: ignore[arg-type]
    )
    return module


def weights_in_common(parameters: Sequence[nn.Parameter], processes: Processes) -> SharedWeights | None:
    """These weights, moved to memory that all processes have in common; None where they have none, or are on GPUs.

    All processes have to call it together, with the same weights.
    """
    if processes.world_size == 1 or processes.device.type != "cpu":
        return None
    return share_weights(parameters)


@contextlib.contextmanager
def local_gradients(module: nn.Module, only: bool) -> Iterator[None]:
    """Within it, backward communicates no gradients, if `only`: for all micro-batches but the last."""
    if only and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield
