"""Layouts of shards and their labels, parquet files, and shards to test on."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data.shards import packed_parts, parquet_contents
from gen_dist.errors import DataError
from gen_dist.records.reading import write_object
from gen_dist.records.run_data import _where_it_trained, _with_moved_tests, open_run_data
from tests.data.shard_sets import some_batches, truth
from tests.support.runs import small_config
from tests.support.shards import encoded, samples, served, tar_of, write_shards


def test_layouts_of_tar_files_give_one_set(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    long = "a" * 80 + "/" + "b" * 80 + "/"
    files = {f"{long}{name}": content for name, content in samples(0, 10).items()}
    digests = set()
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        path.write_bytes(tar_of(files, form))
        dataset = opened(str(path), test_fraction=0.2)
        labelled = [*zip(map(np.ndarray.tobytes, [*dataset.train.images[:], *dataset.test.images]),
                         [*dataset.train.labels.tolist(), *dataset.test.labels.tolist()], strict=True)]  # fmt: skip
        digests.add(tuple(sorted(labelled)))
    assert digests == {tuple(sorted(truth(number) for number in range(10)))}


def test_labels_are_texts_numbers_or_json(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    def with_labels(name: str, ending: str, labels: list[Any]) -> Dataset:
        files = {f"{i}.{end}": content for i, label in enumerate(labels)
                 for end, content in (("png", encoded(i)), (ending, label))}  # fmt: skip
        (tmp_path / name).write_bytes(tar_of(files))
        return opened(str(tmp_path / name))

    texts = with_labels("a.tar", "cls", [b"dog", b"cat\n", b"dog", b"cat"])
    assert texts.class_names == ("cat", "dog")
    numbers = with_labels("b.tar", "json", [json.dumps({"label": n}).encode() for n in (0, 2, 2, 1)])
    assert numbers.class_names == ("0", "1", "2")
    none = with_labels("c.tar", "txt", [b"a dog", b"a cat", b"two", b"three"])
    assert none.class_names == ("all",)
    both = [*numbers.train.labels.tolist(), *numbers.test.labels.tolist()]
    assert sorted(both) == [0, 1, 2, 2]


def test_test_shards_are_the_test_split(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    write_shards(tmp_path / "s", 3, 10)
    dataset = opened(f"{tmp_path}/s/00[01].tar", test_shards=f"{tmp_path}/s/002.tar")
    assert len(dataset.train.labels) == 20
    assert [image.tobytes() for image in dataset.test.images] == [truth(number)[0] for number in range(20, 30)]


def test_test_shards_of_another_source_are_refused(tmp_path: Path) -> None:
    packing = DataConfig(cache_dir=str(tmp_path), test_shards="a.tar")
    with pytest.raises(DataError, match=r"mnist5k: --test-shards a\.tar is for shards; leave it out"):
        open_dataset("mnist5k", ".", packing)


def test_relative_test_shards_count_from_where_the_run_started(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "home" / "set").mkdir(parents=True)
    write_object(tmp_path / "run" / "environment.json", {"directory": str(tmp_path / "home")})
    for data in ("shards:set/train-*.tar", "shards:https://host/{0..9}.tar"):
        config = small_config("vae", data=data, packing=DataConfig(test_shards="set/test-*.tar"))
        found = _where_it_trained(tmp_path / "run", config)
        assert found.packing.test_shards == f"{tmp_path}/home/set/test-*.tar"


@pytest.mark.parametrize(
    ("data", "tested", "now", "moved"),
    [
        ("/old/s/train-*.tar", "/old/s/test-*.tar", "/new/s/train-*.tar", "/new/s/test-*.tar"),
        ("/old/s/train-*.tar", "/old/t/test.tar", "/new/s/train-*.tar", "/new/t/test.tar"),
        ("/old/s/train-*.tar", "/old/s/test.tar", "/new/{0..3}.tar", "/new/test.tar"),
        ("/old/s/train-*.tar", "/other/test.tar", "/new/s/train-*.tar", "/other/test.tar"),
        ("s/train.tar", "s/test.tar", "/new/s/train.tar", "/new/s/test.tar"),
        ("s/train.tar", "/s/test.tar", "/new/s/train.tar", "/s/test.tar"),
        ("https://a/s/{0..9}.tar", "https://a/s/t.tar", "s3://b/s/{0..9}.tar", "s3://b/s/t.tar"),
        ("/old/train.tar", "/old/test.tar", "/old/train.tar", "/old/test.tar"),
    ],
)
def test_test_shards_move_with_those_to_train_on(data: str, tested: str, now: str, moved: str) -> None:
    config = small_config("vae", data=f"shards:{data}", packing=DataConfig(test_shards=tested))
    assert _with_moved_tests(config, f"shards:{now}").packing.test_shards == moved
    assert _with_moved_tests(config, None) is config


def test_a_run_whose_shards_have_moved_finds_all_of_them(tmp_path: Path) -> None:
    write_shards(tmp_path / "old", 3, 20)
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), test_shards=f"{tmp_path}/old/002.tar")
    config = small_config("vae", data=f"shards:{tmp_path}/old/00[01].tar", packing=packing)
    before = open_run_data(tmp_path, config, lambda _line: None, digest=None)
    (tmp_path / "old").rename(tmp_path / "new")
    place = f"shards:{tmp_path}/new/00[01].tar"
    assert open_run_data(tmp_path, config, lambda _line: None, digest=before.digest, data=place).digest == before.digest


def test_parquet_shards_are_the_set_that_tar_shards_are(
    tmp_path: Path, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    row_group = parquet_contents.row_group
    read_groups: list[int] = []

    def counted(*of: Any) -> bytes:
        read_groups.append(of[-1])
        return row_group(*of)

    monkeypatch.setattr(parquet_contents, "row_group", counted)
    monkeypatch.setattr(packed_parts, "_LARGEST_GAP", -1)  # each image is read by itself, as larger ones are
    directory = tmp_path / "parquet"
    directory.mkdir()
    for shard in range(2):
        numbers = range(shard * 30, shard * 30 + 30)
        table = pyarrow.table(
            {"image": [{"bytes": encoded(n), "path": ""} for n in numbers], "label": [n % 3 for n in numbers]}
        )
        pyarrow.parquet.write_table(table, directory / f"{shard:03}.parquet", row_group_size=8)
    tar = opened(write_shards(tmp_path / "tar", 2, 30))
    with served(directory) as server:
        for place in (str(directory), server.url):
            found = opened(f"{place}/{{000..001}}.parquet")
            assert len(read_groups) < 40  # eight for a look at the sample, for the sample and for the test split
            assert np.array_equal(some_batches(found.train), some_batches(tar.train))
            read_groups.clear()
            assert np.array_equal(found.test.images, tar.test.images)
            assert found.class_names == tar.class_names


def test_empty_images_of_a_parquet_shard_are_unreadable_ones(
    tmp_path: Path, opened: Callable[..., Dataset], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(packed_parts, "_LARGEST_GAP", -1)  # each image is read by itself
    images = [{"bytes": None if n in (0, 7, 15) else encoded(n), "path": ""} for n in range(16)]
    table = pyarrow.table({"image": pyarrow.array(images, pyarrow.struct({"bytes": "binary", "path": "string"}))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    with served(tmp_path) as server:
        for place in (str(tmp_path), server.url):
            found = opened(f"{place}/a.parquet", unreadable_images="skip", test_fraction=0.5)
            assert all(np.asarray(found.train.images[np.array([row])]).any() for row in range(len(found.train.labels)))
    assert any("unreadable" in line for line in lines)
