"""data_prep.regdb: trees in RegDB's layout, as they should be and as users have them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import trees

from danet_core.files import StudyError
from data_prep.reading import Reading, format_checks
from data_prep.regdb import EXPECTED, read_regdb

PLAN = trees.RegdbPlan(ids=12, images=3)
COUNTS = trees.counts_of_regdb(PLAN)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.write_regdb(tmp_path / "RegDB", PLAN)


def read(root: Path, *, exact: bool = True) -> Reading:
    return read_regdb(root, expected=COUNTS if exact else None)


def settle(reading: Reading, allow_partial: bool = False) -> bool:
    return reading.settle(allow_partial, "python -m data_prep verify regdb")


def refused(root: Path, words: str, *, exact: bool = True, allow_partial: bool = False) -> None:
    with pytest.raises(StudyError, match=words) as caught:
        settle(read(root, exact=exact), allow_partial)
    assert "\n" not in str(caught.value)


def lines(text: str) -> list[str]:
    return text.splitlines()


# ---------------------------------------------------------------- as it should be


def test_a_clean_tree_passes_every_check_without_a_warning(root: Path) -> None:
    reading = read(root)
    assert not settle(reading)
    assert (reading.failed(), reading.problems, reading.warnings, reading.skipped) == ([], [], [], [])
    assert reading.galleries == {}


def test_the_manifest_lists_visible_then_infrared_in_natural_order(root: Path) -> None:
    manifest = read(root).manifest
    expected = [
        trees.regdb_file(modality, pid, number)
        for modality in ("Visible", "Thermal")
        for pid in range(1, PLAN.ids + 1)
        for number in range(PLAN.images)
    ]
    assert manifest["path"].tolist() == expected
    assert manifest["row"].tolist() == list(range(len(expected)))
    assert manifest["modality"].tolist() == ["visible"] * 36 + ["infrared"] * 36
    assert manifest["camid"].tolist() == [1] * 36 + [2] * 36
    assert manifest["pid"].tolist() == [int(path.split("/")[1]) for path in expected]


def test_each_trial_has_its_own_split_by_folder_id(root: Path) -> None:
    manifest = read(root).manifest
    assert list(manifest.columns[5:]) == [f"split_{trial}" for trial in range(1, 11)]
    for trial in range(1, 11):
        train = set(PLAN.train_ids(trial))
        assert [split == "train" for split in manifest[f"split_{trial}"]] == [pid in train for pid in manifest["pid"]]
        assert set(manifest[f"split_{trial}"]) == {"train", "test"}


def test_a_tree_of_full_size_passes_every_published_count(tmp_path: Path) -> None:
    root = trees.write_regdb(tmp_path / "full", trees.RegdbPlan(412, crlf=True), linked=True)
    reading = read_regdb(root, expected=EXPECTED)
    assert not settle(reading)
    assert len(reading.manifest) == 8240
    assert all(Counter(reading.manifest[f"split_{t}"]) == {"train": 4120, "test": 4120} for t in range(1, 11))
    table = format_checks(reading.checks)
    for text in ("4,120", "trial 10, test: identities / visible lines / thermal lines", "206 / 2,060 / 2,060"):
        assert text in table
    assert sum("CRLF" in warning for warning in reading.warnings) == 40


# ---------------------------------------------------------------- accepted, with a warning


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda text: text.replace("\n", "\r\n"), "CRLF"),
        (lambda text: text.replace("/", "\\"), "backslashes"),
        (lambda text: "\ufeff" + text, "byte-order mark"),
        (lambda text: text.replace("\n", ",\n"), "trailing comma"),
        (lambda text: text.replace("\n", " \n"), "spaces"),
        (lambda text: text.replace("Thermal", "thermal"), "differ in case"),
        (lambda text: "\n".join(reversed(text.splitlines())) + "\n", "not in order of appearance"),
    ],
)
def test_a_split_file_written_by_another_tool_is_accepted_with_a_warning(root: Path, change, warning: str) -> None:
    clean = read(root).manifest
    trees.edit(root / "idx" / "train_thermal_3.txt", change)
    reading = read(root)
    assert not settle(reading)
    assert [warning in w for w in reading.warnings] == [True]
    assert reading.manifest.equals(clean)


@pytest.mark.parametrize("end", ["", "\n\n"])
def test_a_missing_or_doubled_final_line_end_is_nothing_to_mention(root: Path, end: str) -> None:
    trees.edit(root / "idx" / "train_thermal_3.txt", lambda text: text.rstrip("\n") + end)
    reading = read(root)
    assert not settle(reading)
    assert reading.warnings == []


def test_other_case_of_folders_is_accepted_with_a_warning(root: Path) -> None:
    (root / "Visible").rename(root / "VISIBLE")
    (root / "Thermal").rename(root / "thermal")
    reading = read(root)
    assert not settle(reading)
    assert "folder VISIBLE read as Visible" in reading.warnings
    assert all((root / path).is_file() for path in reading.manifest["path"])
    assert reading.manifest["path"].str.startswith("VISIBLE/").sum() == 36


def test_stray_files_and_folders_are_listed_and_skipped(root: Path) -> None:
    clean = read(root).manifest
    stray = ["Thumbs.db", "Visible/.DS_Store", "Visible/1/Thumbs.db", "Thermal/2/._a_2.bmp", "idx/readme.txt"]
    for name in stray:
        (root / name).write_bytes(b"stray")
    (root / "Visible" / "backup").mkdir()
    (root / "tools").mkdir()
    reading = read(root)
    assert not settle(reading)
    assert sorted(reading.skipped) == sorted([*stray, "Visible/backup", "tools"])
    assert reading.manifest.equals(clean)


# ---------------------------------------------------------------- refused


def test_an_absent_tree_names_folder_licence_and_tree(tmp_path: Path) -> None:
    refused(tmp_path / "none", r"none: expected the tree Visible/\{id\}.*idx/.*Dongguk.*DBPerson-Recog-DB1")


@pytest.mark.parametrize("name", ["Visible", "Thermal", "idx"])
def test_a_missing_folder_is_named(root: Path, name: str) -> None:
    shutil.rmtree(root / name)
    refused(root, f"{name} is missing; expected the tree")


def edit_line(root: Path, change, name: str = "train_visible_2.txt", number: int = 4) -> None:
    def rewrite(text: str) -> str:
        parts = text.splitlines(keepends=True)
        parts[number - 1] = change(parts[number - 1].rstrip("\n")) + "\n"
        return "".join(parts)

    trees.edit(root / "idx" / name, rewrite)


@pytest.mark.parametrize("label", ["6", "-1", "205"])
def test_a_label_out_of_range_is_refused_with_file_and_line(root: Path, label: str) -> None:
    edit_line(root, lambda line: line.rsplit(" ", 1)[0] + " " + label)
    refused(root, rf"train_visible_2\.txt, line 4: label expected from 0 to 5, found {label}", allow_partial=True)


def test_an_identity_with_two_labels_and_a_label_of_two_identities_are_refused(root: Path) -> None:
    edit_line(root, lambda line: line.rsplit(" ", 1)[0] + " 0", number=5)
    refused(root, r"line 5: identity \d+ has label 0, expected 1 as before")
    for number in (4, 6):
        edit_line(root, lambda line: line.rsplit(" ", 1)[0] + " 0", number=number)
    refused(root, r"line 4: label 0 belongs to identity \d+ already")


def test_two_lines_that_name_one_file_are_refused(root: Path) -> None:
    first = lines((root / "idx" / "train_visible_2.txt").read_text())[0]
    edit_line(root, lambda _: first.replace("Visible/", "visible\\").replace("male", "MALE"))
    refused(root, r"line 4: .* stands in line 1 already, expected once", allow_partial=True)


@pytest.mark.parametrize(
    "path",
    [
        "Visible/../../secret.bmp",
        "/etc/1/x.bmp",
        "Visible\\..\\..\\x.bmp",
        "C:\\Visible\\1\\x.bmp",
        "../RegDB/Visible/1/a.bmp",
    ],
)
def test_a_path_that_escapes_the_root_is_refused(root: Path, path: str) -> None:
    edit_line(root, lambda _: f"{path} 0")
    refused(root, r"train_visible_2\.txt, line 4: .* points outside the data set's folder", allow_partial=True)


@pytest.mark.parametrize(
    "line", ["Visible/1/a.bmp", "Visible/1/a.bmp zero", "Thermal/1/a.bmp 0", "Visible/a.bmp 0", "Visible/x/a.bmp 0"]
)
def test_a_line_of_another_form_is_refused(root: Path, line: str) -> None:
    edit_line(root, lambda _: line)
    refused(root, r"train_visible_2\.txt, line 4: expected .*Visible/<id>/<file>", allow_partial=True)


def test_a_missing_image_is_named_with_the_line_s_file(root: Path) -> None:
    missing = trees.regdb_file("Thermal", 3, 1)
    (root / missing).unlink()
    refused(root, r"Thermal: images: expected 36, found 35; .*--allow-partial")
    refused(root, rf"_thermal_1\.txt: lines whose image is missing: expected 0, found 1 \({missing}\)", exact=False)
    reading = read(root)
    assert settle(reading, allow_partial=True)
    assert any(w.startswith("partial: Thermal: images: expected 36, found 35") for w in reading.warnings)
    assert len(reading.manifest) == 71


def test_an_image_that_no_split_names_is_counted(root: Path) -> None:
    edit_line(root, lambda _: "")
    refused(root, r"trial 2: images in neither train nor test: expected 0, found 1", exact=False)


def test_a_missing_split_file_is_refused_and_leaves_out_its_trial_in_a_subset(root: Path) -> None:
    (root / "idx" / "test_thermal_1.txt").unlink()
    refused(root, "split files: expected 40, found 39")
    reading = read(root)
    assert settle(reading, allow_partial=True)
    assert list(reading.manifest.columns[5:]) == [f"split_{trial}" for trial in range(2, 11)]
    assert any("trial 1 left out" in w for w in reading.warnings)


def test_no_complete_trial_is_refused(root: Path) -> None:
    for trial in range(1, 11):
        (root / "idx" / f"test_thermal_{trial}.txt").unlink()
    refused(root, "no trial with its four split files", allow_partial=True)


def test_identities_in_train_and_test_are_refused_even_in_a_subset(root: Path) -> None:
    train = (root / "idx" / "train_visible_4.txt").read_text().splitlines()
    trees.edit(root / "idx" / "test_visible_4.txt", lambda text: text + "\n".join(train[:3]).replace(" 0", " 6") + "\n")
    pid = train[0].split("/")[1]
    refused(root, f"trial 4: training and test files share identities, expected none, found {pid}", allow_partial=True)


def test_visible_and_thermal_labels_that_differ_are_refused(root: Path) -> None:
    swap = {"0": "1", "1": "0"}

    def change(text: str) -> str:
        parts = [line.rsplit(" ", 1) for line in text.splitlines()]
        return "".join(f"{path} {swap.get(label, label)}\n" for path, label in parts)

    trees.edit(root / "idx" / "train_thermal_6.txt", change)
    refused(
        root, r"train_thermal_6\.txt: trial 6, train: identities whose visible and thermal labels differ", exact=False
    )


def test_a_file_in_the_folder_of_another_identity_is_refused(root: Path) -> None:
    path = root / trees.regdb_file("Visible", 3, 1)
    path.rename(root / "Visible" / "4" / path.name)
    refused(root, r"Visible/4/.*_3\.bmp: expected a name ending in the folder's identity, _4, found _3")


def test_a_training_identity_of_one_modality_is_named(root: Path) -> None:
    pid = PLAN.train_ids(1)[0]
    for path in (root / "Thermal" / str(pid)).iterdir():
        path.unlink()
    refused(root, f"identity {pid} has no infrared image in the training split of trial 1", allow_partial=True)


def test_an_identity_folder_without_images_is_refused(root: Path) -> None:
    (root / "Visible" / "13").mkdir()
    refused(root, r"Visible/13: Visible/13: images: expected some, found 0", exact=False)


def test_a_zero_byte_image_is_refused(root: Path) -> None:
    (root / trees.regdb_file("Visible", 3, 1)).write_bytes(b"")
    refused(root, r"_3\.bmp has 0 bytes", allow_partial=True)


def test_two_folders_of_one_identity_are_refused(root: Path) -> None:
    shutil.copytree(root / "Visible" / "3", root / "Visible" / "003")
    refused(root, "identity 3 has two folders, 003 and 3|identity 3 has two folders, 3 and 003")


def test_a_swapped_pair_of_modality_folders_is_refused(root: Path) -> None:
    (root / "Visible").rename(root / "x")
    (root / "Thermal").rename(root / "Visible")
    (root / "x").rename(root / "Thermal")
    refused(root, "lines whose image is missing", exact=False)


def test_too_few_and_too_many_images_of_one_identity_are_told_apart_from_the_total(root: Path) -> None:
    """One image less of one identity and one more of another leave every total as expected."""
    (root / trees.regdb_file("Visible", 2, 0)).unlink()
    shutil.copy(root / trees.regdb_file("Visible", 5, 0), root / trees.regdb_file("Visible", 5, 7))
    refused(root, r"Visible/2: Visible: identities without 3 images: expected 0, found 2 \(first: 2, 2 images\)")
