"""RegDB's layout: images of both modalities and the split files of the ten trials, read and verified completely.

    Visible/{id}/*_{id}.bmp      Thermal/{id}/*_{id}.bmp
    idx/{train,test}_{visible,thermal}_{1..10}.txt      lines `Visible/285/male_back_v_05528_285.bmp 0`

The folder id is the identity. The labels restart at 0 in the test files and change with the trial: they are checked,
not used.

Accepted, with a warning in the inventory: other case of a folder's or file's name, CRLF, a byte-order mark, backslashes
in the paths, blank lines, trailing commas or spaces, other image types than BMP, labels that are not in order of
appearance.

Source: the split files that circulate with RegDB (Nguyen et al., Sensors 2017); protocol of Ye et al., AAAI 2018.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from danet_core import MODALITIES
from danet_core.files import StudyError
from data_prep.reading import (
    Reading,
    find_file,
    find_folder,
    format_ids,
    identity_folders,
    image_files,
    list_folder,
    read_split_text,
    take_image,
)

TRIALS = 10
SPLITS = ("train", "test")
FOLDERS = ("Visible", "Thermal")  # index = integer code of the modality; camid is one more

TREE = "Visible/{id}/*.bmp, Thermal/{id}/*.bmp, idx/{train,test}_{visible,thermal}_{1..10}.txt"
LICENCE = "the request form of Dongguk University's Dongguk Body-based Person Recognition Database (DBPerson-Recog-DB1)"
_RESTORE = "copy the idx folder again from the distribution"

Key = tuple[int, int, str]  # modality, pid, file name in lower case


@dataclass(frozen=True)
class RegdbCounts:
    """Counts of a complete data set.

    images: per identity and modality. shared: identities that the training sets of two trials share, least and most.
    """

    ids: int
    images: int
    train_ids: int
    shared: tuple[int, int]

    @property
    def lines(self) -> int:
        """Lines of a training file."""
        return self.train_ids * self.images

    @property
    def test_lines(self) -> int:
        """Lines of a test file."""
        return (self.ids - self.train_ids) * self.images


EXPECTED = RegdbCounts(ids=412, images=10, train_ids=206, shared=(91, 110))


@dataclass(frozen=True)
class _Image:
    modality: int
    pid: int
    path: str  # as on disk, relative to the root


@dataclass
class _SplitFile:
    name: str
    keys: list[Key]
    label_of: dict[int, int]


def read_regdb(
    root: Path, *, expected: RegdbCounts | None, train_splits: Sequence[str] = ("train",), allow_partial: bool = False
) -> Reading:
    """Read a tree in RegDB's layout.

    Args:
        root: folder with Visible, Thermal and idx.
        expected: exact counts to check, or None for a set of another size (structure and consistency only).
        train_splits: splits whose identities must have images of both modalities.
        allow_partial: without effect here, findings are settled by `Reading.settle`; the same signature as `read_sysu`.

    Returns the Reading: manifest rows visible then infrared, natural order of id and file name; one split column per
    trial whose four files are there (ten unless the set is partial), empty where a trial names an image in neither
    split. No galleries.

    Raises StudyError for what cannot be read past: an absent root or folder, or a folder without read permission.
    """
    del allow_partial
    if not root.is_dir():
        raise StudyError(f"RegDB's images are not at {root}: expected the tree {TREE}; get them through {LICENCE}")
    reading = Reading(root, "regdb")
    folders: dict[str, Path] = {}
    for name in (*FOLDERS, "idx"):
        folder = find_folder(reading, root, name)
        if folder is None:
            raise StudyError(
                f"{root / name} is missing; expected the tree {TREE}; unpack the distribution again or see {LICENCE}"
            )
        folders[name] = folder
    _skip_others(reading)

    images: dict[Key, _Image] = {}
    for modality, name in enumerate(FOLDERS):
        _scan_modality(reading, folders[name], modality, images)
    if not images:
        raise StudyError(f"{root} holds no image; expected the tree {TREE}; get the images through {LICENCE}")
    _check_images(reading, images, expected)
    trials = _read_trials(reading, folders["idx"], images)
    splits = {trial: _check_trial(reading, trial, files, images, expected) for trial, files in trials.items()}
    _check_across(reading, splits, expected)
    _check_modalities(reading, images, splits, train_splits)
    reading.manifest = _manifest(images, splits)
    return reading


def _skip_others(reading: Reading) -> None:
    known = {name.casefold() for name in (*FOLDERS, "idx")}
    folders, files = list_folder(reading.root)
    for entry in folders:
        if entry.name.casefold() not in known:
            reading.skip(entry.path)
    for entry in files:
        if entry.name != "render.json":
            reading.skip(entry.path)


def _scan_modality(reading: Reading, folder: Path, modality: int, images: dict[Key, _Image]) -> None:
    """Add the images below Visible or Thermal to `images`, in natural order."""
    unnumbered = 0
    for pid, entry in identity_folders(reading, folder):
        found = 0
        for file in image_files(reading, Path(entry.path)):
            found += 1
            key = (modality, pid, file.name.casefold())
            if key in images:
                reading.problems.append(
                    f"{file.path} and {Path(images[key].path).name} differ only in case, expected one; remove one"
                )
                continue
            stem, suffix = Path(file.name).stem, Path(file.name).suffix.lower()
            if suffix != ".bmp":
                reading.warn(f"images of type {suffix}, expected .bmp")
            number = re.search(r"_([0-9]+)$", stem)
            if number is None:
                unnumbered += 1
            elif int(number[1]) != pid:
                reading.problems.append(
                    f"{file.path}: expected a name ending in the folder's identity, _{pid}, found _{number[1]}; "
                    "move the file to its own folder"
                )
            images[key] = _Image(modality, pid, take_image(reading, file))
        if not found:
            reading.check(
                f"{folder.name}/{entry.name}: images",
                "some",
                0,
                Path(entry.path),
                "unpack the distribution again or remove the folder",
            )
    if unnumbered:
        reading.warn(f"{unnumbered} files of {folder.name} whose name does not end in an identity")


def _check_images(reading: Reading, images: dict[Key, _Image], expected: RegdbCounts | None) -> None:
    counts = reading.counts
    counts["images"], counts["identities"] = {}, {}
    per_id = {m: Counter(image.pid for image in images.values() if image.modality == m) for m in range(2)}
    for m, modality in enumerate(MODALITIES):
        where = reading.root / FOLDERS[m]
        counts["images"][modality], counts["identities"][modality] = per_id[m].total(), len(per_id[m])
        if expected is None:
            continue
        unpack = "unpack the distribution again"
        reading.check(f"{FOLDERS[m]}: identities", expected.ids, len(per_id[m]), where, unpack)
        reading.check(f"{FOLDERS[m]}: images", expected.ids * expected.images, per_id[m].total(), where, unpack)
        outside = sorted(pid for pid in per_id[m] if not 1 <= pid <= expected.ids)
        found = format_ids(outside, 3) if outside else 0
        reading.check(f"{FOLDERS[m]}: identities outside 1 to {expected.ids}", 0, found, where, unpack, not outside)
        wrong = sorted(pid for pid in range(1, expected.ids + 1) if per_id[m][pid] != expected.images)
        found = 0 if not wrong else f"{len(wrong)} (first: {wrong[0]}, {per_id[m][wrong[0]]} images)"
        where = where / str(wrong[0]) if wrong else where
        reading.check(f"{FOLDERS[m]}: identities without {expected.images} images", 0, found, where, unpack, not wrong)
    difference = per_id[0].keys() ^ per_id[1].keys()
    found = 0 if not difference else f"{len(difference)} ({format_ids(difference, 3)})"
    reading.check(
        "identities in one modality only", 0, found, reading.root, "unpack the distribution again", not difference
    )


def _read_trials(
    reading: Reading, idx: Path, images: dict[Key, _Image]
) -> dict[int, dict[tuple[str, int], _SplitFile]]:
    """The split files of each trial, keyed by (split, modality)."""
    expected = {
        f"{split}_{folder.lower()}_{t}.txt" for split in SPLITS for folder in FOLDERS for t in range(1, TRIALS + 1)
    }
    folders, files = list_folder(idx)
    for entry in [*folders, *files]:
        if entry.name.casefold() not in expected:
            reading.skip(entry.path)
    trials: dict[int, dict[tuple[str, int], _SplitFile]] = {}
    found = 0
    for trial in range(1, TRIALS + 1):
        read = {}
        for split, modality in itertools.product(SPLITS, range(2)):
            path = find_file(reading, idx, f"{split}_{FOLDERS[modality].lower()}_{trial}.txt")
            if path is not None:
                read[split, modality] = _read_split_file(reading, path, modality, images)
        found += len(read)
        if len(read) == 4:
            trials[trial] = read
        else:
            reading.warn(f"trial {trial} left out: {4 - len(read)} of its four split files missing")
    reading.check("split files", 4 * TRIALS, found, idx, _RESTORE)
    if not trials:
        raise StudyError(f"{idx} has no trial with its four split files; expected the tree {TREE}; {_RESTORE}")
    return trials


def _read_split_file(reading: Reading, path: Path, modality: int, images: dict[Key, _Image]) -> _SplitFile:
    name = path.relative_to(reading.root).as_posix()
    keys: list[Key] = []
    label_of: dict[int, int] = {}
    line_of: dict[Key, int] = {}
    labels: list[tuple[int, int, int]] = []
    missing: list[str] = []
    for number, raw in enumerate(read_split_text(reading, path).split("\n"), start=1):
        line = raw.strip()
        if line.endswith(","):
            reading.warn(f"trailing comma in {name}")
            line = line.rstrip(", \t")
        elif line != raw:
            reading.warn(f"spaces at a line's ends in {name}")
        if not line:
            if raw.strip():
                reading.warn(f"empty entry in {name}")
            continue
        where = f"{path}, line {number}"
        text, _, label_text = line.rpartition(" ")
        if not text or not re.fullmatch(r"-?[0-9]+", label_text):
            raise StudyError(f"{where}: expected `{FOLDERS[modality]}/<id>/<file> <label>`, found {line!r}; {_RESTORE}")
        key, listed = _parse_path(reading, where, name, text.strip(), modality)
        if key in line_of:
            reading.problems.append(
                f"{where}: {listed} stands in line {line_of[key]} already, expected once; {_RESTORE}"
            )
            continue
        line_of[key] = number
        image = images.get(key)
        if image is None:
            missing.append(listed)
        elif image.path != listed:
            reading.warn("paths in the split files differ in case from the files on disk")
        labels.append((number, key[1], int(label_text)))
        keys.append(key)
    found: object = 0 if not missing else f"{len(missing)} ({missing[0]})"
    if missing:
        reading.check(f"{path.name}: lines whose image is missing", 0, found, path, "unpack the images again", False)
    _check_labels(reading, path, labels, label_of)
    return _SplitFile(name, keys, label_of)


def _parse_path(reading: Reading, where: str, name: str, text: str, modality: int) -> tuple[Key, str]:
    if "\\" in text:
        reading.warn(f"backslashes in {name}")
        text = text.replace("\\", "/")
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or ":" in text:
        raise StudyError(f"{where}: {text} points outside the data set's folder, expected a path below it; {_RESTORE}")
    parts = path.parts
    if len(parts) != 3 or parts[0].casefold() != FOLDERS[modality].casefold() or not re.fullmatch(r"[0-9]+", parts[1]):
        raise StudyError(f"{where}: expected a path {FOLDERS[modality]}/<id>/<file>, found {text}; {_RESTORE}")
    return (modality, int(parts[1]), parts[2].casefold()), path.as_posix()


def _check_labels(reading: Reading, path: Path, labels: list[tuple[int, int, int]], label_of: dict[int, int]) -> None:
    """Fill `label_of`: one label per identity, 0..n-1 over the file's n identities."""
    n_ids = len({pid for _, pid, _ in labels})
    pid_of: dict[int, int] = {}
    for number, pid, label in labels:
        if not 0 <= label < n_ids:
            reading.problems.append(
                f"{path}, line {number}: label expected from 0 to {n_ids - 1}, found {label}; {_RESTORE}"
            )
        elif label_of.setdefault(pid, label) != label:
            reading.problems.append(
                f"{path}, line {number}: identity {pid} has label {label}, expected {label_of[pid]} as before; "
                f"{_RESTORE}"
            )
        elif pid_of.setdefault(label, pid) != pid:
            reading.problems.append(
                f"{path}, line {number}: label {label} belongs to identity {pid_of[label]} already, found {pid}; "
                f"{_RESTORE}"
            )
    if list(label_of.values()) != sorted(label_of.values()):
        reading.warn(
            f"labels not in order of appearance in {path.name}; they are not used, the folder id is the identity"
        )


