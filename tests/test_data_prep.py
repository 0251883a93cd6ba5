"""data_prep: trees of photographs and rendered ones, as they should be and as users have them."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from danet_study.config import Dataset
from danet_study.files import StudyError, read_json
from danet_study.store import read_manifest
from data_prep import index as indexing
from data_prep import llcm, regdb, sysu_mm01
from data_prep.__main__ import verify
from tests import trees

Change = Callable[[Path], object]
SYSU, REGDB = trees.small_sysu_plan(), trees.RegdbPlan(ids=12, images=3)


@pytest.fixture(autouse=True)
def counts_of_the_plans(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """`published` then means the counts of the small plans, except in tests of full size."""
    if "full" not in request.node.name:
        monkeypatch.setattr(sysu_mm01, "PUBLISHED", trees.counts_of_sysu(SYSU))
        monkeypatch.setattr(regdb, "PUBLISHED", trees.counts_of_regdb(REGDB))
        monkeypatch.setattr(llcm, "PUBLISHED", trees.counts_of_llcm())


@pytest.fixture
def sysu(tmp_path: Path) -> Dataset:
    root = trees.write_sysu(tmp_path / "SYSU-MM01", SYSU)
    return trees.dataset("sysu_mm01", root, name="sysu", published=True, train_splits=["train", "val"])


@pytest.fixture
def regdb_set(tmp_path: Path) -> Dataset:
    return trees.dataset("regdb", trees.write_regdb(tmp_path / "RegDB", REGDB), name="regdb", published=True)


@pytest.fixture
def llcm_set(tmp_path: Path) -> Dataset:
    return trees.dataset("llcm", trees.write_llcm(tmp_path / "LLCM"), name="llcm", published=True)


@pytest.fixture
def photographs(tmp_path: Path) -> Dataset:
    """Ten identities of one's own, 1 to 10; two images of each modality."""
    for folder in ("visible", "Infrared"):
        for pid in range(1, 11):
            for number in (1, 2):
                put_image(
                    tmp_path / "own" / folder / f"{pid:03d}" / f"IMG_{number}.jpg",
                    (20 * pid, 90 * number, 9 * len(folder)),
                )
    return trees.dataset("folder", tmp_path / "own", protocol="both_ways")


def put_image(path: Path, color: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(trees.jpeg(color))


def prepare(dataset: Dataset, ids_per_batch: int = 2) -> pd.DataFrame:
    out = dataset.root.parent / "prepared"
    indexing.prepare(dataset, ids_per_batch=ids_per_batch, prepared=out)
    return read_manifest(out / dataset.name / "manifest.csv")


def refused(dataset: Dataset, *words: str, ids_per_batch: int = 2) -> str:
    """Preparing fails with these words, at most twelve lines, and leaves nothing."""
    with pytest.raises(StudyError) as caught:
        prepare(dataset, ids_per_batch)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) <= 12
    assert not list((dataset.root.parent / "prepared").glob("*"))
    return text


def allowed(dataset: Dataset, **changes: object) -> Dataset:
    return dataset.model_copy(update={"allow_partial": True, **changes})


# ---------------------------------------------------------------- as it should be


