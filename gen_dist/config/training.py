"""The config of a whole run, and its JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from tyro.conf import Fixed, Suppress, arg

from gen_dist.config.addresses import refuse_secrets
from gen_dist.config.augmentation import image_changes
from gen_dist.config.checked import Checked, at_least
from gen_dist.config.data import DataConfig
from gen_dist.config.networks import MlpConfig, NetworkConfig, RoleName, Roles, networks
from gen_dist.config.objectives import ObjectiveConfig, VaeConfig, ignored_ada, objectives
from gen_dist.config.optimization import OptimizerConfig
from gen_dist.config.options import (
    line_about_roles,
    network_option,
    plain_value,
    refuse_vain,
    refuse_vain_network,
    roles_reached,
    with_changes,
)
from gen_dist.config.recorded import recorded_metric
from gen_dist.config.schedules import ScheduleConfig
from gen_dist.errors import ConfigError, UnknownNameError, shortened
from gen_dist.plugins.faults import place_of
from gen_dist.plugins.loading import Plugin, contents_of, load_contents, load_recorded, plugins_of
from gen_dist.plugins.registry import Registry

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
WandbMode = Literal["disabled", "offline", "online"]

_UNKNOWN_NAMES = ("unexpected_keyword_argument", "extra_forbidden", "union_tag_invalid")
"""pydantic's names of errors about options and kinds that do not exist."""


