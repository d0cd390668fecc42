"""`shards:PATTERN`: images of many files in their order, whatever their server, their disk and other processes do."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gen_dist
from gen_dist.config import DataConfig
from gen_dist.data import Dataset
from gen_dist.data.shards import fetching
from gen_dist.data.shards.block_cache import BlockCache, stripe_of
from gen_dist.errors import DataError
from gen_dist.records.checkpoint import load_newest
from gen_dist.training.supervisor import Supervisor
from tests.data.shard_sets import IMAGES, SHARDS, batches, some_batches, truth, with_status
from tests.support.runs import small_config
from tests.support.shards import ShardServer, samples, served, tar_of, wait_for, write_shards


def test_an_epoch_of_two_ranks_has_each_image_with_its_label(
    server: ShardServer, opened: Callable[..., Dataset]
) -> None:
    dataset = opened(f"{server.url}/{{000..002}}.tar")
    count = len(dataset.train.labels)
    ranks = [batches(dataset.train, rows) for rows in (((0, 3), (3, 3)), ((6, 6),))]
    seen: list[tuple[bytes, int]] = []
    for step in range(-(-count // 12)):
        for rank, parts in zip(ranks, (2, 1), strict=True):
            for part in range(parts):
                images, labels = rank.micro_batch(step, part)
                seen += zip([image.numpy().tobytes() for image in images], labels.tolist(), strict=True)
    for rank in ranks:
        rank.close()
    tested = [image.tobytes() for image in dataset.test.images]
    expected = [truth(number) for number in range(SHARDS * IMAGES)]
    assert sorted(seen[:count]) == sorted(one for one in expected if one[0] not in tested)
    assert sorted(zip(tested, dataset.test.labels.tolist(), strict=True)) == sorted(
        one for one in expected if one[0] in tested
    )
    assert len(tested) == 6


def test_local_remote_and_indexed_twice_are_one_set(
    server: ShardServer, tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    local = opened(f"{tmp_path}/shards/*.tar")
    remote = opened(f"{server.url}/{{000..002}}.tar", cache="another")
    again = opened(f"{server.url}/{{000..002}}.tar", cache="third")
    assert local.digest == remote.digest == again.digest
    assert np.array_equal(some_batches(local.train), some_batches(remote.train))
    assert np.array_equal(some_batches(local.train)[4:], some_batches(local.train, 4))
    assert np.array_equal(local.test.images, remote.test.images)
    for rows in (3, slice(1, 30, 7), np.array([5, 5, 0])):
        assert np.array_equal(local.train.images[rows], remote.train.images[rows])
    assert local.train.images[-1].shape == (1, 8, 8)
    assert opened(f"{tmp_path}/shards/{{000,001}}.tar").digest != local.digest


def test_an_index_is_on_disk_before_it_has_its_name(
    tmp_path: Path, server: ShardServer, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    opened(f"{server.url}/{{000..002}}.tar")
    (index,) = {file.parent for file in tmp_path.rglob("test_labels.npy")}
    assert not [file.name for file in index.iterdir() if file.stat().st_ino not in synced]


def test_requests_that_fail_are_tried_again_and_told(
    server: ShardServer, opened: Callable[..., Dataset], lines: list[str]
) -> None:
    wanted = some_batches(opened(f"{server.url}/{{000..002}}.tar").train)
    server.fails = lambda number: 503 if number % 2 else 0
    assert np.array_equal(some_batches(opened(f"{server.url}/{{000..002}}.tar", cache="another").train), wanted)
    assert any("failed a request (HTTP 503); tried again" in line for line in lines)


def test_training_waits_for_a_server_that_is_gone(
    server: ShardServer, opened: Callable[..., Dataset], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_TOLD_AFTER_SECONDS", 0.2)
    url = f"{server.url}/{{000..002}}.tar"
    wanted = some_batches(opened(url).train)
    train = opened(url, cache="another").train
    server.stop()
    found: list[NDArray[np.uint8]] = []
    thread = threading.Thread(target=lambda: found.append(some_batches(train)))
    thread.start()
    wait_for(lambda: any("waiting for http://127.0.0.1" in line for line in lines))
    server.start()
    thread.join(60)
    assert np.array_equal(found[0], wanted)
    assert any("answers again after" in line for line in lines)


def test_a_server_that_stays_away_is_one_line(
    server: ShardServer, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = opened(f"{server.url}/{{000..002}}.tar").train
    server.stop()
    monkeypatch.setattr(fetching.Fetcher, "_tell_failure", lambda *_: None)
    monkeypatch.setattr(fetching, "_FIRST_PAUSE", 0.01)
    fetcher = train.images._encoded._blocks._fetcher  # type: ignore[attr-defined]
    monkeypatch.setattr(fetcher, "_patience_seconds", 0.05)
    with pytest.raises(DataError, match=r"server has failed for .* run the same command again"):
        some_batches(train)


@pytest.mark.parametrize("change", ["tag", "size", "content"])
def test_a_shard_that_changed_is_refused_by_name(
    change: str, server: ShardServer, tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    train = opened(f"{server.url}/{{000..002}}.tar").train
    path = tmp_path / "shards" / "001.tar"
    if change == "tag":
        server.etag = '"2"'
    elif change == "size":
        path.write_bytes(path.read_bytes() + bytes(512))
    else:
        path.write_bytes(path.read_bytes()[::-1])
    where = "" if change == "tag" else "/001"
    with pytest.raises(DataError, match=rf"{where}.*\.tar has changed since it was indexed .* put the old one back"):
        some_batches(train)


@pytest.mark.parametrize("local", [True, False])
def test_the_next_image_takes_the_place_of_a_damaged_one(
    local: bool, tmp_path: Path, opened: Callable[..., Dataset], lines: list[str]
) -> None:
    directory = tmp_path / "shards"
    directory.mkdir()
    (directory / "a.tar").write_bytes(tar_of(samples(0, IMAGES, classes=50)))
    whole = opened(f"{directory}/a.tar", test_fraction=0.01, cache="whole")
    tested = whole.test.labels.tolist()
    damaged = [number for number in (4, 5, IMAGES - 1) if number not in tested]
    files = samples(0, IMAGES, classes=50)
    for number in damaged:
        files[f"{number:06}.png"] = files[f"{number:06}.png"][:40]
    (directory / "a.tar").write_bytes(tar_of(files))
    following = {number: next(n for n in [*range(number, IMAGES), *range(IMAGES)] if n not in (*damaged, *tested))
                 for number in range(IMAGES)}  # fmt: skip
    with served(directory) as server:
        place = f"{directory}/a.tar" if local else f"{server.url}/a.tar"
        train = opened(place, test_fraction=0.01).train
        labels = np.concatenate([batches(train).micro_batch(step, 0)[1] for step in range(4)])
        assert train.labels.tolist() == [number for number in range(IMAGES) if number not in tested]
        order = batches(train)._order
        assert order is not None
        rows = order.images(0, 48)
        assert labels.tolist() == [following[int(train.labels[row])] for row in rows]
        assert any("is unreadable" in line and "next of the shard" in line for line in lines)


def test_blocks_stay_within_the_budget_and_the_oldest_go(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 1000, print)
    for number in range(50):
        key = f"{number:08x}-0"
        cache.write(key, bytes([number]) * 90)
        held = sum(path.stat().st_size for path in (tmp_path / "blocks").glob("*/*"))
        assert 90 <= held <= 1000
        assert cache.read(key, 10, 20) == bytes([number]) * 10
    assert not cache.has(f"{3:08x}-0")


def test_files_that_are_no_blocks_stay_beside_them(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 1000, print)
    theirs = [tmp_path / "blocks" / name for name in ("00/notes.txt", "photos/0a-1", "00/11111111-0", "00/.profile")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(500))
        os.utime(path, (0, 0))
    for number in range(30):
        cache.write(f"{number:08x}-0", bytes(90))
    assert all(path.exists() for path in theirs)
    assert not cache.has(f"{3:08x}-0")


def test_training_without_room_for_blocks_is_the_same_and_told(
    server: ShardServer, opened: Callable[..., Dataset], lines: list[str]
) -> None:
    url = f"{server.url}/{{000..002}}.tar"
    wanted = some_batches(opened(url).train)
    assert not any("--cache-gib" in line for line in lines)
    assert np.array_equal(some_batches(opened(url, cache="another", cache_gib=1e-6).train), wanted)
    (line,) = (line for line in lines if "--cache-gib" in line)
    enough = float(re.search(r"give it ([\d.e-]+)$", line)[1])  # type: ignore[index]
    lines.clear()
    opened(url, cache="another", cache_gib=enough)
    assert not any("--cache-gib" in line for line in lines)


def test_a_damaged_block_is_fetched_again(server: ShardServer, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    url = f"{server.url}/{{000..002}}.tar"
    wanted = some_batches(opened(url).train)
    blocks = sorted((tmp_path / "cache" / "shard-blocks").glob("*/*"))
    assert len(blocks) == SHARDS
    blocks[0].write_bytes(bytes(blocks[0].stat().st_size))
    blocks[1].write_bytes(blocks[1].read_bytes()[:100])
    assert np.array_equal(some_batches(opened(url).train), wanted)


def test_a_disk_that_refuses_blocks_is_told_and_training_goes_on(
    server: ShardServer, opened: Callable[..., Dataset], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/{{000..002}}.tar"
    wanted = some_batches(opened(url).train)
    train = opened(url, cache="another").train

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gen_dist.data.shards.block_cache.os.replace", full)
    assert np.array_equal(some_batches(train), wanted)
    assert sum("cannot keep parts of shards" in line and "No space left" in line for line in lines) == 1


def test_two_openings_fetch_a_block_once(server: ShardServer, opened: Callable[..., Dataset]) -> None:
    url = f"{server.url}/{{000..002}}.tar"
    splits = [opened(url).train for _ in range(2)]
    server.asked.clear()
    threads = [threading.Thread(target=some_batches, args=(split,)) for split in splits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gets = [one for one in server.asked if one.startswith("GET")]
    assert len(gets) == len(set(gets)) == SHARDS


def test_an_index_that_was_interrupted_goes_on_with_the_next_shard(
    server: ShardServer, opened: Callable[..., Dataset]
) -> None:
    server.fails = lambda _: 418 if server.asked[-1].startswith("GET 002") else 0
    with pytest.raises(DataError, match="HTTP 418"):
        opened(f"{server.url}/{{000..002}}.tar")
    server.fails = lambda _: 0
    server.asked.clear()
    opened(f"{server.url}/{{000..002}}.tar")
    whole = [one for one in server.asked if f"bytes=0-{server._size('000.tar') - 1}" in one]
    assert whole and all("002" in one for one in whole)


def test_a_damaged_index_is_written_again(tmp_path: Path, opened: Callable[..., Dataset], lines: list[str]) -> None:
    pattern = write_shards(tmp_path / "shards", 2, 10)
    digest = opened(pattern).digest
    (index,) = (tmp_path / "cache").glob("shards-*/labels.npy")
    meta = index.with_name("meta.json")
    damages: tuple[Callable[[], object], ...] = (
        lambda: index.write_bytes(index.read_bytes()[:-1] + b"\7"),
        index.unlink,
        lambda: meta.write_text("[" * 10**5),
        lambda: meta.write_text("[]"),
    )
    for damage in damages:
        damage()
        assert opened(pattern).digest == digest
    assert sum("is damaged" in line and "indexing" in line for line in lines) == len(damages)


def test_a_damaged_description_of_an_index_is_found(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    pattern = write_shards(tmp_path / "shards", 2, 10)
    digest = opened(pattern).digest
    (meta,) = (tmp_path / "cache").glob("shards-*/meta.json")
    changed = json.loads(meta.read_text())
    changed["first_rows"][1] += 1
    meta.write_text(json.dumps(changed))
    dataset = opened(pattern)
    assert dataset.digest == digest
    assert dataset.train.counts is not None and dataset.train.counts.sum() == len(dataset.train.labels)
    assert json.loads(meta.read_text())["first_rows"] != changed["first_rows"]


def test_blocks_of_one_shard_are_fetched_at_the_same_time() -> None:
    assert len({stripe_of(f"{'0123abcd' * 4}-{block}") for block in range(16)}) > 10


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no"), ""),
        (with_status(OSError("no"), 503), ""),
        (with_status(OSError("no"), 401), "HTTP 401: no credentials"),
        (with_status(OSError("no"), 404), "no such file"),
        (type("InvalidURLClientError", (OSError,), {})(), "InvalidURLClientError, which is not tried again"),
        (type("ClientConnectorCertificateError", (OSError,), {})(), "CertificateError, which is not tried again"),
    ],
    ids=str,
)
def test_failures_that_will_not_pass_are_not_tried_again(error: Exception, line: str) -> None:
    fetcher = fetching.Fetcher("shards", print)
    if not line:
        assert fetcher._passing("https://host/a.tar", error)
        return
    with pytest.raises(DataError, match=line):
        fetcher._passing("https://host/a.tar", error)


def test_an_error_of_an_index_waits_for_no_server(
    server: ShardServer, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE", 200.0)
    waits = threading.Event()
    monkeypatch.setattr(fetching.Fetcher, "_tell_failure", lambda *_: waits.set())

    def fail(_: int) -> int:
        if "000" not in server.asked[-1]:
            return 503
        return 418 if waits.wait(60) else 0

    server.fails = fail
    started = time.monotonic()
    with pytest.raises(DataError, match="HTTP 418"):
        opened(f"{server.url}/{{000..002}}.tar")
    assert time.monotonic() - started < 150


def test_an_error_ends_the_waiting_for_other_images(
    server: ShardServer, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    images: Any = opened(f"{server.url}/{{000..002}}.tar").train.images
    fetcher, waits = images._encoded._blocks._fetcher, threading.Event()

    def facts(place: str) -> None:
        if place.endswith("/001.tar"):  # the port may hold "001" too
            waits.wait(60)
            raise DataError("001 is gone")
        waits.set()
        fetcher.interrupted.wait(200)
        raise DataError("000 was interrupted")

    monkeypatch.setattr(fetcher, "facts", facts)
    started = time.monotonic()
    with pytest.raises(DataError, match="001 is gone"):
        images[np.array([30] * 4 + [0] * 4)]
    images._pool.shutdown()
    assert time.monotonic() - started < 150


def test_an_image_that_stands_for_another_has_its_own_label(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    files = samples(0, IMAGES, classes=50)
    files["000003.png"] = files["000003.png"][:40]
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    train = opened(str(tmp_path / "a.tar"), test_fraction=0.01).train
    rows, images, labels = train.some_rows(0, len(train.labels))
    for row, image, label in zip(rows.tolist(), images, labels.tolist(), strict=True):
        assert (image.tobytes(), label) == truth(label, classes=50)
        assert train.labels[row] == label


def test_file_systems_that_read_ahead_fetch_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

    asked: list[tuple[int, int]] = []

    class File(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            asked.append((start, end))
            return bytes(end - start)

    class Ahead(AbstractFileSystem):
        def info(self, path: str, **_: Any) -> dict[str, Any]:
            return {"name": path, "size": 2**24, "type": "file"}

        def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> File:
            return File(self, path, mode, block_size or "default", **options)

    monkeypatch.setattr(fsspec, "filesystem", lambda *_args, **_options: Ahead())
    fetcher = fetching.Fetcher("set", lambda _: None)
    assert len(fetcher.read("ahead://a.tar", 1000, 3000)) == 2000
    assert asked == [(1000, 3000)]


def test_a_run_stops_between_steps_while_its_server_is_gone(server: ShardServer, tmp_path: Path) -> None:
    config = small_config(
        "vae",
        data=f"shards:{server.url}/{{000..002}}.tar",
        packing=DataConfig(cache_dir=str(tmp_path / "cache"), cache_gib=1e-9),  # nothing is kept: each batch is fetched
        steps=10_000,
        evaluate_every=10_000,
        sample_every=10_000,
        checkpoint_every=10_000,
        run_dir=str(tmp_path / "run"),
    )
    stop, gone = threading.Event(), threading.Event()

    def on_log(step: int, _metrics: object) -> None:
        if step == 3:
            server.fails = lambda _: 503
            gone.set()

    def end() -> None:
        assert gone.wait(120)
        time.sleep(1)  # the batches that were on their way have come
        stop.set()

    ender = threading.Thread(target=end)
    ender.start()
    supervisor = Supervisor("launch", stop, lambda _step, _metrics, _saved: None)
    outcome = gen_dist.train(config, on_log=on_log, say=lambda _: None, supervisor=supervisor)
    ender.join()
    found = load_newest(tmp_path / "run", print)
    assert 3 <= outcome.step < 100 and not outcome.finished
    assert found and found[0].step == outcome.step
    server.fails = lambda _: 0
    again = threading.Event()
    supervisor = Supervisor("launch", again, lambda _step, _metrics, _saved: None)
    resumed = gen_dist.train(config, on_log=lambda *_: again.set(), say=lambda _: None, supervisor=supervisor)
    assert resumed.step == outcome.step + 1
    server.fails = lambda _: 503
    other, at_once = dataclasses.replace(config, run_dir=str(tmp_path / "other")), threading.Event()
    threading.Timer(1.0, at_once.set).start()
    supervisor = Supervisor("launch", at_once, lambda _step, _metrics, _saved: None)
    assert gen_dist.train(other, say=lambda _: None, supervisor=supervisor).step == 0
    assert load_newest(tmp_path / "other", print) is None


@pytest.mark.slow
def test_a_resumed_run_on_shards_is_the_undisturbed_one(server: ShardServer, tmp_path: Path) -> None:
    config = small_config(
        "vae",
        data=f"shards:{server.url}/{{000..002}}.tar",
        packing=DataConfig(cache_dir=str(tmp_path / "cache")),
        steps=8,
        evaluate_every=8,
        sample_every=8,
        checkpoint_every=4,
        keep_checkpoints=2,
        run_dir=str(tmp_path / "run"),
    )

    def trained() -> dict[str, torch.Tensor]:
        threads = set(threading.enumerate())
        gen_dist.train(config, say=lambda _: None)
        ours = [thread for thread in set(threading.enumerate()) - threads if thread.name == "gen_dist-fetch"]
        wait_for(lambda: not any(thread.is_alive() for thread in ours))
        found = load_newest(tmp_path / "run", print)
        assert found and found[0].step == 8
        return {f"{group} {name}": one for group, all_of in found[0].tensors.items() for name, one in all_of.items()}

    whole = trained()
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    resumed = trained()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_pipes_and_links_in_a_cache_are_neither_read_nor_followed(
    tmp_path: Path, opened: Callable[..., Dataset], lines: list[str]
) -> None:
    pattern = write_shards(tmp_path / "shards", 2, 10)
    opened(pattern)
    (meta,) = (tmp_path / "cache").glob("shards-*/meta.json")
    meta.unlink()
    os.mkfifo(meta)
    with pytest.raises(DataError, match="not a regular file"):  # and nobody waits for a writer
        opened(pattern)
    blocks, theirs = tmp_path / "blocks", tmp_path / "theirs"
    theirs.write_text("theirs")
    (blocks / "00").mkdir(parents=True)
    os.mkfifo(blocks / "00" / "00000001-0")
    (blocks / ".total").symlink_to(theirs)
    cache = BlockCache(blocks, 1000, lines.append)
    assert cache.read("00000001-0", 0, 1) is None
    cache.write("00000002-0", bytes(9))
    assert theirs.read_text() == "theirs" and "cannot keep parts of shards" in lines[-1]
