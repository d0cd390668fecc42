"""Half precision with a loss scale, and steps without waits for their own results."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gen_dist.config import OptimizerConfig, TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import Checkpoint, checkpoint_paths
from gen_dist.training.precision import resolve_precision
from gen_dist.training.run import train
from gen_dist.training.trainer import Trainer
from tests.support.runs import OBJECTIVES, assert_same_bits, each_of, make_trainer, small_config

TO_NUMBERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")


def _quiet(_line: str) -> None:
    pass


def _with_loss_scale(config: TrainConfig, scale: float) -> Trainer:
    """Make a trainer with a loss scale at which no gradient of the first step overflows."""
    trainer = make_trainer(config)
    scales = {name: {**state, "scale": scale} for name, state in trainer.loss_scales().items() if state}
    facts = {"data_digest": trainer.dataset.digest, "loss_scales": trainer.loss_scales() | scales}
    trainer.load(Checkpoint(0, trainer.tensors(), facts))
    return trainer


def _first_update(config: TrainConfig) -> Tensor:
    """Compute the change of all weights by the first step, as one vector."""
    trainer = _with_loss_scale(config, 256.0)
    before = [value.clone() for value in trainer.tensors()["networks"].values()]
    trainer.run_step(0)
    after = trainer.tensors()["networks"].values()
    return torch.cat([(new - old).flatten() for new, old in zip(after, before, strict=True)])


@pytest.mark.parametrize(
    ("launched", "chosen"),
    [(None, torch.float32), ("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_launchers_precision_is_taken(launched: str | None, chosen: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert resolve_precision("auto", torch.device("cpu")) == chosen
    assert resolve_precision("float32", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("launched", ["fp8", "int8", ""])
def test_a_launchers_precision_that_is_none_of_ours_is_refused(launched: str, monkeypatch: Any) -> None:
    """It would train in another precision in silence."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ConfigError, match=f"ACCELERATE_MIXED_PRECISION is '{launched}', which this trainer lacks"):
        resolve_precision("auto", torch.device("cpu"))
    assert resolve_precision("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("clip_norm", [0.5, 1e6], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp16_unscales_gradients_before_clipping(clip_norm: float, accumulation: int) -> None:
    optimization = OptimizerConfig(optimizer="sgd", betas=(0.0, 0.0), clip_norm=clip_norm)
    config = small_config("vae", optimization=optimization, learning_rate=1.0)
    wide = _first_update(config)
    narrow = _first_update(dataclasses.replace(config, precision="fp16", accumulation=accumulation))
    assert float((narrow - wide).norm()) < 0.02 * float(wide.norm())
    if clip_norm < 1:
        assert float(narrow.norm()) == pytest.approx(clip_norm, rel=2e-3)
    else:
        assert 0.5 < float(narrow.norm()) < 1e5


@pytest.mark.parametrize("objective", ["wgan-gp, lazy", "r3gan"])
def test_fp16_penalizes_unscaled_slopes(objective: str) -> None:
    config = small_config(objective, optimization=OptimizerConfig(optimizer="sgd", betas=(0.0, 0.0)))
    wide = _first_update(config)
    narrow = _first_update(dataclasses.replace(config, precision="fp16"))
    assert float((narrow - wide).norm()) < 0.02 * float(wide.norm())


@pytest.mark.parametrize("overflowing", ["discriminator", "generator"])
def test_an_overflow_affects_only_its_own_turn_and_loss_scale(overflowing: str) -> None:
    trainer = _with_loss_scale(small_config("gan", precision="fp16"), 256.0)
    scales = trainer.loss_scales()
    assert list(scales) == ["generator", "discriminator"]
    scales[overflowing]["scale"] = 2.0**100
    facts = {"data_digest": trainer.dataset.digest, "loss_scales": scales}
    trainer.load(Checkpoint(0, trainer.tensors(), facts))
    before = {name: value.clone() for name, value in trainer.tensors()["networks"].items()}
    logs = trainer.run_step(0)
    after = trainer.tensors()["networks"]
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {"discriminator", "generator"} - {overflowing}
    assert all(bool(value.isfinite().all()) for value in logs.values())
    found = {name: state["scale"] for name, state in trainer.loss_scales().items()}
    assert found == {"discriminator": 256.0, "generator": 256.0, overflowing: 2.0**99}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("objective", "penalized", "unpenalized"),
    [
        ("wgan-gp", ["narrow", "narrow", "float32"], None),
        ("wgan-gp, lazy", ["narrow", "narrow", "float32"], ["narrow"]),
        ("r3gan", ["narrow", "narrow", "float32"], None),
        ("r3gan, lazy, conditional, augmented", ["narrow", "narrow", "float32"], ["narrow", "narrow", "narrow"]),
    ],
)
def test_only_penalized_slopes_are_computed_in_float32(
    objective: str, penalized: list[str], unpenalized: list[str] | None, precision: Any
) -> None:
    """The dtypes of the discriminator's products at the first two steps: the generator's turn if due, then its own."""
    trainer = make_trainer(small_config(objective, precision=precision))
    seen: list[str] = []
    discriminator = trainer.objective.networks["discriminator"]
    layers = [layer for layer in discriminator.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]

    def note(_layer: torch.nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append("float32" if output.dtype == torch.float32 else "narrow")

    handles = [layer.register_forward_hook(note) for layer in layers]
    for step, expected in enumerate((penalized, unpenalized)):
        seen.clear()
        trainer.run_step(step)
        if expected is not None:
            assert seen == [kind for kind in expected for _ in layers]
    for handle in handles:
        handle.remove()


def _fp16(run_dir: Path) -> TrainConfig:
    seldom = {"sample_every": 100, "evaluate_every": 100}
    return small_config("vae", precision="fp16", steps=6, checkpoint_every=3, run_dir=str(run_dir), **seldom)


def _newest(run_dir: Path) -> tuple[Checkpoint, TrainConfig]:
    return checkpoints.load(checkpoint_paths(run_dir)[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run in fp16 of six steps, with a checkpoint at the third."""
    path = tmp_path_factory.mktemp("fp16") / "run"
    train(_fp16(path), say=_quiet)
    return path


@pytest.fixture
def half(whole: Path, tmp_path: Path) -> Path:
    """Copy of that run as if interrupted after its third step."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    return tmp_path / "run"


def test_a_resumed_fp16_run_keeps_its_loss_scale(half: Path) -> None:
    checkpoint, config = _newest(half)
    saved = checkpoint.facts["loss_scales"]["vae"]
    assert checkpoint.step == 3
    assert saved["scale"] > 1
    # A scale and a count that no run of six steps reaches by itself.
    changed = {**checkpoint.facts, "loss_scales": {"vae": {**saved, "scale": 192.0, "_growth_tracker": 100}}}
    checkpoints.save(half, dataclasses.replace(checkpoint, facts=changed), config, keep=2)
    train(_fp16(half), say=_quiet)
    resumed, _ = _newest(half)
    assert resumed.step == 6
    assert resumed.facts["loss_scales"]["vae"]["scale"] == 192.0
    assert resumed.facts["loss_scales"]["vae"]["_growth_tracker"] == 103


def test_a_resumed_fp16_run_ends_with_the_same_bits_and_scale(whole: Path, half: Path) -> None:
    train(_fp16(half), say=_quiet)
    (expected, _), (resumed, _) = _newest(whole), _newest(half)
    assert expected.step == resumed.step == 6
    assert expected.facts["loss_scales"] == resumed.facts["loss_scales"]
    for group in expected.tensors:
        assert_same_bits(dict(expected.tensors[group]), dict(resumed.tensors[group]))


class _Reads(TorchDispatchMode):
    """List of the tensors that are converted to Python numbers, except the noise's int64 key and 8-bit images.

    On a CPU those are read to draw the noise; on a GPU they are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, how: str, tensor: object) -> None:
        if isinstance(tensor, Tensor) and tensor.dtype not in (torch.int64, torch.uint8):
            self.found.append(f"{how} of {tensor.dtype} {list(tensor.shape)}")

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.note(str(func), args[0])
        elif func is torch.ops.aten.nonzero.default:  # its shape depends on the values
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Reads]:
    mode = _Reads()

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            mode.note(name, self)
            return original(self, *args, **kwargs)

        return method

    for name in TO_NUMBERS:
        monkeypatch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
    yield mode


def test_reads_are_detected(reads: _Reads) -> None:
    loss = torch.tensor(1.5)
    with reads:
        float(loss), bool(loss > 1), loss.item(), loss.tolist(), loss.numpy()
        torch.tensor([7, 3]).tolist()
    for how in ("__float__ of torch.float32", "__bool__ of torch.bool", "item", "tolist", "numpy"):
        assert any(found.startswith(how) for found in reads.found)
    assert not any("int64" in found for found in reads.found)


@each_of(OBJECTIVES)
def test_a_step_does_not_read_its_own_results(objective: str, reads: _Reads) -> None:
    """Each such read makes the host wait for a GPU."""
    optimization = OptimizerConfig(warmup_steps=5, decay="cosine", ema_decay=0.99, clip_norm=1.0)
    trainer = make_trainer(small_config(objective, accumulation=2, optimization=optimization))
    trainer.run_step(0)  # makes the optimizer's state
    with reads:
        for step in range(1, 4):
            trainer.run_step(step)
    assert reads.found == []
