"""SYSU-MM01's layout.

    cam1..cam6/{id:04d}/{n:04d}.jpg      cameras 1 2 4 5 visible, 3 6 infrared
    exp/{train,val,test,available}_id.txt
    exp/rand_perm_cam.mat                not in the archive: evaluation/data_split/ of the authors' evaluation code

Source: split files and evaluation code of the repository wuancong/SYSU-MM01; Wu et al., ICCV 2017.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from danet_core import MODALITIES
from danet_study.config import Dataset
from data_prep.index import SUFFIXES, Index

CAMERAS, INFRARED_CAMERAS = (1, 2, 3, 4, 5, 6), (3, 6)
SPLITS = ("train", "val", "test")  # also their order in the manifest
TRIALS = 10
GALLERIES = {  # setting: gallery cameras, images per camera and identity
    "all_single": ((1, 2, 4, 5), 1),
    "all_multi": ((1, 2, 4, 5), 10),
    "indoor_single": ((1, 2), 1),
    "indoor_multi": ((1, 2), 10),
}
REQUEST = "agreement form in the repository wuancong/SYSU-MM01"
IMAGE = re.compile(rf"cam([1-6])/([0-9]+)/([0-9]+){SUFFIXES}", re.IGNORECASE)
LIST = re.compile(r"exp/(train|val|test|available)_id\.txt", re.IGNORECASE)
MAT = re.compile(r"(?:exp/|data_split/|evaluation/data_split/)?rand_perm_cam\.mat", re.IGNORECASE)
UNUSED = re.compile(r"exp/(?:train|val|test|available)_id\.mat|render\.json", re.IGNORECASE)

PUBLISHED: dict[str, Any] = {  # by camera 1 to 6 where there are six values
    "ids": {"train": 296, "val": 99, "test": 96, "available": 491},
    "not available": 22,  # identities with images in none of the lists
    "cells": (333, 333, 533, 533, 533, 333),  # of rand_perm_cam
    "all": ((259, 259, 486, 493, 502, 299), (6289, 7528, 9812, 8030, 8224, 5980)),  # identities, images
    "train": ((194, 195, 293, 283, 294, 200), (4721, 5753, 5929, 4821, 4989, 4000)),
    "val": ((0, 0, 99, 99, 96, 0), (0, 0, 1980, 990, 984, 0)),
    "test": ((56, 56, 93, 94, 95, 96), (1374, 1565, 1883, 1918, 1918, 1920)),
    "galleries": {"all_single": 301, "all_multi": 3010, "indoor_single": 112, "indoor_multi": 1120},
    "queries": (3803, 1088, 1120),  # all; with a match in the indoor gallery, from camera 3 and from camera 6
}
Cells = Mapping[tuple[int, int], Mapping[int, str]]  # (camid, pid): path by image number


def read_sysu(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """Index of a tree in SYSU-MM01's layout: rows by split, camera, identity, image number; galleries (10, G).

    Accepted: other case of names, numbers without leading zeros, stray files, CRLF and spaces in the lists, gaps in the
    image numbers, an HDF5 copy of rand_perm_cam.mat.
    """
    index, lists, mats = Index(), {}, []
    cells: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)
    twice = []
    for name in files:
        if match := IMAGE.fullmatch(name):
            cam, pid, number = map(int, match.groups())
            if cells[cam, pid].setdefault(number, name) != name:
                twice.append(name)
        elif match := LIST.fullmatch(name):
            lists[match[1].lower()] = name
        elif MAT.fullmatch(name):
            mats.append(name)
        elif not UNUSED.fullmatch(name):
            index.skipped.append(name)
    if not cells:
        return index
    index.forbid("second images of a camera, identity and number", twice)
    index.forbid("camera folders that are missing or empty", sorted(set(CAMERAS) - {c for c, _ in cells}), partial=True)
    ids = _id_lists(index, root, lists, dataset.published)
    split_of = {pid: split for split in SPLITS for pid in ids[split]}
    with_images = {pid for _, pid in cells}
    index.forbid("listed identities without images", sorted(set(split_of) - with_images), partial=True)
    rows = sorted(
        (SPLITS.index(split_of[pid]), cam, pid, number, path)
        for (cam, pid), images in cells.items()
        if pid in split_of
        for number, path in images.items()
    )
    index.manifest = pd.DataFrame(
        [(path, pid, cam, MODALITIES[cam in INFRARED_CAMERAS], SPLITS[split]) for split, cam, pid, _, path in rows],
        columns=["path", "pid", "camid", "modality", "split_1"],
    )
    if not mats:
        index.findings.append(
            "exp/rand_perm_cam.mat is missing; copy it from evaluation/data_split/ of the repository wuancong/SYSU-MM01"
        )
    elif perms := read_rand_perm(index, root / mats[0]):
        _check_perms(index, cells, perms)
        _draw_galleries(index, cells, perms, ids["test"])
        if dataset.published:
            _check_published(index, cells, perms, ids, split_of)
    return index


def draw_gallery(perm: Int[np.ndarray, " M"], numbers: Sequence[int], shots: int) -> list[int]:
    """Positions in `numbers` of the images that one trial draws from one (camera, identity).

    perm: a row of rand_perm_cam, 1-based; numbers: image numbers on disk, ascending. With as many images as entries,
    entry v is the v-th image; in a subset it is the image numbered v, and absent ones are passed over.
    Source: the authors' evaluation code, `rand_perm_cam{cam}{id}(trial, 1:shots)`.
    """
    values = [int(value) for value in perm]  # uint8 in the file: cast before arithmetic
    if len(values) == len(numbers):
        return [value - 1 for value in values[:shots]]
    position = {number: i for i, number in enumerate(numbers)}
    return [position[value] for value in values if value in position][:shots]


def read_rand_perm(index: Index, path: Path) -> dict[int, list[Int[np.ndarray, "10 M"]]]:
    """rand_perm_cam.mat: by camera a list over identities 1, 2, ..; each row of a cell permutes 1..M. {} if refused.

    The original is a MATLAB v5 file of uint8; an HDF5 (v7.3) copy is read with a warning.
    """
    try:
        with path.open("rb") as stream:
            hdf5 = b"\x89HDF\r\n\x1a\n" in stream.read(520)
        cells = _load_hdf5(path) if hdf5 else _load_mat5(path)
        if len(cells) != len(CAMERAS):
            raise ValueError(f"{len(cells)} cameras")
        for cam, camera in cells.items():
            for i, rows in enumerate(camera):
                if rows.size == 0:
                    camera[i] = np.zeros((TRIALS, 0), np.uint8)
                elif len(rows) != TRIALS or (np.sort(rows, axis=1) != np.arange(1, rows.shape[1] + 1)).any():
                    raise ValueError(f"camera {cam}, identity {i + 1}: not 10 permutations")
    except Exception as error:  # scipy and h5py raise anything on damaged files
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        index.findings.append(f"{path.name} is not the authors' file ({' '.join(reason.split())[:80]}); copy it again")
        return {}
    if hdf5:
        index.warnings.append("rand_perm_cam.mat is an HDF5 (v7.3) copy, not the original file")
    return cells


def _load_mat5(path: Path) -> dict[int, list[np.ndarray]]:
    import scipy.io

    outer = scipy.io.loadmat(path, variable_names=["rand_perm_cam"])["rand_perm_cam"].ravel()
    return {cam: [np.asarray(cell) for cell in camera.ravel()] for cam, camera in enumerate(outer, start=1)}


def _load_hdf5(path: Path) -> dict[int, list[np.ndarray]]:
    """Cell arrays are arrays of references, every axis is reversed, and an empty matrix stores its size."""
    import h5py

    def matrix(cell: Any) -> np.ndarray:
        return np.zeros((TRIALS, 0), np.uint8) if cell.attrs.get("MATLAB_empty", 0) else cell[()].T

    with h5py.File(path, "r") as file:
        outer = file["rand_perm_cam"][()].ravel()
        return {
            cam: [matrix(file[cell]) for cell in file[camera][()].ravel()] for cam, camera in enumerate(outer, start=1)
        }


def _id_lists(index: Index, root: Path, lists: Mapping[str, str], published: bool) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {name: [] for name in (*SPLITS, "available")}
    for name in ids:
        if name not in lists:
            if name != "available" or published:
                index.findings.append(f"exp/{name}_id.txt is missing; copy it from the archive")
            continue
        try:
            words = re.split(r"[,\s]+", (root / lists[name]).read_bytes().decode("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            index.findings.append(
                f"exp/{name}_id.txt cannot be read ({type(error).__name__}); copy it from the archive"
            )
            continue
        ids[name] = sorted({int(word) for word in words if re.fullmatch("[0-9]+", word)})
        index.forbid(f"exp/{name}_id.txt: not a number", [word for word in words if not re.fullmatch("[0-9]*", word)])
        if len(ids[name]) < sum(word != "" for word in words):
            index.warnings.append(f"exp/{name}_id.txt names an identity twice")
    shared = {pid for a, b in itertools.combinations(SPLITS, 2) for pid in set(ids[a]) & set(ids[b])}
    index.forbid("identities in two of the lists train, val, test", sorted(shared))  # never excused: a leak
    union = {pid for split in SPLITS for pid in ids[split]}
    if "available" in lists:
        odd = sorted(union ^ set(ids["available"]))
        index.forbid("identities in available_id.txt or in a split, but not in both", odd, partial=True)
    return ids


def _check_perms(index: Index, cells: Cells, perms: Mapping[int, Sequence[np.ndarray]]) -> None:
    """Every cell of rand_perm_cam against the images on disk."""
    for cam in CAMERAS:
        on_disk = {pid: len(images) for (c, pid), images in cells.items() if c == cam}
        in_mat = {pid: rows.shape[1] for pid, rows in enumerate(perms[cam], start=1)}
        odd = [pid for pid in sorted(in_mat.keys() | on_disk) if in_mat.get(pid, 0) != on_disk.get(pid, 0)]
        found = [f"{pid:04d} ({on_disk.get(pid, 0)} of {in_mat.get(pid, 0)})" for pid in odd]
        index.forbid(f"camera {cam}: identities with other images than in rand_perm_cam.mat", found, partial=True)
    gaps = sum(sorted(images) != list(range(1, len(images) + 1)) for images in cells.values())
    if gaps:
        index.warnings.append(f"image numbers with gaps in {gaps} folders: rand_perm_cam counts images in order")


def _draw_galleries(
    index: Index, cells: Cells, perms: Mapping[int, Sequence[np.ndarray]], test_ids: Sequence[int]
) -> None:
    """Per trial the first 1 or 10 entries of its row for every test identity and gallery camera with images."""
    row_of = {path: row for row, path in enumerate(index.manifest["path"])}
    for name, (cameras, shots) in GALLERIES.items():
        trials: list[list[int]] = [[] for _ in range(TRIALS)]
        for cam in cameras:
            for pid in test_ids:
                if (cam, pid) not in cells or pid > len(perms[cam]):
                    continue
                numbers = sorted(cells[cam, pid])
                paths = [cells[cam, pid][number] for number in numbers]
                for trial, perm in zip(trials, perms[cam][pid - 1], strict=True):
                    trial += [row_of[paths[i]] for i in draw_gallery(perm, numbers, shots) if paths[i] in row_of]
        index.galleries[name] = np.sort(np.array(trials, dtype=np.int32).reshape(TRIALS, -1), axis=1)


def _check_published(
    index: Index,
    cells: Cells,
    perms: Mapping[int, Sequence[np.ndarray]],
    ids: Mapping[str, Sequence[int]],
    split_of: Mapping[int, str],
) -> None:
    """Every published count; see PUBLISHED."""
    for name, expected in PUBLISHED["ids"].items():
        index.compare(f"{name} identities", expected, len(ids[name]))
    outside = {pid for _, pid in cells} - set(split_of)
    index.compare("identities with images, not available", PUBLISHED["not available"], len(outside))
    index.compare("cells of rand_perm_cam, cameras 1 to 6", PUBLISHED["cells"], tuple(len(perms[c]) for c in CAMERAS))
    for split in ("all", *SPLITS):
        sizes = [
            [len(images) for (c, pid), images in cells.items() if c == cam and split in ("all", split_of.get(pid))]
            for cam in CAMERAS
        ]
        n_ids, n_images = PUBLISHED[split]
        index.compare(f"{split}: identities, cameras 1 to 6", n_ids, tuple(map(len, sizes)))
        index.compare(f"{split}: images, cameras 1 to 6", n_images, tuple(map(sum, sizes)))
    for name, expected in PUBLISHED["galleries"].items():
        index.compare(f"gallery {name}", expected, index.galleries[name].shape[1])
    test = [(cam, pid, len(images)) for (cam, pid), images in cells.items() if split_of.get(pid) == "test"]
    indoor = {cam: {pid for c, pid, _ in test if c in (1, 2) and (cam, c) != (3, 2)} for cam in INFRARED_CAMERAS}
    matched = (sum(n for cam, pid, n in test if cam == query and pid in indoor[query]) for query in INFRARED_CAMERAS)
    queries = sum(n for cam, _, n in test if cam in INFRARED_CAMERAS)
    index.compare("queries; with indoor match from camera 3, 6", PUBLISHED["queries"], (queries, *matched))
