"""Confidence intervals of FID and KID are as wide as the figures vary over new sets of images."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gen_dist.evaluation import bootstrap
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metrics import frechet, kernel
from gen_dist.testing.trial import ALONE

REAL, FAKE, FEATURES = 150, 200, 4


def _sets(seed: int, shift: float) -> tuple[Tensor, Tensor]:
    draws = torch.randn(REAL + FAKE, FEATURES, generator=torch.Generator().manual_seed(seed))
    return draws[:REAL], draws[REAL:] + shift


def _context(real: Tensor, fake: Tensor, with_intervals: bool) -> Any:
    return SimpleNamespace(
        compared_features=real,
        sampled=SimpleNamespace(features=fake),
        with_intervals=with_intervals,
        intervals={},
        processes=ALONE,
        share=lambda count: (0, count),
        summed=lambda value: value,
        compared_reference=lambda _name, compute: compute(),
        in_logs=lambda items, _what, _unit: items,
    )


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("metric", [frechet, kernel])
def test_intervals_are_as_wide_as_figures_vary(metric: Any, shift: float) -> None:
    values, widths = [], []
    for seed in range(60):
        context = _context(*_sets(seed, shift), with_intervals=seed < 8)
        values.append(next(iter(metric.measure(context).values())))
        if seed < 8:
            ((low, high),) = context.intervals.values()
            assert low <= values[-1] <= high
            widths.append(high - values[-1])
    # A standard deviation of 60 values is right to a tenth. Of equal distributions the kernel distance is 0, where its
    # variance is of second order; drawing again doubles it there.
    ratio = np.mean(widths) / 1.96 / np.std(values)
    assert 0.75 < ratio < (1.3 if shift else 2.5)


def test_sets_of_an_interval_are_counted_on_a_bar_that_logs_show(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []

    def bar(items: Iterable[int], **options: Any) -> Iterable[int]:
        shown.append(options)
        return items

    monkeypatch.setattr("gen_dist.evaluation.context.tqdm", bar)
    context = _context(*_sets(0, 0.0), with_intervals=True)
    context.in_logs = functools.partial(Context.in_logs, context)
    frechet.measure(context)
    assert [one["desc"] for one in shown] == ["interval of the Frechet distance"]
    assert shown[0]["disable"] is False and shown[0]["delay"] > 1


@pytest.mark.parametrize(("on_terminal", "delay"), [(True, 0.0), (False, 20.0)])
def test_rows_are_counted_on_a_bar_that_logs_show_when_they_take_long(
    on_terminal: bool, delay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, Any]] = []

    def bar(items: Iterable[int], **options: Any) -> Iterable[int]:
        shown.append(options)
        return items

    monkeypatch.setattr("gen_dist.evaluation.context.tqdm", bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal, raising=False)
    context = _context(*_sets(0, 0.0), with_intervals=False)
    context.in_logs = functools.partial(Context.in_logs, context)
    context._rows_per_block = lambda _count, _compute: 4
    (found,) = Context.rows(context, 10, "samples", lambda first, last: (torch.arange(first, last),))
    assert found.tolist() == list(range(10))
    (options,) = shown
    assert (options["desc"], options["delay"], options["disable"]) == ("samples", delay, False)


def test_drawn_sets_are_a_function_of_their_number() -> None:
    counts = bootstrap.drawn_counts(500, 0, 6, 0)
    assert torch.equal(counts.sum(dim=1), torch.full((6,), 500.0).double())
    assert torch.equal(bootstrap.drawn_counts(500, 2, 5, 0), counts[2:5])
    assert not torch.equal(bootstrap.drawn_counts(500, 0, 6, 1), counts)
    # A drawn set lacks 1 / e of the images.
    assert float((counts == 0).double().mean()) == pytest.approx(np.exp(-1), abs=0.03)
    assert bootstrap.drawn_counts(500, 3, 3, 0).shape == (0, 500)


def test_moments_of_a_drawn_set_are_those_of_its_images() -> None:
    features = _sets(0, 0.0)[0]
    counts = bootstrap.drawn_counts(REAL, 0, 1, 0)[0]
    drawn = features.repeat_interleave(counts.long(), dim=0)
    for found, expected in zip(frechet.drawn_moments(features, counts), frechet.moments(drawn), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_kernel_sums_of_drawn_sets_are_those_of_their_images() -> None:
    real, fake = _sets(0, 0.5)
    counts = bootstrap.drawn_counts(REAL, 0, 2, 0), bootstrap.drawn_counts(FAKE, 0, 2, 1)
    found = kernel.drawn_kernel_sums(real, fake, *counts)
    for place in range(2):
        drawn = [some.repeat_interleave(n[place].long(), dim=0) for some, n in zip((real, fake), counts, strict=True)]
        torch.testing.assert_close(found[place], kernel.kernel_sum(*drawn), rtol=1e-10, atol=0.0)
