"""The autoencoder of latent diffusion models: sizes, arithmetic, memory, and the checks of all networks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gen_dist.config import AutoencoderKlConfig, MlpConfig, networks
from gen_dist.errors import ConfigError
from gen_dist.networks import Decoder, Encoder, autoencoder_kl, build_decoder, build_encoder
from gen_dist.networks.autoencoder_kl import _attend
from gen_dist.objectives import Batch
from gen_dist.testing import check_network
from tests.support.runs import assert_same_bits, brief_preset, close_losses, make_trainer, run_steps, small_config

SMALL = networks["autoencoder-kl"](feature_maps=(8, 16), blocks=1, groups=4, latent_dim=2, attention_factors=(2,))
KL_F4 = AutoencoderKlConfig(feature_maps=(128, 256, 512), latent_dim=3)


def make(config: Any, shape: tuple[int, int, int], outputs: int = 4) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    return build_encoder(config, shape, outputs), build_decoder(config, shape)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 12, 20), (5, 6, 2)], ids=str)
@pytest.mark.parametrize("middle_attention", [True, False])
def test_the_autoencoder_passes_the_checks_of_networks(shape: tuple[int, int, int], middle_attention: bool) -> None:
    config = dataclasses.replace(SMALL, middle_attention=middle_attention)
    assert config.latent_shape(shape) == (2, shape[1] // 2, shape[2] // 2)
    results = check_network(config, image_shape=shape)
    assert {one.outcome for one in results} == {"passed"}


@pytest.mark.parametrize(("config", "millions"), [(AutoencoderKlConfig(), 83.65), (KL_F4, 55.3)], ids=["f8", "f4"])
def test_published_autoencoders_have_their_parameters(config: AutoencoderKlConfig, millions: float) -> None:
    shape = (3, 256, 256)
    with torch.device("meta"):
        parts = build_encoder(config, shape, 2 * config.latent_dim), build_decoder(config, shape)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_attention_is_softmax_of_scaled_products() -> None:
    query, key, value = (torch.randn(2, 1, 5, 3, dtype=torch.float64) for _ in range(3))
    weights = torch.exp(torch.einsum("bhnc,bhmc->bhnm", query, key) / 3**0.5)
    expected = torch.einsum("bhnm,bhmc->bhnc", weights / weights.sum(-1, keepdim=True), value)
    torch.testing.assert_close(_attend(query, key, value), expected)


def test_attention_is_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = make(SMALL, (1, 8, 8))
    seen: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.extend([query, key, value])
        return attend(query, key, value)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(torch.rand(2, 1, 8, 8))
    assert len(seen) == 6 and {one.dtype for one in seen} == {torch.float32}


def test_maps_are_halved_with_zeros_right_and_below() -> None:
    encoder: Any = make(SMALL, (1, 8, 8))[0]
    (halving,) = encoder.down_blocks[0].downsamplers
    with torch.no_grad():
        halving.conv.weight.zero_()
        halving.conv.bias.zero_()
        halving.conv.weight[:, 0, 2, 2] = 1.0  # the last of each three rows and columns
    maps = torch.rand(1, 8, 6, 6)
    expected = F.pad(maps[:, :1], (0, 1, 0, 1))[:, :, 2::2, 2::2].expand(-1, 8, -1, -1)
    assert torch.equal(halving(maps), expected)


def test_doubling_is_a_convolution_of_repeated_places() -> None:
    decoder: Any = make(SMALL, (1, 8, 8))[1]
    (doubling,) = decoder.up_blocks[0].upsamplers
    doubling.double()
    maps = torch.randn(2, 16, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = doubling.conv(maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    found = doubling(maps)
    torch.testing.assert_close(found, expected)
    inputs = (maps, doubling.conv.weight, doubling.conv.bias)
    torch.testing.assert_close(*(torch.autograd.grad(outputs.square().sum(), inputs) for outputs in (found, expected)))


def test_doubled_maps_keep_the_dtype_of_autocast() -> None:
    decoder: Any = make(SMALL, (1, 8, 8))[1]
    (doubling,) = decoder.up_blocks[0].upsamplers
    with torch.autocast("cpu", torch.bfloat16):
        assert doubling(torch.randn(2, 16, 4, 4)).dtype == torch.bfloat16


class _NewMaps(TorchDispatchMode):
    """Memories, each alive once made, of tensors of as many elements as a result."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.alive: list[Tensor] = []
        self._elements = elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self._elements:
            self.alive.append(result)
        return result

    @property
    def memories(self) -> int:
        return len({one.untyped_storage().data_ptr() for one in self.alive})


