"""The page of a report in a browser: the slider, zoom, charts, widths and schemes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reports.reported_runs import report_of
from tests.support.browser import chromium, opening

pytestmark = pytest.mark.usefixtures("short_presets")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page_file(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report_of(path, "vae", "gan", runs=runs, step_times=True)
    return path


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    with opening(browser, page_file) as open_at:
        yield open_at


def test_the_slider_moves_the_picture_by_keyboard(opened: Any) -> None:
    figure = opened().locator(".series").first
    shown = figure.locator("img:not([hidden])")
    assert shown.get_attribute("alt").endswith("step 24")
    figure.locator("input").press("Home")
    assert shown.count() == 1
    assert shown.get_attribute("alt").endswith("step 8")
    assert figure.locator("output").inner_text() == "step 8"
    figure.locator("input").press("ArrowRight")
    assert figure.locator("input").get_attribute("aria-valuetext") == "step 16"
    assert shown.get_attribute("alt").endswith("step 16")


def test_pairs_are_compared_in_one_place_and_zoomed(opened: Any) -> None:
    for width in (1280, 420):
        page = opened(width)
        figure = page.locator(".pairs").first
        shown = figure.locator(".pane:not([hidden])")
        place = figure.locator(".panes")
        size = place.evaluate("one => [one.offsetWidth, one.offsetHeight]")
        assert shown.count() == 1 and shown.get_attribute("data-label") == "originals"
        figure.locator("input").press("End")
        assert shown.count() == 1 and shown.get_attribute("data-label").startswith("difference")
        assert figure.locator("output").inner_text() == figure.locator("input").get_attribute("aria-valuetext")
        seen = shown.locator("img").bounding_box()["width"]
        for times in (2, 4, 1):
            figure.locator("[data-zoom]").click()
            assert figure.locator("[data-zoom]").inner_text() == f"{times}\u00d7"
            assert shown.locator("img").bounding_box()["width"] == pytest.approx(times * seen, abs=1)
            assert place.evaluate("one => [one.offsetWidth, one.offsetHeight]") == size
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_no_place_beside_a_picture_is_empty(opened: Any) -> None:
    for width in (1100, 420):
        drawn = opened(width).locator(".drawn").first
        samples, pairs, reconstructions = (
            drawn.locator(f".{kind}").bounding_box() for kind in ("samples", "pairs", "reconstructions")
        )
        assert (pairs["y"] == samples["y"]) == (width == 1100)
        assert reconstructions["y"] > pairs["y"] + pairs["height"]
        assert reconstructions["width"] == drawn.bounding_box()["width"]


def test_without_samples_pairs_stand_on_the_left(runs: dict[str, Path], browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "vae"
    shutil.copytree(runs["vae"], path)
    shutil.rmtree(path / "samples")
    report_of(tmp_path / "report.html", "vae", runs={"vae": path})
    with opening(browser, tmp_path / "report.html") as open_at:
        page = open_at(1100)
        assert page.locator("h2").first.inner_text() == "Reconstructions"
        pairs, reconstructions = (page.locator(f".{kind}").bounding_box() for kind in ("pairs", "reconstructions"))
    assert pairs["y"] == reconstructions["y"]
    assert pairs["height"] == pytest.approx(reconstructions["height"], rel=0.15)


def test_without_a_script_pairs_stand_in_a_row(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(page_file.as_uri())
    boxes = [pane.bounding_box() for pane in page.locator(".pairs").first.locator(".pane").all()]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    assert not page.locator(".pairs .slider").first.is_visible()
    context.close()


def test_charts_tell_values_at_the_pointer_and_by_arrow_keys(opened: Any) -> None:
    chart = opened().locator(".chart").first
    last = chart.locator("[data-line=train]").inner_text()
    chart.press("ArrowRight")
    assert chart.locator("[data-at]").inner_text() == "step 2"
    assert chart.locator("[data-line=train]").inner_text() != last
    chart.locator(":scope > svg").hover()
    assert chart.locator("[data-at]").inner_text() in {f"step {step}" for step in (10, 12, 14)}


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_window(width: int, opened: Any) -> None:
    assert opened(width).evaluate("document.documentElement.scrollWidth") == width


def test_a_dark_scheme_is_followed(opened: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (
        sum(map(int, re.findall(r"\d+", opened(scheme=one).evaluate(background)))) for one in ("light", "dark")
    )
    assert dark < 3 * 64 < 3 * 192 < light
