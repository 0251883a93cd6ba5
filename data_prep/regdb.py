"""RegDB's layout.

    Visible/{id}/*_{id}.bmp      Thermal/{id}/*_{id}.bmp
    idx/{train,test}_{visible,thermal}_{1..10}.txt      lines `Visible/285/male_back_v_05528_285.bmp 0`

The folder is the identity. Labels restart at 0 in the test files and change with the trial: they are checked, not used.

Source: the split files that circulate with RegDB (Nguyen et al., Sensors 2017); protocol of Ye et al., AAAI 2018.
"""

from __future__ import annotations

import itertools
import re
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
LINE = r"({})[/\\]([0-9]+)[/\\]([^/\\]+?)\s+([0-9]+)[\s,]*"

PUBLISHED: dict[str, Any] = {
    "ids": 412,
    "images": 10,  # per identity and modality
    "train": 206,  # identities of a trial; as many test
    "shared": (91, 110),  # training identities shared by two trials, least and most
}
KEY = ["folder", "pid", "file"]  # of an image; see split_key
IN_FILE = ["trial", "split", "folder"]


def read_tree(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """Index of a tree in RegDB's layout: visible rows, then infrared; one split column per trial; no galleries.

    Accepted: other case of names, stray files, and CRLF, a byte-order mark, backslashes, blank lines or trailing commas
    in the split files. A trial without its four files has no column. Labels, identities in file names and the number of
    trials are checked in the published set only.
    """
    index, rows, lists = Index(), [], {}
    for name in files:
        if match := IMAGE.fullmatch(name):
            rows.append((name, *split_key(*match.groups())))
        elif match := LIST.fullmatch(name):
            lists[match[1].lower()] = root / name
        elif name != "render.json":
            index.skipped.append(name)
    if not rows:
        return index
    images = pd.DataFrame(rows, columns=["path", *KEY]).sort_values("folder", kind="stable", ascending=False)
    images = images.set_index(KEY, drop=False)  # visible first; natural order within a modality
    index.forbid("images whose names differ only in case or zeros", images.loc[images.index.duplicated(), "path"])
    names = {t: [f"{split}_{folder}_{t}" for split in SPLITS for folder in FOLDERS] for t in TRIALS}
    whole = [t for t in TRIALS if all(name in lists for name in names[t])]
    found = [
        (t, name.split("_")[0], *line)
        for t in whole
        for name in names[t]
        for line in read_split_file(index, lists[name], name.split("_")[1])
    ]
    lines = pd.DataFrame(found, columns=["trial", "split", *KEY, "label"])
    if 1 not in whole:
        index.findings.append("trial 1 has not its four files idx/{train,test}_{visible,thermal}_1.txt; add them")
    wanted = TRIALS if dataset.published else [t for t in TRIALS if any(name in lists for name in names[t])]
    absent = [f"{name}.txt" for t in wanted for name in names[t] if name not in lists]
    index.forbid("split files missing in idx/", absent, partial=True)
    _check_lines(index, lines)
    index.manifest = images[["path", "pid"]].assign(
        camid=images["folder"].map({"visible": 1, "thermal": 2}),
        modality=images["folder"].map(dict(zip(FOLDERS, MODALITIES, strict=True))),
        split_1="",
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
        _check_labels(index, lines)
        _check_published(index, images, lines)
    return index


def split_key(folder: str, pid: str, file: str) -> tuple[str, int, str]:
    """What a file name and a line of a split file have in common, whatever their case."""
    return folder.lower(), int(pid), file.casefold()


def read_split_file(index: Index, path: Path, folder: str) -> list[tuple[str, int, str, int]]:
    """Key and label of each line `<folder>/<id>/<file> <label>`; other lines and an unreadable file are findings."""
    where = f"idx/{path.name}"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        index.findings.append(f"{where} cannot be read ({type(error).__name__}); copy it again")
        return []
    line_form, found, wrong = re.compile(LINE.format(folder), re.IGNORECASE), [], []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if match := line_form.fullmatch(line):
            found.append((*split_key(*match.groups()[:3]), int(match[4])))
        elif line.strip(" \t,"):
            wrong.append(f"line {number} ({line[:60]})")
    index.forbid(f"{where}: lines not of the form {folder}/<id>/<file> <label>", wrong)
    return found


def _check_lines(index: Index, lines: pd.DataFrame) -> None:
    """No image is in two lines of a trial."""
    named = lines[["trial", *KEY]].to_numpy()
    texts = pd.Series([f"{folder}/{pid}/{file} (trial {t})" for t, folder, pid, file in named], lines.index, dtype=str)
    once = lines.drop_duplicates([*IN_FILE, *KEY[1:]])
    index.forbid("images that are named twice in a file", texts.drop(once.index))
    index.forbid("images in train and test", texts[once.index[once.duplicated(["trial", *KEY])]])


def _check_labels(index: Index, lines: pd.DataFrame) -> None:
    """Labels are 0, 1, 2, ... in each file, one per identity, and the same in both modalities."""
    labels = lines.drop_duplicates([*IN_FILE, "pid", "label"])  # an identity with two labels makes two rows
    wrong = [
        f"idx/{split}_{folder}_{trial}.txt"
        for (trial, split, folder), rows in labels.groupby(IN_FILE)
        if sorted(rows["label"]) != list(range(rows["pid"].nunique()))
    ]
    index.forbid("split files whose labels are not 0, 1, 2, ..., one per identity", wrong)
    labels = labels.drop_duplicates([*IN_FILE, "pid"])
    both = labels.pivot(index=["trial", "split", "pid"], columns="folder", values="label").reindex(columns=FOLDERS)
    odd = [f"{pid} (trial {t}, {split})" for t, split, pid in both.index[both["visible"] != both["thermal"]]]
    index.forbid("identities whose visible and thermal labels differ", odd, partial=True)


def _check_published(index: Index, images: pd.DataFrame, lines: pd.DataFrame) -> None:
    """Every published count; see PUBLISHED."""
    in_name = images["file"].str.extract(r"_([0-9]+)\.[a-z]+$", expand=False)
    other = in_name.notna() & (in_name.fillna("0").astype(int) != images["pid"])
    index.forbid("images in the folder of another identity than their name says", images.loc[other, "path"])
    n_ids, n_images, n_train = PUBLISHED["ids"], PUBLISHED["images"], PUBLISHED["train"]
    for folder in FOLDERS:
        sizes = images.loc[images["folder"] == folder, "pid"].value_counts()
        index.compare(f"{folder}: identities / images", (n_ids, n_ids * n_images), (len(sizes), int(sizes.sum())))
        sizes = sizes.reindex(range(1, n_ids + 1), fill_value=0)
        odd = [f"{pid} ({size})" for pid, size in sizes[sizes != n_images].items()]
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
