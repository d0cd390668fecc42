"""What each metric means: its name for people, its unit, which direction is better, and one line of explanation."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

Better = Literal["less", "more", "data"]

_COUNT = re.compile(r"(?:_k(?P<latents>\d+))?(?:_(?P<images>\d+)(?P<thousands>k?))?$")


@dataclass(frozen=True)
class Metric:
    """How to read one metric."""

    label: str
    better: Better | None
    """Which values are better: smaller ones, larger ones, or those near that of the data; None where neither is."""
    meaning: str
    unit: str = ""

    @property
    def direction(self) -> str:
        """The same in words."""
        match self.better:
            case "less":
                return "less is better"
            case "more":
                return "more is better"
            case "data":
                return "near the data's is better"
            case None:
                return ""


GUIDE: dict[str, Metric] = {
    "fid": Metric("FID", "less", "Fréchet distance of the features of samples and of real images."),
    "kid": Metric("KID", "less", "Kernel distance of the same features; unlike FID unbiased for few samples."),
    "precision": Metric("precision", "more", "Share of the samples that lie among real images: fidelity."),
    "recall": Metric("recall", "more", "Share of the real images that lie among samples: variety."),
    "density": Metric(
        "density", "more", "How many real images' neighbourhoods a sample lies in, over what is expected."
    ),
    "coverage": Metric("coverage", "more", "Share of the real images with a sample in their neighbourhood."),
    "sharpness": Metric(
        "sharpness", "data", "Variance of the Laplacian of the samples; blur lowers it, noise raises it."
    ),
    "diversity": Metric("diversity", "data", "Mean distance of two samples; near 0 where a generator has collapsed."),
    "classes": Metric("classes drawn", "more", "Classes that the samples show, told by a classifier."),
    "class_variation": Metric(
        "class imbalance", "less", "Total variation distance of the samples' classes from those of real images."
    ),
    "label_accuracy": Metric("labels right", "more", "Share of the samples in the class that was asked for."),
    "path_length": Metric(
        "path length", "less", "Change of the image along a walk between latents: less is a smoother latent space."
    ),
    "negative_elbo": Metric(
        "negative ELBO", "less", "Bound on the test images' negative log-likelihood, one latent an image.", "nats"
    ),
    "nll": Metric(
        "negative log-likelihood", "less", "Importance-sampled estimate for the test images, a tighter bound.", "nats"
    ),
    "bits_per_dimension": Metric("bits per dimension", "less", "The same in bits, per pixel and channel.", "bits"),
    "reconstruction_error": Metric("reconstruction error", "less", "Of test images decoded from what they encode to."),
    "reconstruction_fid": Metric(
        "FID of reconstructions", "less", "Fréchet distance of reconstructions and real images."
    ),
    "active_units": Metric("active latents", "more", "Latents whose posterior mean varies over the test images."),
    "training_seconds": Metric(
        "training time", "less", "Wall time of the steps, without tests, pictures and checkpoints.", "s"
    ),
    "images_per_second": Metric("throughput", "more", "Training images a second, mean over the run.", "images/s"),
    "epochs": Metric("epochs", None, "Passes over the training images."),
}
"""By name without the numbers of samples, in the order in which tables show them."""

SPEED = ("training_seconds", "images_per_second", "epochs")
"""Those of them that the run itself tells, not the evaluator."""

LIKELIHOODS = frozenset({"negative_elbo", "nll", "bits_per_dimension"})
"""Those that compare only where the pixels are taken for the same: real-valued or binarized, Bernoulli or Gaussian."""


def base_name(name: str) -> str:
    """A metric's name without its counts: `fid_10k` is of `fid`, `nll_k5000` and `nll_k5000_1k` of `nll`."""
    return _COUNT.sub("", name)


def metric_of(name: str) -> Metric:
    """How to read a metric, its counts in its label; of an unknown one the name is all that is known."""
    base = base_name(name)
    known = GUIDE.get(base, Metric(base.replace("_", " "), None, ""))
    count = _COUNT.search(name)
    latents, images, thousands = count.groups() if count else (None, None, None)
    parts = [known.label]
    if latents:
        parts.append(f"K = {int(latents):,}")
    if images:
        size = int(images) * (1000 if thousands else 1)
        parts.append(f"{size:,} {'images' if latents else 'samples'}")
    return replace(known, label=", ".join(parts))


def in_order(names: list[str]) -> list[str]:
    """Names of metrics in the guide's order, unknown ones last."""
    places = {name: place for place, name in enumerate(GUIDE)}
    return sorted(names, key=lambda name: (places.get(base_name(name), len(places)), name))
