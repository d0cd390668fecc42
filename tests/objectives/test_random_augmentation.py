"""Augmentation with a probability: the paper's transformations, keyed by row, and a probability that follows scores."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_dist.config import GanConfig, R3ganConfig, RandomAugmentation, TrainConfig, WganGpConfig
from gen_dist.config.objectives import Transformation
from gen_dist.errors import ConfigError
from gen_dist.kernels import Key, normal
from gen_dist.objectives.adaptive_augmentation import AdaptiveAugmentation
from gen_dist.objectives.gan import GanDiscriminatorPhase, GanGeneratorPhase
from gen_dist.objectives.phase import TurnResult
from gen_dist.objectives.random_augmentation import DRAWS, randomly_augment
from gen_dist.objectives.shared_scores import SharedScoresGan
from gen_dist.randomness import Stream
from gen_dist.records.reading import read_config
from tests.objectives.test_augmentation import images_of
from tests.support.runs import make_trainer, run_steps, small_config

pytestmark = pytest.mark.usefixtures("poisoned_memory")

KEY = Key(torch.tensor([7, 3]), Stream.REAL_RANDOM_AUGMENTATION, 0)
ALL: tuple[RandomAugmentation, ...] = get_args(Transformation)
HALF = torch.tensor(0.5)


def augmented(images: Tensor, kinds: tuple[RandomAugmentation, ...] = ALL, probability: Tensor = HALF) -> Tensor:
    return randomly_augment(images, kinds, probability, KEY, 0.8)


def matrix2(rows: list[list[float]]) -> np.ndarray:
    return np.array([*rows, [0.0, 0.0, 1.0]])


def rotation(angle: float) -> np.ndarray:
    return matrix2([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])


def affine(
    draws: np.ndarray, uniforms: np.ndarray, p: float, made: Collection[str], width: int, height: int
) -> np.ndarray:
    """The map of an image, from its forward matrices in the order of the paper's listing (appendix B, figure 10)."""
    gates, given, normals = uniforms[:14], uniforms[14:24], draws[24:]
    total = np.eye(3)
    steps = []
    if "mirror" in made and gates[0] < p and int(2 * given[0]):
        steps.append(np.diag([-1.0, 1.0, 1.0]))
    if "turn" in made and gates[1] < p:
        steps.append(rotation(-math.pi / 2 * int(4 * given[1])))
    if "shift" in made and gates[2] < p:
        x, y = round((2 * given[2] - 1) * 0.125 * width), round((2 * given[3] - 1) * 0.125 * height)
        steps.append(matrix2([[1.0, 0.0, x], [0.0, 1.0, y]]))
    if "scale" in made and gates[3] < p:
        steps.append(np.diag([2.0 ** (0.2 * normals[0]), 2.0 ** (0.2 * normals[0]), 1.0]))
    either = 1 - math.sqrt(1 - p)
    if "rotation" in made and gates[4] < either:
        steps.append(rotation(-(2 * given[4] - 1) * math.pi))
    if "stretch" in made and gates[5] < p:
        steps.append(np.diag([2.0 ** (0.2 * normals[1]), 2.0 ** (-0.2 * normals[1]), 1.0]))
    if "rotation" in made and gates[6] < either:
        steps.append(rotation(-(2 * given[5] - 1) * math.pi))
    if "drift" in made and gates[7] < p:
        steps.append(matrix2([[1.0, 0.0, 0.125 * normals[2] * width], [0.0, 1.0, 0.125 * normals[3] * height]]))
    for step in steps:
        total = step @ total
    return total


