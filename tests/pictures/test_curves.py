"""Curves have one panel for each figure of a run, with all of its lines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gen_dist.config import (
    AutoencoderConfig,
    GanConfig,
    ObjectiveConfig,
    VaeConfig,
    VaeGanConfig,
    WganGpConfig,
    objectives,
)
from gen_dist.pictures.curves import _draw_panel as draw_panel
from gen_dist.pictures.curves import (
    colour_of,
    is_single,
    limits_of,
    save_curves,
    single_value,
    spelled,
    unit_of,
)
from gen_dist.pictures.curves import curves_of as panels_of
from gen_dist.pictures.figures import figure_of
from gen_dist.reports.panels import panels_of as report_panels
from tests.support.digits import read_png


def training_records(last_step: int = 2000) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    records = []
    for step in range(50, last_step + 1, 50):
        nll, kl = 75 + 450 * np.exp(-step / 60) + 300 / np.sqrt(step), 25 * (1 - np.exp(-step / 150))
        record = {"step": step, "images_seen": step * 128, "images_per_second": 24_000 + 600 * rng.normal()}
        record |= {"train/loss": nll + kl, "train/nll": nll, "train/kl": kl, "train/learning_rate": 1e-3}
        if step % 500 == 0:
            record |= {"test/loss": nll + kl + 2, "test/nll": nll + 1.8, "test/kl": kl + 0.2}
        records.append(record)
    return records


def test_curves_have_a_panel_a_name_and_fit_the_page(tmp_path):
    save_curves(tmp_path / "curves.png", training_records())
    assert read_png(tmp_path / "curves.png").shape[:2] == (682, 1419)  # 5 names: 3 columns, 2 rows


def test_curves_draw_train_and_test_of_one_name_in_one_panel():
    panels = panels_of(training_records())
    assert list(panels) == ["loss", "nll", "kl", "learning_rate", "images_per_second"]
    assert list(panels["loss"]) == ["train", "test"]
    assert panels["loss"]["train"].shape == (40, 2) and panels["loss"]["test"].shape == (4, 2)
    assert list(panels["images_per_second"]) == [""]


def test_a_figure_has_the_title_and_unit_of_its_objective():
    def of(objective: ObjectiveConfig, *names: str) -> list[str | None]:
        return [text for name in names for text in (spelled(name, objective), unit_of(name, objective))]

    nats = "nats per image"
    assert of(VaeConfig(), "nll", "loss") == ["reconstruction term of the negative ELBO", nats, "loss", nats]
    assert of(VaeConfig(beta=4.0), "loss") == ["loss with 4 times the KL term", nats]
    assert of(VaeConfig(importance_samples=5), "negative_bound_k5") == ["negative bound of 5 importance samples", nats]
    assert of(AutoencoderConfig(likelihood="gaussian"), "loss") == ["loss", "squared error per image"]
    assert of(AutoencoderConfig(), "reconstruction_error") == ["reconstruction error", nats]
    assert of(VaeGanConfig(), "reconstruction_error") == ["reconstruction error", "squared error per image"]
    assert of(GanConfig(), "loss", "images_per_second") == ["loss", None, "images per second", "images / s"]


def test_no_objective_calls_a_term_of_the_elbo_a_likelihood():
    for config in objectives.configs():
        names = [*config().figure_names.values()]
        assert not any("likelihood" in name.title.lower() or "nll" in name.title.lower() for name in names)
    assert not any("likelihood" in spelled(name, VaeConfig()) for name in VaeConfig().test_metrics)


def test_a_figure_of_one_step_is_a_number_not_a_dot():
    lines = panels_of([{"step": 9, "train/kl": 20.0, "test/kl": 21.5}, {"step": 10, "train/loss": 3.0}])
    assert is_single(lines["kl"]) and single_value("kl", lines["kl"]) == ("train 20.00, test 21.50", 9)
    assert single_value("loss", lines["loss"]) == ("3.00", 10)
    assert not is_single(panels_of(training_records())["kl"])
    panels, singles = report_panels([*training_records(), {"step": 2000, "samples/classes_found": 9.0}])
    assert [single.value for single in singles] == ["9 classes of the samples"]
    assert "classes found" not in [panel.title for panel in panels]


def test_a_figure_with_one_finite_value_is_a_number():
    lines = panels_of([{"step": 1, "train/loss": None}, {"step": 2, "train/loss": 5.0}])["loss"]
    assert is_single(lines) and single_value("loss", lines) == ("5.00", 2)
    assert not is_single(panels_of([{"step": 1, "train/loss": None}])["loss"])


def test_phases_have_the_colours_of_their_config():
    assert [colour_of(phase, GanConfig()) for phase in ("discriminator", "generator")] == ["blue", "orange"]
    assert colour_of("encoder", VaeGanConfig()) == colour_of("test encoder", VaeGanConfig()) == "green"
    assert colour_of("critic", WganGpConfig()) == "blue" and colour_of("mine", GanConfig()) == "ink"
    lines = ("mine", "test mine", "yours")
    assert [colour_of(line, VaeConfig(), lines) for line in lines] == ["blue", "blue", "orange"]
    assert colour_of("mine", VaeConfig(), ["mine", "test"]) == "ink"


def test_a_steep_start_and_a_lone_spike_do_not_flatten_a_curve():
    steps = np.arange(1.0, 401)
    loss = 100 + 450 * np.exp(-steps / 5)
    loss[[300, 333]] = 1e4
    low, high = limits_of(np.column_stack([steps, loss]))
    assert 95 < low < 100 < high < 110


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "images_seen": 128, "train/loss": 540.0}],
        [{"step": 1, "images_seen": 128, "train/loss": None}],
        [{"step": step, "train/loss": None if step == 3 else 100.0 / step} for step in range(1, 8)],
        [{"step": step, "train/loss": 7.0, "images_per_second": 0.0} for step in range(1, 8)],
    ],
    ids=["one record", "never finite", "a gap", "constant"],
)
def test_curves_of_odd_records_are_drawn_without_a_warning(tmp_path, records, recwarn):
    save_curves(tmp_path / "curves.png", records)
    assert read_png(tmp_path / "curves.png").std() > 1
    assert not recwarn.list


def test_records_without_scalars_make_no_curves(tmp_path):
    with pytest.raises(ValueError, match="no record"):
        save_curves(tmp_path / "curves.png", [{"step": 1, "images_seen": 128}])


def test_pictures_ignore_and_keep_the_users_matplotlib_style(tmp_path):
    import matplotlib

    save_curves(tmp_path / "default.png", training_records())
    with matplotlib.rc_context({"axes.facecolor": "black", "savefig.dpi": 30, "font.size": 30}):
        save_curves(tmp_path / "styled.png", training_records())
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "styled.png").read_bytes() == (tmp_path / "default.png").read_bytes()


def gan_records(last_step: int = 2000) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    records = []
    for step in range(50, last_step + 1, 50):
        record: dict[str, Any] = {"step": step, "images_seen": step * 128}
        for phase in ("discriminator", "generator"):
            record |= {f"train/{phase}/loss": 1 + rng.random(), f"train/{phase}/gradient_norm": 10 ** rng.normal()}
        record |= {f"train/discriminator/accuracy_{kind}": rng.random() for kind in ("real", "fake")}
        if step % 500 == 0:
            record |= {"samples/diversity": 0.3, "samples/diversity_ratio": 0.9, "samples/class_shares": [0.1] * 10}
            record |= {"samples/classes_found": 9.0, "scores/real": [0.05] * 20, "scores/fake": [0.05] * 20}
        records.append(record)
    return records


def test_figures_of_all_phases_share_a_panel():
    panels = panels_of(gan_records(), GanConfig())
    assert {name: list(lines) for name, lines in panels.items()} == {
        "loss": ["discriminator", "generator"],
        "accuracy": ["real", "fake"],
        "gradient_norm": ["discriminator", "generator"],
        "diversity_ratio": [""],
        "classes_found": [""],
    }
    assert panels["loss"]["generator"].shape == (40, 2) and panels["diversity_ratio"][""].shape == (4, 2)


def test_diversity_has_a_panel_where_there_is_no_ratio():
    assert list(panels_of([{"step": 1, "samples/diversity": 0.3}])) == ["diversity"]


def test_test_metrics_of_a_phase_stand_beside_its_training():
    panels = panels_of([{"step": 1, "train/encoder/kl": 20.0, "test/encoder/kl": 21.0, "train/encoder/loss": 90.0}])
    assert list(panels["kl"]) == ["encoder", "test encoder"] and list(panels["loss"]) == ["encoder"]


def drawn_axis(name: str, records: list[dict[str, Any]]) -> Any:
    """The axes of one panel."""
    with figure_of(4, 3) as figure:
        axes = figure.subplots()
        lines = panels_of(records)[name]
        draw_panel(axes, name, lines)
    return axes


def test_gradient_norms_have_a_readable_logarithmic_axis():
    axes = drawn_axis("gradient_norm", gan_records())
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log"
    assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 2
    norms = [record[f"train/{phase}/gradient_norm"] for record in gan_records()[4:] for phase in ("generator",)]
    assert low < np.percentile(norms, 5) and high > 2 * np.percentile(norms, 95)


def test_gradient_norms_that_hardly_differ_have_a_plain_axis():
    records = [{"step": step, "train/gradient_norm": 2.0 + 0.001 * step} for step in range(1, 50)]
    assert drawn_axis("gradient_norm", records).get_yscale() == "linear"


@pytest.mark.parametrize("norms", [[0.0, 0.0, 0.0], [None, 1.0, 0.0], [1.0, 1e-9, 1e9]])
def test_odd_gradient_norms_are_drawn_without_a_warning(tmp_path, norms, recwarn):
    records = [{"step": step, "train/generator/gradient_norm": norm} for step, norm in enumerate(norms, start=1)]
    save_curves(tmp_path / "curves.png", records)
    assert read_png(tmp_path / "curves.png").std() > 1
    assert not recwarn.list


def test_accuracies_are_drawn_from_none_to_all_in_percent():
    axes = drawn_axis("accuracy", gan_records())
    assert axes.get_ylim() == (-0.02, 1.02)
    assert axes.yaxis.get_major_formatter()(0.125, 0) == "12.5%"
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [text.split()[0] for text in shown] == ["real", "fake"] and all(text.endswith("%") for text in shown)


def test_the_curves_of_a_gan_are_drawn_without_a_warning(tmp_path, recwarn):
    save_curves(tmp_path / "curves.png", gan_records())
    assert read_png(tmp_path / "curves.png").shape[:2] == (682, 1419)
    assert not recwarn.list
