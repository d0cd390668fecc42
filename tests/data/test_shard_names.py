"""Names of images in shards, found where the images lie."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data.decoding import decode_image
from gen_dist.data.shards.tar_contents import name_before
from tests.support.shards import encoded, served, tar_of, write_shards

FORMS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def opened(pattern: str, cache: Path, **options: object) -> Dataset:
    packing = DataConfig(cache_dir=str(cache), test_fraction=0.2, **options)  # type: ignore[arg-type]
    return open_dataset(f"shards:{pattern}", "", packing, lambda _line: None)


def image_of(dataset: Dataset, names: dict[str, bytes]) -> None:
    """Check that every image has the name of its file."""
    for split in (dataset.train, dataset.test):
        assert split.names is not None
        assert len(split.names) == len(split.labels)
        for row, name in enumerate(split.names):
            assert np.array_equal(split.images[row], pixels(names[name]))


def pixels(content: bytes) -> NDArray[np.uint8]:
    return decode_image(content, None, 1).pixels


@pytest.mark.parametrize("form", FORMS)
def test_images_of_tar_files_have_the_names_of_their_files(form: str, tmp_path: Path) -> None:
    folder = "d/" * 60 if form == "ustar" else "long" * 60 + "/" if form == "GNU" else "größe" * 40 + "/"
    named: dict[str, bytes] = {}
    for shard in range(3):
        files = {
            f"{folder if number % 2 else ''}{shard}{number:02}.png": encoded(100 * shard + number)
            for number in range(9)
        }
        (tmp_path / f"{shard}.tar").write_bytes(tar_of(files, FORMS[form]))
        named |= {f"{shard}.tar/{name}": content for name, content in files.items()}
    image_of(opened(f"{tmp_path}/{{0..2}}.tar", tmp_path / "cache"), named)


def test_images_of_parquet_files_have_their_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    named: dict[str, bytes] = {}
    for shard in range(2):
        images = [encoded(100 * shard + number) for number in range(15)]
        table = pyarrow.table({"image": [{"bytes": one, "path": None} for one in images]})
        pyarrow.parquet.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=4)
        named |= {f"{shard}.parquet row {row}": one for row, one in enumerate(images)}
    image_of(opened(f"{tmp_path}/{{0..1}}.parquet", tmp_path / "cache"), named)


def test_names_are_the_same_from_a_server(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "here", shards=2, images=10)
    with served(tmp_path / "here") as server:
        remote = opened(f"{server.url}/{{000..001}}.tar", tmp_path / "remote")
        here = opened(pattern, tmp_path / "cache")
        assert list(remote.train.names or ()) == list(here.train.names or ())
        assert list(remote.test.names or ()) == list(here.test.names or ())
        assert remote.train.names is not None
        assert remote.train.names[-len(remote.train.names)] == remote.train.names[0]
        assert "000.tar/000003.png" in [*(here.train.names or ()), *(here.test.names or ())]


def test_a_row_whose_contents_have_gone_has_its_place(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [encoded(number) for number in range(10)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    opened(f"{tmp_path}/a.parquet", tmp_path / "cache")
    for path in (tmp_path / "cache" / "shard-contents").iterdir():
        path.unlink()
    names = opened(f"{tmp_path}/a.parquet", tmp_path / "cache").train.names
    assert names is not None
    assert names[0].startswith("a.parquet byte ")


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"no header" * 200])
def test_bytes_without_a_header_name_nothing(content: bytes) -> None:
    assert name_before(content) is None
