"""Scripts that make the guides' tables: their configs are ones that a run takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.quality import few_digits, photographs
from gen_dist.config import AdversarialConfig, LatentAutoencoderConfig


@pytest.mark.parametrize("name", few_digits.KINDS)
def test_each_augmentation_of_few_digits_has_a_config(name: str, tmp_path: Path) -> None:
    kinds = few_digits.KINDS[name]
    objective = few_digits.config_of(kinds, 3, 100, 0, tmp_path).objective
    assert isinstance(objective, AdversarialConfig)
    assert objective.ada == kinds and objective.adapts_augmentation == bool(kinds)


@pytest.mark.parametrize("terms", photographs.TERMS)
def test_each_loss_of_photographs_has_a_config(terms: str, tmp_path: Path) -> None:
    objective = photographs.config_of(terms, 30, 4, 0, tmp_path).objective
    assert isinstance(objective, LatentAutoencoderConfig)
    assert {name: getattr(objective, name) for name in photographs.TERMS[terms]} == photographs.TERMS[terms]
