"""SYSU-MM01's layout: images, identity lists and random galleries, read and verified completely.

    cam1..cam6/{id:04d}/{n:04d}.jpg      cameras 1 2 4 5 visible, 3 6 infrared
    exp/{train,val,test,available}_id.txt
    exp/rand_perm_cam.mat                not in the archive: the authors' evaluation code has it, evaluation/data_split/

Accepted, with a warning in the inventory: other case of a folder's or list's name, identities and images numbered
without leading zeros, other image types than JPEG, a byte-order mark, CRLF, spaces or a trailing comma in an identity
list, an HDF5 copy of rand_perm_cam.mat, image numbers with gaps. Identity folders without images are part of the
original and mean "absent".

Source: the split files and evaluation code of the authors' repository wuancong/SYSU-MM01; Wu et al., ICCV 2017.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from danet_core import MODALITIES
from danet_core.files import StudyError
from data_prep.rand_perm import CAMERAS, MAT_FOLDERS, MAT_SOURCE, TRIALS, read_rand_perm
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

INFRARED_CAMERAS = (3, 6)
SPLITS = ("train", "val", "test")  # also their order in the manifest
GALLERY_CAMERAS = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
SHOTS = {"single": 1, "multi": 10}
SAME_PLACE = {3: 2}  # a query of camera 3 ignores every gallery image of camera 2

TREE = "cam1..cam6/{id:04d}/{n:04d}.jpg, exp/{train,val,test,available}_id.txt, exp/rand_perm_cam.mat"
LICENCE = "the agreement form in the authors' repository wuancong/SYSU-MM01 on GitHub"
Cell = tuple[int, int]  # (camid, pid)


@dataclass(frozen=True)
class SysuCounts:
    """Counts of a complete data set; per-camera tuples are in the order of CAMERAS."""

    ids: Mapping[str, int]
    mat_ids: tuple[int, ...]
    camera_ids: tuple[int, ...]
    camera_images: tuple[int, ...]
    split_ids: Mapping[str, tuple[int, ...]]
    split_images: Mapping[str, tuple[int, ...]]
    unavailable: int
    galleries: Mapping[str, int]
    indoor_matched: Mapping[int, int]  # queries with a match in the indoor gallery, by query camera


EXPECTED = SysuCounts(
    ids={"train": 296, "val": 99, "test": 96, "available": 491},
    mat_ids=(333, 333, 533, 533, 533, 333),
    camera_ids=(259, 259, 486, 493, 502, 299),
    camera_images=(6289, 7528, 9812, 8030, 8224, 5980),
    split_ids={
        "train": (194, 195, 293, 283, 294, 200),
        "val": (0, 0, 99, 99, 96, 0),
        "test": (56, 56, 93, 94, 95, 96),
    },
    split_images={
        "train": (4721, 5753, 5929, 4821, 4989, 4000),
        "val": (0, 0, 1980, 990, 984, 0),
        "test": (1374, 1565, 1883, 1918, 1918, 1920),
    },
    unavailable=22,
    galleries={"all_single": 301, "all_multi": 3010, "indoor_single": 112, "indoor_multi": 1120},
    indoor_matched={3: 1088, 6: 1120},
)


def read_sysu(
    root: Path, *, expected: SysuCounts | None, train_splits: Sequence[str], allow_partial: bool = False
) -> Reading:
    """Read a tree in SYSU-MM01's layout.

    Args:
        root: folder with cam1..cam6 and exp.
        expected: exact counts to check, or None for a set of another size (structure and consistency only).
        train_splits: splits whose identities must have images of both modalities.
        allow_partial: only changes how galleries are drawn from cells that miss images (see `draw_gallery`);
            which findings are errors is settled by the caller, `Reading.settle`.

    Returns the Reading: manifest rows ordered by split (train, val, test), camid, pid, image number; galleries
    all_single, all_multi, indoor_single, indoor_multi, each (10, G) int32 manifest rows, ascending within a trial.

    Raises StudyError for what cannot be read past: an absent root, exp or rand_perm_cam.mat, a folder without read
    permission.
    """
    if not root.is_dir():
        raise StudyError(f"SYSU-MM01's images are not at {root}: expected the tree {TREE}; get them through {LICENCE}")
    reading = Reading(root, "sysu")
    exp = find_folder(reading, root, "exp")
    if exp is None:
        raise StudyError(f"{root} has no folder exp with the identity lists; expected the tree {TREE}; see {LICENCE}")
    perms = read_rand_perm(reading)
    ids = _read_id_lists(reading, exp, highest=max(len(cells) for cells in perms.values()), exact=expected is not None)
    cells = _scan(reading)

    split_of = {pid: split for split in SPLITS for pid in ids[split]}
    _check_ids(reading, exp, ids, cells, expected)
    _check_cameras(reading, cells, perms, split_of, expected)
    _check_perms(reading, cells, perms)
    _check_modalities(reading, exp, ids, cells, train_splits)
    reading.manifest = _manifest(cells, split_of)
    _draw_galleries(reading, cells, perms, ids["test"], allow_partial)
    _check_galleries(reading, ids["test"], cells, expected)
    return reading


def draw_gallery(perm: Int[np.ndarray, " M"], numbers: Sequence[int], shots: int) -> list[int]:
    """Positions, in natural order, of the images that one trial draws from one (camera, identity).

    Args:
        perm: one row of the identity's cell of rand_perm_cam, 1-based image numbers.
        numbers: image numbers on disk in natural order.
        shots: 1 or 10; fewer images than that: all there are.

    Where as many images are on disk as the row has entries, entry v is the v-th image in natural order, which for
    images numbered 1..m is image v. Where images are missing (a subset), entry v is the image numbered v, and absent
    ones are passed over.

    Source: the authors' evaluation code (get_gallery by `rand_perm_cam{cam}{id}(trial, 1:shots)`).
    """
    values = perm.astype(np.int64)  # uint8 in the file: cast before arithmetic
    if len(values) == len(numbers):
        return [int(value) - 1 for value in values[:shots]]
    position = {number: i for i, number in enumerate(numbers)}
    return [position[int(value)] for value in values if int(value) in position][:shots]


def _read_id_lists(reading: Reading, exp: Path, highest: int, exact: bool) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for split in (*SPLITS, "available"):
        path = find_file(reading, exp, f"{split}_id.txt")
        if path is not None:
            ids[split] = _read_id_list(reading, path, highest)
        elif split != "available":
            raise StudyError(
                f"{exp / f'{split}_id.txt'} is missing; copy it from exp/ of the data set's archive ({LICENCE})"
            )
    if "available" not in ids:
        union = sorted(set().union(*(ids[split] for split in SPLITS)))
        if exact:
            reading.check(
                "exp/available_id.txt", "present", "missing", exp, "copy it from exp/ of the data set's archive"
            )
        else:
            reading.warn("exp/available_id.txt is missing; the identities of the three splits taken instead")
        ids["available"] = union
    return ids


def _read_id_list(reading: Reading, path: Path, highest: int) -> list[int]:
    name = path.relative_to(reading.root).as_posix()
    tokens = re.split(r"[,\n]", read_split_text(reading, path).strip())
    if any(token != token.strip() for token in tokens):
        reading.warn(f"spaces in {name}")
    tokens = [token.strip() for token in tokens]
    if "" in tokens:
        reading.warn(f"empty entry or trailing comma in {name}")
        tokens = [token for token in tokens if token]
    wrong = [token for token in tokens if not re.fullmatch(r"[0-9]+", token)]
    if wrong:
        raise StudyError(
            f"{path}: expected comma-separated identity numbers, found {wrong[0]!r}; copy it again from the archive"
        )
    ids = [int(token) for token in tokens]
    if outside := sorted(pid for pid in ids if not 1 <= pid <= highest):
        reading.problems.append(
            f"{path}: identities expected from 1 to {highest} (the cells of rand_perm_cam.mat), found "
            f"{format_ids(outside)}; "
            "copy the list again from the archive"
        )
    if twice := sorted({pid for pid in ids if ids.count(pid) > 1}):
        reading.problems.append(
            f"{path}: identity {twice[0]} stands twice, expected once; copy the list again from the archive"
        )
    if ids != sorted(ids):
        reading.warn(f"identities not ascending in {name}")
    return sorted(set(ids))


def _scan(reading: Reading) -> dict[Cell, list[tuple[int, str]]]:
    """Images by (camera, identity): (image number, path relative to the root), in natural order."""
    root = reading.root
    folders, files = list_folder(root)
    known = {f"cam{cam}" for cam in CAMERAS} | {"exp"}
    used_mat_folders = {Path(folder).parts[0] for folder in MAT_FOLDERS if folder}
    for entry in folders:
        if entry.name.casefold() not in known | used_mat_folders:
            reading.skip(entry.path)
    for entry in files:
        if entry.name.casefold() not in ("rand_perm_cam.mat", "render.json"):
            reading.skip(entry.path)
    exp = find_folder(reading, root, "exp")
    if exp is not None:
        expected = {f"{split}_id.{suffix}" for split in (*SPLITS, "available") for suffix in ("txt", "mat")}
        folders, files = list_folder(exp)
        for entry in [*folders, *files]:
            if entry.name.casefold() not in expected | {"rand_perm_cam.mat"}:
                reading.skip(entry.path)

    cells: dict[Cell, list[tuple[int, str]]] = {}
    empty: dict[int, list[int]] = defaultdict(list)
    for cam in CAMERAS:
        folder = find_folder(reading, root, f"cam{cam}")
        reading.check(
            f"cam {cam}: folder",
            "present",
            "missing" if folder is None else "present",
            root / f"cam{cam}",
            "unpack the archive again",
        )
        if folder is None:
            continue
        for pid, entry in identity_folders(reading, folder):
            if entry.name != f"{pid:04d}":
                reading.warn(f"identity folders without four digits in {folder.name}")
            images = _scan_identity(reading, Path(entry.path))
            if images:
                cells[cam, pid] = images
            else:
                empty[cam].append(pid)
    reading.counts["empty_id_folders"] = {str(cam): len(pids) for cam, pids in empty.items()}
    if not cells:
        raise StudyError(f"{root} holds no image; expected the tree {TREE}; get the images through {LICENCE}")
    return cells


def _scan_identity(reading: Reading, folder: Path) -> list[tuple[int, str]]:
    images: dict[int, str] = {}
    for entry in image_files(reading, folder):
        stem, suffix = Path(entry.name).stem, Path(entry.name).suffix
        if not re.fullmatch(r"[0-9]+", stem):
            reading.skip(entry.path)
            continue
        if suffix.lower() not in (".jpg", ".jpeg"):
            reading.warn(f"images of type {suffix.lower()}, expected .jpg")
        number = int(stem)
        if number in images:
            reading.problems.append(
                f"{folder}: image number {number} stands twice, {Path(images[number]).name} and {entry.name}, "
                f"expected once; "
                "remove the one that is not in the archive"
            )
            continue
        images[number] = take_image(reading, entry)
        if len(stem) != 4:
            reading.warn("image numbers without four digits")
    return sorted(images.items())


def _check_ids(
    reading: Reading, exp: Path, ids: dict[str, list[int]], cells: Mapping[Cell, object], expected: SysuCounts | None
) -> None:
    restore = "copy the identity lists again from exp/ of the archive"
    reading.counts["ids"] = {name: len(pids) for name, pids in ids.items()}
    for name, pids in ids.items():
        if expected is not None:
            reading.check(f"{name} identities", expected.ids[name], len(pids), exp / f"{name}_id.txt", restore)
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = set(ids[a]) & set(ids[b])
        if shared:  # testing on trained identities can never be excused
            reading.problems.append(
                f"{exp}: {a}_id.txt and {b}_id.txt share identities, expected none, found {format_ids(shared)}; "
                f"{restore}"
            )
        reading.check(f"identities in both {a} and {b}", 0, len(shared), exp, restore)
    union = set().union(*(ids[split] for split in SPLITS))
    difference = union ^ set(ids["available"])
    reading.check("available, but in no split, or reverse", 0, len(difference), exp / "available_id.txt", restore)
    with_images = {pid for _, pid in cells}
    for split in SPLITS:
        absent = set(ids[split]) - with_images
        found = 0 if not absent else f"{len(absent)} ({format_ids(absent, 3)})"
        reading.check(
            f"{split} identities without images", 0, found, reading.root, "unpack the archive again", not absent
        )
    unavailable = with_images - union
    reading.counts["ids"]["unavailable"] = len(unavailable)
    if expected is not None:
        reading.check(
            "identities with images, not available",
            expected.unavailable,
            len(unavailable),
            reading.root,
            "unpack the archive again",
        )


def _check_cameras(
    reading: Reading,
    cells: Mapping[Cell, Sequence[object]],
    perms: Mapping[int, Sequence[np.ndarray]],
    split_of: Mapping[int, str],
    expected: SysuCounts | None,
) -> None:
    cameras: dict[str, dict[str, Any]] = {}
    for cam in CAMERAS:
        sizes = {pid: len(images) for (c, pid), images in cells.items() if c == cam}
        row: dict[str, Any] = {
            "ids_in_mat": len(perms[cam]),
            "ids": len(sizes),
            "images": sum(sizes.values()),
            **{
                split: {
                    "ids": sum(split_of.get(pid) == split for pid in sizes),
                    "images": sum(n for pid, n in sizes.items() if split_of.get(pid) == split),
                }
                for split in SPLITS
            },
        }
        cameras[str(cam)] = row
        if expected is None:
            continue
        where, i = reading.root / f"cam{cam}", cam - 1
        unpack = "unpack the archive again"
        reading.check(
            f"cam {cam}: cells of rand_perm_cam",
            expected.mat_ids[i],
            row["ids_in_mat"],
            reading.root / "exp",
            MAT_SOURCE,
        )
        wanted = (expected.camera_ids[i], expected.camera_images[i])
        reading.check(f"cam {cam}: identities / images", wanted, (row["ids"], row["images"]), where, unpack)
        for split in SPLITS:
            wanted = (expected.split_ids[split][i], expected.split_images[split][i])
            found = (row[split]["ids"], row[split]["images"])
            reading.check(f"cam {cam}, {split}: identities / images", wanted, found, where, unpack)
    reading.counts["cameras"] = cameras
    reading.counts["modalities"] = {
        modality: {
            "all": sum(cameras[str(cam)]["images"] for cam in _cameras_of(modality)),
            **{split: sum(cameras[str(cam)][split]["images"] for cam in _cameras_of(modality)) for split in SPLITS},
        }
        for modality in MODALITIES
    }
    if expected is not None:
        pids = sum(split_of.get(pid) in ("train", "val") for pid in {pid for _, pid in cells})
        _check_totals(reading, pids, expected)


def _check_totals(reading: Reading, pids: int, expected: SysuCounts) -> None:
    """Visible and infrared images per split, and of the 395 identities of train + val that the paper trains on."""
    found = {s: [reading.counts["modalities"][m][s] for m in MODALITIES] for s in SPLITS}
    wanted = {s: [sum(expected.split_images[s][cam - 1] for cam in _cameras_of(m)) for m in MODALITIES] for s in SPLITS}
    remedy = "unpack the archive again"
    for split in SPLITS:
        name = f"{split}: visible / infrared images"
        reading.check(name, tuple(wanted[split]), tuple(found[split]), reading.root, remedy)
    both_found = (*(a + b for a, b in zip(found["train"], found["val"], strict=True)), pids)
    both_wanted = (
        *(a + b for a, b in zip(wanted["train"], wanted["val"], strict=True)),
        expected.ids["train"] + expected.ids["val"],
    )
    reading.check("train + val: visible / infrared / identities", both_wanted, both_found, reading.root, remedy)


def _check_perms(
    reading: Reading, cells: Mapping[Cell, Sequence[tuple[int, str]]], perms: Mapping[int, Sequence[np.ndarray]]
) -> None:
    """Every cell of rand_perm_cam.mat against the images on disk."""
    gaps = 0
    for cam in CAMERAS:
        on_disk = {pid: images for (c, pid), images in cells.items() if c == cam}
        in_mat = {i + 1: rows.shape[1] for i, rows in enumerate(perms[cam])}
        differing = [pid for pid in sorted(in_mat.keys() | on_disk) if in_mat.get(pid, 0) != len(on_disk.get(pid, ()))]
        found: object = 0
        where = reading.root / f"cam{cam}"
        if differing:
            pid = differing[0]
            where = where / f"{pid:04d}"
            first = f"{in_mat.get(pid, 0)} in it, {len(on_disk.get(pid, ()))} on disk"
            found = f"{len(differing)} (first: identity {pid}, {first})"
        reading.check(
            f"cam {cam}: identities whose images differ from rand_perm_cam",
            0,
            found,
            where,
            "unpack the camera's folder again, or take rand_perm_cam.mat from the authors' evaluation code",
        )
        gaps += sum([number for number, _ in images] != list(range(1, len(images) + 1)) for images in on_disk.values())
    if gaps:
        reading.warn(f"image numbers with gaps in {gaps} folders; rand_perm_cam then counts images in natural order")
    reading.counts["numbering_gaps"] = gaps


def _check_modalities(
    reading: Reading,
    exp: Path,
    ids: Mapping[str, Sequence[int]],
    cells: Mapping[Cell, object],
    train_splits: Sequence[str],
) -> None:
    """Training draws visible and infrared images of each identity: one alone is an error in a training split."""
    seen: dict[int, set[str]] = defaultdict(set)
    for cam, pid in cells:
        seen[pid].add(_modality(cam))
    for split in SPLITS:
        for pid in ids[split]:
            if len(seen[pid]) != 1:
                continue
            absent = MODALITIES[1] if MODALITIES[0] in seen[pid] else MODALITIES[0]
            if split in train_splits:
                reading.problems.append(
                    f"{reading.root}: identity {pid} of the training split {split} has no {absent} image, expected "
                    f"both modalities; "
                    f"restore its folders or drop it from {exp.name}/{split}_id.txt and available_id.txt"
                )
            else:
                reading.warn(f"identity {pid} of split {split} has no {absent} image")


def _manifest(cells: Mapping[Cell, Sequence[tuple[int, str]]], split_of: Mapping[int, str]) -> pd.DataFrame:
    rows = [
        (SPLITS.index(split_of[pid]), cam, pid, number, path)
        for (cam, pid), images in cells.items()
        if pid in split_of
        for number, path in images
    ]
    rows.sort()
    return pd.DataFrame(
        {
            "row": np.arange(len(rows)),
            "path": [path for *_, path in rows],
            "pid": np.array([pid for _, _, pid, _, _ in rows], dtype=np.int64),
            "camid": np.array([cam for _, cam, *_ in rows], dtype=np.int64),
            "modality": [_modality(cam) for _, cam, *_ in rows],
            "split_1": [SPLITS[split] for split, *_ in rows],
        }
    )


def _draw_galleries(
    reading: Reading,
    cells: Mapping[Cell, Sequence[tuple[int, str]]],
    perms: Mapping[int, Sequence[np.ndarray]],
    test_ids: Sequence[int],
    allow_partial: bool,
) -> None:
    """Fill reading.galleries: per trial the first 1 or 10 entries of its row, per (camera, identity) with images."""
    row_of = dict(zip(reading.manifest["path"], reading.manifest["row"], strict=True))
    for mode, cameras in GALLERY_CAMERAS.items():
        for shot, shots in SHOTS.items():
            trials: list[list[int]] = [[] for _ in range(TRIALS)]
            for cam in cameras:
                for pid in test_ids:
                    images = cells.get((cam, pid))
                    rows = perms[cam][pid - 1] if 1 <= pid <= len(perms[cam]) else np.zeros((TRIALS, 0), np.uint8)
                    if images is None or (rows.shape[1] != len(images) and not allow_partial):
                        continue  # the difference is a failed check already
                    numbers = [number for number, _ in images]
                    for trial in range(TRIALS):
                        trials[trial] += [row_of[images[i][1]] for i in draw_gallery(rows[trial], numbers, shots)]
            reading.galleries[f"{mode}_{shot}"] = np.sort(np.array(trials, dtype=np.int32).reshape(TRIALS, -1), axis=1)


def _check_galleries(
    reading: Reading, test_ids: Sequence[int], cells: Mapping[Cell, Sequence[object]], expected: SysuCounts | None
) -> None:
    where = reading.root / "exp"
    names = list(reading.galleries)
    for trial in range(TRIALS):
        found = tuple(len(np.unique(reading.galleries[name][trial])) for name in names)
        # without exact counts: what the images on disk give, min(shots, images) per (camera, identity)
        wanted = tuple(
            expected.galleries[f"{mode}_{shot}"]
            if expected is not None
            else sum(min(shots, len(cells.get((cam, pid), ()))) for cam in cameras for pid in test_ids)
            for mode, cameras in GALLERY_CAMERAS.items()
            for shot, shots in SHOTS.items()
        )
        reading.check(
            f"trial {trial + 1}: gallery all / all multi / indoor / indoor multi",
            wanted,
            found,
            where,
            "see the checks per camera",
        )
    matched = {
        mode: {
            cam: sum(
                len(cells.get((cam, pid), ()))
                for pid in test_ids
                if any((g, pid) in cells for g in cameras if g != SAME_PLACE.get(cam))
            )
            for cam in INFRARED_CAMERAS
        }
        for mode, cameras in GALLERY_CAMERAS.items()
    }
    queries = sum(len(cells.get((cam, pid), ())) for cam in INFRARED_CAMERAS for pid in test_ids)
    reading.counts["queries"] = {
        "all": queries,
        **{f"{mode}_with_match": sum(by_camera.values()) for mode, by_camera in matched.items()},
    }
    reading.counts["galleries"] = {name: int(rows.shape[1]) for name, rows in reading.galleries.items()}
    see = "see the checks per camera"
    if expected is None:
        usable = bool(queries and all(reading.counts["galleries"].values()))
        remedy = "give test identities images in camera 3 or 6 and in camera 1 or 2"
        reading.check("queries, and galleries to search", True, usable, where, remedy)
        return
    total = sum(expected.split_images["test"][cam - 1] for cam in INFRARED_CAMERAS)
    answerable = sum(matched["all"].values())
    reading.check("queries / with a match in all-search", (total, total), (queries, answerable), where, see)
    both = tuple(expected.indoor_matched[cam] for cam in INFRARED_CAMERAS)
    found_both = tuple(matched["indoor"][cam] for cam in INFRARED_CAMERAS)
    name = "indoor queries with a match: cam 3 / cam 6 / both"
    reading.check(name, (*both, sum(both)), (*found_both, sum(found_both)), where, see)


def _modality(cam: int) -> str:
    return MODALITIES[cam in INFRARED_CAMERAS]


def _cameras_of(modality: str) -> tuple[int, ...]:
    return tuple(cam for cam in CAMERAS if _modality(cam) == modality)
