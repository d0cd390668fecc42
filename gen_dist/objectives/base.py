"""Base of all objectives: networks, and an ordered list of phases that train them."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from gen_dist.config import Likelihood, ObjectiveConfig, Roles
from gen_dist.data.values import ValueScale
from gen_dist.errors import UserError
from gen_dist.networks import Decoder, build_decoder, build_encoder
from gen_dist.objectives.phase import Batch, Phase, SumOverBatch, refuse_bad_phases

T = TypeVar("T")


def _of_one_process(values: Tensor) -> Tensor:
    return values


def _over_one_process(statistic: Callable[[Sequence[T]], Tensor], items: Sequence[T], /) -> Tensor:
    return statistic(items)


class Objective(nn.Module):
    """Networks, their training (phases) and their use (encode, decode, sample).

    A subclass is made from `(config, roles, image_shape, classes)`, where `classes` is a number. Its config lists the
    capabilities that it lacks, with reasons; methods of those raise UserError.
    """

    config: ObjectiveConfig
    networks: nn.ModuleDict
    latent_shape: tuple[int, ...]
    """Shape of one image's latents: (D,), or (C, h, w)."""
    conditional: bool = False
    """True if images are decoded from latents and labels."""
    takes_any_labels: ClassVar[bool] = False
    """True if the constructor of this very class takes a `LabelScheme` in the place of `classes`, so that labels may be
    other than classes. A subclass with a constructor of its own says so again."""
    evaluation_samples: int = 1
    """Latents decoded per image in `evaluate`; its batch size is divided by this."""
    starts_anew: ClassVar[tuple[str, ...]] = ()
    """Names of networks, if it has them, that follow the training: a run that starts from another's weights begins with
    its own."""
    carries_graphs: bool = False
    """True if carried tensors may have a graph, through which a later phase runs backward. The trainer sets it if
    backward is plain: one micro-batch, no loss scale, no compiled graph."""
    codebook_size: int = 0
    """Number of codes that latents are made of; 0 if they are not codes."""
    sum_over_processes: Callable[[Tensor], Tensor] = staticmethod(_of_one_process)
    """Sum of a tensor's values over all processes, within `forward` of a phase. The trainer sets it."""
    sum_over_batch: SumOverBatch = staticmethod(_over_one_process)
    """Sum of a statistic over all micro-batches of all processes, within `finish` of a phase. The trainer sets it."""

    @property
    def encodes(self) -> bool:
        """True if images can be mapped to latents and reconstructed."""
        return "encoder" not in self.config.lacks

    @property
    def generates(self) -> bool:
        """True if latents drawn from the prior decode to new images."""
        return "samples" not in self.config.lacks

    @property
    def gives_logvar(self) -> bool:
        """True if `encode` returns the log-variances of a posterior."""
        return "posterior" not in self.config.lacks

    def take_values(self, values: ValueScale) -> None:
        """Take note of the values of the data, and of the range of them that intensities in 0..1 stand for.

        Raises:
            ConfigError: the objective has no meaning for such values.
        """

    def refuse_new(self, values: ValueScale) -> None:
        """Raise ConfigError if a run should not begin on such values, although one that did goes on and is read."""

    def refuse_batch(self, global_batch_size: int) -> None:
        """Raise ConfigError if batches of so many images are too small to train on."""

    def phases(self) -> dict[str, Phase]:
        """Create the phases over the networks of this objective, by name, in the order of their turns."""
        raise NotImplementedError

    def refuse_phases(self, phases: Mapping[str, Phase]) -> None:
        """Raise ConfigError if these phases, as from `phases`, train what is not there or trained by another, or leave
        out what an option of the config asks for."""
        refuse_bad_phases(phases, self)

    def fix_latents(self) -> None:
        """Train the encoder no more, so that latents which other models know keep their meaning."""
        self.networks["encoder"].requires_grad_(False)

    def start_at(self, mean_image: Tensor) -> None:
        """Set initial values that follow from the training data's mean image, float32 [C, H, W] in 0..1."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Posterior of images [B, C, H, W] in 0..255, as `Batch` has them: mean [B, *latent_shape] and log-variance of
        that shape or None."""
        raise UserError(self.config.lacks.get("encoder", f"{type(self).__name__} does not define encode"))

    def codes(self, images: Tensor) -> Tensor:
        """Codes int64 [B, ...] below `codebook_size` of images [B, C, H, W] in 0..255."""
        raise UserError(f"{self.config.family_name} of kind {self.config.kind} has no codes")

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode latents [B, *latent_shape] to logits or means [B, C, H, W].

        A conditional objective needs `labels`: int64 [B] of classes, or [B, A] as the data have them.
        """
        raise NotImplementedError

    def pixels(self, decoded: Tensor) -> Tensor:
        """Intensities in 0..1 from the output of `decode`."""
        raise NotImplementedError

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the config's `test_metrics` of held-out images: one value per image, float [B] each.

        `batch.first_row` is the index of the first image in the split. Objectives without per-image metrics return an
        empty dict.
        """
        return {}


class EncoderDecoder(Objective):
    """Base of objectives with an encoder, and a decoder to the parameters of a likelihood of pixels."""

    def __init__(
        self,
        likelihood: Likelihood,
        roles: Roles,
        image_shape: tuple[int, int, int],
        outputs_per_latent: int,
        label_width: int = 0,
    ) -> None:
        """The decoder takes latents and `label_width` numbers more."""
        super().__init__()
        self.likelihood = likelihood
        self.latent_shape = roles.shared_latent_shape("decoder", image_shape)
        inputs = self.latent_shape[0] + label_width
        self.networks = nn.ModuleDict(
            {
                "encoder": build_encoder(roles.encoder, image_shape, outputs_per_latent * self.latent_shape[0]),
                "decoder": build_decoder(roles.decoder, image_shape, inputs),
            }
        )

    def start_at(self, mean_image: Tensor) -> None:
        decoder = self.networks["decoder"]
        assert isinstance(decoder, Decoder)
        decoder.start_at(likelihood_parameters(mean_image, self.likelihood))

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.networks["decoder"](latents).float()

    def pixels(self, decoded: Tensor) -> Tensor:
        return decoded.sigmoid() if self.likelihood == "bernoulli" else decoded.clamp(0.0, 1.0)


def takes_any_labels(objective: type[Objective]) -> bool:
    """True if the class whose constructor an objective has takes a `LabelScheme`.

    A subclass from outside, such as a plug-in's, may hand `classes` on to layers of its own, which take a number.
    """
    owner = next(one for one in objective.__mro__ if "__init__" in vars(one))
    return bool(vars(owner).get("takes_any_labels", False))


def likelihood_parameters(mean_image: Tensor, likelihood: Likelihood) -> Tensor:
    """Decoder output for pixels of these mean intensities in 0..1: logits, or the means themselves.

    Output biases start at it, as in the code of Burda et al. 2016, so the first steps need not learn the mean image.
    """
    if likelihood != "bernoulli":
        return mean_image
    return torch.logit(mean_image, eps=1e-3)  # pixels that are always 0 would start at minus infinity
