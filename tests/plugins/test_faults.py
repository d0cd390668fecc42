"""Errors of a plug-in's code are one line with its file and line, and nothing that is written is lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gen_dist
from gen_dist import cli, commands
from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.launch import train
from gen_dist.plugins.faults import told
from tests.conftest import REPOSITORY
from tests.plugins.test_wrong_parts import OBJECTIVE, PLUGIN
from tests.support.warm_python import in_two_ranks

pytestmark = pytest.mark.usefixtures("forget")

MORE = """
import numpy as np

from gen_dist.data.sources.source import Block, register as register_source
from gen_dist.evaluation.metric import Metric, register


class MySource:
    name = slug = "mine"
    has_test_split = False
    default_size = None

    def fingerprint(self):
        return [1]

    def remarks(self):
        return []

    def fetch(self):
        pass

    def class_names(self):
        return ("a",)

    def image_count(self):
        return 40

    def blocks(self):
        images = np.random.default_rng(0).integers(0, 256, (40, 1, 28, 28), np.uint8)
        yield Block("train", images, np.zeros(40, np.int64), "mine")


register_source("mine", lambda request: MySource())


def measure(context):
    return {"odd": 1.0}


register(Metric(name="odd", label="odd", group="pixels", better=None, meaning="A number.", measure=measure))


class Mine(Phase):
    def __init__(self, objective, inner):
        super().__init__(objective)
        self.inner = inner

    def forward(self, batch):
        return self.inner(batch)
"""
TEXT = (PLUGIN + OBJECTIVE + MORE).replace(
    "return super().phases()", "return {name: Mine(self, one) for name, one in super().phases().items()}"
)
LATE = (
    "    def __post_init__(self):\n        super().__post_init__()\n        if self.hidden_sizes != (8,):\n            "
)
FIELD = '    activation: Literal["relu"] = "relu"\n'
FORWARD, BLOCK, KEY = "return self.inner(batch)", "yield Block(", "{}['key']"
AT = r"plug-in mine.py, line \d+"
FAULTS: dict[str, tuple[str, str, str]] = {
    "option": (FIELD, f"{FIELD}\n{LATE}{KEY}\n", f"^{AT}: KeyError: 'key'; GEN_DIST_TRACEBACK=1"),
    "value": (FIELD, f"{FIELD}\n{LATE}raise ValueError('too odd')\n", rf"too odd.*\({AT}\)"),
    "construction": (
        "class MyEncoder(MlpEncoder):",
        f"class MyEncoder(MlpEncoder):\n    __init__ = lambda *_: {KEY}",
        AT,
    ),
    "network": (
        "return super().forward(images)",
        f"return super().forward(images) if {KEY} else 0",
        f"^{AT}: KeyError",
    ),
    "no class": (':MyVae"', ':NoVae"', "^a config names its class as .*:NoVae, but .*mine.py has no NoVae"),
    "phases": (
        "return {name: Mine(self, one)",
        "return [1] or {name: Mine(self, one)",
        r"^MyVae.phases\(\) gives no dict",
    ),
    "forward": (FORWARD, KEY, f"^{AT}: KeyError"),
    "end": (FORWARD, "raise SystemExit(0)", f"^{AT}: SystemExit: 0"),
    "no result": (FORWARD, "self.inner(batch)", "^Mine.forward gives NoneType, not TurnResult"),
    "loss": (FORWARD, "return self.inner(batch).loss", "^Mine.forward gives Tensor, not TurnResult"),
    "losses": (
        FORWARD,
        "r = self.inner(batch); return r._replace(loss=r.loss.expand(3))",
        r"a loss of shape \[3\], not",
    ),
    "log": (
        FORWARD,
        "return self.inner(batch)._replace(logs={'loss': 1.0})",
        "logs loss as type float, not as a tensor",
    ),
    "evaluation": (
        "class MyVae(Vae):",
        f"class MyVae(Vae):\n    def evaluate(self, batch): {KEY}\n",
        f"^{AT}: KeyError",
    ),
    "figures": (
        "class MyVae(Vae):",
        "class MyVae(Vae):\n    def evaluate(self, batch): return {'x': 1}\n",
        "^MyVae.evaluate gives x; its config's test_metrics are negative_elbo, nll, kl",
    ),
    "source": (BLOCK, f"{KEY}; {BLOCK}", f"^{AT}: KeyError"),
    "no block": (BLOCK, "yield (", "^mine: MySource.blocks() gives tuple, not a .*Block".replace("()", r"\(\)")),
    "split": ('Block("train"', 'Block("trian"', "gives a block of the split 'trian', which is none of train, test"),
    "labels": ("np.zeros(40,", "np.zeros(30,", "gives 40 images and 30 labels"),
    "classes": ('return ("a",)', "return None", r"^mine: MySource.class_names\(\) gives no tuple of texts"),
    "fingerprint": ("return [1]", "return object()", r"^mine: MySource.fingerprint\(\) gives no JSON"),
    "no source": ("lambda request: MySource()", "lambda request: None", "^mine: NoneType, .* has no name, slug"),
}


@pytest.fixture
def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """Give a function that calls a command with a changed plug-in: its exit code and the lines of errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEN_DIST_CACHE", str(tmp_path / "cache"))

    def run(text: str, command: Callable[[], Any] | None = None) -> tuple[int, list[str]]:
        Path("mine.py").write_text(text)
        words = ["mine-too", "--plugin", "mine.py", "--data", "mine", "--steps", "2", "--global-batch-size", "16"]
        more = ["--hidden-sizes", "4", "--run-dir", "run"]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli._exit_code_of(command or (lambda: train.main([*words, *more], "train")))
        return code, [line.removeprefix("error: ") for line in said.getvalue().splitlines() if "error: " in line]

    return run


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_a_plugin_is_one_line(case: str, run_with: Callable[..., tuple[int, list[str]]]) -> None:
    right, wrong, expected = FAULTS[case]
    assert right in TEXT
    code, errors = run_with(TEXT.replace(right, wrong))
    assert code == 2 and len(errors) == 1
    assert re.search(expected, errors[0]), errors


