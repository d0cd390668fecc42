"""Digests of the weights that presets learn."""

from dataclasses import replace

from bench.gate.weight_digests import digest_of
from gen_dist.presets import get_preset


def test_equal_runs_have_equal_digests_and_other_seeds_have_not() -> None:
    config = get_preset("vae-2d-mnist")
    first, again = (digest_of(config, steps=2, batch_size=4) for _ in range(2))
    assert first == again
    assert digest_of(replace(config, seed=config.seed + 1), steps=2, batch_size=4) != first
