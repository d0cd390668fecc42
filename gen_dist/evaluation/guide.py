"""Guide to the figures of an evaluation: from a name with counts to the metric and its label."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

from gen_dist.config import PerceptualFeatures
from gen_dist.evaluation.features import FeatureName
from gen_dist.evaluation.metric import Metric
from gen_dist.evaluation.metrics import all_metrics

_COUNT = re.compile(
    r"(?:_k(?P<latents>\d+))?(?:_(?P<images>\d+)(?P<thousands>k?)(?:_(?P<reference>train|ref-[0-9a-f]{8}))?)?$"
)
FITTED = "_fitted"
"""End of the names of figures of samples from a fitted prior."""
_NETWORKS = {*get_args(FeatureName), *get_args(PerceptualFeatures)}


def base_name(name: str) -> str:
    """A metric's name without its network, counts and reference: `fid` of `fid_50k_train`, `nll` of `nll_k5000`,
    `rfid` of `rfid_digits_1k`."""
    uncounted = _COUNT.sub("", name.removesuffix(FITTED))
    return uncounted.removesuffix(f"_{_network_of(uncounted)}")


def _network_of(uncounted: str) -> str:
    """Network that a metric's name without counts ends with; empty if there is none."""
    base, _, network = uncounted.rpartition("_")
    known = all_metrics().get(base) if network in _NETWORKS else None
    if known is None or not known.named_after or (known.named_after == "other features" and network == "digits"):
        return ""
    return network


def reference_of(name: str) -> str | None:
    """Reference that a metric's name has, such as `train`; None for the test split."""
    found = _COUNT.search(name.removesuffix(FITTED))
    return found["reference"] if found else None


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
    base, is_fitted, name = base_name(name), name.endswith(FITTED), name.removesuffix(FITTED)
    known = all_metrics().get(base) or Metric(base, base.replace("_", " "), "run", None, "")
    count, network = _COUNT.search(name), _network_of(_COUNT.sub("", name))
    latents, images, thousands, reference = count.groups() if count else (None, None, None, None)
    parts = [known.label, *([network] if network else [])]
    if latents:
        parts.append(f"{int(latents):,} importance samples")
    if images:
        size = int(images) * (1000 if thousands else 1)
        of_images = latents or known.counts in ("test images", "chosen test images")
        parts.append(f"{size:,} {'images' if of_images else 'samples'}")
    elif latents:
        parts.append("all test images")
    if reference:
        parts.append("against training images" if reference == "train" else f"against {reference}")
    parts += ["fitted prior"] if is_fitted else []
    return replace(known, label=", ".join(parts))


def in_order(names: list[str]) -> list[str]:
    """Names of metrics in the order of tables, unknown ones last."""
    places = {name: place for place, name in enumerate(all_metrics())}
    return sorted(names, key=lambda name: (places.get(base_name(name), len(places)), name))
