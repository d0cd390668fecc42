"""Our own parts pass the checks that plug-ins have to pass."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from gen_dist.config import DataConfig, LatentAutoencoderConfig, NetworkConfig, PatchganConfig
from gen_dist.errors import ConfigError
from gen_dist.evaluation.metrics import all_metrics
from gen_dist.networks import build_decoder
from gen_dist.testing import check_metric, check_network, check_objective, check_source
from gen_dist.testing.objectives import OBJECTIVE_CHECKS, SLOW_OBJECTIVE_CHECKS
from gen_dist.testing.report import raise_failures, run_checks
from gen_dist.testing.trial import ObjectiveTrial, small_dataset
from tests.networks.test_networks import SMALL
from tests.support.runs import OBJECTIVES, SMALL_LATENTS, WITH_BATCH_STATISTICS, each_of

QUICK = {"autoencoder", "vae", "beta-vae with warm-up", "iwae, path gradient", "gan", "conditional gan"}
"""One objective of each kind of loss, phase and conditioning; `make test-all` takes all."""


@each_of(OBJECTIVES, left_out=set(OBJECTIVES) - QUICK)
def test_our_objectives_pass(objective: str) -> None:
    results = run_checks(objective, OBJECTIVE_CHECKS, ObjectiveTrial(*OBJECTIVES[objective]))
    raise_failures(results)
    skipped = [one.check for one in results if one.outcome == "skipped"]
    assert skipped == (["micro batches equal the batch"] if objective in WITH_BATCH_STATISTICS else [])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["vae", "conditional gan"])
def test_our_objectives_pass_the_slow_checks(objective: str) -> None:
    """All others are trained in two processes and compiled with smaller tolerances: see tests/README.md."""
    raise_failures(run_checks(objective, SLOW_OBJECTIVE_CHECKS, ObjectiveTrial(*OBJECTIVES[objective])))


PATCHES = PatchganConfig(feature_maps=4, layers=2, discriminator_norm="none")
LATENTS = {
    "adaptive weight, learned scale": LatentAutoencoderConfig(
        adversarial_weight=0.5, adversarial_start=1, log_scale=None, adversarial_loss="non_saturating"
    ),
    "codebook of moving averages": LatentAutoencoderConfig(bottleneck="vq", codebook_size=16, adversarial_weight=0.5),
    "codebook by gradient": LatentAutoencoderConfig(bottleneck="vq", codebook_size=16, codebook_update="gradient"),
}
"""Latent autoencoders with patches that are scored; each draws every code again in its first step."""


@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("codebook of moving averages", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in LATENTS),
    ],
)
def test_our_latent_autoencoders_pass(name: str, slow: bool) -> None:
    check_objective(LATENTS[name], SMALL_LATENTS, roles={"discriminator": PATCHES}, image_shape=(1, 16, 16), slow=slow)


@dataclass(frozen=True)
class AloneConfig(NetworkConfig):
    """A discriminator's network without a decoder."""

    encoder: ClassVar[str] = "gen_dist.networks.mlp:MlpEncoder"
    kind: Literal["alone"] = "alone"
    hidden_sizes: tuple[int, ...] = (4,)
    activation: Literal["relu"] = "relu"


def test_a_discriminator_without_a_decoder_passes() -> None:
    results = check_network(AloneConfig(), image_shape=(1, 8, 8))
    assert [one.reason for one in results if one.outcome != "passed"] == ["it has no decoder"]
    with pytest.raises(ConfigError, match="network alone has no decoder, so it serves as encoder or discriminator"):
        build_decoder(AloneConfig(), (1, 8, 8))


@pytest.mark.parametrize("network", SMALL)
def test_our_networks_pass(network: str) -> None:
    results = check_network(SMALL[network], image_shape=(3, 16, 16))
    assert {one.outcome for one in results} == {"passed"}


@pytest.mark.parametrize("data", ["synthetic", "folder", "parquet"])
def test_our_sources_pass(data: str, tmp_path: Path) -> None:
    name = {"synthetic": "synthetic", "folder": f"folder:{tmp_path}", "parquet": f"parquet:{tmp_path / 'toy.parquet'}"}
    images = small_dataset((3, 8, 8)).train.images[:12]
    files = []
    for place, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(content := io.BytesIO(), "png")
        files.append({"bytes": content.getvalue()})
        if data == "folder":
            (tmp_path / f"{place}.png").write_bytes(content.getvalue())
    if data == "parquet":
        table = pyarrow.table({"image": files, "label": [place % 2 for place in range(12)]})
        pyarrow.parquet.write_table(table, tmp_path / "toy.parquet")
    packing = DataConfig(synthetic_images=64, image_size=None if data == "synthetic" else 8)
    check_source(name[data], packing=packing)


QUICK_METRICS = [name for name, one in all_metrics().items() if not one.takes_minutes or one.group == "reconstruction"]


@pytest.mark.parametrize("metric", QUICK_METRICS)
def test_our_metrics_pass(metric: str) -> None:
    check_metric(metric)
