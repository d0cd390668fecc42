"""Fixtures for all tests. It sets the number of threads before torch is imported: results must not depend on it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GEN_DIST_THREADS"] = "1"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process that compiles starts three more

import gc
import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.support import wheel


@pytest.fixture(scope="session", autouse=True)
def _caches_of_the_session(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[None]:
    """Set one directory for packed data, which the workers of a session share, and one for compiled kernels.

    Tests never touch the user's own cache, and what one worker has packed or compiled another finds. Triton names what
    it has compiled by a digest of sources, options and its own code, so later sessions find it, too.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    kept = getattr(pytestconfig, "cache", None)  # none with -p no:cacheprovider
    kernels = kept.mkdir(COMPILED_KERNELS) if kept else shared / COMPILED_KERNELS
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("GEN_DIST_CACHE", str(shared / "packed"))
        variables.setenv("GEN_DIST_COMPILED_KERNELS", str(kernels))
        variables.delenv("WANDB_MODE", raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _white_charts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave charts white in files of tests that are not about them: they take a third of the time of a small run."""
    with pytest.MonkeyPatch.context() as patched:
        if not request.node.nodeid.startswith(tuple(f"tests/{name}" for name in WITH_CHARTS)):
            patched.setattr("gen_dist.pictures.figures._drawn", _white)
        yield


def _white(figure: Any) -> bytes:
    """A PNG of the size of a figure."""
    width, height = (figure.get_size_inches() * figure.dpi).astype(int).tolist()
    written = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(written, "PNG", compress_level=1)
    return written.getvalue()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Begin each test with the same random state: its draws do not depend on the tests before it in this process."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill fresh memory of floats with NaN, so that an unwritten output cannot pass."""
    empty = np.empty

    def poisoned(*args: Any, **kwargs: Any) -> NDArray[Any]:
        fresh = empty(*args, **kwargs)
        if np.issubdtype(fresh.dtype, np.floating):
            fresh.fill(np.nan)
        return fresh

    monkeypatch.setattr(np, "empty", poisoned)
    torch.use_deterministic_algorithms(True)  # fills fresh memory as well, even where torch.compile traces
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the wheel in dist/, and with the unpacked sdist, which has a second wheel built from it."""
    tree = tmp_path_factory.mktemp("tree")
    wheel.build(tree)
    return tree


@pytest.fixture(scope="session")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of a fresh environment with the wheel; other packages are those of this environment."""
    return wheel.install(built, tmp_path_factory.mktemp("fresh"))


WITH_CHARTS = (
    *("pictures/", "reports/", "bench/", "launch/", "test_readme", "inference/test_model", "training/test_run.py"),
    *("training/test_labels", "training/test_adversarial_runs", "training/test_names"),
)
"""Files of tests whose runs have charts that are drawn."""

REPOSITORY = Path(__file__).resolve().parent.parent

LONG = (
    *("test_readme", "launch/test_ray", "parallel/test_ranks", "training/test_interrupted_runs"),
    *("training/test_trainer", "bench/test_gate", "evaluation/test_evaluator", "inference/test_diffusers"),
    *("inference/test_export", "inference/test_model", "kernels/test_latent_kernel", "kernels/test_latent_operator"),
    "faults/test_faults",
)
"""The slowest files. Workers begin with them, so that none waits at the end for another's long file."""

COMPILED_KERNELS = "compiled-kernels"
MOST_KERNELS = 3000
"""Directories of compiled kernels at which a session begins with none, so that those of old sources do not pile up."""

SLOW_SECONDS = 1200
"""Limit of a slow test, also on a machine that is busy with others; the quick ones have that of pyproject.toml."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and give slow tests the time that they take on a busy machine."""
    items.sort(key=lambda item: not item.nodeid.startswith(tuple(f"tests/{name}.py" for name in LONG)))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remove compiled kernels if they are many. Workers have not started then."""
    kept = getattr(session.config, "cache", None)
    if kept and "PYTEST_XDIST_WORKER" not in os.environ:
        kernels = kept.mkdir(COMPILED_KERNELS)
        if len(list(kernels.iterdir())) > MOST_KERNELS:
            shutil.rmtree(kernels)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is imported by now to no garbage collection: with all tests' modules, each took half a second."""
    gc.collect()
    gc.freeze()
