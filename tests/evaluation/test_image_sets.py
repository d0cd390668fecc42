"""Images that no run made are measured as a model's samples are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist import commands
from gen_dist.cli import run_subcommand
from gen_dist.errors import ConfigError, UserError
from gen_dist.evaluation.features import feature_network
from gen_dist.evaluation.image_sets import evaluate_images
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.evaluation.metrics.frechet import frechet_distance, moments
from tests.support.digits import digits


def _silent(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of digits: `real` has 100, of which 10 are a test split; `made` has 60 of another size, in colour;
    `few` has 3 of them."""
    root = tmp_path_factory.mktemp("folders")
    for place, image in enumerate(digits()[0][:160]):
        name = "made" if place >= 100 else "real/test" if place >= 90 else "real/train"
        (root / name).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image[0])
        if place >= 100:
            picture = picture.convert("RGB").resize((56, 56), Image.Resampling.NEAREST)
        picture.save(root / name / f"{place:03}.png")
    (root / "few").mkdir()
    for place in range(3):
        shutil.copy(root / "made" / f"10{place}.png", root / "few")
    return root


def test_images_are_compared_with_all_of_a_source(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    words = f"evaluate --images {folders}/made --reference folder:{folders}/real --metrics fid precision --out {out}"
    run_subcommand([commands.evaluate, commands.compare], words.split(), "gen-dist")
    said = capsys.readouterr().out
    assert f"folder:{folders}/made, against all images of folder:{folders}/real" in said
    content = json.loads(out.read_text())
    ((name, value),) = [one for one in content["metrics"].items() if one[0].startswith("fid")]
    network = feature_network("digits", torch.device("cpu"))
    real, made = (network.of_images(torch.from_numpy(some))[0] for some in np.split(digits()[0][:160], [100]))
    assert name.startswith("fid_60_ref-")
    assert value == pytest.approx(frechet_distance(moments(real), moments(made)), rel=0.2)  # resized there and back
    assert content["intervals"][name][0] < value < content["intervals"][name][1]
    assert next(iter(content["references"].values())).startswith("100 images of ")


@pytest.mark.slow
def test_what_needs_a_model_is_unavailable(folders: Path) -> None:
    found = evaluate_images(f"folder:{folders}/made", f"folder:{folders}/real", announce=_silent)
    told = {name.split("_")[0] for name in found.metrics}
    assert {"fid", "kid", "precision", "recall", "density", "coverage", "sharpness", "diversity"} <= told
    assert len(found.metrics) + len(found.unavailable) >= len(measured_metrics())
    assert "there are images alone, and no model" in found.unavailable["negative_elbo"]
    assert "no latents to walk between" in found.unavailable["path_length_60"]
    assert found.unavailable["label_accuracy_60"]


@pytest.mark.slow
def test_copies_of_a_source_are_told(folders: Path) -> None:
    training = f"folder:{folders}/real/train"
    found = evaluate_images(training, f"folder:{folders}/real", ["memorization"], announce=_silent)
    assert found.metrics["memorization"] == 1.0 and "copies" in found.warnings["memorization"]


def test_wrong_words_for_images_are_one_line(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, real = f"{folders}/made", f"folder:{folders}/real"
    for words, message in (
        (f"--images {made}", "reference test is a split of a run's data; name a source"),
        (f"--images {made} --reference train", "reference train is a split"),
        (f"{folders} --images {made} --reference {real}", "leave one out"),
        ("", "evaluate needs a run"),
        (f"{folders} --out {tmp_path / 'a.json'}", "out is of --images"),
        (f"--images {tmp_path / 'none'} --reference {real}", "unknown data source"),
        (f"--images {made} --reference {real} --metrics fud", "unknown metrics fud"),
        (f"--images {made} --reference {real} --data {made}", "data is for runs, not for --images"),
        (f"--images {made} --reference {real} --prior fitted", "prior is for runs"),
        (f"--images {folders}/few --reference {real}", r"few are 3, fewer than 10; name more"),
        (f"--images {made} --reference {real} --features inception --inception-weights none", "cannot be read"),
        (f"--images {made} --reference {real} --metrics fid --out {tmp_path}/no/a.json", "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            run_subcommand([commands.evaluate, commands.compare], ["evaluate", *words.split()], "gen-dist")
    assert "fid_60_ref" in capsys.readouterr().out  # the figures that cannot be written are printed
    with pytest.raises(ConfigError, match="samples 3 is less than 10"):
        evaluate_images(made, real, samples=3)
