"""Digests of the weights that presets learn."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.gate.weight_digests import _digest, digest_of
from gen_dist.errors import UserError
from gen_dist.presets import get_preset


def test_equal_runs_have_equal_digests_and_other_seeds_have_not() -> None:
    config = get_preset("vae-2d-mnist")
    first, again = (digest_of(config, steps=2, batch_size=4) for _ in range(2))
    assert first == again
    assert digest_of(replace(config, seed=config.seed + 1), steps=2, batch_size=4) != first


def test_a_run_that_was_ended_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no step_00000030"):
        _digest(tmp_path / "step_00000030")
