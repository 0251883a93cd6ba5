"""Small and full-size trees in the layouts of SYSU-MM01 and RegDB, and a small one in LLCM's, for tests of data_prep.

A plan says which images exist; `counts_of_sysu` counts them with plain loops, independently of the reader. The full
plan has exactly the published counts, though not the published identities, which are licence-gated.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from danet_study.config import Dataset

CAMERAS = (1, 2, 3, 4, 5, 6)
SPLITS = ("train", "val", "test")


def dataset(layout: str, root: Path, **changes: Any) -> Dataset:
    """A row of `datasets` for a tree; `published` takes the counts of the licensed set."""
    row = {"name": "mine", "title": "My set", "layout": layout, "protocol": layout, "root": root}
    row |= {"image": {"height": 32, "width": 32}, "train_splits": ["train"]}
    return Dataset(**{**row, **changes})


# ---------------------------------------------------------------- SYSU-MM01


@dataclass
class SysuPlan:
    """Identities by split, images by (camid, pid), and how many cells each camera has in rand_perm_cam.mat."""

    ids: dict[str, list[int]]
    images: dict[tuple[int, int], int]
    mat_ids: dict[int, int]
    empty: list[tuple[int, int]] = field(default_factory=list)


def small_sysu_plan() -> SysuPlan:
    """4 train, 2 val and 4 test identities; one test identity lacks cameras 1 and 2, one has 12 images in camera 4."""
    ids = {"train": [1, 2, 5, 11], "val": [7, 8], "test": [3, 4, 6, 10]}
    images = {}
    for pid in ids["train"]:
        images |= {(cam, pid): 2 for cam in CAMERAS}
    for pid in ids["val"]:
        images |= {(cam, pid): 3 for cam in (3, 4, 5)}
    for pid in ids["test"]:
        images |= {(cam, pid): 4 for cam in CAMERAS}
    del images[1, 10], images[2, 10]
    images[4, 6] = 12
    images[4, 9] = 2  # identity 9 has images but is not available
    return SysuPlan(ids, images, dict.fromkeys(CAMERAS, 12), empty=[(1, 10), (2, 7)])


def full_sysu_plan() -> SysuPlan:
    """A plan with every count of the published data set: 45,863 images."""
    unavailable = [9, 23, 26, 32, 33, 38, 39, 46, 47, 48, 57, 67, 94, 96, 97, 146, 242, 347, 485, 500, 511, 529]
    low = [pid for pid in range(1, 334) if pid not in unavailable]
    high = [pid for pid in range(334, 534) if pid not in unavailable]
    special = [21, 27, 31, 257, 263, 333]
    test = sorted(special + [pid for pid in low if pid not in special][:90])
    low_train = [pid for pid in low if pid not in test]
    val, high_train = high[:99], high[99 : 99 + 296 - len(low_train)]
    train = low_train + high_train
    images: dict[tuple[int, int], int] = {}

    def share(cam: int, pids: list[int], total: int) -> None:
        for i, pid in enumerate(pids):
            images[cam, pid] = total // len(pids) + (i < total % len(pids))

    share(1, low_train[:194], 4721)
    share(2, low_train[:195], 5753)
    share(3, low_train[3:] + high_train, 5929)
    share(4, low_train[13:] + high_train, 4821)
    share(5, low_train[2:] + high_train, 4989)
    share(6, low_train[:200], 4000)
    share(3, val, 1980)
    share(4, val, 990)
    share(5, val[:96], 984)
    outdoor_only = [pid for pid in test if pid not in (21, 27)][-40:]
    indoor = [pid for pid in test if pid not in outdoor_only]
    share(1, indoor, 1374)
    share(2, indoor, 1565)
    in_camera_3 = [pid for pid in test if pid not in (21, 27, 257)]
    share(3, [pid for pid in in_camera_3 if pid in indoor], 1088)
    share(3, [pid for pid in in_camera_3 if pid not in indoor], 795)
    share(4, [pid for pid in test if pid not in (263, 333)], 1918)
    share(5, [pid for pid in test if pid != 31], 1918)
    share(6, test, 1920)
    low_unavailable = [pid for pid in unavailable if pid <= 333]
    share(1, low_unavailable[:9], 194)
    share(2, low_unavailable[:8], 210)
    share(3, low_unavailable[:1], 20)
    share(4, unavailable[-17:], 301)
    share(5, low_unavailable, 333)
    share(6, low_unavailable[:3], 60)
    mat_ids = {1: 333, 2: 333, 3: 533, 4: 533, 5: 533, 6: 333}
    empty = [(cam, pid) for cam in CAMERAS for pid in range(1, mat_ids[cam] + 1) if (cam, pid) not in images][::7]
    return SysuPlan({"train": train, "val": val, "test": test}, images, mat_ids, empty)


def counts_of_sysu(plan: SysuPlan) -> dict[str, Any]:
    """What `sysu_mm01.PUBLISHED` would be for this plan, with plain loops."""
    split_of = {pid: split for split, pids in plan.ids.items() for pid in pids}

    def per_camera(count, keep) -> tuple[int, ...]:
        return tuple(sum(count(n) for (c, pid), n in plan.images.items() if c == cam and keep(pid)) for cam in CAMERAS)

    def pair(keep) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return per_camera(lambda n: 1, keep), per_camera(lambda n: n, keep)

    galleries = {}
    for mode, cameras in {"all": (1, 2, 4, 5), "indoor": (1, 2)}.items():
        for shot, shots in {"single": 1, "multi": 10}.items():
            total = 0
            for pid in plan.ids["test"]:
                for cam in cameras:
                    total += min(shots, plan.images.get((cam, pid), 0))
            galleries[f"{mode}_{shot}"] = total
    queries, matched = 0, {3: 0, 6: 0}
    for pid in plan.ids["test"]:
        queries += plan.images.get((3, pid), 0) + plan.images.get((6, pid), 0)
        if (1, pid) in plan.images:
            matched[3] += plan.images.get((3, pid), 0)
        if (1, pid) in plan.images or (2, pid) in plan.images:
            matched[6] += plan.images.get((6, pid), 0)
    return {
        "ids": {**{split: len(pids) for split, pids in plan.ids.items()}, "available": len(split_of)},
        "not available": len({pid for _, pid in plan.images if pid not in split_of}),
        "cells": tuple(plan.mat_ids[cam] for cam in CAMERAS),
        "all": pair(lambda pid: True),
        **{split: pair(lambda pid, split=split: split_of.get(pid) == split) for split in SPLITS},
        "galleries": galleries,
        "queries": (queries, matched[3], matched[6]),
    }


def write_sysu(root: Path, plan: SysuPlan, *, linked: bool = False) -> Path:
    """Write a plan. `linked`: hard links of one image per camera, for large trees; else each has its own color."""
    for cam in CAMERAS:
        (root / f"cam{cam}").mkdir(parents=True)
        source = root / f"cam{cam}" / "source"
        source.write_bytes(jpeg((40 * cam, 0, 0)))
        for (c, pid), n in plan.images.items():
            if c != cam:
                continue
            folder = root / f"cam{cam}" / f"{pid:04d}"
            folder.mkdir()
            for number in range(1, n + 1):
                path = folder / f"{number:04d}.jpg"
                if linked:
                    os.link(source, path)
                else:
                    path.write_bytes(jpeg((40 * cam, 7 * pid % 256, 9 * number % 256), (10 + pid % 5, 20 + number)))
        source.unlink()
    for cam, pid in plan.empty:
        (root / f"cam{cam}" / f"{pid:04d}").mkdir()
    write_id_lists(root, plan.ids)
    scipy.io.savemat(root / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": rand_perm(plan)})
    return root


def write_id_lists(root: Path, ids: dict[str, list[int]]) -> None:
    """exp/{train,val,test,available}_id.txt as the original: one line, commas, no spaces, no line end."""
    (root / "exp").mkdir(exist_ok=True)
    lists = {**ids, "available": sorted(pid for pids in ids.values() for pid in pids)}
    for name, pids in lists.items():
        (root / "exp" / f"{name}_id.txt").write_text(",".join(map(str, sorted(pids))))


def rand_perm(plan: SysuPlan, seed: int = 0) -> np.ndarray:
    """rand_perm_cam as the original: cell array (6, 1) of cell arrays (n_ids, 1) of uint8 (10, m)."""
    generator = np.random.default_rng(seed)
    outer = np.empty((6, 1), dtype=object)
    for cam in CAMERAS:
        cells = np.empty((plan.mat_ids[cam], 1), dtype=object)
        for pid in range(1, plan.mat_ids[cam] + 1):
            m = plan.images.get((cam, pid), 0)
            rows = [generator.permutation(m) + 1 for _ in range(10)]
            cells[pid - 1, 0] = np.array(rows, dtype=np.uint8).reshape(10, m)
        outer[cam - 1, 0] = cells
    return outer


# ---------------------------------------------------------------- RegDB


@dataclass
class RegdbPlan:
    """Identities 1..ids with `images` per modality; half of them train in each of ten trials."""

    ids: int
    images: int = 10
    crlf: bool = False

    def train_ids(self, trial: int) -> list[int]:
        """The training identities of a trial, in the order of its files."""
        return [int(pid) for pid in np.random.default_rng(trial).permutation(self.ids)[: self.ids // 2] + 1]


def counts_of_regdb(plan: RegdbPlan) -> dict[str, Any]:
    """What `regdb.PUBLISHED` would be for this plan; the overlap of two trials is left wide."""
    return {"ids": plan.ids, "images": plan.images, "train": plan.ids // 2, "shared": (0, plan.ids // 2)}


def regdb_file(modality: str, pid: int, number: int) -> str:
    """Name of one image relative to the root; `modality` is Visible or Thermal."""
    return f"{modality}/{pid}/male_back_{modality[0].lower()}_{number:05d}_{pid}.bmp"


def write_regdb(root: Path, plan: RegdbPlan, *, linked: bool = False) -> Path:
    """Write a plan. `linked`: one 64x128 image per modality, hard-linked; else tiny images, each of its own color."""
    for m, modality in enumerate(("Visible", "Thermal")):
        (root / modality).mkdir(parents=True)
        source = root / modality / "source"
        source.write_bytes(bmp((200, 90 * m, 90 * m), (64, 128)))
        for pid in range(1, plan.ids + 1):
            (root / modality / str(pid)).mkdir()
            for number in range(plan.images):
                path = root / regdb_file(modality, pid, number)
                if linked:
                    os.link(source, path)
                else:
                    path.write_bytes(bmp((100 * m, 7 * pid % 256, 9 * number % 256), (4 + number, 8)))
        source.unlink()
    (root / "idx").mkdir()
    for trial in range(1, 11):
        train = plan.train_ids(trial)
        test = [pid for pid in range(1, plan.ids + 1) if pid not in train]
        for split, pids in (("train", train), ("test", test)):
            for modality in ("Visible", "Thermal"):
                lines = [
                    f"{regdb_file(modality, pid, number)} {label}"
                    for label, pid in enumerate(pids)
                    for number in range(plan.images)
                ]
                end = "\r\n" if plan.crlf else "\n"
                path = root / "idx" / f"{split}_{modality.lower()}_{trial}.txt"
                path.write_bytes((end.join(lines) + end).encode())
    return root


# ---------------------------------------------------------------- LLCM

LLCM = {"train": range(1, 4), "test": range(4, 8)}  # identities by split
LLCM_CAMERAS = {"vis": (1, 2, 9), "nir": (1, 4)}


def llcm_file(modality: str, pid: int, camid: int, number: int) -> str:
    """Name of one image relative to the root; `modality` is vis or nir."""
    return f"{modality}/{pid:04d}/{pid:04d}_c{camid:02d}_s{100 * number}_f{7 + number}_{modality}.jpg"


def counts_of_llcm() -> dict[str, Any]:
    """What `llcm.PUBLISHED` would be for the tree of `write_llcm`."""
    counts: dict[str, Any] = {"ids": {split: len(pids) for split, pids in LLCM.items()}}
    for split, pids in LLCM.items():
        for modality, cameras in LLCM_CAMERAS.items():
            counts[f"{split}_{modality}"] = tuple(2 * len(pids) * (camid in cameras) for camid in range(1, 10))
    return counts


def write_llcm(root: Path) -> Path:
    """7 identities with 2 images per modality and camera, the split files, and the test images' second arrangement."""
    (root / "idx").mkdir(parents=True)
    (root / "idx" / "test_id.txt").write_text(",".join(map(str, LLCM["test"])))
    for split, pids in LLCM.items():
        for modality, cameras in LLCM_CAMERAS.items():
            lines = []
            for label, pid in enumerate(pids):
                (root / modality / f"{pid:04d}").mkdir(parents=True)
                for camid in cameras:
                    for number in (1, 2):
                        name, color = llcm_file(modality, pid, camid, number), (100 + 20 * pid, 25 * camid, 90 * number)
                        (root / name).write_bytes(jpeg(color))
                        lines.append(f"{name} {label}")
                        if split == "test":
                            folder = root / f"test_{modality}" / f"cam{camid}" / f"{pid:04d}"
                            folder.mkdir(parents=True, exist_ok=True)
                            (folder / Path(name).name).write_bytes(jpeg(color))
            (root / "idx" / f"{split}_{modality}.txt").write_text("\n".join(lines) + "\n")
    return root


def edit(path: Path, change) -> None:
    """Rewrite a text file: `change` gets its text and returns the new one."""
    path.write_bytes(change(path.read_bytes().decode()).encode())


# ---------------------------------------------------------------- images


def jpeg(color: tuple[int, int, int], size: tuple[int, int] = (8, 16)) -> bytes:
    """A solid-color JPEG of `size` (width, height)."""
    return _encode(Image.new("RGB", size, color), "JPEG")


def bmp(color: tuple[int, int, int], size: tuple[int, int] = (8, 16)) -> bytes:
    """A solid-color 24-bit BMP of `size` (width, height)."""
    return _encode(Image.new("RGB", size, color), "BMP")


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
