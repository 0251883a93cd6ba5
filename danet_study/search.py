"""Rank a folder of photographs for query photographs with a trained run.

The run's own record is the only configuration: image size, normalization and test feature. params.yaml is not read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from danet_core.model import DANet
from danet_study import figures
from danet_study.analysis import distance_matrix
from danet_study.checkpoint import load_run
from danet_study.config import Augment
from danet_study.data import normalize
from danet_study.determinism import deterministic, resolve_device
from danet_study.figures import StudyFigure, Tile
from danet_study.files import StudyError, atomic_path, escape_unprintable
from danet_study.store import decode, printable

BATCH = 64  # images per forward pass: 384x128 through ResNet-50 needs less than 1 GB
DRAWN = 30  # images of a ranked list in the figure


@dataclass(frozen=True)
class Search:
    """G gallery images ranked for each of Q queries by cosine distance of the run's test feature.

    gallery: sorted paths; order: gallery indices, nearest first, ties in the order of `gallery`. broken: a sentence for
    each file that cannot be decoded or has over 8 bits: a camera's range of counts is not known here.
    """

    run: str
    queries: list[Path]
    gallery: list[Path]
    order: list[np.ndarray]  # for each query, without the query itself
    distances: Float[np.ndarray, "Q G"]
    broken: list[str]

    def table(self, top: int = 10) -> pd.DataFrame:
        """The first `top` of each query: query, rank (from 1), cosine distance (0 to 2), path."""
        rows = [
            (printable(query), rank, self.distances[q, g], printable(self.gallery[g]))
            for q, query in enumerate(self.queries)
            for rank, g in enumerate(self.order[q][:top], 1)
        ]
        return pd.DataFrame(rows, columns=["query", "rank", "distance", "path"])

    def figure(self, top: int = 10) -> StudyFigure:
        """Each query with the first `top` (at most DRAWN) images ranked for it."""
        rows: list[figures.TileRow] = []
        for q, query in enumerate(self.queries):
            ranked = []
            for rank, g in enumerate(self.order[q][: min(top, DRAWN)], 1):
                name = printable(Path(*self.gallery[g].parts[-2:]))[-20:]  # with its folder, as wide as the picture
                ranked.append(Tile(_picture(self.gallery[g]), f"{rank} · {self.distances[q, g]:.3f}\n{name}"))
            rows += figures.ranked_rows(printable(query), Tile(_picture(query), "query", "query"), ranked)
        return figures.image_grid(rows, f"Nearest of {len(self.gallery):,} images, {self.run}")


def search(
    queries: str | Path | Sequence[str | Path],
    gallery: str | Path,
    run: str | Path,
    *,
    features: str | Path | None = None,
    device: str = "auto",
) -> Search:
    """Rank the images below the folder `gallery`, in any format that Pillow reads, for one or several query images.

    run: the folder of a trained run. features: an .npz to write paths and features of the gallery to.
    A query in the gallery is not ranked for itself. Files that cannot be decoded are left out and reported.

    Raises StudyError for a missing run, query or folder, a broken query, a gallery without a usable image, and a run
    whose network needs to know the modality of an image.
    """
    asked_for = [Path(query) for query in ([queries] if isinstance(queries, (str, Path)) else queries)]
    if absent := next((query for query in asked_for if not query.is_file()), None):
        raise StudyError(f"query {printable(absent)}: expected an image file, found none; correct the path")
    paths = list_files(Path(gallery))
    model, record = load_run(run)
    if (stem := record["config"]["model"]["stem"]) != "one":
        raise StudyError(f"{run} has the stem {stem}, which needs each image's modality; choose a one-stream run")
    model = model.to(resolve_device(device))
    asked, broken = embed(model, asked_for, record["config"])
    for sentence in broken.values():
        raise StudyError(sentence)
    feat, broken = embed(model, paths, record["config"])
    paths = [path for path in paths if path not in broken]
    if features is not None:
        with atomic_path(Path(features)) as temporary, temporary.open("wb") as stream:
            np.savez(stream, paths=np.array([printable(path) for path in paths]), feat=feat)
    distances = distance_matrix(asked, feat)
    targets = [path.resolve() for path in paths]
    order = [
        np.array([g for g in np.argsort(row, kind="stable") if targets[g] != query.resolve()], dtype=np.int64)
        for row, query in zip(distances, asked_for, strict=True)
    ]
    if any(len(row) == 0 for row in order):
        raise StudyError(f"gallery {gallery}: found no image to rank, {len(broken)} other files; choose another folder")
    name = f"{record['run']} (pretrained: {record['config']['recipe']['weights']})"
    return Search(name, asked_for, paths, order, distances, list(broken.values()))


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; linked sub-folders are followed, each once, hidden files and folders left out.

    Raises StudyError if the folder is missing or cannot be read.
    """
    if not folder.is_dir():
        raise StudyError(f"gallery {printable(folder)}: expected a folder, found none; correct the path")

    def refuse(error: OSError) -> None:
        raise StudyError(f"{error.filename} cannot be read ({error.strerror}); check access rights")

    files, seen = [], {folder.resolve()}
    for parent, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        for name in sorted(below):  # of two links to a folder the first is followed
            target = Path(parent, name).resolve()
            if name.startswith(".") or target in seen:
                below.remove(name)
            seen.add(target)
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


