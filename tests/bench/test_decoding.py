"""bench/peers/decoding.py: every way gives batches, and the ratios are of those of one round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_ways_of_decoding_are_measured_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("webdataset")
    from bench.peers import decoding

    monkeypatch.setattr(decoding, "STEPS", 2)
    decoding.main(images=130, rounds=2, seconds=0.3, workers=1, out=tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    rates = {name: one["median"] for name, one in found["images_per_second"].items()}
    assert len(rates) == 5
    assert min(rates.values()) > 0
    assert set(found["encoded_over"]) == rates.keys() - {"gen_dist, encoded"}
    for step in found["step"].values():
        assert 0 <= step["waits_for_images_ms"] < step["step_ms"]
