"""Reports and comparisons of real runs: their contents."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from gen_dist.cli import run_subcommand
from gen_dist.config import VaeConfig
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.evaluation.guide import base_name, metric_of
from gen_dist.records.checkpoint import SUMS
from gen_dist.records.readable import readable_result
from gen_dist.records.run_mark import write_mark
from gen_dist.reports import write_report
from gen_dist.reports.comparison import comparison_of, markdown, read_runs, table_lines
from gen_dist.reports.comparison_picture import save_comparison
from gen_dist.reports.groups import scalars, short_training
from gen_dist.reports.run_record import RunRecord, read_run
from gen_dist.training.step_times import measure_step_times
from tests.reports.reported_runs import NOT_OF_GAN, OF_GAN, evaluate_as, quiet, report_of

pytestmark = pytest.mark.usefixtures("short_presets")


def test_parts_of_each_phase_add_up_to_the_step(runs: dict[str, Path]) -> None:
    before = {file: file.stat().st_mtime_ns for file in runs["gan"].rglob("*")}
    times = measure_step_times(runs["gan"], quiet)
    phases = [
        f"{phase}/{part}" for phase in ("generator", "discriminator") for part in ("forward", "backward", "optimizer")
    ]
    assert list(times.seconds) == ["data", *phases, "moving average", "other"]
    assert all(seconds > 0 for seconds in times.seconds.values())
    assert times.images_per_second == pytest.approx(24 / sum(times.seconds.values()))
    assert times.first_step + times.steps - 1 <= 24
    assert {file: file.stat().st_mtime_ns for file in runs["gan"].rglob("*")} == before


def test_a_report_asks_for_nothing_from_elsewhere(runs: dict[str, Path], tmp_path: Path) -> None:
    html = report_of(tmp_path / "report.html", "vae", "gan", runs=runs)
    sources = re.findall(r"""\b(?:src|href|action|data|poster|srcset)=["']([^"']*)""", html)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|<link[^>]*stylesheet", html)


def test_a_report_has_every_picture_and_figure_of_its_run(runs: dict[str, Path], tmp_path: Path) -> None:
    html = report_of(tmp_path / "report.html", "vae", runs=runs, step_times=True)
    kinds = ("images drawn from the prior", "test images, each with its reconstruction on its right")
    assert all(f'alt="{kind}, step {step}"' in html for kind in kinds for step in (8, 16, 24))
    assert (
        html.count("<img") == html.count("alt=") == 6 + 3 + 4
    )  # pairs; manifold, interpolations, scatter, class shares
    assert all(f'alt="test images: {kind}' in html for kind in ("originals", "reconstructions", "difference"))
    assert "111 nats" in html
    assert "(data 0.130)" in html
    assert "backward" in html
    assert "--run-dir" in html
    assert 'data-points="{' in html


def test_a_run_that_is_not_finished_has_a_report(runs: dict[str, Path], tmp_path: Path) -> None:
    html = report_of(tmp_path / "report.html", "half", runs=runs)
    assert "16 of 24" in html
    assert "made when the run finishes" in html
    assert f"gen-dist evaluate {runs['half']}" in html


def test_a_run_without_evaluation_claims_no_likelihood(runs: dict[str, Path], tmp_path: Path) -> None:
    html = report_of(tmp_path / "report.html", "half", runs=runs)
    assert "likelihood" not in html.split("<style>")[0] + html.split("</style>")[1].split("<h2>Config")[0]
    headline = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html)
    names = ["negative ELBO, nats per image", "reconstruction term of the negative ELBO, nats per image"]
    assert [name for name, _ in headline[:2]] == names and float(headline[0][1]) > 0


def test_names_from_a_config_cannot_become_markup(runs: dict[str, Path], tmp_path: Path) -> None:
    run = read_run(runs["vae"])
    named = replace(run, config=replace(run.config, preset="<script>alert(1)</script>"))
    write_report(tmp_path / "report.html", [named], [None])
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_what_differs_from_the_preset_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    html = report_of(tmp_path / "report.html", "vae", runs=runs)
    changed = r'class="changed"><th scope="row">network.hidden_sizes</th><td>32</td><td class="note">preset: 400'
    assert re.search(changed, html)


