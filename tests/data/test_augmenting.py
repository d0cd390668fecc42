"""Random changes of training images: what they are, and that they depend on seed, step and row alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gen_dist.config.augmentation import ImageChanges, image_changes
from gen_dist.data.augmenting import DRAWS, augmented, refuse_bad_changes
from gen_dist.data.values import PLAIN, ValueScale
from gen_dist.errors import ConfigError
from gen_dist.kernels import Key
from gen_dist.objectives.augmentation import uniform
from gen_dist.parallel.processes import start_processes
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer
from tests.support.runs import assert_same_bits, run_steps, small_config, small_dataset

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), np.uint8))
DEEP = ValueScale("uint16", (100.0,), (900.0,))
EVERYTHING = ("flip", "shift:2", "crop:0.8", "rotate90")


def changed(changes: ImageChanges, images: Any = IMAGES, first_row: int = 0, step: int = 3, scale: Any = PLAIN) -> Any:
    draws = uniform(Key(torch.tensor([5, step]), Stream.IMAGE_CHANGES, first_row), len(images), DRAWS)
    return augmented(images, changes, scale, draws)


def ways(changes: ImageChanges, possible: list[Any]) -> list[int]:
    """Number of images that became each of the possible ones."""
    found = changed(changes)
    counts = [0] * len(possible)
    for row, image in enumerate(found):
        (place,) = [place for place, one in enumerate(possible) if torch.equal(one[row], image)]
        counts[place] += 1
    return counts


def test_a_flip_mirrors_half_of_the_images():
    assert min(ways(ImageChanges(flip=True), [IMAGES, IMAGES.flip(3)])) > 20


def test_a_turn_is_one_of_the_four_quarters():
    assert min(ways(ImageChanges(rotate90=True), [IMAGES.rot90(turn, (2, 3)) for turn in range(4)])) > 6


def test_a_shift_moves_whole_pixels_and_repeats_the_edge():
    padded = torch.nn.functional.pad(IMAGES.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    possible = [padded[..., down : down + 8, right : right + 8] for down in range(5) for right in range(5)]
    assert sum(count > 0 for count in ways(ImageChanges(shift=2), possible)) > 15


def test_a_crop_is_a_resized_part():
    """A ramp has itself as every part: its ends tell which part was cut, and its middle that it was stretched."""
    ramp = torch.linspace(0, 210, 8).expand(64, 1, 8, 8).contiguous()
    found = changed(ImageChanges(crop=0.5), ramp, scale=ValueScale("float32", (0.0,), (1.0,)))
    step = found[:, 0, 0, 4] - found[:, 0, 0, 3]
    assert 14 < step.min() < 20 < step.max() <= 30.01
    assert torch.allclose(found[:, 0, 0, 5] - found[:, 0, 0, 4], step, atol=1e-3)
    assert found.min() >= 0 and found.max() <= 210
    assert torch.equal(found[:, 0, 0], found[:, 0, 7])  # rows are alike, so that the other axis changes nothing


def test_cropped_values_are_those_that_data_can_have():
    images = DEEP.for_model(torch.randint(100, 901, (64, 1, 6, 6)).to(torch.uint16))
    found = changed(ImageChanges(crop=0.5), images, scale=DEEP)
    assert not torch.equal(found, images)
    assert torch.equal(DEEP.rounded(found / 255.0), found)


@pytest.mark.parametrize(("shape", "way_out"), [((1, 6, 9), "use at most shift:3"), ((1, 1, 9), "leave it out")])
def test_the_way_out_of_a_refused_shift_is_a_way_out(shape, way_out):
    with pytest.raises(ConfigError, match=way_out):
        refuse_bad_changes(ImageChanges(shift=7), shape)


@pytest.mark.parametrize("images", [IMAGES, IMAGES.float() / 3])
def test_changes_depend_on_the_global_row_alone(images):
    changes = image_changes(EVERYTHING)
    scale = PLAIN if images.dtype == torch.uint8 else ValueScale("float32", (0.0,), (1.0,))
    whole = changed(changes, images, scale=scale)
    assert whole.dtype == images.dtype
    ends = ((0, 5), (5, 6), (6, 43), (43, 64))
    parts = [changed(changes, images[first:last], first, scale=scale) for first, last in ends]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(changed(changes, images, step=4), whole)


def test_one_change_more_leaves_the_draws_of_the_others():
    both = changed(ImageChanges(flip=True, rotate90=True))
    alone = changed(ImageChanges(flip=True))
    turned = [alone.rot90(turn, (2, 3)) for turn in range(4)]
    assert all(any(torch.equal(one[row], both[row]) for one in turned) for row in range(64))


@pytest.mark.parametrize(
    "changes", [{"accumulation": 3}, {"packing": {"resident_budget_mib": 0}}, {"shards": 4}], ids=lambda one: str(one)
)
def test_images_are_changed_alike_however_they_come(changes):
    found = []
    config = small_config("vae", augment=EVERYTHING)
    all_changes: list[dict[str, Any]] = [{}, changes]
    for one in all_changes:
        packing = replace(config.packing, **one.get("packing", {}))
        own = replace(config, **{**one, "packing": packing})
        trainer = Trainer(own, small_dataset(own), start_processes(own))
        batches = trainer._micro_batches(7)
        found.append({"images": torch.cat([batch.images for batch in batches])})
        trainer.close()
    assert_same_bits(*found)


def test_a_step_of_changed_images_is_replayed_and_test_images_are_not_changed():
    trainer, plain = (
        Trainer(config, small_dataset(config), start_processes(config))
        for config in (small_config("vae", augment=EVERYTHING), small_config("vae"))
    )
    assert trainer.evaluate(trainer.dataset.test) == plain.evaluate(plain.dataset.test)
    first, other = run_steps(trainer, 0, 3), run_steps(plain, 0, 3)
    assert first != other
    again = Trainer(trainer.config, trainer.dataset, trainer.processes)
    assert run_steps(again, 0, 3) == first