def colours(draws: np.ndarray, uniforms: np.ndarray, p: float, made: Collection[str]) -> np.ndarray:
    """The matrix of an image's colours, in homogeneous coordinates of three channels."""
    gates, given, normals = uniforms[8:13], uniforms[20:22], draws[28:]
    grey = np.array([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)
    total = np.eye(4)
    if "brightness" in made and gates[0] < p:
        total[:3, 3] += 0.2 * normals[0]
    if "contrast" in made and gates[1] < p:
        total = np.diag([*[2.0 ** (0.5 * normals[1])] * 3, 1.0]) @ total
    if "negative" in made and gates[2] < p and int(2 * given[0]):
        total = (np.eye(4) - 2 * np.outer(grey, grey)) @ total
    if "hue" in made and gates[3] < p:  # Rodrigues' formula
        x, y, z = grey[:3]
        cross = np.zeros((4, 4))
        cross[:3, :3] = [[0, -z, y], [z, 0, -x], [-y, x, 0]]
        angle = (2 * given[1] - 1) * math.pi
        total = (np.eye(4) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross) @ total
    if "saturation" in made and gates[4] < p:
        total = (np.outer(grey, grey) + (np.eye(4) - np.outer(grey, grey)) * np.array(2.0 ** normals[2])) @ total
        total[3] = [0, 0, 0, 1]
    return total


@pytest.mark.parametrize("shape", [(40, 3, 12, 16), (40, 1, 9, 9)])
@pytest.mark.parametrize(
    ("kinds", "made"),
    [
        (("blit", "geometric", "colour", "cutout"), get_args(Transformation)),
        (("mirror", "scale", "drift", "contrast", "hue"), ("mirror", "scale", "drift", "contrast", "hue")),
        (("shift", "rotation", "negative", "saturation"), ("shift", "rotation", "negative", "saturation")),
        (("turn", "stretch", "brightness"), ("turn", "stretch", "brightness")),
    ],
)
def test_images_are_those_of_the_papers_matrices(
    shape: tuple[int, int, int, int], kinds: tuple[RandomAugmentation, ...], made: Collection[str]
) -> None:
    images = images_of(*shape, dtype=torch.float64)
    rows, channels, height, width = shape
    draws = normal(KEY, rows, DRAWS).double().numpy()
    uniforms = 0.5 * (1 + torch.erf(torch.from_numpy(draws) / math.sqrt(2))).numpy()
    wanted = []
    for image, own, even in zip(images, draws, uniforms, strict=True):
        inverse = np.linalg.inv(affine(own, even, 0.5, made, width, height))
        # grid_sample has corners at -1 and 1.
        to_pixels = np.diag([(width - 1) / 2, (height - 1) / 2, 1.0])
        theta = (np.linalg.inv(to_pixels) @ inverse @ to_pixels)[:2]
        grid = F.affine_grid(torch.from_numpy(theta)[None], [1, channels, height, width], align_corners=True)
        moved = F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=True)[0]
        matrix = torch.from_numpy(colours(own, even, 0.4, made))
        coloured = moved.expand(3, -1, -1)
        coloured = torch.einsum("ij,jhw->ihw", matrix[:3, :3], coloured) + matrix[:3, 3, None, None]
        coloured = coloured if channels == 3 else coloured.mean(dim=0, keepdim=True)
        x, y = ((torch.arange(side) + 0.5) / side - at for side, at in ((width, even[22]), (height, even[23])))
        if "cutout" in made and even[13] < 0.5:
            coloured = coloured.masked_fill((y.abs() < 0.25)[:, None] & (x.abs() < 0.25)[None], 0.0)
        wanted.append(coloured)
    torch.testing.assert_close(augmented(images, kinds), torch.stack(wanted), rtol=0, atol=1e-9)


def test_nothing_is_changed_at_probability_zero_and_much_at_one() -> None:
    grey, images = images_of(20, 1, 8, 8), images_of(20, 3, 8, 8)
    assert torch.equal(augmented(grey, probability=torch.tensor(0.0)), grey)
    torch.testing.assert_close(augmented(images, probability=torch.tensor(0.0)), images, rtol=0, atol=1e-6)
    changed = (augmented(images, probability=torch.tensor(1.0)) != images).flatten(1).any(dim=1)
    assert changed.all()


def test_reflection_continues_images_of_one_row() -> None:
    even = torch.full((20, 2, 1, 9), 0.5)
    torch.testing.assert_close(augmented(even, ("blit", "geometric"), torch.tensor(1.0)), even)


