"""Self-attention and conditional batch normalization of residual GANs against their papers' equations in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gen_dist.config import ResnetConfig
from gen_dist.errors import ConfigError
from gen_dist.networks import build_decoder, build_encoder
from gen_dist.networks.conditional_norm import ConditionalBatchNorm
from gen_dist.networks.self_attention import SelfAttention
from gen_dist.networks.spectral_norm import spectrally_normalized
from gen_dist.testing import check_network

SMALL = ResnetConfig(
    feature_maps=(4, 6, 8), latent_dim=5, generator_norm="batch", conditional_norm=True, attention_factor=2
)


def test_attention_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16).double()
    with torch.no_grad():
        layer.factor.fill_(0.7)
    maps = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    found = layer(maps).detach().numpy()
    f, g, h, v = (
        each.weight.detach().numpy()[:, :, 0, 0] for each in (layer.query, layer.key, layer.value, layer.output)
    )
    for image, result in zip(maps.numpy(), found, strict=True):
        x = image.reshape(16, 12)
        for j in range(12):  # Zhang et al. 2019, eq. 1 to 3, where queries are of the place that looks
            scores = np.array([(f @ x[:, j]) @ (g @ x[:, i]) for i in range(12)])
            beta = np.exp(scores) / np.exp(scores).sum()
            o = v @ sum(beta[i] * (h @ x[:, i]) for i in range(12))
            np.testing.assert_allclose(result.reshape(16, 12)[:, j], 0.7 * o + x[:, j], rtol=1e-10)


def test_attention_starts_as_the_identity() -> None:
    maps = torch.randn(2, 8, 4, 4)
    assert torch.equal(SelfAttention(8)(maps), maps)


def test_a_class_has_its_scale_and_shift() -> None:
    layer = ConditionalBatchNorm(3, 2).double()
    with torch.no_grad():
        layer.scale.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        layer.shift.copy_(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
    maps, labels = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    found = layer(maps, torch.nn.functional.one_hot(labels).double())
    whitened = (maps - maps.mean((0, 2, 3), keepdim=True)) / (
        maps.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    for row, label in enumerate(labels.tolist()):
        expected = whitened[row] * layer.scale[label][:, None, None] + layer.shift[label][:, None, None]
        torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)


def test_the_class_enters_the_generator_by_its_norms_alone() -> None:
    torch.manual_seed(0)
    decoder = build_decoder(SMALL, (1, 8, 8), inputs=5 + 3).eval()
    latents = torch.cat([torch.randn(1, 5).expand(3, 5), torch.eye(3)], dim=1)
    with torch.no_grad():
        images = decoder(latents)
        assert torch.equal(images[0], images[1])  # all classes start alike
        for module in decoder.modules():
            if isinstance(module, ConditionalBatchNorm):
                module.shift[1] += 1.0
        moved = decoder(latents)
    assert torch.equal(moved[::2], images[::2])
    assert float((moved[1] - images[1]).abs().max()) > 1e-3


def test_spectral_norms_include_those_of_attention() -> None:
    config = ResnetConfig(feature_maps=(4, 6, 8), latent_dim=5, spectral_norm=True, attention_factor=4)
    encoder = build_encoder(config, (1, 8, 8), 1)
    (attention,) = (module for module in encoder.modules() if isinstance(module, SelfAttention))
    assert len(spectrally_normalized(attention)) == 4


def test_they_pass_the_checks_of_networks() -> None:
    check_network(SMALL, image_shape=(3, 16, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "r3gan", "attention_factor": 2}, "attention_factor goes with block sngan, not r3gan"),
        ({"conditional_norm": True}, "conditional_norm goes with generator_norm batch, not none"),
        ({"attention_factor": 3}, "attention_factor 3 is not one of 2, 4, 8"),
    ],
)
def test_other_resnets_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResnetConfig(**changes)  # type: ignore[arg-type]
