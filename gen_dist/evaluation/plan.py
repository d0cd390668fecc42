"""Which metrics an evaluation is asked for, which of them there are, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from gen_dist.data import Dataset
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.evaluation.features import FeatureNetwork
from gen_dist.evaluation.marginal_likelihood import is_binarized
from gen_dist.evaluation.record import OF_CLASSES, OF_FEATURES, OF_WALKS
from gen_dist.inference.model import GenerativeModel
from gen_dist.objectives.vae import Vae
from gen_dist.records.checkpoint import is_checkpoint

LEAST_SAMPLES = 10

OF_POSTERIOR = ("negative_elbo", "reconstruction_error", "active_units")
OF_PIXELS = ("sharpness", "diversity")
OF_LIKELIHOOD = ("nll", "bits_per_dimension")
METRICS = (*OF_FEATURES, *OF_PIXELS, *OF_CLASSES, *OF_WALKS, *OF_POSTERIOR, *OF_LIKELIHOOD)
"""All metrics, by the names that they are asked for; those of samples and of nll have counts behind their names: `nll`
is found as `nll_k5000` of all test images, as `nll_k5000_1k` of 1,000 of them."""


class MetricPlan:
    """What is asked for, and what of it a model and its data have."""

    def __init__(
        self,
        model: GenerativeModel,
        dataset: Dataset,
        network: FeatureNetwork | None,
        asked: Sequence[str],
        samples: int,
        nll_samples: int,
        nll_images: int | None,
    ) -> None:
        """`asked` are names from METRICS; the others are arguments of `evaluation.evaluate`."""
        self._model = model
        self._dataset = dataset
        self._network = network
        self._asked = asked
        self.samples = samples
        self.nll_samples = nll_samples
        available = len(dataset.test.images)
        self.nll_rows = evenly_spaced(min(nll_images or available, available), available)
        """Places in the test split of the images that nll is measured on, int64."""
        self.unavailable = {
            self.full_name(name): reason for name in asked if (reason := self._why_not(name)) is not None
        }
        """Why, of those that are asked for and that there are not, by their full names."""

    def full_name(self, name: str) -> str:
        """A metric's name with its counts."""
        if name in OF_LIKELIHOOD:  # of fewer images it is another figure
            of_part = len(self.nll_rows) < len(self._dataset.test.images)
            return f"{name}_k{self.nll_samples}{f'_{short_count(len(self.nll_rows))}' if of_part else ''}"
        if name in (*OF_FEATURES, *OF_PIXELS, *OF_CLASSES, *OF_WALKS):
            return f"{name}_{short_count(self.samples)}"
        return name

    def is_asked(self, full_name: str) -> bool:
        """Whether a figure is asked for; that of the data is, with that of the samples."""
        asked = {self.full_name(name) for name in self._asked}
        return full_name in asked or full_name.removesuffix("_data") in self._asked

    def wants(self, *names: str) -> bool:
        """Whether one of these metrics is asked for and not known to be unavailable."""
        return any(name in self._asked and self.full_name(name) not in self.unavailable for name in names)

    def give_up(self, names: Iterable[str], reason: str) -> None:
        """Note that these cannot be measured, those of them that are asked for."""
        for name in set(names) & set(self._asked):
            self.unavailable.setdefault(self.full_name(name), reason)

    def _why_not(self, name: str) -> str | None:
        """Why the model or the data do not have a metric, as far as that is known before measuring."""
        objective = self._model.objective
        lacks = self._model.config.objective.lacks
        if name in ("negative_elbo", *OF_LIKELIHOOD) and "likelihood" in lacks:
            return lacks["likelihood"]
        if name in ("reconstruction_error", "active_units") and "encoder" in lacks:
            return lacks["encoder"]
        if name == "active_units" and "posterior" in lacks:
            return lacks["posterior"]
        if name == "bits_per_dimension" and isinstance(objective, Vae) and not is_binarized(objective):
            return "a Gaussian density of 8-bit pixels is no probability of them"
        if name in (*OF_FEATURES, *OF_PIXELS, *OF_CLASSES, *OF_WALKS) and "samples" in lacks:
            return lacks["samples"]
        if name in (*OF_FEATURES, *OF_WALKS) and self._network is None:
            return f"images are {sides(self._dataset)}, the digit network takes 1 x 28 x 28; use --features inception"
        if name in (*OF_FEATURES, *OF_PIXELS, *OF_CLASSES) and len(self._dataset.test.images) < LEAST_SAMPLES:
            return f"the test split has {len(self._dataset.test.images)} images, fewer than {LEAST_SAMPLES}"
        if name in OF_WALKS and self._network is not None and self._network.of_intensities is None:
            return "InceptionV3 takes 8-bit images, in which a small step along a walk changes nothing"
        if name in OF_CLASSES and (self._network is None or self._network.name != "digits"):
            return "classes are told by the digit network, which serves images of 1 x 28 x 28"
        if name == "label_accuracy" and not self._model.conditional:
            return "the model is not conditional on classes"
        return None


def check_options(run: Path, asked: list[str], samples: int, nll_samples: int, nll_images: int | None) -> None:
    """Raise UserError if these cannot be."""
    unknown = [name for name in asked if name not in METRICS]
    if unknown:
        raise ConfigError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(METRICS)}")
    if samples < LEAST_SAMPLES:
        raise ConfigError(f"samples {samples} is less than {LEAST_SAMPLES}")
    for name, value in (("nll_samples", nll_samples), ("nll_images", nll_images)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is less than 1")
    if is_checkpoint(run):
        raise CheckpointError(f"{run} is one checkpoint; name the run directory, whose newest one is evaluated")


def short_count(count: int) -> str:
    """A count as names of metrics have it: 10k, 2500."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def sides(dataset: Dataset) -> str:
    """Of its images, for people: channels x height x width."""
    return " x ".join(map(str, dataset.image_shape))