@pytest.mark.parametrize("fixture", ["sysu", "regdb_set", "llcm_set", "photographs"])
def test_a_clean_tree_passes_every_check_without_a_warning(fixture: str, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(fixture)
    index = indexing.read(dataset)
    assert not indexing.settle(index, dataset)
    assert (index.findings, index.differences, index.warnings, index.skipped) == ([], [], [], [])
    assert {verdict for *_, verdict in index.checks} == {"ok"}


def test_sysu_manifest_lists_available_images_by_split_camera_identity_and_number(sysu: Dataset) -> None:
    manifest = prepare(sysu)
    expected = [
        (split, cam, pid, f"cam{cam}/{pid:04d}/{number:04d}.jpg")
        for split in ("train", "val", "test")
        for cam in range(1, 7)
        for pid in sorted(SYSU.ids[split])
        for number in range(1, SYSU.images.get((cam, pid), 0) + 1)
    ]
    assert list(zip(manifest["split_1"], manifest["camid"], manifest["pid"], manifest["path"], strict=True)) == expected
    assert set(manifest.loc[manifest["modality"] == "infrared", "camid"]) == {3, 6}
    assert 9 not in set(manifest["pid"])  # has images, but is not available


def test_galleries_are_the_first_entries_of_each_trial(sysu: Dataset) -> None:
    """The slow way: file names from the 1-based image numbers, then looked up."""
    index = indexing.read(sysu)
    perm = scipy.io.loadmat(sysu.root / "exp" / "rand_perm_cam.mat")["rand_perm_cam"]
    row_of = {path: row for row, path in enumerate(index.manifest["path"])}
    for name, (cameras, shots) in sysu_mm01.GALLERIES.items():
        for trial in range(10):
            wanted = [
                row_of[f"cam{cam}/{pid:04d}/{int(number):04d}.jpg"]
                for cam in cameras
                for pid in SYSU.ids["test"]
                for number in perm[cam - 1, 0][pid - 1, 0][trial, :shots]
            ]
            assert index.galleries[name][trial].tolist() == sorted(wanted)


def test_regdb_manifest_has_a_split_per_trial_by_folder_id(regdb_set: Dataset) -> None:
    manifest = prepare(regdb_set)
    assert manifest["path"].tolist() == [
        trees.regdb_file(modality, pid, number)
        for modality in ("Visible", "Thermal")
        for pid in range(1, 13)
        for number in range(3)
    ]
    assert manifest["modality"].tolist() == ["visible"] * 36 + ["infrared"] * 36
    for trial in range(1, 11):
        train = set(REGDB.train_ids(trial))
        assert [split == "train" for split in manifest[f"split_{trial}"]] == [pid in train for pid in manifest["pid"]]


def test_llcm_manifest_has_identity_of_the_folder_and_camera_of_the_name(llcm_set: Dataset) -> None:
    manifest = prepare(llcm_set)
    expected = [
        (trees.llcm_file(folder, pid, camid, number), pid, camid, modality, "train" if pid < 4 else "test")
        for folder, modality in (("vis", "visible"), ("nir", "infrared"))
        for pid in range(1, 8)
        for camid in trees.LLCM_CAMERAS[folder]
        for number in (1, 2)
    ]
    columns = ["path", "pid", "camid", "modality", "split_1"]
    assert list(manifest[columns].itertuples(index=False, name=None)) == expected


def test_the_published_counts_of_llcm_in_full_add_up() -> None:
    counts = {name: sum(images) for name, images in llcm.PUBLISHED.items() if name != "ids"}
    assert counts == {"train_vis": 16_946, "train_nir": 13_975, "test_vis": 8_680, "test_nir": 7_166}
    assert (sum(counts.values()), sum(llcm.PUBLISHED["ids"].values())) == (46_767, 1_064)


def test_half_of_the_own_identities_train_as_the_seed_draws_them(photographs: Dataset) -> None:
    def training(dataset: Dataset) -> set[int]:
        manifest = indexing.read(dataset).manifest
        assert manifest.groupby("pid")["split_1"].nunique().max() == 1
        return set(manifest.loc[manifest["split_1"] == "train", "pid"])

    draws = [training(photographs.model_copy(update={"split_seed": seed})) for seed in range(5)]
    assert all(len(draw) == 5 for draw in draws) and len(set(map(frozenset, draws))) > 1
    assert training(photographs) == draws[0] == set(prepare(photographs).query("split_1 == 'train'")["pid"])
    for pid in range(20, 29):  # of one modality: they test
        put_image(photographs.root / "visible" / str(pid) / "1.png", (pid, 0, 0))
    index = indexing.read(photographs)
    assert training(photographs) == draws[0] and len(index.warnings) == 1
    assert not indexing.settle(index, photographs)


@pytest.mark.parametrize("suffix", ["webp", "GIF", "jp2", "pgm"])
def test_every_kind_of_image_that_pillow_reads_is_a_photograph(photographs: Dataset, suffix: str) -> None:
    Image.new("L", (8, 16), 7).save(photographs.root / f"visible/003/a.{suffix}")
    assert f"visible/003/a.{suffix}" in set(prepare(photographs)["path"])


def test_the_full_plan_has_the_published_counts() -> None:
    plan = trees.full_sysu_plan()
    assert trees.counts_of_sysu(plan) == sysu_mm01.PUBLISHED
    assert sum(plan.images.values()) == 45_863
    infrared = [sysu_mm01.PUBLISHED[split][1][2] + sysu_mm01.PUBLISHED[split][1][5] for split in ("train", "val")]
    assert sum(infrared) == 11_909
    totals = [sum(sysu_mm01.PUBLISHED[split][1]) for split in ("train", "val", "test")]
    assert totals == [20_284 + 9_929, 1_974 + 1_980, 6_775 + 3_803]


@pytest.mark.slow
def test_a_sysu_tree_of_full_size_passes_every_published_count(tmp_path: Path) -> None:
    root = trees.write_sysu(tmp_path / "full", trees.full_sysu_plan(), linked=True)
    dataset = trees.dataset("sysu_mm01", root, name="sysu", published=True, train_splits=["train", "val"])
    index = indexing.read(dataset)
    assert not indexing.settle(index, dataset)
    assert index.galleries["all_multi"].shape == (10, 3010)


def test_a_regdb_tree_of_full_size_with_crlf_passes_every_published_count(tmp_path: Path) -> None:
    root = trees.write_regdb(tmp_path / "full", trees.RegdbPlan(412, crlf=True), linked=True)
    dataset = trees.dataset("regdb", root, name="regdb", published=True)
    index = indexing.read(dataset)
    assert not indexing.settle(index, dataset)
    assert all(Counter(index.manifest[f"split_{t}"]) == {"train": 4120, "test": 4120} for t in range(1, 11))


def test_what_is_stored_with_the_manifest(sysu: Dataset) -> None:
    prepare(sysu)
    about = read_json(sysu.root.parent / "prepared" / "sysu" / "inventory.json")
    assert (about["dataset"], about["protocol"], about["partial"]) == ("sysu", "sysu_mm01", False)
    assert about["counts"]["1"]["train"] == {"identities": 4, "visible": 32, "infrared": 16}


# ---------------------------------------------------------------- accepted


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("/", "\\"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", ",\n"),
        lambda text: text.replace("\n", " \n\n"),
        lambda text: text.replace("Thermal", "thermal"),
        lambda text: "\n".join(reversed(text.splitlines())),
    ],
)
def test_a_split_file_written_by_another_tool_is_accepted(regdb_set: Dataset, change: Callable[[str], str]) -> None:
    clean = indexing.read(regdb_set).manifest
    trees.edit(regdb_set.root / "idx" / "train_thermal_3.txt", change)
    assert prepare(regdb_set).drop(columns="row").equals(clean)


