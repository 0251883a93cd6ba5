"""Identities and images of a data set by split and camera, beside what they should be."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from danet_core import MODALITIES
from danet_core.files import StudyError
from danet_core.parameters import Dataset, RenderRegdb, RenderSysu
from data_prep import regdb, sysu_mm01

Expected = dict[tuple[str, str, str], tuple[int | None, int | None]]  # (split, camera, modality): identities, images
ALL = ("all", "both")  # the camera and the modality of a split's total


def counts_by_camera(dataset: Dataset, manifest: pd.DataFrame, trial: int = 1) -> pd.DataFrame:
    """One line per split and camera, and one for the whole split: found, expected, and whether they agree.

    Expected are the published counts of a real set, and for a rendered one what params.yaml asks for. A rendering in
    SYSU-MM01's layout leaves some (identity, camera) pairs without images by chance, so that a camera's identities
    have no expectation (empty); the images of those that are there have.

    Args:
        manifest: a store's.
        trial: the split column to read; an image in neither split of it is not counted.

    Raises StudyError when the manifest has no such trial.
    """
    if f"split_{trial}" not in manifest:
        raise StudyError(f"the manifest of {dataset.name} has no split of trial {trial}; choose a trial that it has")
    split = manifest[f"split_{trial}"]
    pairs: dict[tuple[str, str, str], set[int]] = {}
    images: Counter[tuple[str, str, str]] = Counter()
    for name, camid, modality, pid in zip(split, manifest.camid, manifest.modality, manifest.pid, strict=True):
        if name:
            for key in ((name, str(camid), modality), (name, *ALL)):
                pairs.setdefault(key, set()).add(int(pid))
                images[key] += 1
    expected = _expected(dataset, {key: len(pids) for key, pids in pairs.items()})
    order = {name: place for place, name in enumerate(sysu_mm01.SPLITS)}
    keys = sorted(expected.keys() | pairs.keys(), key=lambda key: (order[key[0]], key[1]))
    rows = []
    for key in keys:
        found = len(pairs.get(key, ())), images[key]
        wanted = expected.get(key, (0, 0))
        agrees = all(b is None or a == b for a, b in zip(found, wanted, strict=True))
        rows.append((*key, *found, *wanted, agrees))
    columns = [
        "split",
        "camera",
        "modality",
        "identities",
        "images",
        "expected identities",
        "expected images",
        "agrees",
    ]
    table = pd.DataFrame(rows, columns=columns).set_index(["split", "camera", "modality"])
    return table.astype({"expected identities": "Int64", "expected images": "Int64"})


def _expected(dataset: Dataset, identities: dict[tuple[str, str, str], int]) -> Expected:
    """`identities` are those found: a rendering fixes the images of each, not which cameras see whom."""
    if isinstance(dataset.render, RenderSysu):
        each = vars(dataset.render.images)
        seen: Expected = {key: (None, n * each[key[0]]) for key, n in identities.items() if key[1:] != ALL}
        ids = {split: getattr(dataset.render, f"{split}_ids") for split in sysu_mm01.SPLITS}
        return seen | {(split, *ALL): (n, None) for split, n in ids.items()}
    if dataset.layout == "sysu":
        return _published_sysu()
    facts = regdb.EXPECTED
    if isinstance(dataset.render, RenderRegdb):
        total, each_id, train = dataset.render.ids, dataset.render.images, dataset.render.ids // 2
    else:
        total, each_id, train = facts.ids, facts.images, facts.train_ids
    wanted: Expected = {}
    for split, n in (("train", train), ("test", total - train)):
        wanted |= {(split, str(k), modality): (n, n * each_id) for k, modality in enumerate(MODALITIES, start=1)}
        wanted[split, *ALL] = (n, 2 * n * each_id)
    return wanted


def _published_sysu() -> Expected:
    facts, wanted = sysu_mm01.EXPECTED, Expected()
    for split in sysu_mm01.SPLITS:
        for camid, n, images in zip(sysu_mm01.CAMERAS, facts.split_ids[split], facts.split_images[split], strict=True):
            if n:
                modality = MODALITIES[camid in sysu_mm01.INFRARED_CAMERAS]
                wanted[split, str(camid), modality] = (n, images)
        wanted[split, *ALL] = (facts.ids[split], sum(facts.split_images[split]))
    return wanted