def test_seeds_of_one_config_form_one_group(runs: dict[str, Path]) -> None:
    comparison = comparison_of(read_runs([runs["vae"], runs["gan"], runs["vae-seed-1"]]))
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [("vae-mnist", 2), ("gan-mnist", 1)]
    table = "\n".join(table_lines(comparison))
    assert "20.50 (20 to 21)" in table
    assert "111.50 (111 to 112) nats" in table


def test_words_rest_on_the_figures(runs: dict[str, Path]) -> None:
    comparison = comparison_of(read_runs([runs["vae"], runs["gan"]]))
    said = {one.metrics[0]: one for one in comparison.statements}
    assert said["fid_10k"].text == "gan-mnist draws what is nearest to real images: FID 12 against 20 of vae-mnist."
    assert said["sharpness_10k"].text.startswith("gan-mnist is nearest to the data: sharpness 0.140 against")
    assert said["path_length_10k"].text.startswith("vae-mnist has the smoothest latent space")
    assert said["negative_elbo"].text.endswith("gan-mnist has none: a GAN gives no likelihood.")


def _two_seeds(*runs: RunRecord) -> list[RunRecord]:
    """Each run, and the same with another seed."""
    return [replace(run, config=replace(run.config, seed=seed)) for run in runs for seed in (0, 1)]


CLAIMED = ("fid_10k", "sharpness_10k", "path_length_10k", "negative_elbo")


def _verdicts(runs: list[RunRecord]) -> list[str]:
    said = {one.metrics[0]: one for one in comparison_of(runs).statements}
    return [said[name].verdict for name in CLAIMED]


