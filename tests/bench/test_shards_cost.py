"""The benchmark of what shards cost: its blocks, and the figures that it prints."""

import json
from typing import Any

import pytest

from bench.costs import shards_cost


@pytest.mark.parametrize("is_processor", [False, True])
def test_steps_with_shards_are_compared_with_those_without(
    is_processor: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_cost, "BLOCK_SECONDS", 0.0)
    shards_cost.main(("dcgan-mnist",), shards=(2,), rounds=2, batch_size=4, processor_time=is_processor)
    row, text = capsys.readouterr().out.strip().splitlines()[-2:]
    found: dict[str, Any] = json.loads(text)["presets"]["dcgan-mnist"]
    assert json.loads(text)["conditions"]["clock"] == ("processor" if is_processor else "wall")
    assert found["images_of_a_process"] == 4
    assert found["step_seconds"]["n"] == found["ratios"]["2"]["n"] == 2
    assert 0 < found["step_seconds"]["median"] < 60
    assert 0 < found["ratios"]["2"]["p20"] <= found["ratios"]["2"]["p80"]
    assert row.startswith("| `dcgan-mnist` | 4 | ") and row.count("|") == 5