def test_biases_and_shortcuts_are_added_in_place() -> None:
    decoder: Any = make(SMALL, (1, 8, 8))[1]
    (doubling,), block = decoder.up_blocks[0].upsamplers, decoder.mid_block.resnets[0]
    maps = torch.randn(2, 16, 4, 4, requires_grad=True)
    with _NewMaps(2 * 16 * 8 * 8) as doubled:
        doubling(maps)
    with _NewMaps(2 * 16 * 4 * 4) as of_block:
        block(maps)
    assert doubled.memories == 1
    assert of_block.memories == 4  # each normalization and each convolution makes one


def _gradients(networks: tuple[Encoder, Decoder], images: Tensor) -> dict[str, Tensor]:
    encoder, decoder = networks
    loss = (decoder(encoder(images)[:, :2]) - images).square().mean()
    named = dict(itertools.chain(encoder.named_parameters(prefix="e"), decoder.named_parameters(prefix="d")))
    return {"loss": loss.detach()} | dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def test_checkpointing_changes_no_bit_and_runs_blocks_twice() -> None:
    config = dataclasses.replace(SMALL, blocks=2)
    plain = make(config, (1, 16, 16))
    frugal = make(dataclasses.replace(config, checkpointing=True), (1, 16, 16))
    images = torch.rand(3, 1, 16, 16)
    assert_same_bits(_gradients(frugal, images), _gradients(plain, images))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(_gradients(frugal, images), _gradients(plain, images))
    calls = [0, 0]
    for place, pair in enumerate((plain, frugal)):
        for block in pair[0].modules():
            if hasattr(block, "conv_shortcut"):
                block.register_forward_pre_hook(lambda *_, place=place: calls.__setitem__(place, calls[place] + 1))
        _gradients(pair, images)
    assert calls[1] == 2 * calls[0] > 0  # each block is computed once more for backward


def _kept_bytes(network: nn.Module, inputs: Any) -> int:
    """Bytes that a forward pass keeps for backward, each memory once: saved tensors, and inputs of checkpoints."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no memory is used twice
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def noting(function: Any, modules: Any, maps: Tensor, **options: Any) -> Any:
        return checkpoint(function, modules, keep(maps), **options)

    with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(autoencoder_kl, "checkpoint", noting)
        alive.append(network(inputs))
    return sum(kept.values())


def test_checkpoints_keep_less_than_a_quarter() -> None:
    config = dataclasses.replace(SMALL, blocks=2)
    shape = (1, 16, 16)
    kept = [
        [_kept_bytes(part, inputs) for part, inputs in zip(make(one, shape), inputs_of(shape), strict=True)]
        for one in (config, dataclasses.replace(config, checkpointing=True))
    ]
    assert all(frugal < 0.25 * plain for plain, frugal in zip(*kept, strict=True)), kept


def test_a_training_pass_keeps_little_more_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's two operations keep the normalized maps as well, and their results."""

    def kept() -> int:
        trainer = make_trainer(dataclasses.replace(brief_preset("kl-f4-cifar10"), global_batch_size=16))
        phase = trainer.objective.phases()["autoencoder"]
        batch = Batch(*trainer.batches.micro_batch(0, 0), torch.tensor([0, 0]), 0, penalized=False)
        trainer.close()
        return _kept_bytes(phase, batch)

    ours = kept()
    monkeypatch.setattr(
        autoencoder_kl,
        "group_norm_silu",
        lambda maps, norm: F.silu(F.group_norm(maps, norm.num_groups, norm.weight, norm.bias, norm.eps)),
    )
    plain = kept()
    assert ours < 0.6 * plain, ours / plain


