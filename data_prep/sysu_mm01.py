"""SYSU-MM01's layout.

    cam1..cam6/{id:04d}/{n:04d}.jpg      cameras 1 2 4 5 visible, 3 6 infrared
    exp/{train,val,test,available}_id.txt
    exp/rand_perm_cam.mat                not in the archive: evaluation/data_split/ of the authors' evaluation code

Source: split files and evaluation code of the repository wuancong/SYSU-MM01; Wu et al., ICCV 2017.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from jaxtyping import Int

from danet_core import MODALITIES
from danet_study.config import Dataset
from danet_study.matlab import read_mat
from danet_study.protocols import SYSU_SEARCHES
from data_prep.index import SUFFIXES, Index

CAMERAS, INFRARED_CAMERAS = (1, 2, 3, 4, 5, 6), (3, 6)
SPLITS = ("train", "val", "test")  # also their order in the manifest
TRIALS = 10
GALLERIES = {  # setting: gallery cameras, images per camera and identity
    f"{search}_{name}": (cameras, shots)
    for search, cameras in SYSU_SEARCHES.items()
    for name, shots in (("single", 1), ("multi", 10))
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
Perms = Mapping[int, Sequence[np.ndarray]]  # by camera a list over identities; see read_rand_perm


def read_tree(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """Index of a tree in SYSU-MM01's layout: rows by split, camera, identity, image number; galleries (10, G).

    Accepted: other case of names, numbers without leading zeros, stray files, CRLF and spaces in the lists, gaps in the
    image numbers, an HDF5 copy of rand_perm_cam.mat. Other sets than the published one need neither all cameras nor
    val_id.txt, available_id.txt and rand_perm_cam.mat.
    """
    index, rows, lists, mats = Index(), [], {}, []
    for name in files:
        if match := IMAGE.fullmatch(name):
            rows.append((name, *map(int, match.groups())))
        elif match := LIST.fullmatch(name):
            lists[match[1].lower()] = root / name
        elif MAT.fullmatch(name):
            mats.append(root / name)
        elif not UNUSED.fullmatch(name):
            index.skipped.append(name)
    if not rows:
        return index
    images = pd.DataFrame(rows, columns=["path", "camid", "pid", "number"])
    twice = images.loc[images.duplicated(["camid", "pid", "number"]), "path"]
    index.forbid("second images of a camera, identity and number", twice)
    if dataset.published:
        index.forbid("camera folders that are missing or empty", sorted({*CAMERAS} - {*images["camid"]}), partial=True)
    needed = [*SPLITS, "available"] if dataset.published else sorted({"train", "test", *lists})
    ids: dict[str, set[int]] = {"val": set(), "available": set()}
    ids |= {name: _read_list(index, name, lists.get(name)) for name in needed}
    split_of = {pid: split for split in SPLITS for pid in ids[split]}
    shared = {pid for a, b in itertools.combinations(SPLITS, 2) for pid in ids[a] & ids[b]}
    index.forbid("identities in two of the lists train, val, test", sorted(shared))  # never excused: a leak
    odd = sorted(split_of.keys() ^ ids["available"]) if "available" in needed else []
    index.forbid("identities in available_id.txt or in a split, but not in both", odd, partial=True)
    absent = sorted(split_of.keys() - {*images["pid"]})
    index.forbid("listed identities without images", absent, partial=True)

    images["split"] = pd.Categorical(images["pid"].map(split_of), SPLITS, ordered=True)  # none if not available
    images["modality"] = images["camid"].isin(INFRARED_CAMERAS).map({True: MODALITIES[1], False: MODALITIES[0]})
    images = images.sort_values(["split", "camid", "pid", "number"], ignore_index=True)
    manifest = images[images["split"].notna()]
    index.manifest = manifest.rename(columns={"split": "split_1"})[["path", "pid", "camid", "modality", "split_1"]]
    if mats and (perms := read_rand_perm(index, mats[0])):
        _check_perms(index, images, perms)
        index.galleries = _draw_galleries(manifest[manifest["split"] == "test"], perms)
        if dataset.published:
            _check_published(index, images, perms, ids)
    elif not mats and dataset.published:
        index.findings.append(
            "exp/rand_perm_cam.mat is missing; copy it from evaluation/data_split/ of the repository wuancong/SYSU-MM01"
        )
    elif not mats:
        index.warnings.append("no exp/rand_perm_cam.mat: set evaluation.galleries to random_seed in params.yaml")
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
    """rand_perm_cam.mat: by camera a list over identities 1, 2, ...; each row of a cell permutes 1..M. {} if refused.

    The original is a MATLAB v5 file of uint8; an HDF5 (v7.3) copy is read with a warning.
    """
    try:
        hdf5 = h5py.is_hdf5(path)
        cells = dict(enumerate(read_mat(path, "rand_perm_cam"), start=1))
        if len(cells) != len(CAMERAS):
            raise ValueError(f"{len(cells)} cameras")
        for cam, camera in cells.items():
            for pid, rows in enumerate(camera, start=1):
                expected = np.arange(1, rows.shape[1] + 1)
                if rows.size and (len(rows) != TRIALS or (np.sort(rows, axis=1) != expected).any()):
                    raise ValueError(f"camera {cam}, identity {pid}: not 10 permutations")
    except Exception as error:  # anything, for other cells than expected
        reason = str(error) if type(error) is ValueError else "damaged"
        index.findings.append(f"{path.name} is not as the authors' ({reason}); copy it again")
        return {}
    if hdf5:
        index.warnings.append("rand_perm_cam.mat is an HDF5 (v7.3) copy, not the original file")
    return cells


def _read_list(index: Index, name: str, path: Path | None) -> set[int]:
    if path is None:
        index.findings.append(f"exp/{name}_id.txt is missing; add it, with identities separated by commas")
        return set()
    try:
        words = re.findall(r"[^,\s]+", path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        index.findings.append(f"exp/{name}_id.txt cannot be read ({type(error).__name__}); copy it again")
        return set()
    numbers = [word for word in words if re.fullmatch("[0-9]+", word)]
    index.forbid(f"exp/{name}_id.txt: not a number", [word for word in words if word not in numbers])
    return set(map(int, numbers))


def _check_perms(index: Index, images: pd.DataFrame, perms: Perms) -> None:
    """Every cell of rand_perm_cam against the images on disk."""
    for cam, cells in perms.items():
        on_disk = images.loc[images["camid"] == cam, "pid"].value_counts()
        in_mat = pd.Series({pid: rows.shape[1] for pid, rows in enumerate(cells, start=1)}, dtype=int)
        both = pd.DataFrame({"disk": on_disk, "mat": in_mat}).fillna(0).astype(int).query("disk != mat")
        found = [f"{pid:04d} ({disk} of {mat})" for pid, disk, mat in both.itertuples()]
        index.forbid(f"camera {cam}: identities with other images than in rand_perm_cam.mat", found, partial=True)
    numbers = images.groupby(["camid", "pid"])["number"].agg(["size", "max"])
    if gaps := int((numbers["size"] != numbers["max"]).sum()):
        index.warnings.append(f"image numbers with gaps in {gaps} folders: rand_perm_cam counts images in order")


def _draw_galleries(test: pd.DataFrame, perms: Perms) -> dict[str, Int[np.ndarray, "10 G"]]:
    """Per trial the first 1 or 10 entries of its row for every test identity and gallery camera with images.

    test: the test images, indexed by manifest row, by image number within a camera and identity.
    """
    galleries = {}
    cells: list[Any] = [(*key, cell.index, [*cell["number"]]) for key, cell in test.groupby(["camid", "pid"])]
    for name, (cameras, shots) in GALLERIES.items():
        trials: list[list[int]] = [[] for _ in range(TRIALS)]
        for cam, pid, rows, numbers in cells:
            if cam in cameras and pid <= len(perms[cam]):
                for trial, perm in zip(trials, perms[cam][pid - 1], strict=False):  # an empty cell may have no row
                    trial += [rows[i] for i in draw_gallery(perm, numbers, shots)]
        galleries[name] = np.sort(np.array(trials, dtype=np.int32), axis=1)
    return galleries


def _check_published(index: Index, images: pd.DataFrame, perms: Perms, ids: Mapping[str, set[int]]) -> None:
    """Every published count; see PUBLISHED."""
    for name, expected in PUBLISHED["ids"].items():
        index.compare(f"{name} identities", expected, len(ids[name]))
    outside = images.loc[images["split"].isna(), "pid"].nunique()
    index.compare("identities with images, not available", PUBLISHED["not available"], outside)
    index.compare("cells of rand_perm_cam, cameras 1 to 6", PUBLISHED["cells"], tuple(len(perms[c]) for c in CAMERAS))
    for split in ("all", *SPLITS):
        part = images if split == "all" else images[images["split"] == split]
        found = part.groupby("camid")["pid"].agg(["nunique", "size"]).reindex(CAMERAS, fill_value=0)
        n_ids, n_images = PUBLISHED[split]
        index.compare(f"{split}: identities, cameras 1 to 6", n_ids, tuple(found["nunique"].tolist()))
        index.compare(f"{split}: images, cameras 1 to 6", n_images, tuple(found["size"].tolist()))
    for name, expected in PUBLISHED["galleries"].items():
        index.compare(f"gallery {name}", expected, index.galleries[name].shape[1])
    test = images[images["split"] == "test"]
    queries = [test.loc[test["camid"] == cam, "pid"] for cam in INFRARED_CAMERAS]
    indoor = [test.loc[test["camid"].isin(cameras), "pid"] for cameras in ((1,), (1, 2))]  # 2 and 3: the same place
    matched = [int(query.isin(pids).sum()) for query, pids in zip(queries, indoor, strict=True)]
    n_queries = (sum(map(len, queries)), *matched)
    index.compare("queries; with indoor match from camera 3, 6", PUBLISHED["queries"], n_queries)
