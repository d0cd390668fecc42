"""A prior fitted to latents: it is the mixture that the latents come from, keyed, and belongs to its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import gen_dist
from gen_dist import commands
from gen_dist.cli import run_subcommand
from gen_dist.errors import CheckpointError, UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.guide import base_name, metric_of
from gen_dist.inference.export import export
from gen_dist.inference.fitted_prior import prior_bytes, read_fitted_prior, write_fitted_prior
from gen_dist.inference.loading import fitted_prior_of
from gen_dist.inference.prior_fitting import fit_prior, fitted
from gen_dist.records.run_paths import RunPaths
from gen_dist.training.run import train
from tests.support.runs import OBJECTIVES, small_config

FACTS = {"step": "1", "weights": "none"}


def _silent(_line: str) -> None:
    pass


def _run(tmp_path_factory: pytest.TempPathFactory, objective: str, **changes: Any) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    train(small_config(objective, steps=4, data="mnist5k", run_dir=str(path), **changes), say=_silent)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = _run(tmp_path_factory, "vae")
    fit_prior(path, 5, announce=_silent)
    return path


def _clusters() -> torch.Tensor:
    """Latents of 6 numbers around two points that are far apart, one of them twice as likely."""
    draws = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0)).double()
    draws[:, 1] += 0.8 * draws[:, 0]
    draws[:1000] += 30.0
    return draws.float()


def test_a_fitted_mixture_is_that_of_the_latents() -> None:
    latents = _clusters()
    drawn = fitted(latents, 2, FACTS, 0).sample(6000, seed=3).double()
    far = drawn[:, 2] > 15
    assert float(far.double().mean()) == pytest.approx(1 / 3, abs=0.02)
    for found, expected in ((drawn[far], latents[:1000].double()), (drawn[~far], latents[1000:].double())):
        torch.testing.assert_close(found.mean(dim=0), expected.mean(dim=0), atol=0.12, rtol=0.0)
        torch.testing.assert_close(found.T.cov(), expected.T.cov(), atol=0.2, rtol=0.1)


def test_principal_components_beyond_the_mixture_keep_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gen_dist.inference.prior_fitting.MIXED", 2)
    latents = _clusters()
    prior = fitted(latents, 2, FACTS, 0)
    assert prior.means.shape == (2, 2) and prior.deviations.shape == (4,)
    drawn = prior.sample(6000, seed=3).double()
    torch.testing.assert_close(drawn.T.cov(), latents.double().T.cov(), atol=6.0, rtol=0.05)


def test_one_gaussian_is_that_of_the_moments() -> None:
    latents = _clusters()
    drawn = fitted(latents, 1, FACTS, 0)
    covariance = (drawn.factors[0] @ drawn.directions).T @ (drawn.factors[0] @ drawn.directions)
    rotated = drawn.directions.T @ (drawn.factors[0] @ drawn.factors[0].T) @ drawn.directions
    assert covariance.shape == rotated.shape
    torch.testing.assert_close(rotated, latents.double().T.cov(correction=0), rtol=1e-3, atol=2e-3)


def test_a_row_depends_on_neither_count_nor_start() -> None:
    prior = fitted(_clusters(), 2, FACTS, 0)
    whole = prior.sample(40, seed=5)
    assert torch.equal(prior.sample(10, seed=5), whole[:10])
    assert torch.equal(prior.sample(7, seed=5, first_row=20), whole[20:27])
    assert not torch.equal(prior.sample(40, seed=6), whole)


def test_equal_priors_have_equal_bytes() -> None:
    """The library writes the entries of its metadata in any order."""
    prior = fitted(_clusters()[:50], 1, FACTS, 0)
    assert len({prior_bytes(prior) for _ in range(8)}) == 1


@pytest.mark.slow
def test_a_fit_is_a_function_of_its_run(run: Path) -> None:
    before = RunPaths(run).fitted_prior.read_bytes()
    fit_prior(run, 5, announce=_silent)
    assert RunPaths(run).fitted_prior.read_bytes() == before


@pytest.mark.slow
def test_samples_of_a_fitted_prior_decode_its_latents(run: Path) -> None:
    model = gen_dist.load(run)
    latents = model.fitted_prior.sample(6, seed=2)
    assert torch.equal(model.sample(6, seed=2, prior="fitted"), model.images(latents))
    assert not torch.equal(model.sample(6, seed=2), model.sample(6, seed=2, prior="fitted"))
    with pytest.raises(UserError, match="prior 'other' is not one of normal, fitted"):
        model.sample(6, prior="other")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_prior_of_other_weights_is_refused(tmp_path: Path) -> None:
    later = tmp_path / "run"
    config = small_config("vae", steps=6, checkpoint_every=4, data="mnist5k", run_dir=str(later))
    train(config, say=_silent)
    fit_prior(RunPaths(later).checkpoint(4), 3, announce=_silent)
    assert gen_dist.load(RunPaths(later).checkpoint(4)).sample(4, prior="fitted").shape == (4, 1, 28, 28)
    with pytest.raises(CheckpointError, match=r"other weights, of step 4: .* fit it again with gen-dist fit-prior"):
        gen_dist.load(later).sample(4, prior="fitted")
    with pytest.raises(CheckpointError, match="other weights, of step 4"):
        evaluate(later, ["fid"], prior="fitted", announce=_silent)
    lines: list[str] = []
    assert not (export(later, "safetensors", announce=lines.append) / "fitted_prior.safetensors").exists()
    assert any("the export has no fitted prior" in line for line in lines)
    train(config, say=_silent, fresh=True)
    assert not RunPaths(later).fitted_prior.exists()
    with pytest.raises(CheckpointError, match="there is no fitted prior"):
        gen_dist.load(later).sample(4, prior="fitted")


def test_the_way_out_fits_to_the_same_checkpoint(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(objective=SimpleNamespace(networks=torch.nn.Linear(1, 1)))
    for which, ending in (("newest", "run$"), ("best", "run --checkpoint best$")):
        with pytest.raises(CheckpointError, match=f"fit it with gen-dist fit-prior .*{ending}"):
            fitted_prior_of(model, tmp_path / "run", which)  # type: ignore[arg-type]


def test_a_damaged_prior_is_told(tmp_path: Path) -> None:
    file = tmp_path / "prior.safetensors"
    prior = fitted(_clusters(), 2, FACTS, 0)
    write_fitted_prior(file, prior)
    found = read_fitted_prior(file, "none", "a command")
    assert all(torch.equal(one, other) for one, other in zip(found[:6], prior[:6], strict=True))
    content = prior_bytes(prior)
    for damaged in (content[:-8], content[:300], b"", content[:-20] + b"\x01" + content[-19:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged: .*; fit it again with a command"):
            read_fitted_prior(file, None, "a command")


@pytest.mark.slow
def test_an_export_has_the_prior_and_its_card_says_so(run: Path) -> None:
    out = export(run, "safetensors", run / "with-prior", announce=_silent)
    assert "a mixture of 5 Gaussians fitted to the latents of 4,000 training images" in (out / "README.md").read_text()
    expected = gen_dist.load(run).sample(5, seed=1, prior="fitted")
    assert torch.equal(gen_dist.load(out).sample(5, seed=1, prior="fitted"), expected)
    (out / "fitted_prior.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"fitted_prior\.safetensors is damaged or changed"):
        gen_dist.load(out)


@pytest.mark.slow
def test_evaluations_of_a_fitted_prior_have_names_of_their_own(run: Path) -> None:
    evaluate(run, ["fid", "precision"], samples=60, announce=_silent)
    found = evaluate(run, ["fid", "memorization", "path_length"], samples=60, prior="fitted", announce=_silent)
    assert {"fid_60", "precision_60", "fid_60_fitted", "memorization_fitted"} <= set(found.metrics)
    assert found.metrics["fid_60"] != found.metrics["fid_60_fitted"]
    assert "great circles" in found.unavailable["path_length_60_fitted"]
    assert base_name("fid_60_fitted") == base_name("fid_10k_train_fitted") == "fid"
    assert metric_of("fid_10k_train_fitted").label == "FID, 10,000 samples, against training images, fitted prior"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["autoencoder", "latent autoencoder"])
def test_autoencoders_generate_with_a_fitted_prior(
    objective: str,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The latents of the second have places: all their numbers together are one vector."""
    monkeypatch.setattr("gen_dist.inference.prior_fitting.IMAGES_PER_COMPONENT", 2000)
    run = _run(tmp_path_factory, objective)
    words = ["fit-prior", str(run), "--components", "3"]
    run_subcommand([commands.fit_prior, commands.sample], words, "gen-dist")
    said = capsys.readouterr()
    assert "3 Gaussians need 6,000 images: 2 are fitted" in said.err
    assert said.out.strip().endswith("fitted_prior.safetensors")
    picture = run / "samples.png"
    words = ["sample", str(run), "--count", "4", "--prior", "fitted", "--out", str(picture)]
    run_subcommand([commands.fit_prior, commands.sample], words, "gen-dist")
    assert picture.exists()
    model = gen_dist.load(run)
    assert np.isfinite(model.latents(3, prior="fitted").numpy()).all()
    with pytest.raises(UserError, match="cannot generate"):
        model.sample(4)
    found = evaluate(run, ["fid"], samples=50, prior="fitted", announce=_silent)
    assert "fid_50_fitted" in found.metrics


