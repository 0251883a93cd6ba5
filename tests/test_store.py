"""A packed store is used as it was packed or not at all; images are decoded as they are meant to be seen."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from danet_study.files import (
    StudyError,
    atomic_path,
    atomic_write_json,
    exclusive,
    read_json,
    replace_folder,
    sha256_json,
)
from danet_study.store import GALLERIES, IMAGES, MANIFEST, META, PackedStore, content_sha256, decode, printable
from tests.stores import make_store


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("packed") / "synth_sysu")


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "synth_sysu")


def repack(root, change) -> None:
    """Write `change`d meta with the hash that fits, as a packer with an error would."""
    meta = read_json(root / META)
    change(meta)
    atomic_write_json(root / META, {**meta, "content_sha256": content_sha256(root, meta["files"])})


def test_a_store_gives_back_images_and_their_identities(packed):
    store = PackedStore.open(packed)
    assert store.images.shape == (len(store.manifest), 3, 32, 32) and store.images.dtype == np.uint8
    assert store.manifest["modality"].tolist() == [("visible", "infrared")[one] for one in store.modalities]
    assert set(store.galleries) == {f"{mode}_{shots}" for mode in ("all", "indoor") for shots in ("single", "multi")}
    rows = store.rows("test")
    assert (np.diff(rows) > 0).all() and set(store.pids[rows] % 2) == {0}
    assert len(store.rows(["train", "test"])) == len(store.images)
    assert not store.images.flags.writeable
    assert PackedStore.open(make_store(packed.parent / "regdb", "regdb")).galleries == {}


@pytest.mark.parametrize(("splits", "trial"), [("train", 2), ("val", 1), (["train", "val"], 1)])
def test_an_absent_trial_or_an_empty_split_is_refused(packed, splits, trial):
    with pytest.raises(StudyError):
        PackedStore.open(packed).rows(splits, trial)


@pytest.mark.parametrize("name", [IMAGES, MANIFEST, GALLERIES, META])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "changed byte"])
def test_a_store_with_a_damaged_file_is_refused(copy, name, damage):
    content = (copy / name).read_bytes()
    middle = len(content) // 2
    changed = {
        "truncated": content[:middle],
        "empty": b"",
        "changed byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    (copy / name).unlink() if damage == "missing" else (copy / name).write_bytes(changed[damage])
    if name == META and damage == "changed byte":
        (copy / META).write_text((copy / META).read_text().replace('content_sha256": "', 'content_sha256": "0'))
    with pytest.raises(StudyError):
        PackedStore.open(copy)


def test_a_store_that_is_no_folder_or_whose_meta_is_no_mapping_is_refused(copy, tmp_path):
    with pytest.raises(StudyError):
        PackedStore.open(tmp_path / "absent")
    for text in ("[]", "{}", '{"files": 3}', "null"):
        (copy / META).write_text(text)
        with pytest.raises(StudyError):
            PackedStore.open(copy)


def test_images_of_another_type_or_size_are_refused_even_if_the_hash_fits(copy):
    images = np.load(copy / IMAGES)
    for wrong in (images.astype(np.float32), images[1:], images[:, :1], images[..., :16]):
        np.save(copy / IMAGES, wrong)
        repack(copy, lambda meta: None)
        with pytest.raises(StudyError):
            PackedStore.open(copy)
    np.save(copy / IMAGES, np.array([{"a": 1}], dtype=object), allow_pickle=True)  # never unpickled
    repack(copy, lambda meta: None)
    with pytest.raises(StudyError):
        PackedStore.open(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop(columns="camid"),
        lambda table: table.drop(columns="split_1"),
        lambda table: table.assign(modality=table.modality.replace("infrared", "thermal")),
        lambda table: table.assign(row=table.row[::-1].to_numpy()),
        lambda table: table.assign(pid="x"),
        lambda table: table.iloc[1:],
    ],
)
def test_a_manifest_that_cannot_be_is_refused_even_if_the_hash_fits(copy, change):
    change(pd.read_csv(copy / MANIFEST)).to_csv(copy / MANIFEST, index=False)
    repack(copy, lambda meta: None)
    with pytest.raises(StudyError):
        PackedStore.open(copy)


# Decoding


def saved(tmp_path, image: Image.Image, name: str = "image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


PICTURE = np.random.default_rng(0).integers(0, 256, (8, 4, 3), dtype=np.uint8)


def test_an_image_keeps_its_pixels_at_its_own_size_and_is_resized_bilinearly_to_another(tmp_path):
    path = saved(tmp_path, Image.fromarray(PICTURE))
    np.testing.assert_array_equal(decode(path, 8, 4), PICTURE.transpose(2, 0, 1))
    expected = np.asarray(Image.fromarray(PICTURE).resize((6, 10), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(path, 10, 6), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
def test_gray_palette_and_transparent_images_become_rgb(tmp_path, mode):
    name = "image.tif" if mode == "CMYK" else "image.png"
    image = Image.fromarray(PICTURE).convert(mode)
    found = decode(saved(tmp_path, image, name), 8, 4)
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    if mode in ("L", "LA", "1"):
        assert (found == found[:1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {1: PICTURE, 2: PICTURE[:, ::-1], 3: PICTURE[::-1, ::-1], 4: PICTURE[::-1]}
    turned |= {5: PICTURE.swapaxes(0, 1), 6: np.rot90(PICTURE, -1), 7: PICTURE[::-1, ::-1].swapaxes(0, 1)}
    turned |= {8: np.rot90(PICTURE)}
    expected = turned[orientation]
    path = saved(tmp_path, Image.fromarray(PICTURE), exif=exif)
    np.testing.assert_array_equal(decode(path, *expected.shape[:2]), expected.transpose(2, 0, 1))


def test_16_bit_images_are_mapped_from_their_range_and_refused_without_one(tmp_path):
    counts = np.array([[1000, 2000], [3000, 60000]], dtype=np.uint16)
    path = saved(tmp_path, Image.fromarray(counts))
    found = decode(path, 2, 2, intensity=(1000, 3000))
    assert found[0].tolist() == [[0, 128], [255, 255]] and (found == found[:1]).all()
    assert decode(path, 2, 2, intensity=(5, 5)).max() == 255  # a constant image has no range
    with pytest.raises(StudyError, match=r"image\.png"):
        decode(path, 2, 2)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"no image", None])
def test_a_broken_file_is_refused_by_name(tmp_path, content):
    path = saved(tmp_path, Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(StudyError, match=r"image\.png"):
        decode(path, 8, 4)
    with pytest.raises(StudyError, match=r"absent\.png"):
        decode(tmp_path / "absent.png", 8, 4)
    with pytest.raises(StudyError):
        decode(tmp_path, 8, 4)


def test_a_name_that_is_not_utf_8_can_be_printed():
    assert printable("a\udcff.png").encode() == b"a\\udcff.png"


# Files


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "a" / "value.json"
    atomic_write_json(path, {"b": 1, "a": [1.5, "ä"]})
    first = path.read_bytes()
    atomic_write_json(path, {"a": [1.5, "ä"], "b": 1})
    assert path.read_bytes() == first and read_json(path) == {"a": [1.5, "ä"], "b": 1}
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError):
        atomic_write_json(path, {"a": float("nan")})
    assert path.read_bytes() == first and [one.name for one in path.parent.iterdir()] == [path.name]
    with pytest.raises(StudyError, match="below"):
        atomic_write_json(path / "below" / "x.json", {})  # a file where a folder should be


def test_missing_and_broken_json_is_refused_by_name_and_hashes_ignore_the_order_of_keys(tmp_path):
    for content in (None, b"{", b"\xff\xfe"):
        if content is not None:
            (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(StudyError, match=r"x\.json"):
            read_json(tmp_path / "x.json")
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json(json.loads('{"b": [2], "a": 1}')) != sha256_json({"a": 1})


def test_a_lock_is_held_by_one_and_free_afterwards(tmp_path):
    for _ in range(2):
        with exclusive(tmp_path / "x.lock", "it"), pytest.raises(StudyError), exclusive(tmp_path / "x.lock", "it"):
            pass


def test_a_folder_is_replaced_by_another(tmp_path):
    for content in ("old", "new"):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / content).touch()
        replace_folder(tmp_path / "made", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]
