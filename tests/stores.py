"""Small packed stores of random but separable images, for tests of training and evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from danet_core.config import RunConfig, load_study
from danet_core.parameters import Checkpoints, Image
from data_prep.store_writer import StoreWriter

PARAMS = Path(__file__).parent.parent / "params.yaml"


def small_config(
    dataset: str = "synth_sysu", variant: str = "baseline", trial: int = 1, seed: int = 0, **recipe: object
) -> RunConfig:
    """A run of params.yaml with its numbers lowered to what a test can afford."""
    small = {
        "width": 8,
        "ids_per_batch": 4,
        "imgs_per_modality": 2,
        "epochs": 3,
        "steps_per_epoch": 2,
        "milestones": (2,),
    }
    config = load_study(PARAMS).run(dataset, variant, trial, seed)
    changed = dataclasses.replace(config.dataset.recipe, **{**small, **recipe})
    row = dataclasses.replace(config.dataset, recipe=changed, image=Image(32, 16))
    return dataclasses.replace(config, dataset=row, checkpoints=Checkpoints(every_epochs=1, share_of_time=1))


def make_store(root: Path, layout: str, identities: int = 6, per_camera: int = 3, *, height: int = 32, width: int = 16):
    """Pack a store: odd identities train, even ones test; an identity is a picture plus noise, grey in infrared."""
    generator = np.random.default_rng(7)
    cameras = {1: "visible", 2: "visible", 3: "infrared", 4: "visible", 5: "visible", 6: "infrared"}
    if layout == "regdb":
        cameras = {1: "visible", 2: "infrared"}
    rows, images = [], []
    for pid in range(1, 2 * identities + 1):
        picture = generator.integers(40, 216, (3, height, width))
        for camid, modality in cameras.items():
            for number in range(per_camera):
                noisy = picture + generator.integers(-20, 21, picture.shape)
                noisy = np.broadcast_to(noisy.mean(0), noisy.shape) if modality == "infrared" else noisy
                images.append(noisy.astype(np.uint8))
                split = "train" if pid % 2 else "test"
                rows.append((len(rows), f"{camid}/{pid}/{number}.bmp", pid, camid, modality, split))
    manifest = pd.DataFrame(rows, columns=["row", "path", "pid", "camid", "modality", "split_1"])
    writer = StoreWriter(root, (len(rows), 3, height, width), "test", chunk=len(rows))
    content = np.stack(images).tobytes()
    with writer.images_path.open("r+b") as stream:
        stream.seek(writer.offset_of(0))
        stream.write(content)
    writer.finish_chunk(0, "test", hashlib.sha256(content).hexdigest())
    test = manifest[manifest.split_1 == "test"]
    galleries = {} if layout == "regdb" else _galleries(test, generator)
    meta = {
        "dataset": root.name,
        "layout": layout,
        "synthetic": True,
        "partial": False,
        "interpolation": "none",
        "counts": {},
    }
    writer.commit(manifest, galleries, meta)
    return root


def _galleries(test: pd.DataFrame, generator: np.random.Generator, trials: int = 10) -> dict[str, np.ndarray]:
    galleries = {}
    for mode, cameras in (("all", [1, 2, 4, 5]), ("indoor", [1, 2])):
        cells = [cell["row"].to_numpy() for _, cell in test[test.camid.isin(cameras)].groupby(["camid", "pid"])]
        for shots, count in (("single", 1), ("multi", 10)):
            drawn = [
                np.sort(np.concatenate([generator.permutation(cell)[:count] for cell in cells])) for _ in range(trials)
            ]
            galleries[f"{mode}_{shots}"] = np.stack(drawn)
    return galleries
