"""danet_core.store: what is opened is what was packed, or an error that says what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from danet_core.files import StudyError
from danet_core.store import PackedStore, StoreError, galleries_bytes, partial_path
from data_prep import store_writer
from data_prep.store_writer import StoreWriter

H, W, CHUNK = 4, 3, 4
META = {
    "dataset": "tiny",
    "layout": "sysu",
    "synthetic": True,
    "partial": False,
    "counts": {},
    "interpolation": "bilinear",
}


def tiny_manifest(n: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "row": np.arange(n),
            "path": [f"cam1/0001/{i:04d}.jpg" for i in range(n)],
            "pid": np.arange(n) // 2 + 1,
            "camid": [3 if i % 2 else 1 for i in range(n)],
            "modality": ["infrared" if i % 2 else "visible" for i in range(n)],
            "split_1": ["train"] * (n - 4) + ["val"] * 2 + ["test"] * 2,
        }
    )


def pixels(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, H, W), dtype=np.uint8)


def galleries() -> dict[str, np.ndarray]:
    return {"all_single": np.arange(20, dtype=np.int32).reshape(10, 2), "indoor_single": np.zeros((10, 1), np.int32)}


def open_writer(root: Path, n: int) -> StoreWriter:
    return StoreWriter(root, (n, 3, H, W), "what is packed", CHUNK)


def write_chunk(writer: StoreWriter, images: np.ndarray, chunk: int, source: str = "source") -> None:
    rows = writer.rows(chunk)
    data = images[rows.start : rows.stop].tobytes()
    with writer.images_path.open("rb+") as file:
        file.seek(writer.offset_of(chunk))
        file.write(data)
    writer.finish_chunk(chunk, source, hashlib.sha256(data).hexdigest())


def make_store(root: Path, n: int = 10) -> Path:
    writer, images = open_writer(root, n), pixels(n)
    for chunk in range(writer.n_chunks):
        write_chunk(writer, images, chunk)
    writer.commit(tiny_manifest(n), galleries(), META)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_store(tmp_path / "packed" / "tiny")


def test_a_written_store_opens_with_the_same_content(root: Path) -> None:
    store = PackedStore.open(root)
    assert isinstance(store.images, np.memmap)
    assert store.images.flags.c_contiguous
    np.testing.assert_array_equal(store.images, pixels(10))
    pd.testing.assert_frame_equal(store.manifest, tiny_manifest(10), check_dtype=False)
    assert store.pids.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert store.camids.tolist() == [1, 3] * 5
    assert store.modalities.tolist() == [0, 1] * 5
    assert {a.dtype for a in (store.pids, store.camids, store.modalities)} == {np.dtype(np.int64)}
    assert store.galleries.keys() == galleries().keys()
    for name, rows in galleries().items():
        np.testing.assert_array_equal(store.galleries[name], rows)
    assert (store.meta["n"], store.meta["height"], store.meta["width"]) == (10, H, W)
    assert sorted(path.name for path in root.parent.iterdir()) == ["tiny"]
    assert sorted(path.name for path in root.iterdir()) == ["galleries.npz", "images.npy", "manifest.csv", "meta.json"]


def test_the_images_cannot_be_written_through_the_store(root: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        PackedStore.open(root).images[0] = 0


def test_rows_of_splits_are_ascending_and_disjoint(root: Path) -> None:
    store = PackedStore.open(root)
    assert store.rows("train").tolist() == [0, 1, 2, 3, 4, 5]
    assert store.rows(["test", "train"]).tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert store.rows(("train", "val", "test")).tolist() == list(range(10))
    assert store.rows("val").dtype == np.int64


@pytest.mark.parametrize(
    ("split", "trial", "words"), [("query", 1, "'query'.*test, train, val"), ("train", 2, "trial 2")]
)
def test_a_split_or_trial_that_does_not_exist_is_refused(root: Path, split: str, trial: int, words: str) -> None:
    with pytest.raises(StoreError, match=words):
        PackedStore.open(root).rows(split, trial)


@pytest.mark.parametrize("name", ["images.npy", "manifest.csv", "galleries.npz"])
def test_a_changed_byte_anywhere_in_the_content_is_found(root: Path, name: str) -> None:
    data = bytearray((root / name).read_bytes())
    data[-1] ^= 1
    (root / name).write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"content differs.*expected sha256.*found.*pack tiny"):
        PackedStore.open(root)


@pytest.mark.parametrize("name", ["images.npy", "manifest.csv", "galleries.npz", "meta.json"])
def test_a_missing_file_is_named_with_the_remedy(root: Path, name: str) -> None:
    (root / name).unlink()
    for verify in (True, False):
        with pytest.raises(StoreError, match=f"{name} is missing.*python -m data_prep pack tiny"):
            PackedStore.open(root, verify=verify)


def test_a_missing_store_says_how_to_make_it_and_whether_a_pack_was_begun(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"absent is missing; .*pack absent"):
        PackedStore.open(tmp_path / "absent")
    partial_path(tmp_path / "absent").mkdir()
    with pytest.raises(StoreError, match="begun and not finished"):
        PackedStore.open(tmp_path / "absent")
    assert issubclass(StoreError, StudyError)


def test_a_cut_array_is_refused_even_without_verification(root: Path) -> None:
    data = (root / "images.npy").read_bytes()
    (root / "images.npy").write_bytes(data[:-7])
    with pytest.raises(StoreError, match=r"images\.npy is not a whole array"):
        PackedStore.open(root, verify=False)


def test_a_meta_file_that_does_not_fit_the_array_is_refused(root: Path) -> None:
    meta = json.loads((root / "meta.json").read_text())
    (root / "meta.json").write_text(json.dumps({**meta, "height": H + 1}))
    with pytest.raises(StoreError, match=r"expected uint8 \(10, 3, 5, 3\), found uint8 \(10, 3, 4, 3\)"):
        PackedStore.open(root)
    for text in ("{", "[]", json.dumps({"n": 10})):
        (root / "meta.json").write_text(text)
        with pytest.raises(StoreError, match=r"meta\.json"):
            PackedStore.open(root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop(columns="camid"), "missing camid"),
        (lambda table: table.drop(columns="split_1"), "missing split_1"),
        (lambda table: table.assign(pid="one"), "whole numbers in column pid"),
        (lambda table: table.iloc[::-1], "rows 0 to 9"),
        (lambda table: table.assign(modality="thermal"), "found 'thermal'"),
        (lambda table: table.iloc[:-1], "expected 10 lines of images, found 9"),
    ],
)
def test_a_manifest_that_is_none_is_refused(root: Path, change, words: str) -> None:
    table = change(pd.read_csv(root / "manifest.csv"))
    table.to_csv(root / "manifest.csv", index=False)
    with pytest.raises(StoreError, match=words):
        PackedStore.open(root, verify=False)


def test_equal_content_gives_equal_bytes_and_hash(tmp_path: Path) -> None:
    first, second = make_store(tmp_path / "a" / "tiny"), make_store(tmp_path / "b" / "tiny")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert galleries_bytes(galleries()) == galleries_bytes(dict(reversed(galleries().items())))


def test_the_array_is_a_plain_npy_file(root: Path) -> None:
    np.testing.assert_array_equal(np.load(root / "images.npy"), pixels(10))


def test_a_writer_resumes_only_chunks_whose_source_and_bytes_still_hold(tmp_path: Path) -> None:
    root, images = tmp_path / "tiny", pixels(10)
    writer = open_writer(root, 10)
    for chunk in range(3):
        write_chunk(writer, images, chunk)
    writer.close()
    with (partial_path(root) / "journal.jsonl").open("a") as journal:
        journal.write('{"chunk": 7, "sou')  # torn by a kill
    with writer.images_path.open("rb+") as file:  # bytes that never reached the disk
        file.seek(writer.offset_of(1))
        file.write(b"\0" * 5)
    again = open_writer(root, 10)
    assert [again.done(chunk, "source") for chunk in range(3)] == [True, False, True]
    assert not again.done(0, "another source")
    again.close()
    assert not root.exists()


def test_another_fingerprint_size_or_chunk_starts_anew(tmp_path: Path) -> None:
    root, images = tmp_path / "tiny", pixels(10)
    arguments = [
        ((10, 3, H, W), "other", CHUNK),
        ((10, 3, W, H), "what is packed", CHUNK),
        ((10, 3, H, W), "what is packed", 5),
    ]
    for shape, fingerprint, chunk in arguments:
        writer = open_writer(root, 10)
        write_chunk(writer, images, 0)
        writer.close()
        other = StoreWriter(root, shape, fingerprint, chunk)
        assert not other.done(0, "source")
        other.close()
        shutil.rmtree(partial_path(root))


def test_a_new_store_replaces_an_older_one_whole(root: Path) -> None:
    writer, images = open_writer(root, 6), 255 - pixels(6)
    for chunk in range(writer.n_chunks):
        write_chunk(writer, images, chunk)
    assert len(PackedStore.open(root).images) == 10  # until the new one is complete
    writer.commit(tiny_manifest(6), galleries(), META)
    np.testing.assert_array_equal(PackedStore.open(root).images, images)
    assert [path.name for path in root.parent.iterdir()] == ["tiny"]


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"packing needs [0-9,]+ bytes \(.*GiB\), the disk has 1,000,000 free"):
        open_writer(tmp_path / "new" / "tiny", 10)
    assert list(tmp_path.iterdir()) == []
