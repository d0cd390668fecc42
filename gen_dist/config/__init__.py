"""The config of a run: frozen dataclasses that check their own values. It does not import torch, so --help is quick."""

from gen_dist.config.data import (
    DataConfig,
)
from gen_dist.config.latent_autoencoder import (
    BottleneckName,
    LatentAutoencoderConfig,
)
from gen_dist.config.networks import (
    Activation,
    ConvConfig,
    DcganConfig,
    MlpConfig,
    NetworkConfig,
    Norm,
    PerceptualFeatures,
    ResnetConfig,
    RoleName,
    Roles,
    networks,
)
from gen_dist.config.objectives import (
    AdversarialConfig,
    Augmentation,
    AutoencoderConfig,
    Capability,
    Conditioning,
    FigureName,
    GanConfig,
    GanLoss,
    GradientEstimator,
    Likelihood,
    ObjectiveConfig,
    R3ganConfig,
    VaeConfig,
    VaeGanConfig,
    WganGpConfig,
    objectives,
)
from gen_dist.config.optimization import (
    Decay,
    OptimizerConfig,
)
from gen_dist.config.training import (
    Device,
    Precision,
    TrainConfig,
    WandbMode,
)

__all__ = [
    "Activation",
    "AdversarialConfig",
    "Augmentation",
    "AutoencoderConfig",
    "BottleneckName",
    "Capability",
    "Conditioning",
    "ConvConfig",
    "DataConfig",
    "DcganConfig",
    "Decay",
    "Device",
    "FigureName",
    "GanConfig",
    "GanLoss",
    "GradientEstimator",
    "LatentAutoencoderConfig",
    "Likelihood",
    "MlpConfig",
    "NetworkConfig",
    "Norm",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PerceptualFeatures",
    "Precision",
    "R3ganConfig",
    "ResnetConfig",
    "RoleName",
    "Roles",
    "TrainConfig",
    "VaeConfig",
    "VaeGanConfig",
    "WandbMode",
    "WganGpConfig",
    "networks",
    "objectives",
]