def test_an_error_after_a_spoiled_setting_names_that(
    run_with: Callable[..., tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gen_dist.training.trainer.Trainer.run_step", lambda *_: __import__("no_such_module"))
    encoder = "class MyEncoder(MlpEncoder):"
    spoils = (
        f"{encoder}\n    def parameters(self, *_):\n        __import__('sys').path = []; return super().parameters()\n"
    )
    code, errors = run_with(TEXT.replace(encoder, spoils))
    assert code == 2 and len(errors) == 1
    assert re.match(
        "plug-in mine.py changed sys.path, and then ModuleNotFoundError: No module named 'no_such", errors[0]
    )


@pytest.mark.parametrize("place", [FORWARD, "return super().forward(images)"], ids=["step", "step and evaluation"])
def test_a_run_goes_on_after_a_spoiled_setting(
    place: str, run_with: Callable[..., tuple[int, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert place in TEXT
    code, errors = run_with(TEXT.replace(place, f"import os; os.umask(0o777); os.chdir('/'); {place}"))
    assert (code, errors) == (0, [])
    assert Path("run/summary.json").stat().st_mode & 0o400


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1 / 0", f"^{AT}: ZeroDivisionError"), ("np.float32(1)", "^metric odd gives odd as float32; make it a number")],
)
def test_a_metric_that_fails_loses_no_other_figure(
    value: str, expected: str, run_with: Callable[..., tuple[int, list[str]]]
) -> None:
    text = TEXT.replace('{"odd": 1.0}', f'{{"odd": {value}}}')
    assert run_with(text) == (0, [])
    code, errors = run_with(text, lambda: commands.evaluate(Path("run"), ("odd", "negative_elbo"), samples=64))
    assert code == 2 and len(errors) == 1 and re.search(expected, errors[0]), errors
    written = json.loads(Path("run/evaluation.json").read_text())
    assert "negative_elbo" in written["metrics"] and "it failed" in written["unavailable"]["odd"]


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["True", "context.processes.rank == 1"], ids=["both", "one"])
def test_a_metric_that_fails_while_two_ranks_train_ends_nothing(failing: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TEXT.replace('{"odd": 1.0}', f'{{"odd": 1 / (not {failing})}}'))
    words = "mine-too --plugin mine.py --data mine --steps 2 --global-batch-size 16 --hidden-sizes 4 --run-dir run"
    done = subprocess.run(
        [*in_two_ranks(), "-m", "gen_dist.launch.train", *words.split(), "--evaluate-metrics", "odd"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "GEN_DIST_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0 and (tmp_path / "run/summary.json").exists(), done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "evaluations have no odd" in line]
    assert len(said) == 1 and re.search(rf"it failed \({AT}: ZeroDivisionError", said[0]), done.stdout + done.stderr


def test_a_value_error_in_a_written_config_names_its_line(
    run_with: Callable[..., tuple[int, list[str]]], forget: Callable[[], None]
) -> None:
    right, wrong, _ = FAULTS["value"]
    Path("mine.py").write_text(TEXT.replace(right, wrong))
    gen_dist.plugins.load("mine.py")
    text = gen_dist.preset("mine").to_json().replace("[\n      8\n    ]", "[4]")
    with pytest.raises(ConfigError, match=rf"^config.json: network.*too odd \({AT}\)$"):
        TrainConfig.from_json(text, "config.json")


def test_the_calls_of_a_fault_are_shown_on_demand(
    run_with: Callable[..., tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEN_DIST_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run_with(TEXT.replace(FORWARD, KEY))


def test_from_python_the_error_is_raised_as_it_is(run_with: Callable[..., tuple[int, list[str]]]) -> None:
    Path("mine.py").write_text(TEXT.replace(FORWARD, KEY))
    gen_dist.plugins.load("mine.py")
    config = gen_dist.preset("mine-too").with_options(data="mine", steps=1, global_batch_size=16, run_dir="run")
    with pytest.raises(KeyError, match="key") as caught:
        gen_dist.train(config, say=lambda _line: None)
    assert re.search(f"^{AT}: KeyError", str(told(caught.value)))


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli._exit_code_of(lambda: 1 / 0)  # type: ignore[arg-type]
