"""bench/quality/iwae_table.py: runs beside the table of the IWAE paper."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bench.quality.iwae_table import bounds_of, main, row_of
from gen_dist import train
from gen_dist.cli import call_parsed
from gen_dist.config import MlpConfig, TrainConfig, VaeConfig
from gen_dist.errors import UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.presets import get_preset
from gen_dist.reports.run_record import read_run
from tests.conftest import REPOSITORY
from tests.support.digits import mnist_files, read_png
from tests.support.warm_python import warm_python


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with five samples, not evaluated. No test changes it."""
    directory = tmp_path_factory.mktemp("trained")
    mnist_files(directory)
    train(config_of(directory))
    return directory / "run"


def config_of(directory: Path) -> TrainConfig:
    return replace(
        get_preset("iwae-mnist"),
        data="mnist",
        data_root=str(directory),
        steps=8,
        evaluate_every=4,
        checkpoint_every=4,
        network=MlpConfig(hidden_sizes=(8,), latent_dim=2),
        objective=VaeConfig(dynamic_binarization=True, gradient="path", importance_samples=5),
        run_dir=str(directory / "run"),
    )


def test_rows_are_the_runs_own_beside_the_papers(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match="has no nll_k5000 and no negative_elbo and no active_units"):
        row_of(read_run(run))
    evaluate(run, ("nll", "negative_elbo", "active_units"))
    picture = tmp_path / "bounds.png"
    done = subprocess.run(
        [*warm_python(), "bench/quality/iwae_table.py", str(run), "--picture", str(picture)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = json.loads(done.stdout.splitlines()[-1])
    record = read_run(run)
    assert record.evaluation is not None
    assert row["nll_k5000"] == record.evaluation.metrics["nll_k5000"] < row["negative_elbo"]
    assert row["epochs"] == 8 * 200 / 800
    assert (row["samples"], row["paper_nll"], row["paper_active_units"]) == (5, 85.54, 22)
    bounds = bounds_of(record)
    assert list(bounds) == ["K = 5, negative ELBO", "K = 5, bound of 5 samples"]
    assert [epochs for epochs, _ in bounds["K = 5, negative ELBO"]] == [1.0, 2.0]
    assert read_png(picture).std() > 1


def test_what_is_no_such_run_is_told_in_one_line(trained: Path, tmp_path: Path) -> None:
    train(replace(get_preset("vae-mnist"), data="synthetic", steps=1, run_dir=str(tmp_path / "other")))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished)
    shutil.rmtree(unfinished / "checkpoints/step_00000008")
    for words, said in (
        ([str(unfinished)], "is at step 4 of 8; go on with it first"),
        ([str(tmp_path / "other")], "a run of vae-mnist on synthetic"),
        ([str(tmp_path / "none")], "does not exist"),
        ([str(trained), "--picture", str(tmp_path / "none/bounds.png")], "directory is missing"),
        ([], "name at least one run directory"),
    ):
        with pytest.raises(UserError) as error:
            call_parsed(main, words, "bench/quality/iwae_table.py")
        assert said in str(error.value)
        assert "\n" not in str(error.value)