def test_each_transformation_is_made_with_the_probability() -> None:
    images = images_of(3000, 1, 8, 8)
    for probability in (0.2, 0.9):
        same = augmented(images, ("cutout",), torch.tensor(probability)) == images
        # The smallest square that stays in the image has four of its pixels.
        assert 1 - same.flatten(1).all(dim=1).float().mean() == pytest.approx(probability, abs=0.03)
    moved = augmented(images, ("blit",), torch.tensor(1.0))
    assert torch.isin(moved, images).all()
    still = (moved == images).flatten(1).all(dim=1).float().mean()
    assert still == pytest.approx(1 / 2 * 1 / 4 * 1 / 4, abs=0.02)  # of 2 reflections, 4 turns, shifts


def test_rows_are_augmented_alike_in_any_part_of_a_batch() -> None:
    images = images_of(9, 3, 6, 8)
    parts = [
        randomly_augment(images[first:last], ALL, HALF, KEY._replace(first_row=first), 0.8)
        for first, last in ((0, 4), (4, 5), (5, 9))
    ]
    torch.testing.assert_close(torch.cat(parts), augmented(images), rtol=0, atol=1e-6)


def test_derivatives_are_right_and_half_precision_does_not_reach_places() -> None:
    images = images_of(2, 3, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(augmented, images)
    assert torch.autograd.gradgradcheck(lambda one: augmented(one.square()), images)
    small = images_of(3, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmented(small), plain := augmented(small))
    assert torch.equal(plain, augmented(small))


def test_compiled_augmentation_is_equal_and_is_compiled_once() -> None:
    compiled = torch.compile(
        lambda images, rng, p: randomly_augment(images, ALL, p, KEY._replace(rng=rng)), fullgraph=True, backend="eager"
    )
    images = images_of(4, 3, 6, 6)
    for step in range(3):
        rng, probability = torch.tensor([7, step]), torch.tensor(0.3 * step)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            found = compiled(images, rng, probability)
        wanted = randomly_augment(images, ALL, probability, KEY._replace(rng=rng))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def adapted(
    scores: list[list[float]], parts: int = 1, *, every: int = 2, images: int = 40, start: float = 0.0
) -> list[float]:
    """Probability after each step, in which the training images have these margins."""
    augmentation = AdaptiveAugmentation(GanConfig(ada=("blit",), ada_every=every, ada_images=images), (1, 8, 8))
    augmentation.probability.fill_(start)
    found = []
    for step, row in enumerate(scores):
        carried = [augmentation.followed(part)[1] for part in torch.tensor(row).chunk(parts)]
        augmentation.adapt(torch.tensor(step), carried, lambda statistic, items: statistic(items))
        found.append(round(augmentation.probability.item(), 6))
    return found


def test_the_probability_follows_the_sign_of_training_scores() -> None:
    up, down, mixed = [0.1, 2.0, 3.0, 0.5], [-1.0, -2.0, 1.0, 5.0], [1.0, 1.0, 1.0, -1.0]
    assert adapted([up] * 4) == [0.0, 0.2, 0.2, 0.4]  # two steps of 4 images are 8 of 40
    assert adapted([up, up, down, down]) == [0.0, 0.2, 0.2, 0.0]
    assert adapted([mixed, mixed]) == [0.0, 0.0]  # a mean sign of 0.5, below the target
    assert adapted([up, mixed]) == [0.0, 0.2]  # 0.75
    assert adapted([down] * 2, start=0.1) == [0.1, 0.0]
    assert adapted([up] * 2, start=0.95) == [0.95, 1.0]
    assert adapted([up, mixed, down, up], parts=3) == adapted([up, mixed, down, up])


def test_configs_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="no zero that tells overfitting; add --ada-probability"):
        WganGpConfig(ada=("blit",))
    assert WganGpConfig(ada=("blit",), ada_probability=0.3).ada_probability == 0.3
    with pytest.raises(ConfigError, match=r"ada_probability 0.3 without augmentations; add --ada blit"):
        R3ganConfig(ada_probability=0.3)
    for option, value, default in (("target", 0.5, 0.6), ("images", 9, 500_000), ("every", 2, 4), ("colour", 0.5, 1.0)):
        given: dict[str, Any] = {f"ada_{option}": value}
        line = (
            rf"ada_{option} {value} without augmentations; add --ada blit geometric colour, or leave it out \({default}"
        )
        with pytest.raises(ConfigError, match=line):
            GanConfig(**given)
        if option != "colour":
            with pytest.raises(
                ConfigError, match=f"ada_{option} {value} with ada_probability 0.3, which is fixed; leave"
            ):
                GanConfig(ada=("blit", "colour"), ada_probability=0.3, **given)
    with pytest.raises(
        ConfigError, match=r"ada_colour 0\.5 without a change of colour in ada blit cutout; add colour, or"
    ):
        GanConfig(ada=("blit", "cutout"), ada_colour=0.5)
    with pytest.raises(ConfigError, match=r"ada_target 1.0 is not between -1 and 1"):
        GanConfig(ada_target=1.0)
    with pytest.raises(ConfigError, match="ada colour needs grey images or three colours, and these have 2 channels"):
        AdaptiveAugmentation(GanConfig(ada=("colour",)), (2, 8, 8))
    with pytest.raises(ConfigError, match="ada hue saturation changes nothing in grey images; leave hue"):
        AdaptiveAugmentation(GanConfig(ada=("shift", "hue", "saturation")), (1, 8, 8))


