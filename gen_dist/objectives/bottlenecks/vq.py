"""Vector quantization: each place takes the nearest code of a codebook (van den Oord et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.config import LatentAutoencoderConfig
from gen_dist.kernels import Key, normal
from gen_dist.objectives.bottlenecks.base import Bottleneck, Coded, StraightThrough
from gen_dist.objectives.phase import Batch, SumOverBatch
from gen_dist.randomness import Stream

ENCODED, CODES = "encoded", "codes"
"""Names of the carried vectors, float32 [B * places, C], and of their codes, int64 [B * places]."""
_LARGEST_TABLE = 2**22
"""Most distances, or most entries of a one-hot matrix, in memory at once."""
_LEAST_USAGE = 1e-12
"""Usage below which a code of moving averages stays where it is: its sums have no digits left."""


class VectorQuantizer(Bottleneck):
    """A codebook that is learned by gradient, or moved to the averages of the vectors that take each code.

    The penalty of a place with vector z and code q is |q - sg(z)|^2 + commitment * |sg(q) - z|^2 (van den Oord et al.
    2017, eq. 3), where sg stops gradients; moving averages (their appendix A.1) take the place of the first term. It is
    summed over places and channels.

    All statistics are sums over the images of all micro-batches and processes, so the codebook does not depend on their
    number. A code with too small a share of the places is drawn again: it becomes a vector of the batch, chosen by the
    step's key. At the first step that is nearly every code.
    """

    stops_gradients = "quantization has straight-through gradients and stops those of its penalty"
    codebook: Tensor
    """float32 [codes, C], a parameter or moving average."""
    usage: Tensor
    """Moving average of each code's share of all places, float32 [codes]; at first 0."""
    sums: Tensor
    """Moving average of the sum of a code's vectors, divided by the number of all places, float32 [codes, C]."""

    def __init__(self, config: LatentAutoencoderConfig, latent_shape: tuple[int, ...]) -> None:
        super().__init__(config, latent_shape)
        self.codebook_size = config.codebook_size
        shape = (config.codebook_size, latent_shape[0])
        initial = torch.empty(shape).uniform_(-1.0 / config.codebook_size, 1.0 / config.codebook_size)
        self.moves = config.codebook_update == "moving_average"
        if self.moves:
            self.register_buffer("codebook", initial)
            self.register_buffer("sums", torch.zeros(shape))
        else:
            self.codebook = nn.Parameter(initial)
        self.register_buffer("usage", torch.zeros(config.codebook_size))

    def forward(self, encoded: Tensor, key: Key, deterministic: bool = False) -> Coded:
        vectors = encoded.movedim(1, -1).float()
        codes = self._nearest(vectors)
        quantized = F.embedding(codes, self.codebook)
        error = (quantized.detach() - vectors).square().flatten(1).sum(1)
        penalty = self.config.commitment * error
        if not self.moves:
            penalty = penalty + (quantized - vectors.detach()).square().flatten(1).sum(1)
        latents = StraightThrough.apply(vectors, quantized).movedim(-1, 1)
        carried = {ENCODED: vectors.detach().flatten(0, -2), CODES: codes.flatten()}
        return Coded(latents, self.config.codebook_weight * penalty, {"quantization_error": error}, carried)

    def decodable(self, latents: Tensor) -> Tensor:
        return self.latents_of(self.codes(latents))

    def codes(self, latents: Tensor) -> Tensor:
        return self._nearest(latents.movedim(1, -1).float())

    def latents_of(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def _nearest(self, vectors: Tensor) -> Tensor:
        """Code of least distance of vectors [..., C]: int64 [...]; the first of equally near ones."""
        flat, codebook = vectors.detach().flatten(0, -2), self.codebook.detach()
        with torch.autocast(vectors.device.type, enabled=False):
            half_squares = 0.5 * codebook.square().sum(1)
            found = [torch.addmm(half_squares, part, codebook.t(), alpha=-1.0).argmin(1) for part in self._parts(flat)]
        return torch.cat(found).view(vectors.shape[:-1])

    def _parts(self, rows: Tensor) -> Sequence[Tensor]:
        """Rows cut so that a table with a column for each code stays small; an exported program cannot cut them."""
        if torch.compiler.is_exporting():
            return (rows,)
        return rows.split(max(1, _LARGEST_TABLE // self.codebook_size))

    def update(
        self,
        micro_batches: Sequence[Batch],
        carried: Sequence[Mapping[str, Tensor]],
        sum_over_batch: SumOverBatch,
    ) -> None:
        """See Bottleneck."""
        share_of_new = 1.0 - self.config.codebook_decay
        summed = sum_over_batch(self._statistics, carried)
        total = summed[:, 0].sum()
        self.usage.lerp_(summed[:, 0] / total, share_of_new)
        if self.moves:
            self.sums.lerp_(summed[:, 1:] / total, share_of_new)
        if self.config.code_restart:
            chosen = self._chosen(micro_batches[0], total)
            pairs = list(zip(micro_batches, carried, strict=True))
            self._draw_dead_codes(sum_over_batch(lambda some: self._drawn(some, chosen), pairs))
        if self.moves:
            known = (self.usage > _LEAST_USAGE)[:, None]
            means = self.sums / self.usage.clamp(min=_LEAST_USAGE)[:, None]
            self.codebook.copy_(torch.where(known, means, self.codebook))

    def _statistics(self, carried: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Number of vectors with each code, and their sums, in some micro-batches: [codes, 1 + C]."""
        counts, sums = torch.zeros_like(self.usage), torch.zeros_like(self.codebook)
        numbers = torch.arange(self.codebook_size, device=counts.device)
        for one in carried:
            for codes, vectors in zip(self._parts(one[CODES]), self._parts(one[ENCODED]), strict=True):
                # A matrix product, since scattered additions on a GPU have no fixed order.
                taken = (codes[:, None] == numbers).float()
                counts += taken.sum(0)
                sums += taken.t() @ vectors
        return torch.cat([counts[:, None], sums], dim=1)

    def _chosen(self, batch: Batch, total: Tensor) -> Tensor:
        """Index of a vector of the whole batch for each code, int64 [codes].

        Args:
            batch: a micro-batch of the step.
            total: number of vectors in the whole batch, [].
        """
        key = batch.key(Stream.CODES)._replace(first_row=0)
        uniform = torch.special.ndtr(normal(key, self.codebook_size, 1).double()).squeeze(1)
        return torch.minimum((uniform * total).long(), total.long() - 1)

    def _drawn(self, pairs: Sequence[tuple[Batch, Mapping[str, Tensor]]], chosen: Tensor) -> Tensor:
        """The chosen vectors, [codes, C], out of those of some micro-batches; zeros in place of the others."""
        places = math.prod(self.places)
        drawn = torch.zeros_like(self.codebook)
        for batch, one in pairs:
            index, vectors = chosen - batch.first_row * places, one[ENCODED]
            inside = (index >= 0) & (index < len(vectors))
            drawn += vectors[index.clamp(0, len(vectors) - 1)] * inside[:, None]
        return drawn

    def _draw_dead_codes(self, drawn: Tensor) -> None:
        """Move the codes with little usage to drawn vectors [codes, C], and give them an even share."""
        even = 1.0 / self.codebook_size
        dead = self.usage < self.config.code_restart * even
        self.usage.masked_fill_(dead, even)
        if self.moves:
            self.sums.copy_(torch.where(dead[:, None], drawn * even, self.sums))
        else:
            self.codebook.copy_(torch.where(dead[:, None], drawn, self.codebook))
