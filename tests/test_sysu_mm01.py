"""data_prep.sysu_mm01: trees in SYSU-MM01's layout, as they should be and as users have them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import trees

from danet_core.files import StudyError
from data_prep.reading import Reading, format_checks, natural_key
from data_prep.sysu_mm01 import EXPECTED, draw_gallery, read_sysu

PLAN = trees.small_sysu_plan()
COUNTS = trees.counts_of_sysu(PLAN)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.write_sysu(tmp_path / "SYSU-MM01", PLAN)


def read(root: Path, *, exact: bool = True, allow_partial: bool = False, train_splits=("train", "val")) -> Reading:
    counts = COUNTS if exact else None
    return read_sysu(root, expected=counts, train_splits=train_splits, allow_partial=allow_partial)


def settle(reading: Reading, allow_partial: bool = False) -> bool:
    return reading.settle(allow_partial, "python -m data_prep verify sysu")


def refused(root: Path, words: str, **options) -> None:
    with pytest.raises(StudyError, match=words) as caught:
        settle(read(root, **options), options.get("allow_partial", False))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- as it should be


def test_a_clean_tree_passes_every_check_without_a_warning(root: Path) -> None:
    reading = read(root)
    assert not settle(reading)
    assert (reading.failed(), reading.problems, reading.warnings, reading.skipped) == ([], [], [], [])


def test_the_manifest_lists_available_images_by_split_camera_identity_and_number(root: Path) -> None:
    manifest = read(root).manifest
    expected = [
        (split, cam, pid, f"cam{cam}/{pid:04d}/{number:04d}.jpg")
        for split in ("train", "val", "test")
        for cam in range(1, 7)
        for pid in sorted(PLAN.ids[split])
        for number in range(1, PLAN.images.get((cam, pid), 0) + 1)
    ]
    assert list(zip(manifest["split_1"], manifest["camid"], manifest["pid"], manifest["path"], strict=True)) == expected
    assert manifest["row"].tolist() == list(range(len(expected)))
    assert set(manifest.loc[manifest["modality"] == "infrared", "camid"]) == {3, 6}
    assert set(manifest.loc[manifest["modality"] == "visible", "camid"]) == {1, 2, 4, 5}
    assert 9 not in set(manifest["pid"])


def test_galleries_are_the_first_entries_of_each_trial_as_the_evaluation_code_names_them(root: Path) -> None:
    """The slow way: build file names from the 1-based image numbers, then look them up."""
    reading = read(root)
    perm = scipy.io.loadmat(root / "exp" / "rand_perm_cam.mat")["rand_perm_cam"]
    row_of = {path: row for row, path in enumerate(reading.manifest["path"])}
    for mode, cameras in {"all": (1, 2, 4, 5), "indoor": (1, 2)}.items():
        for shot, shots in {"single": 1, "multi": 10}.items():
            rows = reading.galleries[f"{mode}_{shot}"]
            assert rows.dtype == np.int32
            for trial in range(10):
                names = []
                for cam in cameras:
                    for pid in PLAN.ids["test"]:
                        cell = perm[cam - 1, 0][pid - 1, 0]
                        for k in range(min(shots, cell.shape[1])):
                            names.append(f"cam{cam}/{pid:04d}/{int(cell[trial, k]):04d}.jpg")
                assert rows[trial].tolist() == sorted(row_of[name] for name in names)
    assert {len(np.unique(rows)) for rows in reading.galleries["all_multi"]} == {COUNTS.galleries["all_multi"]}


def test_two_readings_of_one_tree_are_equal(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    first, second = read(root), read(copy)
    assert first.manifest.equals(second.manifest)
    assert first.inventory("sysu", False, False) == second.inventory("sysu", False, False)
    assert str(root) not in str(first.inventory("sysu", False, False))


def test_the_full_plan_has_the_published_counts() -> None:
    plan = trees.full_sysu_plan()
    assert trees.counts_of_sysu(plan) == EXPECTED
    assert sum(plan.images.values()) == 45_863
    visible = sum(n for (cam, _), n in plan.images.items() if cam in (1, 2, 4, 5))
    assert (visible, 45_863 - visible) == (30_071, 15_792)


def test_the_published_counts_add_up_to_the_published_totals() -> None:
    visible, infrared = (1, 2, 4, 5), (3, 6)

    def total(split: str, cameras: tuple[int, ...]) -> int:
        return sum(EXPECTED.split_images[split][cam - 1] for cam in cameras)

    assert [total(s, visible) for s in ("train", "val", "test")] == [20_284, 1_974, 6_775]
    assert [total(s, infrared) for s in ("train", "val", "test")] == [9_929, 1_980, 3_803]
    assert total("train", visible) + total("val", visible) == 22_258
    assert total("train", infrared) + total("val", infrared) == 11_909
    assert sum(EXPECTED.indoor_matched.values()) == 2_208


def test_a_tree_with_the_published_proportions_scaled_down_verifies(tmp_path: Path) -> None:
    plan = trees.thin_sysu_plan(trees.full_sysu_plan(), every=8, share=2)
    root = trees.write_sysu(tmp_path / "thin", plan, linked=True)
    reading = read_sysu(root, expected=trees.counts_of_sysu(plan), train_splits=("train", "val"))
    assert not settle(reading)
    available = {pid for pids in plan.ids.values() for pid in pids}
    assert len(reading.manifest) == sum(n for (_, pid), n in plan.images.items() if pid in available)


@pytest.mark.slow
def test_a_tree_of_full_size_passes_every_published_count(tmp_path: Path) -> None:
    root = trees.write_sysu(tmp_path / "full", trees.full_sysu_plan(), linked=True)
    reading = read_sysu(root, expected=EXPECTED, train_splits=("train", "val"))
    assert not settle(reading)
    assert reading.counts["galleries"] == dict(EXPECTED.galleries)
    assert reading.counts["queries"] == {"all": 3803, "all_with_match": 3803, "indoor_with_match": 2208}
    table = format_checks(reading.checks)
    for text in ("22,258 / 11,909 / 395", "301 / 3,010 / 112 / 1,120", "1,088 / 1,120 / 2,208", "6,289", "trial 10"):
        assert text in table


# ---------------------------------------------------------------- accepted, with a warning


def test_stray_files_and_folders_are_listed_and_skipped(root: Path) -> None:
    clean = read(root).manifest
    stray = [
        "Thumbs.db",
        "cam1/.DS_Store",
        "cam1/0001/Thumbs.db",
        "cam2/0001/._0001.jpg",
        "cam3/0001/notes.txt",
        "cam3/0001/0001 copy.jpg",
        "exp/old_id.txt",
    ]
    for name in stray:
        (root / name).write_bytes(b"stray")
    for name in ("cam7", "cam1/extra", "cam4/0001/sub"):
        (root / name).mkdir()
    reading = read(root)
    assert not settle(reading)
    assert reading.manifest.equals(clean)
    assert sorted(reading.skipped) == sorted([*stray, "cam7", "cam1/extra", "cam4/0001/sub"])
    listed = reading.inventory("sysu", False, False)["skipped"]
    assert listed == sorted(reading.skipped, key=natural_key)


def test_other_case_of_folders_and_lists_is_accepted_with_a_warning(root: Path) -> None:
    (root / "cam1").rename(root / "Cam1")
    (root / "exp").rename(root / "EXP")
    (root / "EXP" / "train_id.txt").rename(root / "EXP" / "Train_ID.txt")
    reading = read(root)
    assert not settle(reading)
    assert any("Cam1 read as cam1" in w for w in reading.warnings)
    assert any("EXP read as exp" in w for w in reading.warnings)
    assert any("Train_ID.txt read as train_id.txt" in w for w in reading.warnings)
    assert reading.manifest["path"].str.startswith("Cam1/").sum() == (reading.manifest["camid"] == 1).sum()
    assert all((root / path).is_file() for path in reading.manifest["path"])


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda text: text + ",", "trailing comma"),
        (lambda text: "\ufeff" + text, "byte-order mark"),
        (lambda text: text + "\r\n", "CRLF"),
        (lambda text: text.replace(",", ", "), "spaces"),
        (lambda text: ",".join(reversed(text.split(","))), "not ascending"),
    ],
)
def test_an_identity_list_written_by_another_tool_is_accepted_with_a_warning(root: Path, change, warning: str) -> None:
    trees.edit(root / "exp" / "train_id.txt", change)
    reading = read(root)
    assert not settle(reading)
    assert [w for w in reading.warnings if warning in w] == [w for w in reading.warnings if "train_id.txt" in w]
    assert sum(warning in w for w in reading.warnings) == 1
    assert sorted(set(reading.manifest.loc[reading.manifest["split_1"] == "train", "pid"])) == PLAN.ids["train"]


def test_a_final_line_end_in_an_identity_list_is_nothing_to_mention(root: Path) -> None:
    trees.edit(root / "exp" / "train_id.txt", lambda text: text + "\n")
    assert read(root).warnings == []


def test_empty_identity_folders_mean_absent_as_in_the_original(root: Path) -> None:
    (root / "cam6" / "0009").mkdir()
    reading = read(root)
    assert not settle(reading)
    assert reading.counts["empty_id_folders"] == {"1": 1, "2": 1, "6": 1}


def test_numbers_with_gaps_count_in_natural_order_with_a_warning(root: Path) -> None:
    folder = root / "cam4" / "0006"  # 12 images: 2.jpg sorts before 12.jpg
    before = read(root)
    (folder / "0012.jpg").rename(folder / "0112.jpg")
    reading = read(root)
    assert not settle(reading)
    assert any("gaps in 1 folder" in w for w in reading.warnings)
    for name in before.galleries:
        np.testing.assert_array_equal(before.galleries[name], reading.galleries[name])


def test_unpadded_names_sort_naturally(root: Path) -> None:
    folder = root / "cam4" / "0006"
    for path in list(folder.iterdir()):
        path.rename(folder / f"{int(path.stem)}.jpg")
    folder.rename(root / "cam4" / "6")
    reading = read(root)
    assert not settle(reading)
    paths = reading.manifest.loc[(reading.manifest["camid"] == 4) & (reading.manifest["pid"] == 6), "path"]
    assert paths.tolist() == [f"cam4/6/{n}.jpg" for n in range(1, 13)]


def write_hdf5(path: Path, perm: np.ndarray) -> None:
    """As MATLAB's `save -v7.3`: a 512-byte text header, references to cells, reversed axes, the size of empty cells."""
    with h5py.File(path, "w", userblock_size=512) as file:
        references = np.empty((1, 6), dtype=h5py.ref_dtype)
        for cam in range(6):
            cells = perm[cam, 0]
            inner = np.empty((1, len(cells)), dtype=h5py.ref_dtype)
            for i in range(len(cells)):
                rows = cells[i, 0]
                name = f"#refs#/{cam}_{i}"
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