@pytest.mark.parametrize(
    "text", ["1, 2, 5, 11", "1,2,5,11\r\n", "\ufeff1,2,5,11", "1,2,5,11,", "11,5,2,1", "1\n2 5\n11"]
)
def test_an_identity_list_written_by_another_tool_is_accepted(sysu: Dataset, text: str) -> None:
    clean = indexing.read(sysu).manifest
    (sysu.root / "exp" / "train_id.txt").write_bytes(text.encode())
    assert prepare(sysu).drop(columns="row").equals(clean)


def test_other_case_and_unpadded_names_are_accepted_in_natural_order(sysu: Dataset, regdb_set: Dataset) -> None:
    folder = sysu.root / "cam4" / "0006"
    for path in list(folder.iterdir()):
        path.rename(folder / f"{int(path.stem)}.JPG")
    folder.rename(sysu.root / "cam4" / "6")
    (sysu.root / "cam4").rename(sysu.root / "CAM4")
    manifest = prepare(sysu)
    paths = manifest.loc[(manifest["camid"] == 4) & (manifest["pid"] == 6), "path"]
    assert paths.tolist() == [f"CAM4/6/{n}.JPG" for n in range(1, 13)]
    (regdb_set.root / "Visible").rename(regdb_set.root / "VISIBLE")
    assert len(prepare(regdb_set)) == 72


def test_stray_files_are_listed_and_skipped_also_with_names_that_are_not_utf8(
    sysu: Dataset, regdb_set: Dataset, photographs: Dataset
) -> None:
    for dataset, stray in (
        (sysu, ["Thumbs.db", "cam1/.DS_Store", "cam1/0001/Thumbs.db", "cam2/0001/._0001.jpg", "exp/notes.txt"]),
        (photographs, ["Thumbs.db", "visible/.DS_Store", "visible/001/._IMG_1.jpg", "visible/notes.txt", "cover.jpg"]),
        (regdb_set, ["Thumbs.db", "Visible/.DS_Store", "Thermal/2/._a_2.bmp", "idx/readme.txt", "Visible/old/1.txt"]),
    ):
        clean = indexing.read(dataset).manifest
        (dataset.root / "Visible" / "old").mkdir(parents=True, exist_ok=True)
        stray = [*stray, os.fsdecode(b"caf\xe9\n.txt")]
        for name in stray:
            (dataset.root / name).write_bytes(b"stray")
        assert sorted(indexing.read(dataset).skipped) == sorted(stray)
        assert prepare(dataset).drop(columns="row").equals(clean)
        about = read_json(dataset.root.parent / "prepared" / dataset.name / "inventory.json")
        assert about["skipped"]["files"] == len(stray)
        assert any("caf\\" in name for name in about["skipped"]["first"])


def test_an_hdf5_copy_of_rand_perm_cam_gives_the_same_galleries_with_a_warning(sysu: Dataset) -> None:
    before = indexing.read(sysu).galleries
    path = sysu.root / "exp" / "rand_perm_cam.mat"
    write_hdf5(path, scipy.io.loadmat(path)["rand_perm_cam"])
    index = indexing.read(sysu)
    assert not indexing.settle(index, sysu)
    assert len(index.warnings) == 1
    for name in before:
        np.testing.assert_array_equal(before[name], index.galleries[name])


def write_hdf5(path: Path, perm: np.ndarray) -> None:
    """As MATLAB's `save -v7.3`: a 512-byte text header, references to cells, reversed axes, the size of empty cells."""
    with h5py.File(path, "w", userblock_size=512) as file:
        references = np.empty((1, 6), dtype=h5py.ref_dtype)
        for cam in range(6):
            cells = perm[cam, 0]
            inner = np.empty((1, len(cells)), dtype=h5py.ref_dtype)
            for i in range(len(cells)):
                rows, name = cells[i, 0], f"#refs#/{cam}_{i}"
                if rows.size:
                    file[name] = rows.T
                else:
                    file[name] = np.array(rows.shape, dtype=np.uint64)
                    file[name].attrs["MATLAB_empty"] = np.uint8(1)
                inner[0, i] = file[name].ref
            file[f"#refs#/{cam}"] = inner
            references[0, cam] = file[f"#refs#/{cam}"].ref
        file["rand_perm_cam"] = references
    with path.open("rb+") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512))


def test_rand_perm_cam_is_found_where_the_evaluation_code_has_it(sysu: Dataset) -> None:
    (sysu.root / "evaluation" / "data_split").mkdir(parents=True)
    (sysu.root / "exp" / "rand_perm_cam.mat").rename(sysu.root / "evaluation" / "data_split" / "rand_perm_cam.mat")
    assert len(prepare(sysu))


def test_image_numbers_with_gaps_count_in_order_with_a_warning(sysu: Dataset) -> None:
    before = indexing.read(sysu).galleries
    folder = sysu.root / "cam4" / "0006"  # 12 images
    (folder / "0012.jpg").rename(folder / "0112.jpg")
    index = indexing.read(sysu)
    assert not indexing.settle(index, sysu)
    assert len(index.warnings) == 1
    for name in before:
        np.testing.assert_array_equal(before[name], index.galleries[name])


def test_a_subset_draws_its_galleries_from_the_images_that_are_there(sysu: Dataset) -> None:
    (sysu.root / "cam4" / "0006" / "0005.jpg").unlink()
    refused(sysu, "allow_partial", "images, cameras 1 to 6")
    index = indexing.read(allowed(sysu))
    assert indexing.settle(index, allowed(sysu))
    perm = scipy.io.loadmat(sysu.root / "exp" / "rand_perm_cam.mat")["rand_perm_cam"][3, 0][5, 0]
    for trial in range(10):
        drawn = index.manifest.iloc[index.galleries["all_multi"][trial]]
        paths = drawn.loc[(drawn["camid"] == 4) & (drawn["pid"] == 6), "path"]
        there = [int(number) for number in perm[trial] if number != 5][:10]
        assert sorted(paths) == sorted(f"cam4/0006/{number:04d}.jpg" for number in there)


