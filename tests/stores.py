"""Small packed stores of random but separable images, backbone weights for them, and runs that fit both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from danet_core import MODALITIES
from danet_core.backbone import ResNet
from danet_study.config import RunConfig, load_study
from danet_study.files import atomic_write_json
from danet_study.store import GALLERIES, IMAGES, MANIFEST, META, content_sha256

ROOT = Path(__file__).resolve().parent.parent
PARAMS = ROOT / "params.yaml"
CAMERAS = {"sysu_mm01": {1: 0, 2: 0, 3: 1, 4: 0, 5: 0, 6: 1}, "regdb": {1: 0, 2: 1}}  # camera: modality
SIDE = 32  # pixels
SMALL = {"ids_per_batch": 4, "imgs_per_modality": 2, "epochs": 3, "steps_per_epoch": 2, "milestones": [2]}


def small_run(variant: str = "b_ml_cc", split: str = "synth_sysu-1", seed: int = 0, **recipe: Any) -> RunConfig:
    """A run of params.yaml with its numbers lowered to what a test can afford."""
    return shrunk(load_study(PARAMS).run(split, variant, seed), **recipe)


def shrunk(config: RunConfig, **recipe: Any) -> RunConfig:
    """The same run with a narrow network, small images and few steps."""
    values = config.model_dump()
    values["recipe"] |= {"backbone": "resnet18", "width": 8, **SMALL, **recipe}
    values["dataset"]["image"] = {"height": SIDE, "width": SIDE}
    return RunConfig(**values)


def make_project(root: Path, datasets: tuple[str, ...] = ("synth_sysu", "synth_regdb"), identities: int = 6) -> Path:
    """A folder with data/packed and data/weights of these data sets."""
    (root / "data/weights").mkdir(parents=True)
    for name in datasets:
        make_store(root / "data/packed" / name, "regdb" if "regdb" in name else "sysu_mm01", identities)
        torch.manual_seed(3)
        save_file(ResNet("resnet18", 8).state_dict(), root / "data/weights" / f"{name}.safetensors")
    return root


def make_store(root: Path, layout: str = "sysu_mm01", identities: int = 6, per_camera: int = 3) -> Path:
    """Odd identities train, even ones test; an identity is one picture plus noise, gray in infrared."""
    generator = np.random.default_rng(7)
    rows, images = [], []
    for pid in range(1, 2 * identities + 1):
        picture = generator.integers(40, 216, (3, SIDE, SIDE))
        for camid, modality in CAMERAS[layout].items():
            for number in range(per_camera):
                noisy = picture + generator.integers(-20, 21, picture.shape)
                images.append(np.broadcast_to(noisy.mean(0), noisy.shape) if modality else noisy)
                split = "train" if pid % 2 else "test"
                rows.append((len(rows), f"{camid}/{pid}/{number}.png", pid, camid, MODALITIES[modality], split))
    manifest = pd.DataFrame(rows, columns=["row", "path", "pid", "camid", "modality", "split_1"])
    root.mkdir(parents=True)
    np.save(root / IMAGES, np.stack(images).astype(np.uint8))
    manifest.to_csv(root / MANIFEST, index=False)
    files = [IMAGES, MANIFEST]
    if layout == "sysu_mm01":
        np.savez(root / GALLERIES, **_galleries(manifest[manifest.split_1 == "test"], generator))
        files.append(GALLERIES)
    meta = {"dataset": root.name, "layout": layout, "protocol": layout, "synthetic": True, "partial": False}
    meta |= {"height": SIDE, "width": SIDE, "interpolation": "none", "n": len(rows), "counts": {}, "intensity": None}
    atomic_write_json(root / META, {**meta, "files": files, "content_sha256": content_sha256(root, files)})
    return root


def _galleries(test: pd.DataFrame, generator: np.random.Generator, trials: int = 10) -> dict[str, np.ndarray]:
    galleries = {}
    for mode, cameras in (("all", [1, 2, 4, 5]), ("indoor", [1, 2])):
        cells = [cell["row"].to_numpy() for _, cell in test[test.camid.isin(cameras)].groupby(["camid", "pid"])]
        for shots, count in (("single", 1), ("multi", 10)):
            drawn = [[generator.permutation(cell)[:count] for cell in cells] for _ in range(trials)]
            galleries[f"{mode}_{shots}"] = np.stack([np.sort(np.concatenate(one)) for one in drawn])
    return galleries


def small_params(root: Path, **rows: dict[str, Any]) -> Path:
    """Write params.yaml with small rendered data sets' recipes, and `rows` added to its sections; return its path."""
    yaml = YAML()
    params = yaml.load(PARAMS.read_text(encoding="utf-8"))
    for name in ("synth_sysu", "synth_regdb"):
        dataset = params["datasets"][name]
        dataset["image"] = {"height": SIDE, "width": SIDE}
        dataset["recipe"] = {"backbone": "resnet18", "width": 8, "weights": "rendered", **SMALL, "lr": 0.002}
    for section, added in rows.items():
        params[section].update(added)
    yaml.dump(params, root / "params.yaml")
    return root / "params.yaml"
