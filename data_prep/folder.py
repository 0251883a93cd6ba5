"""Photographs of one's own: visible/<id>/* and infrared/<id>/*, where <id> is a number. See docs/extend.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from danet_study.config import Dataset
from data_prep.index import SUFFIXES, Index, listed

IMAGE = re.compile(rf"(visible|infrared)/([0-9]+)/[^/.][^/]*{SUFFIXES}", re.IGNORECASE | re.DOTALL)
CAMERAS = {"visible": 1, "infrared": 2}


def read_tree(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """One row per image. A random half of the identities trains, drawn with `dataset.split_seed`; the others test.

    An identity with images of one modality only cannot be trained on, so it tests.
    Args: files: all file names below `root`, relative, in natural order.
    """
    index, rows = Index(), []
    for name in files:
        if match := IMAGE.fullmatch(name):
            modality = match[1].lower()
            rows.append((name, int(match[2]), CAMERAS[modality], modality))
        else:
            index.skipped.append(name)  # a README or Thumbs.db is no error
    index.manifest = manifest = pd.DataFrame(rows, columns=["path", "pid", "camid", "modality"])
    n_modalities = manifest.groupby("pid")["modality"].nunique()  # sorted by identity
    single, both = n_modalities.index[n_modalities == 1], n_modalities.index[n_modalities == 2]
    if len(single):
        index.warnings.append(f"identities with one modality only are not trained on: {listed(single)}")
    train = np.random.default_rng(dataset.split_seed).permutation(both)[: len(both) // 2]
    manifest["split_1"] = np.where(manifest["pid"].isin(train), "train", "test")
    return index
