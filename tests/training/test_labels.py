"""Models of labels of every kind: what is asked for is what is drawn, from training to export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gen_dist
import gen_dist.objectives as objectives_room
from gen_dist.commands import sample
from gen_dist.config import GanConfig, MlpConfig, R3ganConfig, VaeConfig
from gen_dist.config.labels import LabelScheme
from gen_dist.data import Dataset, Split
from gen_dist.errors import ConfigError, DataError, UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.marginal_likelihood import negative_log_likelihoods
from gen_dist.inference.encoding import encode
from gen_dist.inference.export import export
from gen_dist.inference.model import label_tensor
from gen_dist.networks.label_inputs import LabelVectors, label_table
from gen_dist.objectives import Batch, build_objective
from gen_dist.objectives.base import takes_any_labels
from gen_dist.objectives.gan import Gan
from gen_dist.objectives.shared_scores import SharedScoresGan
from gen_dist.objectives.vae import Vae
from gen_dist.parallel.processes import start_processes
from gen_dist.records.run_paths import RunPaths
from gen_dist.training.trainer import Trainer
from tests.support.runs import SMALL_MLP, assert_same_bits, small_config

RANDOM = np.random.default_rng(0)
BRIGHTNESS = RANDOM.uniform(0.5, 1.0, 90)
SIDE = np.arange(90) % 2
PLACES = np.arange(4)[None, None, :] // 2 == SIDE[:, None, None]
IMAGES = np.rint(255 * BRIGHTNESS[:, None, None] * np.repeat(PLACES, 4, axis=1)).astype(np.uint8)
"""One half of each image is lit, which the labels say; how brightly, they do not."""
KINDS: dict[str, tuple[Any, str, str]] = {
    "classes": (np.array(["left", "right"])[SIDE], "left", "right"),
    "attributes": ({"right": SIDE == 1, "third": np.arange(90) % 3}, "0,1", "1,unknown"),
    "numbers": ({"place": SIDE + RANDOM.uniform(-0.1, 0.1, 90), "noise": RANDOM.uniform(size=90)}, "0,.5", "1,unknown"),
}


def labels_of(kind: str) -> Any:
    labels = KINDS[kind][0]
    if isinstance(labels, dict):  # the second label of some images is missing
        (first, one), (second, two) = labels.items()
        gone = np.arange(90) % 9 == 0
        return {first: one, second: np.where(gone, -1 if kind == "attributes" else np.nan, two)}
    return ["" if place % 9 == 0 else str(label) for place, label in enumerate(labels)]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_of_the_label_that_is_asked_for(tmp_path: Path, kind: str) -> None:
    config = gen_dist.preset("vae-mnist").with_options(
        steps=800,
        global_batch_size=30,
        learning_rate=1e-2,
        network=MlpConfig(hidden_sizes=(16,), latent_dim=2),
        objective=VaeConfig(conditioning="concat", likelihood="gaussian", gaussian_scale=0.1),
        missing_labels="unknown",
        run_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path),
        sample_every=800,
        evaluate_every=800,
    )
    outcome = gen_dist.train(config, data=(IMAGES, labels_of(kind)), say=lambda _line: None)
    model = gen_dist.load(outcome.run_path)
    left, right = (
        model.sample(32, label_tensor(model.labels, [model.labels.row_of(word)] * 32)).float()
        for word in KINDS[kind][1:]
    )
    assert (left[..., :2].mean((1, 2, 3)) > left[..., 2:].mean((1, 2, 3))).float().mean() > 0.8
    assert (right[..., 2:].mean((1, 2, 3)) > right[..., :2].mean((1, 2, 3))).float().mean() > 0.8
    # A missing label has weights of its own, so it can be asked for; by itself it says nothing of the side.
    assert "unknown" in model.labels.meaning
    assert len(model.sample(5)) == 5
    with pytest.raises(UserError, match=r"reconstruct\(images, labels\)"):
        model.reconstruct(torch.from_numpy(IMAGES[:3, None]))
    with pytest.raises(UserError, match="labels are float32"):
        model.sample(2, torch.zeros(2, 3))

    # The likelihood is that of images given their labels: those of the other half make it worse.
    figures = evaluate(outcome.run_path, ["nll", "reconstruction_error"], nll_samples=20, announce=lambda _line: None)
    assert figures.metrics.keys() == {"nll_k20", "reconstruction_error"}
    images, objective = torch.from_numpy(IMAGES[SIDE == 0][:8, None]), model.objective
    assert isinstance(objective, Vae)
    right_label, wrong_label = (label_tensor(model.labels, [model.labels.row_of(word)] * 8) for word in KINDS[kind][1:])
    true, false = (
        negative_log_likelihoods(objective, Batch(images, labels, torch.tensor([0, 0]), 0), 50).mean()
        for labels in (right_label, wrong_label)
    )
    assert true + 5 < false

    # Shares are of the classes that a sample can be found to be of: not of the unknown one.
    assert RunPaths(outcome.run_path).final_pictures["class_shares"].exists() == (kind == "classes")

    # Latents have the labels of their images; those of other data have to mean the same.
    run, say = outcome.run_path, lambda _line: None
    latents = np.load(encode(run, tmp_path / "latents", file_format="npz", announce=say) / "train.npz")
    assert latents["label"].dtype == model.labels.dtype and latents["label"].shape[1:] == model.labels.shape
    np.savez(tmp_path / "other.npz", x=IMAGES, labels=np.array(["right", "wrong"])[SIDE])
    with pytest.raises(DataError, match=r"labels of array:.*other.npz are not those of the model"):
        encode(run, tmp_path / "others", data=f"array:{tmp_path / 'other.npz'}", announce=say)

    # Words of the command line, an export, and what it loads as.
    sample(outcome.run_path, count=4, labels=(KINDS[kind][2],), out=tmp_path / "drawn.png")
    export(outcome.run_path, "safetensors", tmp_path / "export", announce=lambda _line: None)
    exported = gen_dist.load(tmp_path / "export")
    assert repr(exported.labels) == repr(model.labels)
    assert torch.equal(exported.sample(6), model.sample(6))


@pytest.mark.parametrize("kind", ["attributes", "numbers"])
@pytest.mark.parametrize(
    "objective", [GanConfig(conditioning="concat"), R3ganConfig(conditioning="projection")], ids=lambda one: one.kind
)
def test_every_kind_of_label_conditions_a_gan(kind: str, objective: Any) -> None:
    """Micro-batches and the prefetching thread give the step of resident images, and every label table learns."""
    found = []
    all_changes: list[dict[str, Any]] = [{}, {"resident_budget_mib": 0}]
    for changes in all_changes:
        config = replace(small_config("gan", network=SMALL_MLP, global_batch_size=20), objective=objective)
        trainer = Trainer(config.with_options(**changes), labelled(kind), start_processes(config))
        before = {name: one.detach().clone() for name, one in trainer.objective.named_parameters()}
        for step in range(3):
            trainer.run_step(step)
        learned = [name for name, one in trainer.objective.named_parameters() if not torch.equal(one, before[name])]
        assert any("class_" in name for name in learned)
        found.append({name: one.detach().clone() for name, one in trainer.objective.named_parameters()})
        trainer.close()
    assert_same_bits(*found)


def labelled(kind: str) -> Dataset:
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (40, 1, 6, 6), np.uint8)
    if kind == "numbers":
        scheme = LabelScheme("numbers", ("a", "b"), unknown=(False, True), mean=(0.5, 0.0), deviation=(0.3, 2.0))
        labels = random.normal(size=(40, 2)).astype(np.float32)
        labels[::5, 1] = np.nan
    else:
        scheme = LabelScheme("attributes", ("a", "b"), (("x", "y"), ("0", "1", "2", "unknown")), (False, True))
        labels = np.stack([np.arange(40) % 2, np.arange(40) % 4], axis=1)
    return Dataset(Split("train", images, labels), Split("test", images, labels), ("all",), "0" * 64, scheme)


def test_vectors_of_labels_are_one_hot_or_standardized() -> None:
    attributes = LabelScheme("attributes", ("a", "b"), (("x", "y"), ("0", "1", "unknown")), (False, True))
    vectors = LabelVectors(attributes)
    assert vectors(torch.tensor([[1, 0], [0, 2]])).tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    numbers = LabelScheme("numbers", ("a", "b"), unknown=(False, True), mean=(1.0, 2.0), deviation=(2.0, 0.5))
    vectors = LabelVectors(numbers)
    found = vectors(torch.tensor([[3.0, 1.0], [1.0, float("nan")]]))
    assert found.tolist() == [[1, -2, 0, 0], [0, 0, 0, 1]]
    assert vectors.width == 4 and not list(vectors.state_dict())


def test_a_table_of_attributes_sums_a_row_for_each() -> None:
    attributes = LabelScheme("attributes", ("a", "b"), (("x", "y"), ("0", "1", "unknown")), (False, True))
    table = label_table(attributes, 7)
    weight = table.weight
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(table(torch.tensor([[1, 2]]))[0], weight[1] + weight[4])


def test_a_subclass_with_a_constructor_of_its_own_gets_a_number() -> None:
    class Own(Gan):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)

    assert takes_any_labels(SharedScoresGan) and not takes_any_labels(Own)


def test_an_objective_of_ones_own_is_told_how_to_take_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Gan):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)

    class Any_(Own):
        takes_any_labels = True

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)

    config = small_config("conditional gan")
    scheme = labelled("numbers").labels
    for implementation, line in ((Own, "or say takes_any_labels = True in Own"), (Any_, None)):
        monkeypatch.setattr(objectives_room, "load", lambda _name, made=implementation: made)
        if line is None:
            assert build_objective(config, (1, 6, 6), scheme).conditional
            continue
        with pytest.raises(ConfigError, match=line):
            build_objective(config, (1, 6, 6), scheme)