@torch.inference_mode()
def embed(
    model: DANet, paths: Sequence[Path], config: dict[str, Any]
) -> tuple[Float[np.ndarray, "n D"], dict[Path, str]]:
    """Test features of image files in their order, and a sentence for each file that cannot be decoded."""
    size = config["dataset"]["image"]["height"], config["dataset"]["image"]["width"]
    augment, device = Augment(**config["recipe"]["augment"]), next(model.parameters()).device

    def read(path: Path) -> UInt8[np.ndarray, "3 H W"] | StudyError:
        try:
            return decode(path, *size)
        except StudyError as error:
            return error

    features = [np.empty((0, model.neck.num_features), np.float32)]
    broken: dict[Path, str] = {}
    starts = range(0, len(paths), BATCH)
    with deterministic(0), ThreadPoolExecutor() as pool:
        for start in tqdm(starts, desc="reading", unit="batch", disable=len(starts) < 2):
            batch = paths[start : start + BATCH]
            found = dict(zip(batch, pool.map(read, batch), strict=True))
            broken |= {path: str(one) for path, one in found.items() if isinstance(one, StudyError)}
            if images := [image for image in found.values() if not isinstance(image, StudyError)]:
                pixels = normalize(torch.from_numpy(np.stack(images)).to(device), augment)
                both = dict(zip(("before_bn", "after_bn"), model.embed(pixels), strict=True))
                features.append(both[config["model"]["test_feature"]].float().cpu().numpy())
    return np.concatenate(features), broken


def _picture(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """A photograph in a box of one size for all, its shape kept."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.pad(ImageOps.exif_transpose(image).convert("RGB"), (128, 256), color="white"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m danet_study.search", description="Rank a folder of photographs.")
    parser.add_argument("--query", nargs="+", required=True, type=Path, help="one or several query images")
    parser.add_argument("--gallery", required=True, type=Path, help="a folder of images, with sub-folders")
    parser.add_argument("--run", required=True, type=Path, help="the folder of a trained run, runs/<run>")
    parser.add_argument("--top", type=int, default=10, help="images shown for each query (10)")
    parser.add_argument("--out", type=Path, help="path of a figure, without .png and .pdf")
    parser.add_argument("--features", type=Path, help="an .npz for paths and features of the gallery")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    given = parser.parse_args(arguments)
    escape_unprintable()
    try:
        found = search(given.query, given.gallery, given.run, features=given.features, device=given.device)
        for query, table in found.table(given.top).groupby("query", sort=False):
            print(f"{query}\n{table[['rank', 'distance', 'path']].to_string(index=False)}\n")
        for sentence in found.broken:
            print(f"left out: {sentence}", file=sys.stderr)
        if given.out:
            print(*figures.save(found.figure(given.top), given.out))
    except StudyError as error:
        print(f"search: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
