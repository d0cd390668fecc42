"""Processes that would train one wrong model together are refused before the first step, all with one line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

import gen_dist
from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.parallel import facts as facts_module
from gen_dist.parallel.facts import disagreement, facts_of_start
from gen_dist.parallel.rendezvous import _meet
from tests.support.runs import small_config

CONFIG = small_config("vae", run_dir="/runs/a", data="folder:/data/a")


ENCODED = replace(CONFIG, packing=replace(CONFIG.packing, packed_as="encoded"))


@pytest.fixture(autouse=True)
def _plain_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_HET_JOB_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def _facts(config: TrainConfig = CONFIG, launched: int = 2, on_cpu: bool = True, threads: int = 1) -> dict[str, str]:
    return facts_of_start(config, launched, on_cpu, threads)


def _outcomes(facts: Mapping[int, Mapping[str, str]], launched: int, seconds: float = 100.0) -> dict[int, str | None]:
    """Lines with which the ranks end that meet in one store; None if they may begin."""
    store: Any = HashStore()
    found: dict[int, str | None] = {}

    def meet(rank: int) -> None:
        try:
            _meet(store, rank, facts[rank], launched, time.monotonic() + seconds, "host:1")
            found[rank] = None
        except ConfigError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in facts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_versions_of_decoders_are_compared_where_training_decodes() -> None:
    decoding = _facts(ENCODED)
    assert decoding["pillow"] and "libjpeg_turbo" in decoding["image decoders"]
    assert _facts(replace(CONFIG, data="shards:/data/{0..1}.tar")).keys() >= {"pillow", "image decoders"}
    assert not _facts().keys() & {"pillow", "image decoders"}
    told = disagreement({0: decoding, 1: decoding | {"pillow": "9.0", "image decoders": "libjpeg_turbo 2.1"}})
    assert told and "but 9.0 on rank 1" in told and told.endswith("; install one version on all hosts")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: _facts(replace(CONFIG, learning_rate=0.1)), "learning_rate is 0.003 on rank 0 but 0.1 on rank 1"),
        (lambda: _facts(replace(CONFIG, seed=7)), "seed is 0 on rank 0 but 7 on rank 1"),
        (lambda: _facts(replace(CONFIG, steps=20)), "steps is 50 on rank 0 but 20 on rank 1"),
        (lambda: _facts(replace(CONFIG, shards=2)), "shards is None on rank 0 but 2 on rank 1"),
        (lambda: _facts(replace(CONFIG, log_every=7)), "log_every is 1 on rank 0 but 7 on rank 1"),
        (lambda: _facts(replace(CONFIG, precision="bf16")), "precision is 'auto' on rank 0 but 'bf16' on rank 1"),
        (
            lambda: _facts(replace(CONFIG, network=replace(CONFIG.network, latent_dim=6))),
            "network.latent_dim is 5 on rank 0 but 6 on rank 1; start all of them with the same command",
        ),
        (lambda: _facts(small_config("gan", run_dir="/runs/a")), "objective.kind is 'vae' on rank 0 but 'gan' on rank"),
        (lambda: _facts(replace(CONFIG, run_dir="/runs/b")), "run_dir is '/runs/a' on rank 0 but '/runs/b' on rank 1"),
        (lambda: _facts(replace(CONFIG, data="mnist")), "data is folder: on rank 0 but 'mnist' on rank 1"),
        (lambda: _facts(threads=8), "threads is 1 on rank 0 but 8 on rank 1; set GEN_DIST_THREADS"),
        (lambda: _facts(on_cpu=False), "device type is cpu on rank 0 but cuda on rank 1"),
        (lambda: _facts(launched=4), "number of processes is 2 on rank 0 but 4 on rank 1"),
        (lambda: _facts() | {"torch": "2.5.0"}, "but 2.5.0 on rank 1; install one version on all hosts"),
        (lambda: _facts() | {"code of gen_dist": "edited"}, "but edited on rank 1; install one version on all hosts"),
    ],
)
def test_all_ranks_end_with_one_line_at_once(other: Any, told: str) -> None:
    started = time.monotonic()
    outcomes = _outcomes({0: _facts(), 1: other()}, 2)
    assert time.monotonic() - started < 60
    assert outcomes[0] == outcomes[1] != None  # noqa: E711
    assert str(outcomes[0]).startswith("the processes disagree: ")
    assert told in str(outcomes[0])


def test_equal_ranks_begin() -> None:
    """Each host may have its data and its cache elsewhere."""
    elsewhere = replace(CONFIG, data="folder:/scratch", data_root="/b", packing=replace(CONFIG.packing, cache_dir="/c"))
    assert _outcomes({0: _facts(), 1: _facts(elsewhere)}, 2) == {0: None, 1: None}


def test_a_disagreement_is_told_before_all_have_come() -> None:
    """Ranks 2 and 3 of another host may come minutes later, or never."""
    facts = {0: _facts(launched=4), 1: _facts(replace(CONFIG, seed=1), launched=4)}
    assert set(_outcomes(facts, 4).values()) == {
        "the processes disagree: seed is 0 on rank 0 but 1 on rank 1; start all of them with the same command"
    }


def test_a_launch_of_more_processes_does_not_join_a_smaller_one() -> None:
    """Rank 0 begins with its two, and rank 2 of four finds out by itself."""
    store: Any = HashStore()
    store.set("joined 1", json.dumps(_facts()))
    _meet(store, 0, _facts(), 2, time.monotonic() + 60, "host:1")
    with pytest.raises(ConfigError, match="number of processes is 2 on rank 0 but 4 on rank 2"):
        _meet(store, 2, _facts(launched=4), 4, time.monotonic() + 60, "host:1")


def test_absent_ranks_are_named() -> None:
    assert _outcomes({0: _facts()}, 2, seconds=0.1)[0] == (
        "2 processes were launched but 1 joined at host:1 in time; absent: rank 1; see their output, and check that "
        "every host was given the same number of processes"
    )


def test_a_rank_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job's process at the same port says that it is rank 1, too."""
    store: Any = HashStore()
    store.compare_set("claim 1", "", "process 7 of another-host")
    with pytest.raises(ConfigError, match="process 7 of another-host has already joined at host:1 as rank 1") as caught:
        _meet(store, 1, _facts(), 2, time.monotonic() + 60, "host:1")
    assert not caught.value.shared


def test_a_fact_that_one_lacks_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that was started by hand has no SLURM_JOB_ID."""
    by_hand = _facts()
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert disagreement({0: _facts(), 1: by_hand}) is None
    assert disagreement({0: _facts() | {"job": "42"}, 1: _facts()}) == (
        "the processes disagree: job is 42 on rank 0 but 41 on rank 1; another job uses this port: choose another with "
        "--main_process_port, --master-port or MASTER_PORT"
    )


def test_many_differences_of_many_ranks_fit_one_line() -> None:
    other = _facts(
        replace(CONFIG, seed=1, steps=9, log_every=3, learning_rate=1.0, global_batch_size=8, accumulation=2)
    )
    line = disagreement(dict(enumerate([_facts(), *[other] * 63])))
    assert line is not None
    assert "on rank 1, 2, 3, 4, and 59 more; " in line
    assert "; and 2 more; start all" in line
    assert len(line) < 500


def test_an_edited_module_has_another_digest(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for content in ("a = 1", "a = 2"):
        (tmp_path / "module.py").write_text(content)
        monkeypatch.setattr(gen_dist, "__path__", [str(tmp_path)])
        facts_module._digest_of_code.cache_clear()
        digests.append(facts_module._digest_of_code())
    facts_module._digest_of_code.cache_clear()
    assert digests[0] != digests[1]