@pytest.mark.parametrize(
    "given",
    [
        {"ada_target": 0.5},
        {"ada": ["blit"], "ada_probability": 0.3, "ada_every": 2},
        {"ada": ["blit"], "ada_colour": 0.5},
    ],
)
def test_a_run_that_recorded_options_without_effect_is_read(given: dict[str, Any], tmp_path: Path) -> None:
    values = json.loads(small_config("gan").to_json())
    values["objective"] |= given
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="leave"):
        TrainConfig.from_json(json.dumps(values), "a file")
    found = read_config(tmp_path / "config.json").objective
    kept = {name: value for name, value in given.items() if name in ("ada", "ada_probability")}
    assert found == replace(small_config("gan").objective, **{**kept, "ada": tuple(kept.get("ada", ()))})


def test_a_run_that_recorded_an_augmentation_twice_is_read(tmp_path: Path) -> None:
    values = json.loads(small_config("gan").to_json())
    values["objective"] |= {"augmentation": ["cutout", "colour", "cutout"], "ada": ["blit", "blit"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="twice; name it once"):
        TrainConfig.from_json(json.dumps(values), "a file")
    found = read_config(tmp_path / "config.json").objective
    assert isinstance(found, GanConfig)
    assert found.augmentation == ("cutout", "colour") and found.ada == ("blit",)


class _NotAdapting(GanDiscriminatorPhase):
    """As of a plug-in that gives the loss and logs alone."""

    def adapting(self, result: TurnResult, margins: Tensor) -> TurnResult:
        return result


def test_a_turn_that_does_not_adapt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("gan", objective=GanConfig(ada=("blit",)))
    monkeypatch.setattr("gen_dist.objectives.gan.GanDiscriminatorPhase", _NotAdapting)
    with pytest.raises(
        ConfigError, match=r"ada blit: _NotAdapting.forward returns no result of `self.adapting\(result"
    ):
        run_steps(make_trainer(config), 0, 1)
    fixed = replace(config, objective=GanConfig(ada=("blit",), ada_probability=0.5))
    run_steps(make_trainer(fixed), 0, 1)
    monkeypatch.setattr(SharedScoresGan, "phases", lambda gan: {"generator": GanGeneratorPhase(gan, "hinge")})
    with pytest.raises(
        ConfigError, match="ada blit: no phase of SharedScoresGan is a DiscriminatorPhase, which adapts"
    ):
        make_trainer(config)