def _check_trial(
    reading: Reading,
    trial: int,
    files: dict[tuple[str, int], _SplitFile],
    images: dict[Key, _Image],
    expected: RegdbCounts | None,
) -> dict[Key, str]:
    """Checks within one trial; returns the split of each image on disk that the trial names."""
    where = reading.root / "idx"
    pids = {}
    for split in SPLITS:
        visible, thermal = (files[split, m] for m in range(2))
        pids[split] = visible.label_of.keys() | thermal.label_of.keys()
        differing = sorted(pid for pid in pids[split] if visible.label_of.get(pid) != thermal.label_of.get(pid))
        reading.check(
            f"trial {trial}, {split}: identities whose visible and thermal labels differ",
            0,
            f"{len(differing)} ({format_ids(differing, 3)})" if differing else 0,
            where / Path(thermal.name).name,
            _RESTORE,
            not differing,
        )
        if expected is not None:
            lines = expected.lines if split == "train" else expected.test_lines
            ids = expected.train_ids if split == "train" else expected.ids - expected.train_ids
            reading.check(
                f"trial {trial}, {split}: identities / visible lines / thermal lines",
                (ids, lines, lines),
                (len(pids[split]), len(visible.keys), len(thermal.keys)),
                where,
                _RESTORE,
            )
    shared = pids["train"] & pids["test"]
    if shared:  # testing on trained identities can never be excused
        reading.problems.append(
            f"{where}: trial {trial}: training and test files share identities, expected none, found "
            f"{format_ids(shared)}; {_RESTORE}"
        )
    reading.check(f"trial {trial}: identities in both train and test", 0, len(shared), where, _RESTORE)
    split_of = {key: split for (split, _), file in files.items() for key in file.keys if key in images}
    unnamed = [image.path for key, image in images.items() if key not in split_of]
    found = 0 if not unnamed else f"{len(unnamed)} ({unnamed[0]})"
    reading.check(f"trial {trial}: images in neither train nor test", 0, found, where, _RESTORE, not unnamed)
    reading.counts.setdefault("trials", {})[str(trial)] = {
        split: {
            "ids": len({pid for (_, pid, _), s in split_of.items() if s == split}),
            **{m: sum(s == split and key[0] == i for key, s in split_of.items()) for i, m in enumerate(MODALITIES)},
        }
        for split in SPLITS
    }
    return split_of


