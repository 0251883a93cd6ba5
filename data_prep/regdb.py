"""RegDB's layout.

    Visible/{id}/*_{id}.bmp      Thermal/{id}/*_{id}.bmp
    idx/{train,test}_{visible,thermal}_{1..10}.txt      lines `Visible/285/male_back_v_05528_285.bmp 0`

The folder is the identity. Labels restart at 0 in the test files and change with the trial: they are checked, not used.

Source: the split files that circulate with RegDB (Nguyen et al., Sensors 2017); protocol of Ye et al., AAAI 2018.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from danet_core import MODALITIES
from danet_study.config import Dataset
from data_prep.index import SUFFIXES, Index

TRIALS, SPLITS = range(1, 11), ("train", "test")
FOLDERS = ("visible", "thermal")  # in the order of MODALITIES
REQUEST = "form of Dongguk University, DBPerson-Recog-DB1"
IMAGE = re.compile(rf"(visible|thermal)/([0-9]+)/([^/.][^/]*{SUFFIXES})", re.IGNORECASE | re.DOTALL)
LIST = re.compile(r"idx/((?:train|test)_(?:visible|thermal)_(?:10|[1-9]))\.txt", re.IGNORECASE)
LINE = re.compile(r"(visible|thermal)[/\\]([0-9]+)[/\\]([^/\\]+?)\s+([0-9]+)[\s,]*", re.IGNORECASE)

PUBLISHED: dict[str, Any] = {
    "ids": 412,
    "images": 10,  # per identity and modality
    "train": 206,  # identities of a trial; as many test
    "shared": (91, 110),  # training identities shared by two trials, least and most
}
KEY = ["folder", "pid", "file"]  # of an image; see _key


def read_regdb(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """Index of a tree in RegDB's layout: visible rows, then infrared; one split column per trial; no galleries.

    Accepted: other case of names, stray files, and CRLF, a byte-order mark, backslashes, blank lines or trailing commas
    in the split files. A trial without its four files has no column.
    """
    index, rows, lists = Index(), [], {}
    for name in files:
        if match := IMAGE.fullmatch(name):
            rows.append((name, *_key(*match.groups())))
        elif match := LIST.fullmatch(name):
            lists[match[1].lower()] = root / name
        elif name != "render.json":
            index.skipped.append(name)
    if not rows:
        return index
    images = pd.DataFrame(rows, columns=["path", *KEY]).sort_values("folder", kind="stable", ascending=False)
    images = images.set_index(KEY)  # visible first; natural order within a modality
    index.forbid("images whose names differ only in case or zeros", images.loc[images.index.duplicated(), "path"])
    in_name = images.index.get_level_values("file").str.extract(r"_([0-9]+)\.[a-z]+$", expand=False)
    other = in_name.notna() & (in_name.fillna("0").astype(int) != images.index.get_level_values("pid"))
    index.forbid("images in the folder of another identity than their name says", images.loc[other, "path"])
    wanted = [f"{split}_{folder}_{t}" for t in TRIALS for split in SPLITS for folder in FOLDERS]
    absent = [f"{name}.txt" for name in wanted if name not in lists]
    index.forbid("split files missing in idx/", absent, partial=True)
    whole = [t for t in TRIALS if all(f"{split}_{folder}_{t}" in lists for split in SPLITS for folder in FOLDERS)]
    lines = pd.DataFrame(
        [line for name in wanted if name in lists for line in _read_list(index, name, lists[name])],
        columns=["trial", "split", *KEY, "label"],
    )
    lines = lines[lines["trial"].isin(whole)]
    _check_lines(index, lines)
    if 1 not in whole:
        index.findings.append("trial 1 has not its four split files in idx/; copy them from the distribution")
    index.manifest = pd.DataFrame(
        {
            "path": images["path"],
            "pid": images.index.get_level_values("pid"),
            "camid": images.index.get_level_values("folder").map({"visible": 1, "thermal": 2}),
            "modality": images.index.get_level_values("folder").map(dict(zip(FOLDERS, MODALITIES, strict=True))),
            "split_1": "",
        }
    )
    unnamed = []
    for trial in whole:
        split_of = lines[lines["trial"] == trial].drop_duplicates(KEY).set_index(KEY)["split"]
        index.manifest[f"split_{trial}"] = split_of.reindex(images.index).fillna("")
        unnamed += [f"{path} (trial {trial})" for path in images.loc[~images.index.isin(split_of.index), "path"]]
    index.forbid("images in neither train nor test", unnamed, partial=True)
    named = lines.drop_duplicates(KEY).set_index(KEY).index
    missing = ["/".join([folder.title(), str(pid), file]) for folder, pid, file in named[~named.isin(images.index)]]
    index.forbid("listed images that are missing", missing, partial=True)
    if dataset.published:
        _check_published(index, images, lines)
    return index


def _key(folder: str, pid: str, file: str) -> tuple[str, int, str]:
    """What a file name and a line of a split file have in common, whatever their case."""
    return folder.lower(), int(pid), file.casefold()


def _read_list(index: Index, name: str, path: Path) -> list[tuple[int, str, str, int, str, int]]:
    """Trial, split, key and label of each line of a split file; `name` is <split>_<folder>_<trial>."""
    split, folder, trial = name.split("_")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        index.findings.append(f"idx/{name}.txt cannot be read ({type(error).__name__}); copy it again")
        return []
    found, wrong = [], []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        match = LINE.fullmatch(line)
        if match and match[1].lower() == folder:
            found.append((int(trial), split, *_key(*match.groups()[:3]), int(match[4])))
        elif line.strip(" \t,"):
            wrong.append(f"line {number} ({line[:60]})")
    index.forbid(f"idx/{name}.txt: lines not of the form {folder.title()}/<id>/<file> <label>", wrong)
    return found


def _check_lines(index: Index, lines: pd.DataFrame) -> None:
    """What the split files must agree on, over all trials."""
    in_file = ["trial", "split", "folder"]

    def files(found: pd.DataFrame) -> list[str]:
        keys = found[[*in_file, "pid"]].drop_duplicates().itertuples(index=False)
        return [f"{pid} (idx/{split}_{folder}_{trial}.txt)" for trial, split, folder, pid in keys]

    index.forbid("identities with an image that is named twice", files(lines[lines.duplicated([*in_file, *KEY[1:]])]))
    labels = lines.drop_duplicates([*in_file, "pid", "label"])
    index.forbid("identities with two labels", files(labels[labels.duplicated([*in_file, "pid"])]))
    labels = labels.drop_duplicates([*in_file, "pid"])
    wrong = [
        f"idx/{split}_{folder}_{trial}.txt"
        for (trial, split, folder), column in labels.groupby(in_file)["label"]
        if sorted(column) != list(range(len(column)))
    ]
    index.forbid("split files whose labels are not 0, 1, 2, ..., one per identity", wrong)
    both = labels.pivot(index=["trial", "split", "pid"], columns="folder", values="label").reindex(columns=FOLDERS)
    odd = [f"{pid} (trial {t}, {split})" for t, split, pid in both.index[both["visible"] != both["thermal"]]]
    index.forbid("identities whose visible and thermal labels differ", odd, partial=True)
    n_splits = lines.groupby(["trial", *KEY])["split"].nunique()
    leaks = [f"{folder}/{pid}/{file} (trial {t})" for t, folder, pid, file in n_splits.index[n_splits > 1]]
    index.forbid("images in train and test", leaks)


def _check_published(index: Index, images: pd.DataFrame, lines: pd.DataFrame) -> None:
    """Every published count; see PUBLISHED."""
    n_ids, n_images, n_train = PUBLISHED["ids"], PUBLISHED["images"], PUBLISHED["train"]
    for folder in FOLDERS:
        sizes = Counter(images.index[images.index.get_level_values("folder") == folder].get_level_values("pid"))
        index.compare(f"{folder}: identities / images", (n_ids, n_ids * n_images), (len(sizes), sizes.total()))
        odd = [f"{pid} ({sizes[pid]})" for pid in range(1, n_ids + 1) if sizes[pid] != n_images]
        index.forbid(f"{folder}: identities of 1 to {n_ids} without {n_images} images", odd, partial=True)
    for split, expected in zip(SPLITS, (n_train, n_ids - n_train), strict=True):
        part = lines[lines["split"] == split]
        found = part.groupby("trial")["pid"].nunique().reindex(TRIALS, fill_value=0)
        index.compare(f"{split} identities by trial", (expected,) * 10, tuple(found.tolist()))
        for folder in FOLDERS:
            found = part.loc[part["folder"] == folder, "trial"].value_counts().reindex(TRIALS, fill_value=0)
            index.compare(f"{split} {folder} images by trial", (expected * n_images,) * 10, tuple(found.tolist()))
    train = [set(pids) for _, pids in lines[lines["split"] == "train"].groupby("trial")["pid"]]
    shared = [len(a & b) for a, b in itertools.combinations(train, 2)]
    least, most = PUBLISHED["shared"]
    if shared and not least <= min(shared) <= max(shared) <= most:
        index.warnings.append(f"trials share {min(shared)} to {max(shared)} training identities, not {least} to {most}")
