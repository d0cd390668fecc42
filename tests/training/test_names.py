"""A run directory may have any name that the file system takes."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gen_dist import commands
from gen_dist.training.run import train
from tests.support.runs import small_config


@pytest.mark.parametrize(
    "name", ["r\udce9un", *(pytest.param(name, marks=pytest.mark.slow) for name in ("%20 rün", "[b]a*[b] **"))]
)
def test_a_run_of_any_name_trains_and_is_of_use(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)  # pytest's own takes UTF-8 alone
    monkeypatch.setattr(sys, "stderr", shown)
    path = tmp_path / name
    config = small_config("vae", steps=2, run_dir=str(path))
    config = replace(config, optimization=replace(config.optimization, decay="constant"))
    train(config, say=lambda _line: None)
    assert train(replace(config, steps=3), say=lambda _line: None).finished
    used = [["sample", "--count=2", f"--out={path}/s.png"], ["export", "--format=safetensors", f"--out={path}/e"]]
    for verb, *options in [*used, ["report", "--no-evaluate", "--no-step-times"], ["replay", "--step=2"]]:
        monkeypatch.setattr(sys, "argv", ["gen-dist", verb, str(path), *options])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        assert stop.value.code == 0, ascii(shown.getvalue())
    assert {"s.png", "e", "report.html", "summary.json"} <= {entry.name for entry in path.iterdir()}
