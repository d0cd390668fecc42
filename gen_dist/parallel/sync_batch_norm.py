"""Batch normalization over the images of all processes, on CPUs and GPUs, compiled or not.

torch's SyncBatchNorm refuses CPUs, and its collectives cannot be compiled.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gen_dist.parallel.batch_sums import BatchSums

_OVER_PROCESSES = BatchSums()


def synchronize(module: nn.Module, sums: BatchSums = _OVER_PROCESSES) -> nn.Module:
    """Have every batch normalization in the module take its statistics by `sums`; returns the module.

    Layers are changed in place: their parameters, buffers and names stay. In training mode, forward and backward passes
    through them are collective calls.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.__class__ = SyncBatchNorm  # type: ignore[assignment]
            layer.sums = sums  # type: ignore[assignment]
    return module


class SyncBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d` and `nn.BatchNorm2d` over the batch of all processes; in one process, the same as torch's."""

    sums: BatchSums

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"a batch of {input.ndim} dimensions has no channels")

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize [B, C] or [B, C, ...]; the shape stays. Processes may have different B."""
        if not self.training:
            return super().forward(maps)
        self._check_input_dim(maps)
        values = maps if maps.dtype == torch.float64 else maps.float()
        pixels = (0, *range(2, maps.ndim))
        shape = (1, -1, *[1] * (maps.ndim - 2))
        # Centred at this process's means, so that sums lose no digits if values are far from zero.
        centre = values.detach().mean(pixels)
        centred = values - centre.view(shape)
        mean, variance, count = _global_statistics(centred, centre.double(), pixels, self.sums)
        if self.track_running_stats and self.sums.leads:
            self._move_running_statistics(mean.detach(), variance.detach(), count)
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = (centre - mean) * scale
        if self.bias is not None:
            shift = shift + self.bias
        scale, shift = scale.to(values.dtype).view(shape), shift.to(values.dtype).view(shape)
        return (centred * scale + shift).to(maps.dtype)

    def _move_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked
        unbiased = variance * count / (count - 1.0)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(running + share * (new.to(running.dtype) - running))


def _global_statistics(
    centred: Tensor, centre: Tensor, pixels: tuple[int, ...], batch: BatchSums
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel, float64 [C], and its number of values, [], over all processes.

    Args:
        centred: this process's values, less `centre`.
        centre: float64 [C].
        pixels: all dimensions except the channels.
        batch: sums over the batch.
    """
    count = centred.numel() // len(centre)
    own_sum = centred.sum(pixels).double()
    own_square = centred.square().sum(pixels).double()
    # Moved back to the common centre 0. float64 has enough digits for it, so one exchange of sums is enough.
    own_square = own_square + 2.0 * centre * own_sum + count * centre**2
    own_count = torch.full((1,), float(count), dtype=torch.float64, device=centred.device)
    sums = batch.total(torch.cat([own_sum + count * centre, own_square, own_count]))
    total = sums[-1].detach()
    mean, mean_square = (sums[:-1] / total).chunk(2)
    return mean, (mean_square - mean**2).clamp(min=0.0), total