def _check_across(reading: Reading, splits: dict[int, dict[Key, str]], expected: RegdbCounts | None) -> None:
    """How many training identities two trials share: why a model may only be tested on its own trial."""
    train = {trial: {pid for (_, pid, _), s in split_of.items() if s == "train"} for trial, split_of in splits.items()}
    overlaps = [len(train[a] & train[b]) for a, b in itertools.combinations(sorted(train), 2)]
    if overlaps:
        reading.counts["shared_train_ids"] = {"least": min(overlaps), "most": max(overlaps)}
        least, most = expected.shared if expected is not None else (min(overlaps), max(overlaps))
        if min(overlaps) < least or max(overlaps) > most:
            reading.warn(
                f"two trials share {min(overlaps)} to {max(overlaps)} training identities, the published splits "
                f"{least} to {most}"
            )


def _check_modalities(
    reading: Reading, images: dict[Key, _Image], splits: dict[int, dict[Key, str]], train_splits: Sequence[str]
) -> None:
    """Training draws visible and infrared images of each identity: one alone is an error in a training split."""
    named: set[int] = set()
    for trial, split_of in splits.items():
        seen: dict[int, set[int]] = {}
        for (modality, pid, _), split in split_of.items():
            if split in train_splits:
                seen.setdefault(pid, set()).add(modality)
        for pid in sorted(seen):
            if len(seen[pid]) == 1 and pid not in named:
                named.add(pid)
                absent = MODALITIES[1 - min(seen[pid])]
                reading.problems.append(
                    f"{reading.root}: identity {pid} has no {absent} image in the training split of trial {trial}, "
                    "expected both modalities; restore its images or drop its lines from the idx files"
                )


def _manifest(images: dict[Key, _Image], splits: dict[int, dict[Key, str]]) -> pd.DataFrame:
    # dictionaries keep the order of scanning: visible then infrared, natural order of id and file name
    rows = list(images.values())
    return pd.DataFrame(
        {
            "row": np.arange(len(rows)),
            "path": [image.path for image in rows],
            "pid": np.array([image.pid for image in rows], dtype=np.int64),
            "camid": np.array([image.modality + 1 for image in rows], dtype=np.int64),
            "modality": [MODALITIES[image.modality] for image in rows],
            **{f"split_{trial}": [split_of.get(key, "") for key in images] for trial, split_of in splits.items()},
        }
    )
