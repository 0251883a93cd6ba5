"""A data set of one's own: a reader of folders visible/<id>/* and infrared/<id>/*. See docs/extend.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from danet_study.config import Dataset
from data_prep.index import SUFFIXES, Index

NAME = re.compile(rf"(visible|infrared)/(\d+)/[^/]+{SUFFIXES}", re.I)
CAMERAS = {"visible": 1, "infrared": 2}
SEED, TRAIN_SHARE = 0, 0.5


def read_mine(root: Path, dataset: Dataset, files: Sequence[str]) -> Index:
    """One line per image; a random half of the identities trains.

    Args: files: all file names below `root`, relative, in natural order.
    """
    index, rows = Index(), []
    for name in files:
        match = NAME.fullmatch(name)
        if match is None:
            index.skipped.append(name)  # a README or Thumbs.db is no error
        else:
            rows.append((name, int(match[2]), CAMERAS[match[1]], match[1]))
    index.manifest = pd.DataFrame(rows, columns=["path", "pid", "camid", "modality"])
    identities = index.manifest["pid"].unique()
    shuffled = np.random.default_rng(SEED).permutation(np.sort(identities))
    train = shuffled[: round(TRAIN_SHARE * len(shuffled))]
    index.manifest["split_1"] = np.where(index.manifest["pid"].isin(train), "train", "test")
    return index
