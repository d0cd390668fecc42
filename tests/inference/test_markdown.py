"""Foreign text stays text in Markdown."""

from __future__ import annotations

import re

import pytest

from gen_dist.inference.markdown import code, text

HOSTILE = [
    "cat\n\n## Loading\n\n```python\nimport os\n```",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://example.org/track.png)",
    "**bold** _so_ ~~gone~~ `code`",
    "&lt;script&gt;",
    "https://example.org and www.example.org and a@example.org",
    "a | b",
    "\u2028# heading",
    "back\\slash \\",
]


@pytest.mark.parametrize("foreign", HOSTILE)
def test_no_mark_or_element_is_left(foreign: str) -> None:
    shown = text(foreign)
    assert len(shown.splitlines()) == 1
    assert not re.search(r"[<>]|&(?!amp;|lt;|gt;|#\d+;)", shown)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]~]", shown)
    assert "://" not in shown and "www." not in shown and not re.search(r"\w@\w", shown)
    span = code(foreign)
    assert len(span.splitlines()) == 1
    if span.startswith("`"):
        assert not re.search("[`<>&]", span[1:-1])
    else:
        assert not re.search("[<>]", span.removeprefix("<code>").removesuffix("</code>"))


@pytest.mark.parametrize(
    "plain", ["fid_10k", "Ankle boot", "T-shirt/top", "test/nll", "0 to 9: 0, 1, 2", "犬", "x = f(y)"]
)
def test_plain_text_stays_as_it_is(plain: str) -> None:
    assert text(plain) == plain
    assert code(plain) == f"`{plain}`"
