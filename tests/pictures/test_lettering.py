"""Class names in pictures are whole and legible, or numbered with a word about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen_dist.pictures import charts, lettering
from gen_dist.pictures.lettering import Font, columns_of, lettering_of
from tests.support.digits import read_png

CHINESE = ["猫", "犬", "鳥"]


@pytest.fixture(params=[True, False], ids=["a font", "no font"])
def other_font(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Font | None:
    """A font with any letter, as some machines have it, or none."""
    font = Font("DejaVu Serif", lettering.usual_font().replace("Sans", "Serif")) if request.param else None
    monkeypatch.setattr(lettering, "_font_with", lambda _letters: font)
    return font


@pytest.mark.parametrize("names", [CHINESE, ["a", "कुत्ता"], ["cat", "고양이"], ["🐈", "dog"]])
def test_names_that_no_font_has_are_numbered_and_said_so(names: list[str], other_font: Font | None) -> None:
    found = lettering_of(names)
    if other_font:
        assert found == lettering.Lettering(names, other_font, "")
    else:
        assert found.names == [name if name.isascii() else f"class {place}" for place, name in enumerate(names)]
        assert "numbered" in found.note
        assert any(name.isascii() for name in names) == ("some class names" in found.note)


@pytest.mark.parametrize("names", [["cat", "dog"], ["é", "ß", "Ω", "Ж"], [], ["0"]])
def test_names_of_usual_letters_stay_as_they_are(names: list[str]) -> None:
    assert lettering_of(names) == lettering.Lettering(names, None, "")


def test_long_names_are_cut_and_stay_apart() -> None:
    long = ["n02123045 tabby, tabby cat, of the house", "n02123045 tabby, tabby cat, of the street", "dog"]
    found = lettering_of(long).names
    assert len(set(found)) == 3 and all(columns_of(name) <= lettering.MOST_COLUMNS for name in found)
    assert lettering_of(["猫" * 30, "x"]).inches(9) < 4


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\udce9", "a\u202eb"])
def test_letters_that_cannot_be_drawn_are_question_marks(name: str) -> None:
    (drawn,) = lettering_of([name]).names
    assert drawn.isprintable() and "?" in drawn


@pytest.mark.parametrize("has_fonts", [True, False], ids=["fonts of this machine", "no other font"])
@pytest.mark.parametrize(
    "names", [CHINESE, ["W" * 60, "M" * 40, "i"], ["$x_2$", "a" * 24, "b" * 25], ["x", "猫" * 40, "y"]]
)
def test_no_label_of_a_chart_is_cut_off(
    names: list[str], has_fonts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_fonts:
        monkeypatch.setattr(lettering, "_font_with", lambda _letters: None)
    outside: list[str] = []

    def inspect(path: Path, figure: Any) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for text in (text for axes in figure.axes for text in [*axes.texts, *axes.get_legend().get_texts()]):
            box = text.get_window_extent(canvas.get_renderer())
            if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.width or box.y1 > figure.bbox.height:
                outside.append(text.get_text())

    monkeypatch.setattr(charts, "save_figure", inspect)
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    means = rng.normal(size=(60, 2)) * 0.05 + np.array([[-40.0, 0.0], [40.0, 9.0], [0.0, -9.0]])[labels]
    charts.save_scatter(tmp_path / "scatter.png", means, labels, names)
    charts.save_class_shares(tmp_path / "shares.png", [{"step": 1, "samples/class_shares": [0.2, 0.3, 0.5]}], names)
    assert outside == []


@pytest.mark.filterwarnings("ignore:Glyph")
def test_charts_of_any_script_are_drawn(other_font: Font | None, tmp_path: Path) -> None:
    means = np.random.default_rng(0).normal(size=(9, 5))
    charts.save_scatter(tmp_path / "scatter.png", means, np.arange(9) % 3, CHINESE)
    assert read_png(tmp_path / "scatter.png").std() > 1