def test_figures_turned_round_turn_the_words_round(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    assert _verdicts(_two_seeds(vae, gan)) == ["as expected"] * 4
    swapped = replace(vae, evaluation=gan.evaluation), replace(gan, evaluation=vae.evaluation)
    assert comparison_of(swapped).statements[0].text.startswith("vae-mnist draws")
    assert _verdicts(_two_seeds(*swapped)) == ["not as expected"] * 4


def test_one_seed_gives_no_verdict_on_any_claim(runs: dict[str, Path], tmp_path: Path) -> None:
    vae, second, gan = read_runs([runs["vae"], runs["vae-seed-1"], runs["gan"]])
    both = "no verdict: one seed of vae-mnist and gan-mnist, where a claim needs 2 or more"
    assert _verdicts([vae, gan]) == [both] * 4
    assert _verdicts([vae, second, gan]) == [both.replace("vae-mnist and ", "")] * 4
    again = replace(vae, path=tmp_path)
    assert _verdicts([vae, again, *_two_seeds(gan)]) == [both.replace(" and gan-mnist", "")] * 4  # one seed, twice
    html = report_of(tmp_path / "report.html", "vae", "gan", runs=runs)
    assert "as expected</span>" not in html and html.count("No verdict: one seed of") >= 4


def test_half_trained_runs_are_marked_and_decide_nothing(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    third = replace(gan, step=8)
    cases = {
        "gan-mnist (33% trained)": (third, "at step 8 of 24, not finished"),
        "gan-mnist (66% trained)": (
            replace(gan, step=16, config=replace(gan.config, steps=16)),
            "trained for 16 steps, where its preset has 24",
        ),
        "gan-mnist (50% trained)": (
            replace(gan, config=replace(gan.config, global_batch_size=12)),
            "trained on 288 images, where its preset has 576",
        ),
    }
    for label, (run, caveat) in cases.items():
        comparison = comparison_of(_two_seeds(vae, run))
        assert [group.label for group in comparison.groups] == ["vae-mnist", label]
        assert comparison.warnings == [f"{label} is {caveat}: these figures are not what it can do."]
        assert {one.verdict for one in comparison.statements if one.textbook} == {f"no verdict: {label} is {caveat}"}
        assert table_lines(comparison)[0] == comparison.warnings[0]
        assert comparison.warnings[0] in markdown(comparison)


def test_whole_training_of_another_preset_or_none_is_not_marked(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    own = replace(vae, config=replace(vae.config, preset="mine"))
    larger = replace(gan, step=12, config=replace(gan.config, steps=12, global_batch_size=48))
    assert comparison_of([own, larger]).warnings == []


def test_a_run_with_less_than_its_presets_training_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    run = read_run(runs["vae"])
    short = replace(run, step=3, config=replace(run.config, steps=3))
    write_report(tmp_path / "report.html", [short], [None])
    assert "This run is trained for 3 steps, where its preset has 24" in (tmp_path / "report.html").read_text()


def test_a_time_is_told_with_what_was_done_in_it(runs: dict[str, Path]) -> None:
    comparison = comparison_of(read_runs([runs["vae"], runs["gan"]]))
    said = next(one.text for one in comparison.statements if one.metrics == ["training_seconds"])
    epochs = readable_result(scalars(read_run(runs["vae"]))["epochs"])
    assert said.count(f"{epochs} epochs of") == 2


def test_a_page_of_several_runs_has_its_own_command(runs: dict[str, Path], tmp_path: Path) -> None:
    html = report_of(tmp_path / "report.html", "vae", "gan", runs=runs)
    assert f"Command for this page: <code>gen-dist report {runs['vae']} {runs['gan']}</code>" in html


def test_a_kid_that_contradicts_fid_is_reported(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    words = []
    for kid_of_vae in (0.9, 0.3):
        with_kid = []
        for run, kid in ((vae, kid_of_vae), (gan, 0.6)):
            assert run.evaluation
            metrics = run.evaluation.metrics | {"kid_10k": kid}
            with_kid.append(replace(run, evaluation=replace(run.evaluation, metrics=metrics)))
        words.append(next(one.text for one in comparison_of(with_kid).statements if one.metrics == ["fid_10k"]))
    assert words[0].endswith("FID 12 against 20 of vae-mnist.")
    assert words[1].endswith(" KID, on the same features, disagrees: 0.300 of vae-mnist, 0.600 of gan-mnist.")


def test_fid_decides_nothing_against_precision(runs: dict[str, Path]) -> None:
    found = []
    for run, precision in zip(read_runs([runs["vae"], runs["gan"]]), (0.94, 0.62), strict=True):
        assert run.evaluation
        metrics = run.evaluation.metrics | {"precision_10k": precision}
        found += _two_seeds(replace(run, evaluation=replace(run.evaluation, metrics=metrics)))
    said = next(one for one in comparison_of(found).statements if one.metrics == ["fid_10k"])
    assert said.text.startswith("gan-mnist has the best FID, which decides nothing alone: FID 12")
    assert said.text.endswith("precision, on the same features, disagrees: 0.940 of vae-mnist, 0.620 of gan-mnist.")
    assert said.verdict == "no verdict: precision and FID disagree"


def test_near_figures_are_no_difference(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    assert vae.evaluation and gan.evaluation
    near = replace(gan, evaluation=replace(gan.evaluation, metrics={"fid_10k": 20.1}))
    comparison = comparison_of([vae, near])
    fid = next(one for one in comparison.statements if one.metrics == ["fid_10k"])
    assert fid.text.startswith("no clear difference")
    assert fid.holds is None
    assert comparison.best("fid_10k") is None


def test_likelihoods_of_different_pixels_do_not_compare(runs: dict[str, Path]) -> None:
    vae = read_run(runs["vae"])
    objective = VaeConfig(dynamic_binarization=True)
    comparison = comparison_of([vae, replace(vae, config=replace(vae.config, objective=objective))])
    elbo = next(one for one in comparison.statements if one.metrics == ["negative_elbo"])
    assert elbo.text.endswith("these do not compare.")
    assert comparison.best("negative_elbo") is None


def test_reconstruction_errors_compare_across_pixel_models(runs: dict[str, Path]) -> None:
    vae = read_run(runs["vae"])
    assert vae.evaluation
    objective = VaeConfig(dynamic_binarization=True)
    metrics = vae.evaluation.metrics | {"reconstruction_error": 40.0}
    better = replace(
        vae, config=replace(vae.config, objective=objective), evaluation=replace(vae.evaluation, metrics=metrics)
    )
    comparison = comparison_of([vae, better])
    assert comparison.best("reconstruction_error") is comparison.groups[1]


def test_figures_equally_far_from_the_data_are_equal(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    either = []
    for run, value in ((vae, 0.05), (gan, 0.2)):
        assert run.evaluation
        found = replace(run.evaluation, metrics={"sharpness_10k": value, "sharpness_data": 0.1})
        either.append(replace(run, evaluation=found))
    assert comparison_of(either).best("sharpness_10k") is None


def test_times_of_different_machines_are_not_compared(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    comparison = comparison_of([vae, replace(gan, environment={"cpu": {"model": "another"}, "torch_threads": 1})])
    for name in ("training_seconds", "images_per_second"):
        said = next(one for one in comparison.statements if one.metrics == [name])
        assert said.text.endswith("these do not compare.")
        assert said.textbook and said.holds is None
        assert comparison.best(name) is None


def test_the_time_of_half_a_training_is_not_the_least(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    comparison = comparison_of([vae, replace(gan, step=8, state={**gan.state, "training_seconds": 1e-3}, summary=None)])
    said = next(one.text for one in comparison.statements if one.metrics == ["training_seconds"])
    assert "; at step 8 of 24)" in said and said.endswith("these do not compare.")
    assert comparison.best("training_seconds") is None
    assert comparison.best("images_per_second") is not None


def test_half_of_a_shorter_training_names_that_of_its_preset(runs: dict[str, Path]) -> None:
    vae, gan = read_runs([runs["vae"], runs["gan"]])
    shorter = replace(gan, step=6, config=replace(gan.config, steps=12))
    (warning,) = comparison_of([vae, shorter]).warnings
    assert warning.startswith("gan-mnist (25% trained) is at step 6 of 12, where its preset has 24, not finished:")


@pytest.mark.parametrize(
    ("steps", "batch", "words"),
    [
        (12, 2, "at step 6 of 12, not finished"),
        (24, 0.5, "at step 6 of 24 in batches of {}, where its preset has 24 in batches of {}, not finished"),
    ],
)
def test_a_shorter_training_is_one_of_fewer_images(steps: int, batch: float, words: str, runs: dict[str, Path]) -> None:
    gan = read_run(runs["gan"])
    usual = gan.config.global_batch_size
    size = round(batch * usual)
    told = short_training(replace(gan, step=6, config=replace(gan.config, steps=steps, global_batch_size=size)))
    assert told == words.format(size, usual)


def test_a_missing_metric_shows_its_reason(runs: dict[str, Path], tmp_path: Path) -> None:
    comparison = comparison_of(read_runs([runs["vae"], runs["gan"]]))
    assert "a GAN has no encoder" in "\n".join(table_lines(comparison))
    assert "| a GAN has no encoder |" in markdown(comparison)
    assert '<td data-label="gan-mnist" class=" reason">a GAN has no encoder</td>' in report_of(
        tmp_path / "report.html", "vae", "gan", runs=runs
    )
    unavailable = comparison.as_json()["groups"][1]["unavailable"]
    assert unavailable["reconstruction_error"] == "a GAN has no encoder"
    assert unavailable["nll_k500"] == "a GAN gives no likelihood"  # for any K


def test_copied_pictures_are_ignored_damaged_records_named(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["vae"], path)
    pictures = read_run(path).pictures_by_step("samples")
    (path / "samples/step_00000024 (copy).png").write_bytes(b"")
    assert read_run(path).pictures_by_step("samples") == pictures
    (path / "summary.json").write_text('{"steps": 24}')
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged: it has no training_seconds"):
        read_run(path)


def test_what_is_not_evaluated_is_evaluated_once(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "new"
    shutil.copytree(runs["gan"], path)
    (path / "evaluation.json").unlink()
    asked: list[Path] = []

    def evaluate(run: Path) -> None:
        asked.append(run)
        evaluate_as(run, OF_GAN, NOT_OF_GAN)

    read = read_runs([runs["vae"], path], evaluate)
    assert asked == [path]
    assert read[1].evaluation is not None
    assert read[1].evaluation.metrics == OF_GAN


def test_an_evaluation_of_an_older_checkpoint_is_none(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "older"
    shutil.copytree(runs["vae"], path)
    shutil.rmtree(path / "checkpoints" / "step_00000024")
    assert read_run(path).evaluation is None


def test_the_picture_has_a_column_for_each_group(runs: dict[str, Path], tmp_path: Path) -> None:
    widths = []
    for names in (["vae", "vae-seed-1"], ["vae", "gan"]):
        save_comparison(tmp_path / "compare.png", comparison_of(read_runs([runs[name] for name in names])), quiet)
        with Image.open(tmp_path / "compare.png") as picture:
            widths.append(picture.width)
    assert widths[1] > 1.5 * widths[0]


def test_incomparable_runs_are_refused_in_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_runs([tmp_path / "none"])
    with pytest.raises(CheckpointError, match="not a run directory"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([runs["vae"], runs["vae"]])
    other = tmp_path / "other"
    shutil.copytree(runs["gan"], other)
    evaluate_as(other, OF_GAN, NOT_OF_GAN, digest="d2")
    with pytest.raises(ConfigError, match="other features"):
        read_runs([runs["vae"], other])
    state = next(other.glob("checkpoints/*_00000024/state.json"))
    before = hashlib.sha256(state.read_bytes()).hexdigest()
    state.write_text(state.read_text().replace(read_run(other).state["data_digest"], "f" * 64))
    sums = state.with_name(SUMS)
    sums.write_text(sums.read_text().replace(before, hashlib.sha256(state.read_bytes()).hexdigest()))
    with pytest.raises(ConfigError, match=r"do not compare: one is of mnist5k .* the other of mnist5k \(ffffffff\)"):
        read_runs([runs["vae"], other])
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(CheckpointError, match="has trained, but there is no checkpoint in"):
        read_runs([other])
    write_mark(other)  # killed before its first checkpoint
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        read_runs([other])


@pytest.mark.parametrize(("words", "needed"), [(["compare", "a"], "two or more runs"), (["report"], "needs a run")])
def test_commands_say_what_they_need(words: list[str], needed: str) -> None:
    from gen_dist.commands import compare, report

    with pytest.raises(ConfigError, match=needed):
        run_subcommand([compare, report], words, "gen-dist")


def test_the_commands_write_their_files(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gen_dist.commands import compare, report

    words = [str(runs["vae"]), str(runs["gan"]), "--no-evaluate", "--out"]
    run_subcommand([compare, report], ["compare", *words, str(tmp_path / "out")], "gen-dist")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "compare.md", "compare.png"]
    run_subcommand([compare, report], ["report", *words, str(tmp_path / "page.html"), "--no-step-times"], "gen-dist")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "page.html")
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["best"]["fid_10k"] == "gan-mnist"


def test_numbers_of_samples_are_part_of_a_label() -> None:
    assert metric_of("fid_10k").label == "FID, 10,000 samples"
    of_all = "negative log-likelihood, 5,000 importance samples, all test images"
    assert metric_of("nll_k5000").label == of_all
    assert metric_of("nll_k5000_1k").label == of_all.replace("all test", "1,000")
    assert metric_of("bits_per_dimension_k30_7").label == "bits per dimension, 30 importance samples, 7 images"
    assert base_name("nll_k5000_1k") == base_name("nll") == "nll"
    assert metric_of("negative_elbo").label == "negative ELBO"
