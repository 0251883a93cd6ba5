"""Photographs of one's own: visible/<id>/* and infrared/<id>/*, where <id> is a number. See docs/extend.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image

from danet_study.config import Dataset
from data_prep.index import Index, listed

IMAGE = re.compile(r"[^/]+/([0-9]{1,9})/[^/]+", re.DOTALL)
SUFFIXES = {*Image.registered_extensions()} - {".palm", ".pdf"}  # which Pillow only writes
CAMERAS = {"visible": 1, "infrared": 2}


def read_tree(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """One row per image. A random half of the identities trains, drawn with `dataset.split_seed`; the others test.

    An identity with images of one modality only cannot be trained on, so it tests.
    Args: files: all file names below `root`, relative, in natural order.
    """
    index, rows, misplaced = Index(), [], []
    for name in files:
        path = PurePosixPath(name)
        modality = path.parts[0].lower()
        if modality not in CAMERAS or path.suffix.lower() not in SUFFIXES or "/." in name:
            index.skipped.append(name)  # a README or Thumbs.db is no error
        elif match := IMAGE.fullmatch(name):
            rows.append((name, int(match[1]), CAMERAS[modality], modality))
        else:
            misplaced.append(name)
    index.forbid("photographs elsewhere than in visible/<number>/ or infrared/<number>/", misplaced)
    index.manifest = manifest = pd.DataFrame(rows, columns=["path", "pid", "camid", "modality"])
    folders = manifest.assign(path=manifest["path"].str.rsplit("/", n=1).str[0]).drop_duplicates("path")
    twice = folders.loc[folders.duplicated(["pid", "modality"], keep=False), "path"]
    index.forbid("folders that are the same but for case or zeros", twice)
    n_modalities = manifest.groupby("pid")["modality"].nunique()  # sorted by identity
    single, both = n_modalities.index[n_modalities == 1], n_modalities.index[n_modalities == 2]
    if len(single):
        index.warnings.append(f"identities with one modality only are not trained on: {listed(single)}")
    train = np.random.default_rng(dataset.split_seed).permutation(both)[: len(both) // 2]
    manifest["split_1"] = np.where(manifest["pid"].isin(train), "train", "test")
    return index
