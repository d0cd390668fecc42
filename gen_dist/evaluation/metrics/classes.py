"""Metrics of the classes that the digit network finds in samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Better, Metric, UnavailableError, Value, register

LEAST_ACCURACY = 0.9
"""Minimum test accuracy of the digit network. Below it, these metrics are not reported."""
NETWORK_CLASSES = 10


class Shares(NamedTuple):
    """Shares of the classes, float64 [10] each."""

    sampled: NDArray[np.float64]
    real: NDArray[np.float64]


def accuracy(context: Context) -> float | None:
    """Share of the test images whose class the network finds; None if the network has no classes."""

    def compute() -> float | None:
        classes = context.real.classes
        if classes is None or context.dataset.labels.kind != "classes":
            return None
        labels = torch.from_numpy(context.dataset.test.labels).to(classes.device)
        return share_right(context, classes, labels)

    return context.once("accuracy of the digit network", compute)


def share_right(context: Context, found: Tensor, labels: Tensor) -> float:
    """Share of the images whose class is found, of those with a known one: `unknown` is none to find."""
    known = labels < context.dataset.labels.known_classes
    return float((found == labels)[known].double().mean()) if bool(known.any()) else 0.0


def _shares(context: Context) -> Shares:
    found = accuracy(context)
    assert found is not None and context.sampled.classes is not None and context.real.classes is not None
    if found < LEAST_ACCURACY:
        raise UnavailableError(f"the digit network is right for {found:.0%} of the test images: they are no digits")
    sampled, real = (
        np.bincount(classes.cpu().numpy(), minlength=NETWORK_CLASSES)
        for classes in (context.sampled.classes, context.real.classes)
    )
    return Shares(sampled / sampled.sum(), real / real.sum())


def _classes(context: Context) -> dict[str, Value]:
    sampled, real = _shares(context)
    return {"classes": int(((sampled > 0) & (sampled >= real / 4)).sum())}


def _class_shares(context: Context) -> dict[str, Value]:
    return {"class_shares": _shares(context).sampled.tolist()}


def _class_variation(context: Context) -> dict[str, Value]:
    sampled, real = _shares(context)
    return {"class_variation": float(np.abs(sampled - real).sum() / 2)}


def _label_accuracy(context: Context) -> dict[str, Value]:
    _shares(context)
    labels, classes = context.labels(0, context.samples), context.sampled.classes
    assert labels is not None and classes is not None
    return {"label_accuracy": share_right(context, classes.cpu(), labels)}


def _register(
    name: str,
    label: str,
    better: Better | None,
    meaning: str,
    measure: Callable[[Context], dict[str, Value]],
    *needs: str,
) -> None:
    register(
        Metric(
            name=name,
            label=label,
            group="classes",
            better=better,
            meaning=meaning,
            needs=("samples", "test images", "digits", *needs),
            counts="samples",
            measure=measure,
            stage="classes",
            rests_on_features=True,
        )
    )


_register(
    "classes",
    "classes drawn",
    "more",
    "Classes that occur in the samples, by a digit classifier, which names one for squiggles too.",
    _classes,
)
_register("class_shares", "shares of the classes", None, "Shares of the samples in each class.", _class_shares)
_register(
    "class_variation",
    "class imbalance",
    "less",
    "Total variation distance of the samples' classes from those of real images.",
    _class_variation,
)
_register(
    "label_accuracy",
    "labels right",
    "more",
    "Share of the samples in the class that was asked for.",
    _label_accuracy,
    "labels",
)