def test_an_hdf5_copy_of_rand_perm_cam_gives_the_same_galleries_with_a_warning(root: Path) -> None:
    before = read(root)
    path = root / "exp" / "rand_perm_cam.mat"
    write_hdf5(path, scipy.io.loadmat(path)["rand_perm_cam"])
    reading = read(root)
    assert not settle(reading)
    assert any("HDF5" in w for w in reading.warnings)
    for name in before.galleries:
        np.testing.assert_array_equal(before.galleries[name], reading.galleries[name])


def test_an_hdf5_copy_that_cannot_be_read_names_the_fix(root: Path) -> None:
    (root / "exp" / "rand_perm_cam.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n")
    refused(root, r"HDF5 \(MATLAB v7\.3\) copy.*-v7.*evaluation/data_split")


def test_rand_perm_cam_is_found_where_the_evaluation_code_has_it(root: Path) -> None:
    (root / "evaluation" / "data_split").mkdir(parents=True)
    (root / "exp" / "rand_perm_cam.mat").rename(root / "evaluation" / "data_split" / "rand_perm_cam.mat")
    reading = read(root)
    assert not settle(reading)
    assert reading.skipped == []


# ---------------------------------------------------------------- refused


def test_an_absent_tree_names_folder_licence_and_tree(tmp_path: Path) -> None:
    refused(tmp_path / "none", r"none: expected the tree cam1\.\.cam6.*rand_perm_cam\.mat.*wuancong/SYSU-MM01")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no folder exp")
    trees.write_id_lists(tmp_path, PLAN.ids)
    scipy.io.savemat(tmp_path / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": trees.rand_perm(PLAN)})
    refused(tmp_path, "holds no image")


def test_a_missing_rand_perm_cam_says_where_it_comes_from(root: Path) -> None:
    (root / "exp" / "rand_perm_cam.mat").unlink()
    refused(root, r"exp/rand_perm_cam\.mat is missing.*evaluation/data_split/ of the authors' evaluation code")
    refused(root, "is missing", allow_partial=True)


@pytest.mark.parametrize("data", [b"", b"not a MATLAB file" * 20])
def test_a_damaged_rand_perm_cam_is_refused(root: Path, data: bytes) -> None:
    (root / "exp" / "rand_perm_cam.mat").write_bytes(data)
    refused(root, r"rand_perm_cam\.mat.*(0 bytes|not a readable)")


def test_a_cut_rand_perm_cam_is_refused(root: Path) -> None:
    path = root / "exp" / "rand_perm_cam.mat"
    path.write_bytes(path.read_bytes()[:-3000])
    refused(root, r"rand_perm_cam\.mat")


def test_another_variable_in_the_mat_file_is_refused(root: Path) -> None:
    scipy.io.savemat(root / "exp" / "rand_perm_cam.mat", {"perm": np.zeros((6, 1))})
    refused(root, "expected the cell array rand_perm_cam.*no such variable")


def test_rows_that_are_no_permutation_are_refused_with_camera_and_identity(root: Path) -> None:
    perm = trees.rand_perm(PLAN)
    perm[4 - 1, 0][6 - 1, 0][3, 0] = perm[4 - 1, 0][6 - 1, 0][3, 1]
    scipy.io.savemat(root / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": perm})
    refused(root, "camera 4, identity 6.*permutation of 1..m")


def test_a_missing_camera_folder_is_refused_unless_it_is_a_subset_on_purpose(root: Path) -> None:
    shutil.rmtree(root / "cam5")
    refused(root, r"cam5: cam 5: folder: expected present, found missing.*--allow-partial.*more findings")
    reading = read(root, allow_partial=True)
    assert settle(reading, allow_partial=True)
    assert any("partial: cam 5: folder" in w for w in reading.warnings)
    assert 5 not in set(reading.manifest["camid"])
    assert reading.galleries["all_single"].shape == (10, COUNTS.galleries["all_single"] - 4)


def test_a_missing_image_is_named_by_camera_and_identity(root: Path) -> None:
    (root / "cam2" / "0003" / "0002.jpg").unlink()
    refused(root, r"cam2: cam 2: identities / images: expected 7 / 20, found 7 / 19")
    refused(root, r"cam2/0003: .*differ from rand_perm_cam.*identity 3, 4 in it, 3 on disk", exact=False)


def test_a_subset_draws_its_galleries_from_the_images_that_are_there(root: Path) -> None:
    (root / "cam4" / "0006" / "0005.jpg").unlink()
    reading = read(root, allow_partial=True)
    assert settle(reading, allow_partial=True)
    perm = scipy.io.loadmat(root / "exp" / "rand_perm_cam.mat")["rand_perm_cam"][3, 0][5, 0]
    for trial in range(10):
        drawn = reading.manifest.iloc[reading.galleries["all_multi"][trial]]
        paths = drawn.loc[(drawn["camid"] == 4) & (drawn["pid"] == 6), "path"]
        there = [int(number) for number in perm[trial] if number != 5][:10]
        assert sorted(paths) == sorted(f"cam4/0006/{number:04d}.jpg" for number in there)


def test_an_image_number_that_stands_twice_is_refused(root: Path) -> None:
    shutil.copy(root / "cam1" / "0001" / "0001.jpg", root / "cam1" / "0001" / "1.jpg")
    refused(root, r"image number 1 stands twice, 0001\.jpg and 1\.jpg")
    refused(root, "stands twice", allow_partial=True)


def test_two_folders_of_one_identity_are_refused(root: Path) -> None:
    shutil.copytree(root / "cam1" / "0001", root / "cam1" / "1")
    refused(root, "identity 1 has two folders, 0001 and 1")


def test_two_spellings_of_one_camera_are_refused(root: Path) -> None:
    try:
        (root / "CAM1").mkdir()
    except FileExistsError:
        pytest.skip("this file system does not tell cam1 from CAM1")
    refused(root, "holds CAM1 and cam1, expected one folder cam1")


def test_a_zero_byte_image_is_refused(root: Path) -> None:
    (root / "cam3" / "0001" / "0002.jpg").write_bytes(b"")
    refused(root, r"cam3/0001/0002\.jpg has 0 bytes")
    refused(root, "has 0 bytes", allow_partial=True)


def test_a_broken_link_is_refused(root: Path) -> None:
    path = root / "cam3" / "0001" / "0002.jpg"
    path.unlink()
    path.symlink_to(root / "nowhere.jpg")
    refused(root, r"0002\.jpg cannot be read .*broken link")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2,x", "comma-separated identity numbers, found 'x'"),
        ("1,2,5,0", "from 1 to 12.*found 0"),
        ("1,2,5,13", "from 1 to 12.*found 13"),
        ("1,2,5,11,5", "identity 5 stands twice"),
        ("1,-2", "found '-2'"),
        ("", "train identities: expected 4, found 0"),
    ],
)
def test_an_identity_list_with_other_content_is_refused(root: Path, text: str, words: str) -> None:
    (root / "exp" / "train_id.txt").write_text(text)
    refused(root, words)