@dataclass(frozen=True)
class ByKind:
    """Annotation of a field that JSON reads by its `kind`: the config of that kind in the registry, also in errors."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, _base: Any, handler: Any) -> Any:
        from pydantic import Field  # imported late: it would slow --help

        union: Any = Union[self.registry.configs()]  # noqa: UP007  a union of a tuple
        return handler.generate_schema(Annotated[union, Field(discriminator="kind")])


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Everything that determines a run: two runs of one config on one data set are equal."""

    preset: Suppress[str] = "custom"
    plugins: Suppress[Fixed[tuple[Plugin, ...]]] = ()
    """Plug-ins whose code takes part. Those that define the network or objective are added by themselves."""
    data: str = "mnist5k"
    """Images to learn: mnist5k, mnist, fashion_mnist, kmnist, cifar10, svhn, folder:PATH, parquet:PATH, array:PATH,
    shards:PATTERN, synthetic, or a source of a plug-in."""
    data_root: str = "data"
    """Directory of the torchvision data sets (MNIST/raw and the like) and of downloads."""
    augment: tuple[str, ...] = ()
    """Random changes of training images, anew at each use: `flip` (left and right), `shift:2` (by up to 2 pixels),
    `crop:0.8` (a part of at least 0.8 of the sides, resized), `rotate90` (by multiples of 90 degrees). The model learns
    to make such images."""
    steps: int = 2000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 128
    """Images per optimizer step over all processes and accumulated micro-batches."""
    accumulation: int = 1
    """Micro-batches per process and optimizer step, for batches that do not fit in memory; gradients are summed."""
    auto_accumulation: bool = False
    """Find the least accumulation, from `accumulation` on, with which a step fits in memory, by trying at the start.
    config.json records it as `accumulation`, and a resumed run keeps it."""
    shards: int | None = None
    """Cut each batch into so many parts, a power of two, and add them in one order: 1, 2, 4 ... processes then train to
    the same bits. A process computes its parts one after another."""
    split_state: bool = False
    """Each of several processes keeps the optimizer's state and the moving average for its part of the weights alone:
    less memory, the same run, and checkpoints that any number of processes reads."""
    learning_rate: float = 1e-3
    """Highest learning rate of the schedule; with `rate_per_image`, for each image of the batch."""
    seed: int = 0
    """Key of all randomness: initial weights, order of the images, noise. 0 to 2^63 - 1."""
    precision: Precision = "auto"
    """Precision of the networks; losses are float32. `auto` takes that of `accelerate launch --mixed_precision`, else
    bf16 on GPUs that support it, else float32."""
    compile: bool = False
    """Compile each phase with torch.compile: steps are faster, and the start takes seconds to minutes longer."""
    cuda_graphs: bool = True
    """On GPUs, record the device work of a step as a CUDA graph and replay it as one launch; not in fp16. The graph
    keeps the memory of a step, so evaluation needs memory beside it."""
    sync_batch_norm: bool = False
    """Compute batch statistics over all processes, so that their number does not change the run. Otherwise each
    process normalizes its own images, as in the papers."""
    start_from: Annotated[str | None, arg(name="from")] = None
    """Start at step 0 from other weights: those of another run, its directory or one of its checkpoints, or those of an
    autoencoder in a directory of diffusers, diffusers:DIR. A resumed run does not need them again."""
    from_train: Literal["all", "decoder"] = "all"
    """Networks to train after `--from`: all, or the decoder alone for the latents that other models know."""
    start_digest: Suppress[Fixed[str | None]] = None
    """SHA-256 of the weights that the run started from, as recorded at its start."""
    accept_changed_plugins: bool = False
    """Resume a run although the code of one of its plug-ins has changed since."""
    device: Device = "auto"
    """Device of the training; `auto` takes a GPU if there is one."""
    run_dir: str | None = None
    """Directory of the run, to write to and resume from. None is runs/PRESET."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and on SIGTERM, SIGINT or SIGHUP."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: str | None = None
    """Keep the best checkpoint too, by a metric of the evaluations while training, such as negative_elbo or
    diversity_ratio; one is then saved at every evaluation that is better than all before."""
    sample_every: int = 500
    """Steps between pictures of samples and reconstructions."""
    evaluate_every: int = 500
    """Steps between evaluations on the test split; another is made at the end."""
    evaluate_metrics: tuple[str, ...] = ()
    """Metrics of gen-dist evaluate, such as fid kid, to measure at each of these evaluations, too; a line says how long
    that takes. --keep-best may name one of them."""
    evaluate_samples: int = 1000
    """Samples that `evaluate_metrics` are measured on. The number is part of their names: fid_1k."""
    evaluate_features: Literal["digits", "efficientnet-lite0", "inception"] | None = None
    """Network whose features `evaluate_metrics` compare. None is digits for 28 x 28 grey images, else none."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl; each line has means over the steps since the previous one."""
    wandb: WandbMode | None = None
    """Weights & Biases logging: disabled, offline or online. None takes $WANDB_MODE, else disabled."""
    track: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl, by name: tensorboard, mlflow, wandb. A failure there does not stop the run."""
    packing: DataConfig = field(default_factory=DataConfig)
    network: Annotated[NetworkConfig, ByKind(networks)] = field(default_factory=MlpConfig)
    encoder: Suppress[Annotated[NetworkConfig, ByKind(networks)] | None] = None
    """Network of this role. None takes `network`, as for the three roles below."""
    decoder: Suppress[Annotated[NetworkConfig, ByKind(networks)] | None] = None
    generator: Suppress[Annotated[NetworkConfig, ByKind(networks)] | None] = None
    discriminator: Suppress[Annotated[NetworkConfig, ByKind(networks)] | None] = None
    objective: Annotated[ObjectiveConfig, ByKind(objectives)] = field(default_factory=VaeConfig)
    optimization: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "global_batch_size", "accumulation", "keep_checkpoints"):
            at_least(name, getattr(self, name), 1)
        at_least("evaluate_samples", self.evaluate_samples, 10)
        for name in ("checkpoint_every", "sample_every", "evaluate_every", "log_every"):
            at_least(name, getattr(self, name), 1)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate {self.learning_rate} is not a positive number")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} is not in 0 .. 2^63 - 1")
        for role in get_args(RoleName):
            if getattr(self, role) is not None and role not in self.objective.roles:
                its = " and ".join(self.objective.roles)
                raise ConfigError(f"objective {self.objective.kind} has no {role}; its networks are {its}")
        factor = self.optimization.discriminator_rate_factor
        if factor != 1.0 and not self.objective.trains("discriminator"):
            raise ConfigError(
                f"discriminator_rate_factor {factor} with objective {self.objective.kind}, which trains no "
                "discriminator here; leave it out, and set --learning-rate"
            )
        image_changes(self.augment)
        if self.keep_best is not None:
            object.__setattr__(
                self, "keep_best", recorded_metric(self.keep_best, self.objective, self.evaluate_metrics)
            )
        self._refuse_bad_shards()
        if self.split_state and self.auto_accumulation:
            raise ConfigError(
                "auto_accumulation with split_state: the trial is of one process, which has the state of all weights; "
                "leave out --auto-accumulation"
            )
        self.objective.refuse_steps(self.steps)
        self.schedule.refuse_others(self.objective, self.optimization)
        if not self.data:
            raise ConfigError("data is empty; name a source such as mnist5k")
        refuse_secrets("data", self.data)
        self._refuse_bad_start()
        recorded = {plugin.name for plugin in self.plugins}
        added = [one for one in plugins_of(vars(self).values()) if one.name not in recorded]
        object.__setattr__(self, "plugins", (*self.plugins, *added))

    def _refuse_bad_shards(self) -> None:
        shards = self.shards
        if shards is None:
            return
        at_least("shards", shards, 1)
        if shards & (shards - 1):
            lower = 2 ** (shards.bit_length() - 1)
            raise ConfigError(f"shards {shards} is not a power of two; use {lower} or {2 * lower}")
        if shards > self.global_batch_size:
            raise ConfigError(
                f"shards {shards} of a batch of {self.global_batch_size} images: some would have no images; use at "
                f"most {2 ** (self.global_batch_size.bit_length() - 1)}, or a larger --global-batch-size"
            )
        if self.accumulation > 1:
            raise ConfigError(
                f"accumulation {self.accumulation} with shards {shards}: shards are computed one after another "
                "already; leave out --accumulation, and use more shards if memory is short"
            )
        if self.auto_accumulation:
            raise ConfigError(
                "auto_accumulation with shards: shards are computed one after another already; leave out "
                "--auto-accumulation, and use more shards if memory is short"
            )
        if self.compile:
            raise ConfigError(
                "compile with shards: a part that waits for others cannot be compiled; leave out --compile"
            )

    def _refuse_bad_start(self) -> None:
        if self.start_from is None:
            if self.from_train != "all":
                raise ConfigError(f"from_train {self.from_train} needs weights to start from; add --from")
            if frozen := getattr(self.objective, "freeze_discriminator", 0):
                raise ConfigError(
                    f"freeze_discriminator {frozen} would keep random weights; add --from RUN, or leave it out"
                )
            return
        of_run = not self.start_from.startswith("diffusers:")
        if not self.start_from.removeprefix("diffusers:"):
            raise ConfigError(
                f"from {self.start_from!r} is neither a run directory nor diffusers:DIR, as diffusers:vae/"
            )
        if of_run and self.from_train == "decoder" and self.objective.kind != "latent-autoencoder":
            raise ConfigError(
                f"from_train decoder needs the objective latent-autoencoder, not {self.objective.kind}; leave it out"
            )
        if not of_run and self.objective.kind != "latent-autoencoder":
            raise ConfigError(
                f"from {self.start_from} needs the objective latent-autoencoder, whose images are in -1..1 as those of "
                f"diffusers, not {self.objective.kind}; leave it out, or choose another preset"
            )

    @property
    def keeps_average(self) -> bool:
        """True if the run keeps a moving average of its weights."""
        return self.optimization.ema_decay is not None or self.schedule.final_ema_images is not None

    @property
    def roles(self) -> Roles:
        """The network of each role."""
        return Roles(*(getattr(self, role) or self.network for role in get_args(RoleName)))

    @property
    def run_path(self) -> Path:
        """Directory of the run; `~` and `~user` at its start become the home directory.

        Raises:
            ConfigError: the home directory does not exist, or the name is empty.
        """
        if self.run_dir is None:
            return Path("runs") / self.preset
        if not self.run_dir.strip():  # as of `--run-dir "$UNSET"`
            raise ConfigError("run_dir is empty; name a directory such as runs/first, or . for the current one")
        try:
            return Path(self.run_dir).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"run_dir {self.run_dir}: there is no such home directory; write the path in full"
            ) from None

    def with_options(self, **options: Any) -> TrainConfig:
        """A config with some options changed: `config.with_options(steps=200, hidden_sizes=(32,))`.

        As on the command line, options of `network` do not reach a role that has a network of its own. A UserWarning
        says so where one reaches some roles alone.

        Args:
            **options: values by their names on the command line, with `_` for `-`; those of the parts are flat, as
                there. `network` and `objective` also take a config or a kind, such as `network="dcgan"`.

        Raises:
            ConfigError: an option does not exist or changes nothing, or its value is of a wrong type or out of range;
                one line.
        """
        try:
            text = json.dumps(with_changes(self, options), default=plain_value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"with_options: {error}") from None
        changed = TrainConfig.from_json(text, "with_options")
        own = [role for role in changed.objective.roles if getattr(changed, role) is not None]
        for name in options:
            missed = []
            if name == "network":
                missed = [role for role in own if role not in options]
                refuse_vain_network(changed, "option 'network'", _in_whole(missed) if missed else "")
                reached = [role for role in changed.objective.roles if role not in own]
            elif network_option(changed, name):
                refuse_vain(changed, name, f"option {name!r}", _in_whole)
                reached, missed = roles_reached(changed, name)
                missed = [role for role in missed if role not in options]
            if missed:
                others = {role: f"in the option {role!r}" for role in missed}
                warnings.warn(line_about_roles(f"option {name!r}", reached, others), stacklevel=2)
        return changed

    def to_json(self) -> str:
        """The config as JSON text; `from_json` reads it back to an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, source: str, *, of_run: bool = False) -> TrainConfig:
        """Read a config from JSON text.

        Its plug-ins are loaded first. Code of theirs that is a copy in the run directory runs then.

        Args:
            text: the text.
            source: its file, or its name in errors.
            of_run: True for the config of a run. Options without effect, which old versions recorded, have their
                defaults then, and augmentations named twice are named once; both are refused otherwise.

        Raises:
            ConfigError: the text is not JSON, or has values of a wrong type or out of range, or a plug-in is missing or
                has changed.
            UnknownNameError: it has options or kinds that this version does not have.
        """
        from pydantic import ValidationError  # 70 ms that only --config needs

        load_recorded(_plugins_in(text), source)
        text = _as_older_versions_packed(text)
        text = _without_ignored_ada(_named_once(text)) if of_run else text
        try:
            accepted = _without_lone_bytes(text)
            validated: TrainConfig = _reader_of((*networks.configs(), *objectives.configs())).validate_json(accepted)
            return validated if accepted == text else _with_lone_bytes(validated)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = shortened(".".join(str(part) for part in first["loc"]))
            message = shortened(first["msg"]).removeprefix("Value error, ")  # pydantic's prefix for our own errors
            line = ": ".join(filter(None, (source, place, message)))
            cause = first.get("ctx", {}).get("error")  # text for JSON that cannot be read
            if isinstance(cause, ValueError) and (code := place_of(cause)):  # of a plug-in's config
                line += f" ({code})"
            if first["type"] in _UNKNOWN_NAMES:
                raise UnknownNameError(
                    f"{line}; this gen_dist has no such name: it is mistyped, or of a newer version"
                ) from None
            raise ConfigError(line) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with the single files of its plug-ins, so that processes on other hosts can read it."""
        return read_sent, self.to_send()

    def to_send(self) -> tuple[str, dict[str, bytes]]:
        """The config and the single files of its plug-ins, as `read_sent` takes them in another process."""
        return self.to_json(), contents_of(self.plugins)


def _in_whole(roles: Sequence[RoleName]) -> str:
    """Way out that gives the networks of some roles."""
    return f"give the whole {' and the whole '.join(roles)}"


@functools.lru_cache(maxsize=1)
def _reader_of(parts: tuple[Any, ...]) -> TypeAdapter[TrainConfig]:
    """Reader of configs whose networks and objectives are of these classes. Making one takes 25 ms."""
    from pydantic import ConfigDict, TypeAdapter

    cls: Any
    for cls in (DataConfig, OptimizerConfig, Plugin, ScheduleConfig, TrainConfig, *parts):
        cls.__pydantic_config__ = ConfigDict(extra="forbid")
    return TypeAdapter(TrainConfig)


def read_sent(text: str, plugins: dict[str, bytes]) -> TrainConfig:
    """Read what `to_send` gave.

    Raises:
        PluginError: this process cannot find a module among its plug-ins.
    """
    load_contents(plugins)
    return TrainConfig.from_json(text, "the config")


def _plugins_in(text: str) -> list[Plugin]:
    """Plug-ins that a config names; none if its text is not one, which is told later."""
    if '"plugins"' not in text:
        return []
    try:
        return [Plugin(str(one["name"]), str(one["sha256"])) for one in json.loads(text).get("plugins", ())]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return []


def _as_older_versions_packed(text: str) -> str:
    """Config text with what was done to files without an option for it, if a version without that option wrote it.

    Without `fit`, images of a folder got a side of 64; without `dtype`, all images became 8-bit.
    """
    if not any(source in text for source in ('"folder:', '"parquet:')):
        return text
    try:
        values = json.loads(text)
        packing, source = values["packing"], values["data"].partition(":")[0]
        if source == "folder" and "fit" not in packing and packing.get("image_size") is None:
            packing["image_size"] = 64
        if source in ("folder", "parquet"):
            packing.setdefault("dtype", "uint8")
        return json.dumps(values)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return text  # no config, which is told later


def _named_once(text: str) -> str:
    """Config text with each augmentation of an objective once, as runs of old versions may have one twice."""
    try:
        values = json.loads(text)
        objective = values["objective"]
        once = {name: list(dict.fromkeys(objective[name])) for name in ("ada", "augmentation") if name in objective}
        if all(len(objective[name]) == len(kinds) for name, kinds in once.items()):
            return text
        return json.dumps(values | {"objective": objective | once})
    except (KeyError, RecursionError, TypeError, ValueError):
        return text  # no config, which is told later


def _without_ignored_ada(text: str) -> str:
    """Config text without the options of `ada` that the others leave without effect, as runs of old versions have."""
    if '"ada_' not in text:
        return text
    try:
        values = json.loads(text)
        objective = values["objective"]
        for name in ignored_ada(objective["ada"], objective["ada_probability"]):
            objective.pop(name, None)
        return json.dumps(values)
    except (KeyError, RecursionError, TypeError, ValueError):
        return text  # no config, which is told later, or of an objective without them


# Python holds a byte of a path that is not UTF-8 as half of a surrogate pair. JSON has it as \\udcXX, which pydantic
# refuses. Such a byte passes it as a character that Unicode leaves to private use, U+10FFXX.
_LONE_BYTE = re.compile(r"\\\\|\\ud[89ab]..\\ud[c-f]..|\\udc([89a-f][0-9a-f])")
_BYTES_BACK = {0x10FF00 + byte: 0xDC00 + byte for byte in range(0x80, 0x100)}


def _without_lone_bytes(text: str) -> str:
    return _LONE_BYTE.sub(lambda found: rf"\udbff\udf{found[1]}" if found[1] else found[0], text)


def _with_lone_bytes(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_BYTES_BACK)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in dataclasses.fields(value) if one.init]
        return dataclasses.replace(value, **{name: _with_lone_bytes(getattr(value, name)) for name in names})
    return value