def test_a_gallery_draw_casts_before_arithmetic() -> None:
    perm = np.random.default_rng(0).permutation(255).astype(np.uint8) + np.uint8(1)
    assert sysu_mm01.draw_gallery(perm, range(1, 256), 255) == [int(v) - 1 for v in perm]
    assert sysu_mm01.draw_gallery(np.array([3, 1, 2], np.uint8), [1, 2, 3], 10) == [2, 0, 1]
    assert sysu_mm01.draw_gallery(np.array([3, 1, 2], np.uint8), [2, 3], 1) == [1]


def test_a_validation_identity_of_one_modality_matters_only_where_it_is_trained_on(sysu: Dataset) -> None:
    shutil.rmtree(sysu.root / "cam3" / "0007")
    refused(allowed(sysu), "7", "one modality")
    assert len(prepare(allowed(sysu, train_splits=["train"])))


# ---------------------------------------------------------------- refused


def remove(*names: str) -> Change:
    def change(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return change


def put(name: str, content: bytes) -> Change:
    return lambda root: (root / name).parent.mkdir(exist_ok=True) or (root / name).write_bytes(content) and None


def edit(name: str, change: Callable[[str], str]) -> Change:
    return lambda root: trees.edit(root / name, change)


def line(change: Callable[[str], str], number: int = 4, name: str = "idx/train_visible_2.txt") -> Change:
    def rewrite(text: str) -> str:
        lines = text.splitlines()
        lines[number - 1] = change(lines[number - 1])
        return "\n".join(lines) + "\n"

    return edit(name, rewrite)


def relabel(label: str) -> Callable[[str], str]:
    return lambda old: f"{old.rsplit(' ', 1)[0]} {label}"


def copy(name: str, to: str) -> Change:
    return lambda root: (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, root / to) and None


def broken_link(root: Path) -> None:
    (root / "cam3/0001/0002.jpg").unlink()
    (root / "cam3/0001/0002.jpg").symlink_to(root / "nowhere.jpg")


def empty_indoor_gallery(root: Path) -> None:
    for cam in (1, 2):
        for pid in SYSU.ids["test"]:
            shutil.rmtree(root / f"cam{cam}" / f"{pid:04d}", ignore_errors=True)


def swap_modalities(root: Path) -> None:
    (root / "Visible").rename(root / "x")
    (root / "Thermal").rename(root / "Visible")
    (root / "x").rename(root / "Thermal")


def leak(root: Path) -> None:
    train = (root / "idx/train_visible_4.txt").read_text().splitlines()[:3]
    trees.edit(root / "idx/test_visible_4.txt", lambda text: text + "\n".join(train).replace(" 0", " 6") + "\n")


def leak_by_other_images(root: Path) -> None:
    """One image of a training identity is moved from the training to the test files."""
    name = FOLDER(first, 0, first)
    trees.edit(root / "idx/train_visible_1.txt", lambda text: text.replace(f"{name} 0\n", ""))
    trees.edit(root / "idx/test_visible_1.txt", lambda text: text + f"{name} 6\n")


def not_permutations(root: Path) -> None:
    perm = trees.rand_perm(SYSU)
    perm[3, 0][5, 0][2, 1] = perm[3, 0][5, 0][2, 0]
    scipy.io.savemat(root / "exp/rand_perm_cam.mat", {"rand_perm_cam": perm})


LLCM_LIST = "idx/train_vis.txt"


def LLCM_IMAGE(pid: int) -> str:
    return trees.llcm_file("vis", pid, 1, 1)


def llcm_leak(root: Path) -> None:
    """One image of a test identity is listed for training instead."""
    trees.edit(root / "idx/test_vis.txt", lambda text: text.replace(f"{LLCM_IMAGE(4)} 0\n", ""))
    trees.edit(root / LLCM_LIST, lambda text: text + f"{LLCM_IMAGE(4)} 3\n")


def llcm_rename(old: str, new: str) -> Change:
    """A part of an image's name changes, also in the list."""

    def change(root: Path) -> None:
        name = LLCM_IMAGE(2)
        (root / name).rename(root / name.replace(old, new))
        trees.edit(root / LLCM_LIST, lambda text: text.replace(name, name.replace(old, new)))

    return change


first = REGDB.train_ids(1)[0]
FOLDER = "Visible/{}/male_back_v_{:05d}_{}.bmp".format
SETS = {"sysu": "sysu", "regdb": "regdb_set", "llcm": "llcm_set", "own": "photographs"}  # fixtures
CORRUPT = {  # (layout, refused also with allow_partial): change, words
    "sysu no cameras": ("sysu", True, remove(*(f"cam{c}" for c in range(1, 7))), ["no file fits"]),
    "sysu no exp": ("sysu", True, remove("exp"), ["train_id.txt", "test_id.txt", "rand_perm_cam.mat", "evaluation"]),
    "sysu no mat": ("sysu", True, remove("exp/rand_perm_cam.mat"), ["rand_perm_cam.mat is missing"]),
    "sysu cut mat": ("sysu", True, put("exp/rand_perm_cam.mat", b"MATLAB 5.0"), ["rand_perm_cam.mat"]),
    "sysu empty mat": ("sysu", True, put("exp/rand_perm_cam.mat", b""), ["rand_perm_cam.mat"]),
    "sysu damaged hdf5": (
        *("sysu", True, put("exp/rand_perm_cam.mat", b"MATLAB 7.3".ljust(512) + b"\x89HDF\r\n\x1a\n")),
        ["rand_perm_cam.mat"],
    ),
    "sysu no permutations": ("sysu", True, not_permutations, ["camera 4, identity 6"]),
    "sysu no infrared": ("sysu", True, remove("cam3", "cam6"), ["infrared"]),
    "sysu no camera 5": ("sysu", False, remove("cam5"), ["5"]),
    "sysu no list": ("sysu", True, remove("exp/test_id.txt"), ["test_id.txt is missing"]),
    "sysu no available list": ("sysu", True, remove("exp/available_id.txt"), ["available_id.txt"]),
    "sysu word in list": ("sysu", True, put("exp/train_id.txt", b"1,2,5,x"), ["train_id.txt", "x"]),
    "sysu utf-16 list": ("sysu", True, put("exp/val_id.txt", b"\xff\xfe1\0"), ["val_id.txt"]),
    "sysu leak": ("sysu", True, edit("exp/test_id.txt", lambda text: text + ",1"), ["two of the lists", "1"]),
    "sysu listed without images": ("sysu", False, edit("exp/test_id.txt", lambda text: text + ",12"), ["12"]),
    "sysu one modality": ("sysu", True, remove("cam3/0005", "cam6/0005"), ["one modality", "5"]),
    "sysu missing image": ("sysu", False, remove("cam1/0001/0002.jpg"), ["0001 (1 of 2)", "allow_partial"]),
    "sysu number twice": ("sysu", True, copy("cam1/0001/0001.jpg", "cam1/0001/1.jpg"), ["cam1/0001"]),
    "sysu folder twice": ("sysu", True, copy("cam1/0001", "cam1/1"), ["cam1/1"]),
    "sysu empty image": ("sysu", True, put("cam3/0001/0002.jpg", b""), ["0 bytes", "cam3/0001/0002.jpg"]),
    "sysu broken link": ("sysu", True, broken_link, ["broken link", "cam3/0001/0002.jpg"]),
    "sysu empty gallery": ("sysu", True, empty_indoor_gallery, ["indoor_single"]),
    "sysu rendered": ("sysu", True, put("render.json", b"{}"), ["rendered"]),
    "regdb no thermal": ("regdb", True, remove("Thermal"), ["infrared"]),
    "regdb no idx": ("regdb", True, remove("idx"), ["idx/", "trial 1"]),
    "regdb no split file": ("regdb", False, remove("idx/test_thermal_2.txt"), ["test_thermal_2.txt"]),
    "regdb no trial 1": ("regdb", True, remove("idx/test_thermal_1.txt"), ["trial 1"]),
    "regdb utf-16 split file": ("regdb", True, put("idx/train_thermal_1.txt", b"\xff\xfe1\0"), ["train_thermal_1.txt"]),
    "regdb label": ("regdb", True, line(relabel("6")), ["train_visible_2.txt", "label"]),
    "regdb two labels": ("regdb", True, line(relabel("0"), 5), ["train_visible_2.txt", "label"]),
    "regdb line": ("regdb", True, line(lambda _: "Visible/1/a.bmp zero"), ["line 4", "a.bmp zero"]),
    "regdb path": ("regdb", True, line(lambda _: "Visible/../../x.bmp 0"), ["line 4"]),
    "regdb other modality": ("regdb", True, line(lambda old: old.replace("Visible", "Thermal")), ["line 4"]),
    "regdb named twice": ("regdb", True, edit("idx/train_visible_2.txt", lambda t: t + t.split("\n")[0]), ["twice"]),
    "regdb leak": ("regdb", True, leak, ["trial 4", "train and test"]),
    "regdb leak by other images": ("regdb", True, leak_by_other_images, ["two splits"]),
    "regdb missing image": ("regdb", False, remove(trees.regdb_file("Thermal", 3, 1)), ["3 (2)", "_t_00001_3"]),
    "regdb unnamed image": ("regdb", False, line(lambda _: ""), ["neither train nor test"]),
    "regdb empty folder": ("regdb", True, remove(f"Thermal/{first}"), ["one mod"]),
    "regdb misplaced": ("regdb", True, lambda r: shutil.move(r / FOLDER(3, 1, 3), r / "Visible/4"), ["another"]),
    "regdb empty image": ("regdb", True, put(trees.regdb_file("Visible", 3, 1), b""), ["0 bytes"]),
    "regdb swapped": ("regdb", True, swap_modalities, ["without training image"]),
    "llcm no infrared": ("llcm", True, remove("nir"), ["infrared"]),
    "llcm no idx": ("llcm", True, remove("idx"), ["train_vis.txt", "test_vis.txt"]),
    "llcm no split file": ("llcm", True, remove("idx/train_nir.txt"), ["train_nir.txt"]),
    "llcm no test ids": ("llcm", False, remove("idx/test_id.txt"), ["test_id.txt", "4, 5, 6"]),
    "llcm other test ids": ("llcm", False, put("idx/test_id.txt", b"4,5,6,9"), ["7, 9"]),
    "llcm line": ("llcm", True, line(lambda _: "vis/1/a.jpg zero", 4, LLCM_LIST), ["line 4", "a.jpg zero"]),
    "llcm other modality": ("llcm", True, line(lambda old: old.replace("vis", "nir"), 4, LLCM_LIST), ["line 4"]),
    "llcm named twice": ("llcm", True, edit(LLCM_LIST, lambda text: text + text.split("\n")[0]), ["twice"]),
    "llcm leak": ("llcm", True, edit(LLCM_LIST, lambda text: text + LLCM_IMAGE(4) + " 3\n"), ["twice"]),
    "llcm leak by other images": ("llcm", True, llcm_leak, ["two splits", "4 (trial 1)"]),
    "llcm missing image": ("llcm", False, remove(LLCM_IMAGE(2)), ["missing", "0002_c01", "train_vis"]),
    "llcm unnamed image": ("llcm", False, line(lambda _: "", 4, LLCM_LIST), ["neither train nor test"]),
    "llcm other labels": ("llcm", False, line(relabel("7"), 4, LLCM_LIST), ["train_vis", "labels"]),
    "llcm other camera": ("llcm", False, llcm_rename("_c01", "_c07"), ["cameras 1 to 9"]),
    "llcm misplaced": ("llcm", True, lambda r: shutil.move(r / LLCM_IMAGE(2), r / "vis/0003"), ["another"]),
    "llcm folder twice": ("llcm", True, copy("vis/0002", "vis/2"), ["case or zeros"]),
    "llcm empty image": ("llcm", True, put(LLCM_IMAGE(2), b""), ["0 bytes"]),
    "llcm one modality": ("llcm", True, remove("nir/0002"), ["one modality", "2 (trial 1)"]),
    "llcm rendered": ("llcm", True, put("render.json", b"{}"), ["rendered"]),
    "llcm other ending": ("llcm", True, llcm_rename("_vis.", "_nir."), ["0002_c01", "_vis or _nir"]),
    "llcm no ending": ("llcm", True, llcm_rename("_vis.", "."), ["0002_c01", "_vis or _nir"]),
    "llcm camera 0": ("llcm", True, llcm_rename("_c01", "_c00"), ["0002_c00", "1 to 9"]),
    "llcm camera 10": ("llcm", True, llcm_rename("_c01", "_c10"), ["0002_c10", "1 to 9"]),
    "own named folder": ("own", True, put("visible/anna/1.jpg", trees.jpeg((1, 2, 3))), ["visible/anna/1.jpg"]),
    "own no folder": ("own", True, put("visible/1.jpg", trees.jpeg((1, 2, 3))), ["visible/1.jpg"]),
    "own too deep": ("own", True, put("visible/001/sub/a.jpg", trees.jpeg((1, 2, 3))), ["visible/001/sub/a.jpg"]),
    "own misplaced webp": ("own", True, put("Infrared/x/a.WEBP", b"x"), ["Infrared/x/a.WEBP"]),
    "own 10 digits": ("own", True, put("visible/1234567890/a.jpg", b"x"), ["1234567890/a.jpg"]),
    "own zeros": ("own", True, copy("visible/002", "visible/2"), ["visible/2", "case or zeros"]),
    "own zeros, other file": ("own", True, put("visible/2/b.jpg", b"x"), ["visible/2", "case or zeros"]),
    "own case": ("own", True, lambda r: shutil.copytree(r / "visible/002", r / "VISIBLE/002"), ["case or zeros"]),
    "regdb 30 digits": ("regdb", True, put(f"Visible/{'1' * 30}/a.bmp", b"x"), ["regdb"]),
    "regdb not utf-8": (
        *("regdb", True, lambda r: shutil.copy(r / FOLDER(3, 1, 3), r / "Visible/3" / os.fsdecode(b"\xe9.bmp"))),
        ["not UTF-8"],
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupted_tree_is_refused_with_all_findings_and_nothing_is_written(
    case: str, request: pytest.FixtureRequest
) -> None:
    layout, always, change, words = CORRUPT[case]
    dataset = request.getfixturevalue(SETS[layout])
    change(dataset.root)
    refused(dataset, *words)
    if always:
        refused(allowed(dataset), *words)
    else:
        assert len(prepare(allowed(dataset)))
        assert read_json(dataset.root.parent / "prepared" / dataset.name / "inventory.json")["partial"]


def test_all_findings_are_reported_at_once(sysu: Dataset) -> None:
    for change in (
        remove("exp/rand_perm_cam.mat", "exp/val_id.txt", "cam6"),
        put("cam1/0001/0001.jpg", b""),
        edit("exp/test_id.txt", lambda text: text + ",1"),
    ):
        change(sysu.root)
    refused(sysu, "rand_perm_cam.mat", "val_id.txt", "0 bytes", "two of the lists", "empty: 6")


@pytest.mark.parametrize("fixture", ["regdb_set", "photographs"])
def test_too_few_training_identities_are_refused(fixture: str, request: pytest.FixtureRequest) -> None:
    text = refused(request.getfixturevalue(fixture), "ids_per_batch", ids_per_batch=16)
    assert fixture == "regdb_set" or len(text.splitlines()) == 1


def test_a_missing_folder_names_the_agreement_only_for_the_published_sets(tmp_path: Path) -> None:
    for layout, name in (("sysu_mm01", "sysu"), ("regdb", "regdb"), ("llcm", "llcm")):
        for published in (True, False):
            dataset = trees.dataset(layout, tmp_path / "none", name=name, published=published)
            text = refused(dataset, "none", indexing.root_variable(dataset))
            assert ("request" in text) == published


def test_a_failed_preparation_keeps_the_older_one(sysu: Dataset) -> None:
    prepare(sysu)
    (sysu.root / "exp" / "test_id.txt").unlink()
    with pytest.raises(StudyError):
        prepare(sysu)
    names = sorted(path.name for path in (sysu.root.parent / "prepared" / "sysu").iterdir())
    assert names == ["galleries.npz", "inventory.json", "manifest.csv"]


def test_published_counts_do_not_apply_to_other_sets(sysu: Dataset) -> None:
    shutil.rmtree(sysu.root / "cam5" / "0001")
    images = {cell: n for cell, n in SYSU.images.items() if cell != (5, 1)}
    perm = trees.rand_perm(trees.SysuPlan(SYSU.ids, images, SYSU.mat_ids))
    scipy.io.savemat(sysu.root / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": perm})
    refused(sysu, "expected")
    assert len(prepare(sysu.model_copy(update={"published": False})))


def test_ten_people_of_ones_own_in_regdbs_layout_meet_nothing_of_the_published_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One trial, two images, numbers of a camera in the names, the same label everywhere; then each kind of damage."""
    root = trees.write_regdb(tmp_path / "own", trees.RegdbPlan(ids=10, images=2))
    for path in root.glob("idx/*"):
        if not path.stem.endswith("_1"):
            path.unlink()
        else:
            trees.edit(path, lambda text: re.sub(r"male_back_._0*(\d+)_\d+.bmp \d+", r"IMG_\g<1>77.bmp 0", text))
    for path in root.glob("*/*/*.bmp"):
        path.rename(path.with_name(f"IMG_{int(path.stem.split('_')[3])}77.bmp"))
    dataset = trees.dataset("regdb", root)
    verify(dataset, 4, workers=1, deep=True)
    assert prepare(dataset, 4)["split_1"].value_counts().to_dict() == {"train": 20, "test": 20}
    printed = capsys.readouterr()
    assert not re.search(r"(?mi)^error|WRONG|request|Dongguk", printed.out + printed.err)
    assert re.findall("(?m)^accepted: .{20}", printed.out) == ["accepted: 40 nearly constant i"]  # of one color each
    shutil.rmtree(tmp_path / "prepared")
    for change in (
        remove("Visible/3"),
        remove("idx/test_thermal_1.txt"),
        remove("idx"),
    ):
        change(root)
        text = refused(dataset)
        assert not re.search("412|206|request|Dongguk|distribution", text)


def test_own_people_in_sysus_layout_need_no_validation_list_and_no_published_draws(sysu: Dataset) -> None:
    own = sysu.model_copy(update={"published": False, "train_splits": ["train"]})
    remove("exp/val_id.txt", "exp/available_id.txt", "exp/rand_perm_cam.mat", "cam5")(sysu.root)
    index = indexing.read(own)
    assert not indexing.settle(index, own) and not index.galleries
    assert len(index.warnings) == 1 and "random_seed" in index.warnings[0]
    assert set(prepare(own)["split_1"]) == {"train", "test"}
    remove("exp/test_id.txt")(sysu.root)
    shutil.rmtree(sysu.root.parent / "prepared")
    assert "wuancong" not in refused(own, "test_id.txt")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), allow=st.booleans())
def test_any_damage_to_a_split_file_gives_disjoint_splits_or_a_sentence(
    data: st.DataObject, allow: bool, damaged_sets: tuple[Dataset, ...]
) -> None:
    dataset = data.draw(st.sampled_from(damaged_sets))
    names = {"sysu_mm01": ["exp/train_id.txt", "exp/test_id.txt"], "regdb": ["idx/train_visible_1.txt"]}
    names["llcm"] = ["idx/train_vis.txt", "idx/test_id.txt"]
    path = dataset.root / data.draw(st.sampled_from(names[dataset.layout]))
    before = path.read_bytes()
    start = data.draw(st.integers(0, len(before)))
    end = data.draw(st.integers(start, min(len(before), start + 40)))
    pieces = [b"", b"\n", b",", b"-1", b"1e9", b"\xff", b"\0", before[:60]]
    put_in = data.draw(st.one_of(st.binary(max_size=20), st.sampled_from(pieces)))
    path.write_bytes(before[:start] + put_in + before[end:])
    try:
        index = indexing.read(dataset)
        indexing.settle(index, allowed(dataset) if allow else dataset)
        for column in indexing.split_columns(index.manifest):
            used = index.manifest[index.manifest[column] != ""]
            assert (used.groupby("pid")[column].nunique() == 1).all()
    except StudyError as error:
        assert len(str(error).splitlines()) <= 12
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def damaged_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, ...]:
    raw = tmp_path_factory.mktemp("raw")
    return (
        trees.dataset("sysu_mm01", trees.write_sysu(raw / "sysu", SYSU)),
        trees.dataset("regdb", trees.write_regdb(raw / "regdb", trees.RegdbPlan(ids=4, images=2))),
        trees.dataset("llcm", trees.write_llcm(raw / "llcm")),
    )


# ---------------------------------------------------------------- roots, inventories, readers


def test_the_environment_replaces_the_root_of_the_named_set_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSU_MM01_ROOT", "/photographs/sysu")
    monkeypatch.setenv("OTHER_ROOT", "/photographs/other")
    sets = {
        name: trees.dataset("sysu_mm01", Path("raw"), name=name) for name in ("sysu", "synth_sysu", "other", "third")
    }
    roots = {name: str(indexing.raw_root(dataset)) for name, dataset in sets.items()}
    assert roots == {"sysu": "/photographs/sysu", "synth_sysu": "raw", "other": "/photographs/other", "third": "raw"}
    monkeypatch.setenv("REGDB_ROOT", "/photographs/regdb")
    roots = [str(indexing.raw_root(trees.dataset("regdb", Path("raw"), name=name))) for name in ("regdb", "mine")]
    assert roots == ["/photographs/regdb", "raw"]  # not that of the layout


@pytest.mark.parametrize(
    "change",
    [
        put("cam1/0001/0001.jpg", trees.jpeg((1, 2, 3), (11, 21))),
        put("cam1/0001/0003.jpg", b"new"),
        remove("cam1/0001/0001.jpg"),
        lambda root: (root / "cam1/0001/0001.jpg").rename(root / "cam1/0001/0009.jpg"),
        lambda root: os.utime(root / "cam1/0001/0001.jpg", ns=(1, 1)),
    ],
)
def test_the_inventory_changes_with_the_tree(sysu: Dataset, tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = indexing.write_inventory(sysu, tmp_path / "inventory")
    before = path.read_bytes()
    assert indexing.write_inventory(sysu, tmp_path / "inventory").read_bytes() == before
    change(sysu.root)
    assert indexing.write_inventory(sysu, tmp_path / "inventory").read_bytes() != before


def test_the_hash_of_the_content_is_that_of_every_copy(sysu: Dataset) -> None:
    index = indexing.read(sysu)
    before = indexing.content_sha256(sysu, index)
    image = next(sysu.root.rglob("*.jpg"))
    os.utime(image, (0, 0))
    assert indexing.content_sha256(sysu, index) == before
    image.write_bytes(image.read_bytes()[::-1])
    assert indexing.content_sha256(sysu, index) != before


@pytest.mark.parametrize("place", [shutil.copy, lambda source, target: target.symlink_to(source)])
def test_a_photograph_of_two_identities_is_found_by_its_content(photographs: Dataset, place: Callable) -> None:
    first, other = (photographs.root / name / "IMG_1.jpg" for name in ("visible/001", "visible/002"))
    place(first, first.with_name("again.png"))  # twice under one identity is no error
    verify(photographs, 2, deep=True, workers=1)
    other.unlink()
    place(first, other)
    verify(photographs, 2, workers=1)
    with pytest.raises(StudyError) as caught:
        verify(photographs, 2, deep=True, workers=1)
    assert all(f"{path.parent.name}/{path.name}" in str(caught.value) for path in (first, other))


def test_a_link_to_a_folder_above_ends_and_a_link_to_another_is_followed(sysu: Dataset, tmp_path: Path) -> None:
    (sysu.root / "cam1").rename(tmp_path / "elsewhere")
    (sysu.root / "cam1").symlink_to(tmp_path / "elsewhere")
    (sysu.root / "loop").symlink_to(sysu.root)
    assert len(prepare(sysu))


READER = """
import re
import pandas as pd
from data_prep.index import Index

def read_mine(root, dataset, files):
    index, rows = Index(), []
    for name in files:
        if match := re.fullmatch(r"([vn])/(\\d+)_(\\d+)\\.jpg", name):
            modality = "visible" if match[1] == "v" else "infrared"
            rows.append((name, int(match[2]), int(match[3]), modality, "test" if int(match[2]) > 3 else "train"))
        else:
            index.skipped.append(name)
    index.manifest = pd.DataFrame(rows, columns=["path", "pid", "camid", "modality", "split_1"])
    return index

def read_wrong(root, dataset, files):
    return pd.DataFrame()

def read_without_numbers(root, dataset, files):
    index = read_mine(root, dataset, files)
    index.manifest["pid"] = "somebody"
    return index

def read_without_split(root, dataset, files):
    index = read_mine(root, dataset, files)
    del index.manifest["split_1"]
    return index
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    (tmp_path / "my_package.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    for folder in ("v", "n"):
        for pid in range(1, 6):
            put(f"{folder}/{pid}_1.jpg", trees.jpeg((pid, 0, 0)))(tmp_path / "raw")
    return trees.dataset("my_package.read_mine", tmp_path / "raw", protocol="regdb")


@pytest.fixture(autouse=True)
def raw_folder(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()


def test_a_users_own_reader_is_found_by_its_import_path(mine: Dataset) -> None:
    manifest = prepare(mine)
    assert manifest["split_1"].value_counts().to_dict() == {"train": 6, "test": 4}


@pytest.mark.parametrize(
    "layout",
    [
        "my_package.read_wrong",
        "my_package.read_without_numbers",
        "my_package.read_without_split",
        "my_package.nothing",
        "no_such_package.read",
        "nonsense",
    ],
)
def test_a_reader_that_is_none_is_named(mine: Dataset, layout: str) -> None:
    refused(mine.model_copy(update={"layout": layout}), "datasets.mine")


def test_leaks_and_missing_files_of_a_users_own_reader_are_found(mine: Dataset) -> None:
    def change(old: str, new: str) -> None:
        trees.edit(mine.root.parent / "my_package.py", lambda text: text.replace(old, new))
        sys.modules.pop("my_package", None)

    change("int(match[2]) > 3 else", 'match[1] == "n" and int(match[2]) > 2 else')
    refused(mine, "two splits")
    change("rows.append((name,", 'rows.append((name + "x",')
    refused(mine, "missing")


def test_a_folder_that_may_not_be_listed_is_named(sysu: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(folder: str):
        if str(folder).endswith("0005"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(indexing.os, "scandir", refuse)
    with pytest.raises(StudyError, match="0005"):
        indexing.read(sysu)
