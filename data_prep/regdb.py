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
FOLDERS = ("visible", "thermal")  # indexed by modality; the camera is one more
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
Key = tuple[int, int, str]  # modality, pid, file name in lower case


def read_regdb(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """Index of a tree in RegDB's layout: visible rows, then infrared; one split column per trial; no galleries.

    Accepted: other case of names, stray files, and CRLF, a byte-order mark, backslashes, blank lines or trailing commas
    in the split files. A trial without its four files has no column.
    """
    index, lists = Index(), {}
    images: dict[Key, str] = {}
    doubled, misplaced = [], []
    for name in files:
        if match := IMAGE.fullmatch(name):
            key = (FOLDERS.index(match[1].lower()), int(match[2]), match[3].casefold())
            if images.setdefault(key, name) != name:
                doubled.append(name)
            number = re.search(r"_([0-9]+)\.[a-z]+$", key[2])
            if number and int(number[1]) != key[1]:
                misplaced.append(name)
        elif match := LIST.fullmatch(name):
            lists[match[1].lower()] = name
        elif name != "render.json":
            index.skipped.append(name)
    if not images:
        return index
    index.forbid("images whose names differ only in case or zeros", doubled)
    index.forbid("images in the folder of another identity than their name says", misplaced)
    wanted = [f"{split}_{folder}_{t}" for t in TRIALS for split in SPLITS for folder in FOLDERS]
    index.forbid("split files missing in idx/", [f"{name}.txt" for name in wanted if name not in lists], partial=True)
    splits: dict[int, dict[Key, str]] = {}
    odd: dict[str, list[str]] = {"labels": [], "both": [], "missing": [], "unnamed": []}
    for trial in TRIALS:
        if all(name in lists for name in wanted[4 * trial - 4 : 4 * trial]):
            splits[trial] = _read_trial(index, root, trial, lists, images, odd)
    index.forbid("identities whose visible and thermal labels differ", odd["labels"], partial=True)
    index.forbid("images in train and test", odd["both"])
    index.forbid("listed images that are missing", list(dict.fromkeys(odd["missing"])), partial=True)
    index.forbid("images in neither train nor test", odd["unnamed"], partial=True)
    if 1 not in splits:
        index.findings.append("trial 1 has not its four split files in idx/; copy them from the distribution")
    keys = sorted(images, key=lambda key: key[0])  # stable: natural order within a modality
    index.manifest = pd.DataFrame(
        {
            "path": [images[key] for key in keys],
            "pid": [pid for _, pid, _ in keys],
            "camid": [modality + 1 for modality, _, _ in keys],
            "modality": [MODALITIES[modality] for modality, _, _ in keys],
            "split_1": "",
            **{f"split_{trial}": [split_of.get(key, "") for key in keys] for trial, split_of in splits.items()},
        }
    )
    if dataset.published:
        _check_published(index, images, splits)
    return index


def _read_trial(
    index: Index, root: Path, trial: int, lists: dict[str, str], images: dict[Key, str], odd: dict[str, list[str]]
) -> dict[Key, str]:
    """The split of each image that the trial names; adds to `odd` what is inconsistent."""
    split_of: dict[Key, str] = {}
    for split in SPLITS:
        labels = []
        for modality, folder in enumerate(FOLDERS):
            listed, label_of = _read_list(index, root / lists[f"{split}_{folder}_{trial}"], modality)
            labels.append(label_of)
            for key in listed:
                if key not in images:
                    odd["missing"].append(f"{FOLDERS[key[0]].title()}/{key[1]}/{key[2]}")
                elif split_of.setdefault(key, split) != split:
                    odd["both"].append(f"{images[key]} (trial {trial})")
        pids = sorted(pid for pid in labels[0].keys() | labels[1] if labels[0].get(pid) != labels[1].get(pid))
        odd["labels"] += [f"{pid} (trial {trial}, {split})" for pid in pids]
    odd["unnamed"] += [f"{name} (trial {trial})" for key, name in images.items() if key not in split_of]
    return split_of


def _read_list(index: Index, path: Path, modality: int) -> tuple[list[Key], dict[int, int]]:
    """Images of a split file in its order, and the label of each identity."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        index.findings.append(f"idx/{path.name} cannot be read ({type(error).__name__}); copy it again")
        return [], {}
    keys: dict[Key, int] = {}
    label_of: dict[int, int] = {}
    wrong, twice, inconsistent = [], [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip(" \t,"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None or match[1].lower() != FOLDERS[modality]:
            wrong.append(f"line {number} ({line.strip()[:60]})")
            continue
        pid, label = int(match[2]), int(match[4])
        key = (modality, pid, match[3].casefold())
        if key in keys:
            twice.append(f"line {number}")
        keys[key] = label
        if label_of.setdefault(pid, label) != label:
            inconsistent.add(pid)
    form = f"{FOLDERS[modality].title()}/<id>/<file> <label>"
    index.forbid(f"idx/{path.name}: lines not of the form {form}", wrong)
    index.forbid(f"idx/{path.name}: images named twice", twice)
    index.forbid(f"idx/{path.name}: identities with two labels", sorted(inconsistent))
    if not inconsistent and sorted(label_of.values()) != list(range(len(label_of))):
        index.findings.append(f"idx/{path.name}: labels are not 0 to {len(label_of) - 1}, one per identity")
    return list(keys), label_of


def _check_published(index: Index, images: dict[Key, str], splits: dict[int, dict[Key, str]]) -> None:
    """Every published count; see PUBLISHED."""
    n_ids, n_images, n_train = PUBLISHED["ids"], PUBLISHED["images"], PUBLISHED["train"]
    for modality, folder in enumerate(FOLDERS):
        sizes = Counter(pid for m, pid, _ in images if m == modality)
        index.compare(f"{folder}: identities / images", (n_ids, n_ids * n_images), (len(sizes), sizes.total()))
        odd = [f"{pid} ({sizes[pid]})" for pid in range(1, n_ids + 1) if sizes[pid] != n_images]
        index.forbid(f"{folder}: identities of 1 to {n_ids} without {n_images} images", odd, partial=True)
    for split, expected in zip(SPLITS, (n_train, n_ids - n_train), strict=True):
        named = [[key for key, s in split_of.items() if s == split] for split_of in splits.values()]
        pids = [{pid for _, pid, _ in keys} for keys in named]
        index.compare(f"{split} identities by trial", (expected,) * 10, tuple(map(len, pids)))
        for modality, folder in enumerate(FOLDERS):
            found = tuple(sum(m == modality for m, _, _ in keys) for keys in named)
            index.compare(f"{split} {folder} images by trial", (expected * n_images,) * 10, found)
        if split == "train":
            shared = [len(a & b) for a, b in itertools.combinations(pids, 2)]
    least, most = PUBLISHED["shared"]
    if shared and not least <= min(shared) <= max(shared) <= most:
        index.warnings.append(f"trials share {min(shared)} to {max(shared)} training identities, not {least} to {most}")