def test_an_identity_list_that_is_no_text_is_refused(root: Path) -> None:
    (root / "exp" / "val_id.txt").write_bytes(b"\xff\xfe1\0,\0002\0")
    refused(root, r"val_id\.txt is not a text file")


def test_a_missing_identity_list_is_refused(root: Path) -> None:
    (root / "exp" / "test_id.txt").unlink()
    refused(root, r"test_id\.txt is missing")


def test_a_missing_list_of_available_identities_is_refused_only_for_the_real_set(root: Path) -> None:
    (root / "exp" / "available_id.txt").unlink()
    refused(root, r"available_id\.txt: expected present, found missing")
    reading = read(root, exact=False)
    assert not settle(reading)
    assert any("available_id.txt is missing" in w for w in reading.warnings)


def test_an_identity_in_two_splits_is_refused_even_in_a_subset(root: Path) -> None:
    trees.edit(root / "exp" / "test_id.txt", lambda text: text + ",1")
    refused(root, r"train_id\.txt and test_id\.txt share identities, expected none, found 1", allow_partial=True)


def test_a_training_identity_of_one_modality_is_named(root: Path) -> None:
    shutil.rmtree(root / "cam3" / "0005")
    shutil.rmtree(root / "cam6" / "0005")
    refused(root, "identity 5 of the training split train has no infrared image", allow_partial=True)