def test_small_maps_are_contiguous_and_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, feature_maps=(8, 16, 32), attention_factors=(4,))
    pair, images = make(config, (3, 32, 32)), torch.rand(2, 3, 32, 32)
    layouts: dict[int, set[bool]] = {}
    for block in itertools.chain(*(part.modules() for part in pair)):
        if hasattr(block, "conv_shortcut"):
            block.register_forward_pre_hook(
                lambda _, maps: layouts.setdefault(maps[0].shape[-1], set()).add(maps[0].is_contiguous())
            )
    found = _gradients(pair, images)
    assert layouts == {32: {False}, 16: {True}, 8: {True}}
    monkeypatch.setattr(autoencoder_kl, "FEW_PIXELS", 0)
    layouts.clear()
    expected = _gradients(pair, images)
    assert layouts == {32: {False}, 16: {False}, 8: {False}}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_small_maps_are_contiguous_in_float32_and_uncompiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(2, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    assert autoencoder_kl.layout_of_blocks(maps).is_contiguous()
    assert not autoencoder_kl.layout_of_blocks(maps, doublings=1).is_contiguous()
    assert not autoencoder_kl.layout_of_blocks(maps.bfloat16()).is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        assert not autoencoder_kl.layout_of_blocks(maps).is_contiguous()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not autoencoder_kl.layout_of_blocks(maps).is_contiguous()


def inputs_of(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return torch.rand(3, *shape), torch.randn(3, *SMALL.latent_shape(shape))


def test_evaluation_checkpoints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = make(dataclasses.replace(SMALL, checkpointing=True), (1, 8, 8))
    monkeypatch.setattr("gen_dist.networks.autoencoder_kl.checkpoint", None)
    encoder.eval()(torch.rand(2, 1, 8, 8))
    encoder.train()
    with torch.no_grad():
        encoder(torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("side", [15, 18])
def test_sizes_that_the_factor_does_not_divide_are_one_line(side: int) -> None:
    config = dataclasses.replace(SMALL, feature_maps=(8, 8, 8), attention_factors=())
    fewer = {15: "", 18: ", or --feature-maps with 2 numbers at most"}[side]
    sizes = {15: "12 or 16", 18: "16 or 20"}[side]
    for build in (config.latent_shape, lambda shape: build_encoder(config, shape, 1)):
        with pytest.raises(ConfigError) as error:
            build((1, side, side))
        assert str(error.value) == (
            f"3 feature_maps halve both sides of an image 2 times, which {side} x {side} do not allow; use "
            f"--image-size {sizes}{fewer}"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_maps": (8, 12), "groups": 8}, "groups 8 do not divide feature_maps 12; use --groups 4"),
        ({"feature_maps": ()}, "feature_maps is empty; name at least one number"),
        ({"attention_factors": (3,)}, "attention_factors 3 is not one of 1, 2, 4, 8"),
        ({"blocks": 0}, "blocks 0 is less than 1"),
    ],
)
def test_options_that_fit_no_autoencoder_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        AutoencoderKlConfig(**options)
    assert str(error.value) == message


def _losses(**changes: Any) -> list[float]:
    """Losses of a few steps with checkpoints, or as changed."""
    network = dataclasses.replace(SMALL, checkpointing=changes.pop("checkpointing", True))
    return run_steps(make_trainer(small_config("vae, learned Gaussian scale", network=network, **changes)), 0, 3)


def test_a_checkpointed_run_has_the_bits_of_a_plain_one() -> None:
    assert _losses() == _losses(checkpointing=False)


@pytest.mark.slow
def test_a_compiled_checkpointed_run_equals_an_eager_one() -> None:
    assert _losses(compile=True) == close_losses(_losses())


def test_it_generates_and_scores_patches_in_a_gan() -> None:
    config = small_config("gan", network=SMALL, learning_rate=1e-4)
    trainer = make_trainer(config)
    assert trainer.objective.latent_shape == (2, 14, 14)
    assert all(abs(loss) < 10 for loss in run_steps(trainer, 0, 2))


def test_a_penalty_through_its_attention_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="a gradient penalty needs gradients of slopes, which this discriminator lacks"
    ):
        make_trainer(small_config("wgan-gp", network=MlpConfig(), discriminator=SMALL))


@pytest.mark.slow
def test_compiled_autoencoders_are_the_eager_ones() -> None:
    for checkpointing in (False, True):
        pair = make(dataclasses.replace(SMALL, checkpointing=checkpointing), (1, 8, 8))
        for network, inputs in zip(pair, (torch.rand(2, 1, 8, 8), torch.rand(2, 2, 4, 4)), strict=True):
            network.double()
            compiled: Any = torch.compile(copy.deepcopy(network), backend="aot_eager", fullgraph=True)
            outputs, expected = compiled(inputs.double()), network(inputs.double())
            torch.testing.assert_close(outputs, expected)
            outputs.square().sum().backward(), expected.square().sum().backward()
            for one, other in zip(compiled.parameters(), network.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad)
