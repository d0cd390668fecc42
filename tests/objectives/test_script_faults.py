"""Each fault of the best-known public script for autoencoders is found by the check that is meant to find it."""

from __future__ import annotations

import pytest

from gen_dist.config import AutoencoderKlConfig, PatchganConfig
from gen_dist.objectives import latent_autoencoder
from gen_dist.testing.objectives import OBJECTIVE_CHECKS
from gen_dist.testing.report import run_checks
from gen_dist.testing.trial import ObjectiveTrial
from tests.objectives.faulty_autoencoder import FaultyAutoencoderConfig, ScriptFault
from tests.objectives.test_latent_autoencoder import KnownFeatures

CASES: dict[ScriptFault, tuple[FaultyAutoencoderConfig, str, str]] = {
    "perceptual loss under no_grad": (
        FaultyAutoencoderConfig(perceptual_weight=1.0),
        "every term of the loss has a gradient",
        "phase autoencoder: the loss depends on encoder, decoder through a value without gradient",
    ),
    "encoder past the wrapper": (
        FaultyAutoencoderConfig(),
        "the forward pass stays within the networks",
        "phase autoencoder calls a AutoencoderKlEncoder that is not in the objective's `networks`",
    ),
    "discriminator on the generator's graph": (
        FaultyAutoencoderConfig(adversarial_weight=0.5, adaptive_weight=False),
        "no gradient reaches another phase",
        "phase autoencoder carries 'reconstructions' with the graph",
    ),
    "bf16 weights": (
        FaultyAutoencoderConfig(bottleneck="none"),
        "updates are larger than the spacing of the weights",
        "is bfloat16",
    ),
    "state that no resume loads": (
        FaultyAutoencoderConfig(bottleneck="vq", codebook_size=8),
        "changing buffers are saved",
        "bottleneck.usage of FaultyAutoencoder",
    ),
}
NETWORK = AutoencoderKlConfig(feature_maps=(4, 8), latent_dim=2, blocks=1, groups=2, middle_attention=False)
PATCHES = PatchganConfig(feature_maps=4, layers=2, discriminator_norm="none")


@pytest.mark.parametrize("fault", CASES)
def test_a_fault_of_the_public_script_is_found(fault: ScriptFault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_autoencoder, "perceptual_distance", lambda _name, _file: KnownFeatures())
    config, check, words = CASES[fault]
    checks = [one for one in OBJECTIVE_CHECKS if one.name == check]
    found = []
    for planted in ("none", fault):
        faulty = FaultyAutoencoderConfig(**(vars(config) | {"fault": planted}))
        trial = ObjectiveTrial(faulty, NETWORK, (1, 16, 16), {"discriminator": PATCHES})
        found += run_checks(fault, checks, trial)
    assert [one.outcome for one in found] == ["passed", "failed"], found
    assert words in found[1].reason
