"""Correctness of the guides: their code runs, their links and paths exist, the front page is short.

The blocks of a guide run in order in one directory, which has what the text mentions: images in `holiday/`, files of
torchvision in `data/`, and a small trained run for each `runs/PRESET` in a command.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen_dist.errors import ConfigError
from gen_dist.presets import presets
from tests.conftest import REPOSITORY
from tests.support.guides import (
    SHELL,
    Block,
    blocks_of,
    command_of,
    guides,
    in_process,
    in_processes,
    small_options,
    words_of,
)
from tests.support.loaded_plugins import forgetting_plugins

GUIDES = guides()
_TOP = ("gen_dist", "kernels", "launch", "bench", "tests", ".github")
by_guide = pytest.mark.parametrize("guide", GUIDES, ids=[str(guide.relative_to(REPOSITORY)) for guide in GUIDES])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run directory of a preset, trained for a few steps at its first use."""
    place = tmp_path_factory.mktemp("trained")

    def run(preset: str) -> Path:
        path = place / preset
        if not path.exists():
            in_process(["gen-dist", "train", preset, "--run-dir", str(path), *small_options(preset)])()
        return path

    return run


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directory of a guide's commands: a copy of the root of a checkout, with a user's images and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gen-dist"])
    # A machine whose memory others use up would have every example warn.
    monkeypatch.setattr("gen_dist.training.memory_watch.free_memory_bytes", lambda: None)
    for name in ("gen_dist", "launch", "tests"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    _write_holiday(tmp_path / "holiday")
    for name in ("MNIST", "FashionMNIST"):
        _write_idx_files(tmp_path / "data" / name / "raw")
    with forgetting_plugins():
        yield tmp_path


@by_guide
def test_code_runs_or_says_why_not(
    guide: Path, directory: Path, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = list(blocks_of(guide))
    _copy_runs(blocks, directory, trained)
    for block in blocks:
        try:
            _run(block)
        except BaseException as error:
            error.add_note(f"in the block of {block}")
            raise
        told = capsys.readouterr().err
        is_example = guide == REPOSITORY / "README.md" and block.language not in SHELL
        assert not (is_example and re.search("warning|collapse|since step", told)), f"the example warns: {told}"


@pytest.mark.slow
@by_guide
def test_shell_commands_run_in_processes_of_their_own(
    guide: Path, directory: Path, trained: Callable[[str], Path]
) -> None:
    blocks = list(blocks_of(guide))
    _copy_runs(blocks, directory, trained)
    for block in blocks:
        if block.language not in SHELL:
            _write_named(block)
            continue
        for words in words_of(block.text) if block.reason is None else ():
            if small := command_of(words).small:
                in_processes(small)


@by_guide
def test_links_lead_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(guide.read_text())):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (guide.parent / path).resolve() if path else guide
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in _anchors(linked), f"{path or guide.name} has no heading #{anchor}"


@by_guide
def test_paths_in_code_spans_exist(guide: Path) -> None:
    for span in re.findall(r"`([\w.-]+(?:/[\w.-]*)+)`", _without_code(guide.read_text())):
        first = span.split("/")[0]
        roots = [root for root in {REPOSITORY, guide.parent} if (root / first).exists()]
        if first in _TOP or (guide.parent != REPOSITORY and guide.parent in roots):
            assert any((root / span).exists() for root in roots), f"{span} does not exist"


@by_guide
def test_commits_of_figures_are_in_the_history(guide: Path) -> None:
    try:
        shallow = _git("rev-parse", "--is-shallow-repository") != "false"
    except (OSError, subprocess.CalledProcessError):
        shallow = True
    if shallow:
        pytest.skip("the history is not here")
    commits = {commit[:7] for commit in _git("rev-list", "HEAD").split()}
    if not commits & set().union(*map(_cited, GUIDES)):
        pytest.skip("the history is of another repository, made from these files")
    assert _cited(guide) <= commits, f"not in the history: {sorted(_cited(guide) - commits)}"


def _cited(guide: Path) -> set[str]:
    """Commits that a guide names by their first seven digits."""
    return set(re.findall(r"\b(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{7}\b", guide.read_text()))


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", REPOSITORY, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_front_page_is_short() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 2500


def test_the_front_page_names_every_room() -> None:
    package = REPOSITORY / "gen_dist"
    rooms = {path.parent.name for path in package.glob("*/__init__.py") if not path.parent.is_symlink()}
    house = (REPOSITORY / "README.md").read_text().split("## The rooms")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)/` \|", house, re.MULTILINE)) == rooms


def test_the_guide_names_every_preset() -> None:
    text = (REPOSITORY / "gen_dist/README.md").read_text().split("## Presets")[1].split("\n##")[0]
    named = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    assert [name for name in named if not name.startswith("--")] == list(presets())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\ntorch.zeros(1)\n```", "name 'torch' is not defined"),
        ("```sh\npython launch/train.py no-preset\n```", "unknown preset"),
        ("```sh\npython launch/train.py vae-mnist --no-such-option 1\n```", "no-such-option"),
        ("```sh\nfrobnicate\n```", "no test knows"),
        ("```sh\npython bench/quality/results.py\n```", "not run"),
        ("<!-- not run: it takes hours -->\n```sh\nmake no-target\n```", "no target"),
        ("<!-- not run: it takes hours -->\n```sh\npip install gen_dist\n```", "another project"),
        ("<!-- not run: -->\n```sh\nmake test\n```", "no reason"),
        ("```shell\nmake test\n```", "unknown language"),
    ],
)
def test_a_block_that_is_wrong_is_found(text: str, complaint: str, directory: Path) -> None:
    guide = directory / "README.md"
    guide.write_text(text)
    with pytest.raises((AssertionError, ConfigError, NameError), match=complaint):
        for block in blocks_of(guide):
            _run(block)


