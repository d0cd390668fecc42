"""`gen-dist check` lists the checks of a plug-in's parts, and its exit code tells whether they passed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gen_dist.plugins import load
from gen_dist.testing.networks import NETWORK_CHECKS
from gen_dist.testing.objectives import OBJECTIVE_CHECKS
from gen_dist.testing.plug_in import check_plugin, print_row
from gen_dist.testing.report import Check, nobody, run_checks
from tests.conftest import REPOSITORY
from tests.support.loaded_plugins import forgetting_plugins
from tests.support.warm_python import warm_python

METRIC = """
from gen_dist.evaluation.metric import Metric, register

def measure(context):
    return {"odd": VALUE}

register(Metric(name="odd", label="odd", group="pixels", better=None, meaning="A number.", measure=measure))
"""


def _check(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*warm_python(), "-m", "gen_dist.commands", "check", *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("value", "code", "words"), [("1.0", 0, "3 passed, 1 skipped"), ("float('nan')", 1, "is nan")])
def test_the_exit_code_tells_a_failure(value: str, code: int, words: str, tmp_path: Path) -> None:
    plugin = tmp_path / "odd_metric.py"
    plugin.write_text(METRIC.replace("VALUE", value))
    done = _check(plugin)
    assert done.returncode == code, done.stderr
    assert words in done.stdout


def test_a_check_is_named_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def check_some_work(trial: str) -> None:
        assert capsys.readouterr().out.split() == [trial, "some", "work"]

    (result,) = run_checks("mine", [Check(check_some_work)], "mine", print_row)
    assert result.outcome == "passed", result
    assert capsys.readouterr().out.startswith("passed")


NETWORK = """
from dataclasses import dataclass, replace
from typing import Literal

from gen_dist.config import MlpConfig, networks
from gen_dist.presets import add_preset, get_preset
from gen_dist.records.trackers.base import RunTracker, register


@networks.register
@dataclass(frozen=True)
class MineConfig(MlpConfig):
    kind: Literal["mine"] = "mine"
    hidden_sizes: tuple[int, ...] = (4,)


add_preset("vae-on-mine", replace(get_preset("vae-mnist"), network=MineConfig()), "ours on mine")
add_preset("ours-alone", get_preset("vae-mnist"), "nothing of mine")
register("nowhere", lambda _run: RunTracker())
"""


def test_our_objectives_are_checked_on_networks_of_a_plugin(tmp_path: Path) -> None:
    (path := tmp_path / "mine.py").write_text(NETWORK)
    with forgetting_plugins():
        results = check_plugin(load(str(path)), (1, 8, 8), (), slow=False, announce=nobody)
    names = [*("mine",) * len(NETWORK_CHECKS), *("vae-on-mine",) * len(OBJECTIVE_CHECKS), "nowhere"]
    assert sorted(one.part for one in results) == sorted(names)
    assert [one.reason for one in results if one.outcome != "passed"] == ["a tracker has no checks"]


def test_a_plugin_that_is_missing_is_bad_input(tmp_path: Path) -> None:
    done = _check(tmp_path / "none.py")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "there is no plug-in" in done.stderr


def test_an_empty_plugin_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    done = _check(tmp_path / "empty.py")
    assert done.returncode == 2
    assert "registers nothing" in done.stderr
