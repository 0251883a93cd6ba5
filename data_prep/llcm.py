"""LLCM's layout.

    vis/{id:04d}/{id:04d}_c{camera:02d}_*_vis.jpg      nir/{id:04d}/{id:04d}_c{camera:02d}_*_nir.jpg
    idx/{train,test}_{vis,nir}.txt      lines `nir/0250/0250_c06_s195701_f13335_nir.jpg 0`
    idx/test_id.txt                     the test identities, separated by commas

The folder is the identity; labels are counted, not used. The published code reads a second arrangement of the same test
images, test_vis/cam{1..9}/{id:04d}/ and test_nir/, which is not needed here.

Source: split files and evaluation code of the repository ZYK100/LLCM; Zhang and Wang, CVPR 2023.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from danet_core import MODALITIES
from danet_study.config import Dataset
from data_prep.index import SUFFIXES, Index
from data_prep.regdb import KEY, read_split_file, split_key

SPLITS, FOLDERS, CAMERAS = ("train", "test"), ("vis", "nir"), range(1, 10)  # FOLDERS in the order of MODALITIES
REQUEST = "signed agreement by e-mail, repository ZYK100/LLCM"
IMAGE = re.compile(rf"(vis|nir)/([0-9]{{1,9}})/(([0-9]+)_c([0-9]+)_[^/]*{SUFFIXES})", re.IGNORECASE | re.DOTALL)
LIST = re.compile(r"idx/((?:train|test)_(?:vis|nir)|test_id)\.txt", re.IGNORECASE)
SECOND = re.compile(r"test_(?:vis|nir)/.*", re.IGNORECASE | re.DOTALL)

PUBLISHED: dict[str, Any] = {
    "ids": {"train": 713, "test": 351},  # as many labels, from 0
    "train_vis": (290, 39, 5733, 5769, 3728, 14, 571, 633, 169),  # images of cameras 1 to 9
    "train_nir": (53, 98, 0, 74, 4291, 8436, 431, 456, 136),
    "test_vis": (139, 12, 2773, 3063, 1994, 18, 345, 252, 84),
    "test_nir": (19, 47, 0, 58, 2119, 4276, 217, 311, 119),
}


def read_tree(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """Index of a tree in LLCM's layout: visible rows, then infrared, in natural order; no galleries."""
    index, rows, lists = Index(), [], {}
    for name in files:
        if match := IMAGE.fullmatch(name):
            rows.append((name, *split_key(*match.groups()[:3]), int(match[4]), int(match[5])))
        elif match := LIST.fullmatch(name):
            lists[match[1].lower()] = root / name
        elif not SECOND.fullmatch(name):
            index.skipped.append(name)
    if not rows:
        return index
    images = pd.DataFrame(rows, columns=["path", *KEY, "in_name", "camid"]).sort_values(
        "folder", kind="stable", ascending=False
    )
    index.forbid("images that are the same file but for case or zeros", images.loc[images.duplicated(KEY), "path"])
    other = images["pid"] != images["in_name"]
    index.forbid("images in the folder of another identity than their name says", images.loc[other, "path"])
    ending = images["file"].str.extract(r"_([a-z]+)\.[a-z]+$", expand=False)
    other = (ending != images["folder"]) | ~images["camid"].isin(CAMERAS)
    index.forbid(
        "images without a camera of 1 to 9 and the end _vis or _nir of their folder", images.loc[other, "path"]
    )
    wanted = [f"{split}_{folder}" for split in SPLITS for folder in FOLDERS]
    index.forbid("split files missing in idx/", [f"{name}.txt" for name in wanted if name not in lists])
    found = [
        (name, *line)
        for name in wanted
        if name in lists
        for line in read_split_file(index, lists[name], name.split("_")[1])
    ]
    lines = pd.DataFrame(found, columns=["list", *KEY, "label"])
    texts = lines["folder"] + "/" + lines["pid"].map("{:04d}".format) + "/" + lines["file"]
    index.forbid("images named twice in the split files", texts[lines.duplicated(KEY)])
    split_of = lines.drop_duplicates(KEY).set_index(KEY)["list"].str.split("_").str[0]
    on_disk = images.set_index(KEY).index
    images["split_1"] = split_of[~split_of.index.duplicated()].reindex(on_disk).fillna("").to_numpy()
    index.forbid("images in neither train nor test", images.loc[images["split_1"] == "", "path"], partial=True)
    missing = ~lines.set_index(KEY).index.isin(on_disk)
    index.forbid("listed images that are missing", texts[missing], partial=True)
    test_ids = _read_ids(lists["test_id"]) if "test_id" in lists else set()
    odd = test_ids ^ set(lines.loc[lines["list"].str.startswith("test"), "pid"])
    index.forbid("identities in test_id.txt or in a test list, but not in both", sorted(odd), partial=True)
    images["modality"] = images["folder"].map(dict(zip(FOLDERS, MODALITIES, strict=True)))
    index.manifest = images[["path", "pid", "camid", "modality", "split_1"]]
    if dataset.published:
        _check_published(index, images, lines)
    return index


def _read_ids(path: Path) -> set[int]:
    return set(map(int, re.findall("[0-9]+", path.read_text(encoding="utf-8", errors="replace"))))


def _check_published(index: Index, images: pd.DataFrame, lines: pd.DataFrame) -> None:
    """Every published count; see PUBLISHED."""
    for split, n_ids in PUBLISHED["ids"].items():
        for folder in FOLDERS:
            name = f"{split}_{folder}"
            part, listed = images.query("split_1 == @split and folder == @folder"), lines[lines["list"] == name]
            index.compare(
                f"{name}: identities / labels", (n_ids, n_ids), (part["pid"].nunique(), listed["label"].nunique())
            )
            found = part["camid"].value_counts().reindex(CAMERAS, fill_value=0)
            index.compare(f"{name}: images, cameras 1 to 9", PUBLISHED[name], tuple(found.tolist()))