def _run(block: Block) -> None:
    """Run a block. If a comment says why it is not run, check as much of it as can be checked."""
    assert block.reason != "", "no reason why it is not run"
    if block.language not in SHELL:
        code = compile(block.text, str(block.guide), "exec")
        if not _write_named(block) and block.reason is None:
            exec(code, {"__name__": "__main__"})
        return
    for words in words_of(block.text):
        command = command_of(words)
        command.check()
        if block.reason is None:
            assert command.run or command.small, f"no test can run {words}: mark its block <!-- not run: reason -->"
            if command.run:
                command.run()


def _write_named(block: Block) -> bool:
    """Write a block that begins with the name of a file, which later commands take. False if it does not."""
    named = re.match(r"# (\w+\.py)\n", block.text)
    if named:
        Path(named[1]).write_text(block.text)
    return named is not None


def _copy_runs(blocks: list[Block], directory: Path, trained: Callable[[str], Path]) -> None:
    """Copy the trained runs that the blocks name."""
    spoken_of = {name for block in blocks for name in re.findall(r"runs/([\w-]+)", block.text)}
    for preset in sorted(spoken_of & presets().keys()):
        shutil.copytree(trained(preset), directory / "runs" / preset)


def _write_holiday(path: Path) -> None:
    """Write a user's photographs: several sizes, in two folders."""
    chance = np.random.default_rng(0)
    for index in range(40):
        file = path / ("beach", "city")[index % 2] / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (70 + index, 80, 3), dtype=np.uint8)).save(file)


def _write_idx_files(path: Path) -> None:
    """Write files in MNIST's format with fewer images: a header of big-endian numbers, then bytes."""
    path.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for split, count in (("train", 200), ("t10k", 100)):
        images = chance.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, kind, content in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
            header = np.array([0x800 + kind, *content.shape], dtype=">i4")
            (path / f"{split}-{name}-ubyte").write_bytes(header.tobytes() + content.tobytes())


def _without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(guide: Path) -> set[str]:
    """Anchors of a guide's headings on a web page: small letters, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", _without_code(guide.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
