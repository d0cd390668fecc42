"""Gaussian posterior with a small KL term, as in latent diffusion models (Rombach et al. 2022, section 3.1)."""

from torch import Tensor

from gen_dist.kernels import Key, reparameterize_kl
from gen_dist.objectives.bottlenecks.base import Bottleneck, Coded


class GaussianPosterior(Bottleneck):
    """Latents drawn from the posterior; the penalty is its KL divergence from N(0, I), summed over latents."""

    outputs_per_latent = 2

    def forward(self, encoded: Tensor, key: Key, deterministic: bool = False) -> Coded:
        latents, kl_nats = reparameterize_kl(encoded, key, deterministic=deterministic)
        return Coded(latents, self.config.kl_weight * kl_nats, {"kl": kl_nats})

    @staticmethod
    def posterior(encoded: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = encoded.float().chunk(2, dim=1)
        return mean, logvar
