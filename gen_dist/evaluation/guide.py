"""Guide to the figures of an evaluation: from a name with counts to the metric and its label."""

from __future__ import annotations

import re
from dataclasses import replace

from gen_dist.evaluation.metric import Metric
from gen_dist.evaluation.metrics import all_metrics

_COUNT = re.compile(r"(?:_k(?P<latents>\d+))?(?:_(?P<images>\d+)(?P<thousands>k?))?$")


def base_name(name: str) -> str:
    """A metric's name without its counts: `fid` of `fid_10k`, `nll` of `nll_k5000` and of `nll_k5000_1k`."""
    return _COUNT.sub("", name)


def is_of_run(name: str) -> bool:
    """True if the figure comes from the training run, not from the evaluator."""
    known = all_metrics().get(base_name(name))
    return known is not None and known.measure is None


def is_of_pixels(name: str) -> bool:
    """True if figures compare only between equal pixel models: real-valued or binarized."""
    known = all_metrics().get(base_name(name))
    return known is not None and known.of_pixels


def metric_of(name: str) -> Metric:
    """Guide to one metric, with its counts in its label. A metric that is not in the table has its name as label."""
    base = base_name(name)
    known = all_metrics().get(base) or Metric(base, base.replace("_", " "), "run", None, "")
    count = _COUNT.search(name)
    latents, images, thousands = count.groups() if count else (None, None, None)
    parts = [known.label]
    if latents:
        parts.append(f"{int(latents):,} importance samples")
    if images:
        size = int(images) * (1000 if thousands else 1)
        parts.append(f"{size:,} {'images' if latents else 'samples'}")
    elif latents:
        parts.append("all test images")
    return replace(known, label=", ".join(parts))


def in_order(names: list[str]) -> list[str]:
    """Names of metrics in the order of tables, unknown ones last."""
    places = {name: place for place, name in enumerate(all_metrics())}
    return sorted(names, key=lambda name: (places.get(base_name(name), len(places)), name))