@pytest.mark.slow
def test_models_without_latents_of_images_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="a prior is fitted to latents of images: a GAN has no encoder"):
        fit_prior(_run(tmp_path_factory, "gan"), announce=_silent)
    codes = next(name for name in OBJECTIVES if "vq" in name)
    with pytest.raises(UserError, match="are codes of a codebook"):
        fit_prior(_run(tmp_path_factory, codes), announce=_silent)


def test_a_mixture_has_all_its_parts() -> None:
    prior = fitted(_clusters()[:50, :1], 1, FACTS, 0)
    assert prior.sample(3, 0).shape == (3, 1)
    same = fitted(torch.ones(50, 3), 2, FACTS, 0).sample(4, 0)  # all latents alike
    torch.testing.assert_close(same, torch.ones(4, 3), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": torch.ones(1, 2).double() / 2},
        {"weights": torch.tensor([1.5, -0.5]).double()},
        {"weights": torch.ones(2).double()},
        {"means": torch.zeros(2, 0).double()},
        {"means": torch.full((2, 6), torch.nan).double()},
        {"means": torch.zeros(2, 6)},
        {"factors": torch.zeros(2, 6, 5).double()},
        {"directions": torch.zeros(5, 6).double()},
        {"deviations": torch.zeros(3).double()},
    ],
    ids=str,
)
def test_a_prior_of_other_shapes_with_a_right_digest_is_damaged(changes: dict[str, Any], tmp_path: Path) -> None:
    prior = fitted(_clusters(), 2, FACTS, 0)
    write_fitted_prior(tmp_path / "prior", prior)
    assert read_fitted_prior(tmp_path / "prior", None, "fit-prior").means.shape == (2, 6)
    write_fitted_prior(tmp_path / "prior", prior._replace(**changes))
    with pytest.raises(CheckpointError, match="is damaged: its tensors do not fit together"):
        read_fitted_prior(tmp_path / "prior", None, "fit-prior")


def test_a_checkpoint_outside_of_a_run_gets_no_files_beside_it(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "theirs" / "copied"
    shutil.copytree(max((run / "checkpoints").iterdir()), copied)
    with pytest.raises(UserError, match="outside of a run"):
        fit_prior(copied, 5, announce=_silent)
    with pytest.raises(UserError, match="name --out"):
        export(copied, "safetensors", announce=_silent)
    assert [path.name for path in tmp_path.rglob("*") if path.parent != copied] == ["theirs", "copied"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_told(run: Path) -> None:
    with pytest.raises(UserError, match="torch sees no GPU here; use cpu"):
        fit_prior(run, 5, device="cuda", announce=_silent)