def test_a_validation_identity_of_one_modality_matters_only_where_it_is_trained_on(root: Path) -> None:
    shutil.rmtree(root / "cam3" / "0007")
    refused(root, "identity 7 of the training split val has no infrared image", allow_partial=True)
    reading = read(root, allow_partial=True, train_splits=("train",))
    assert settle(reading, allow_partial=True)
    assert any("identity 7 of split val has no infrared image" in w for w in reading.warnings)


def test_a_listed_identity_without_images_is_counted(root: Path) -> None:
    for cam in range(1, 7):
        shutil.rmtree(root / f"cam{cam}" / "0011")
    refused(root, r"train identities without images: expected 0, found 1 \(11\)", exact=False)


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """The superuser may read everything, so give that up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no POSIX permissions here")
@pytest.mark.parametrize(
    "name", ["cam2", "cam2/0001", "cam2/0001/0001.jpg", "exp/train_id.txt", "exp/rand_perm_cam.mat"]
)
def test_what_may_not_be_read_is_named(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        root = trees.write_sysu(Path(folder) / "tree", PLAN)
        mode = (root / name).stat().st_mode
        (root / name).chmod(0)
        try:
            with ordinary_user():
                refused(root, f"{name} cannot be (read|listed)")
        finally:
            (root / name).chmod(mode)


def test_a_gallery_draw_casts_before_arithmetic() -> None:
    perm = np.random.default_rng(0).permutation(255).astype(np.uint8) + np.uint8(1)
    assert draw_gallery(perm, range(1, 256), 255) == [int(v) - 1 for v in perm]
    assert draw_gallery(np.array([3, 1, 2], np.uint8), [1, 2, 3], 10) == [2, 0, 1]
    assert draw_gallery(np.array([3, 1, 2], np.uint8), [2, 3], 1) == [1]


def test_natural_order_puts_2_before_10() -> None:
    names = ["10.jpg", "2.jpg", "a10", "a2", "A3", "0002.jpg"]
    assert sorted(names, key=natural_key) == ["0002.jpg", "2.jpg", "10.jpg", "a2", "A3", "a10"]
