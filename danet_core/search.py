"""Search: rank a folder of crops for one query crop with a trained model, and say which run that model is.

The run's own record is the only configuration: image size, normalisation and test feature are the ones it was trained
and scored with, whatever params.yaml says today. Crops are decoded as in packing (danet_core.images).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm.auto import tqdm

from danet_core.augment import normalise
from danet_core.config import RunConfig
from danet_core.crops import RankedImage, ranked_list
from danet_core.files import StudyError
from danet_core.images import IMAGE_SUFFIXES, decode, load_rgb, natural_key
from danet_core.model import DANet
from danet_core.nearest import Index, nearest, require
from danet_core.parameters import Checkpoints, Dataset, Evaluation, Variant
from danet_core.record import RunFolder, load_finished
from danet_core.repro import deterministic, resolve_device
from danet_core.runs import read_training_record
from danet_core.strict import ConfigError
from danet_core.strict import build as build_strictly
from danet_core.style import StudyFigure
from danet_core.train import build_model

RUNS = Path("runs")
DRAWN = 50  # images in the picture of a ranked list
_BATCH = 64  # images per forward pass: 384x128 through ResNet-50 stays below 1 GB
_PRETRAINED_ON = {"rendered": "pretrained on rendered pedestrians", "imagenet": "pretrained on ImageNet"}
_THUMBNAIL = (256, 512)  # width and height, at most, of a crop in the picture


# -------------------- runs


def find_run(run: str | Path | None = None, runs: Path = RUNS) -> Path:
    """The folder of a trained run: `run` itself, or the only one below `runs` where none is named.

    Raises StudyError when there is none, or several and no name; it lists them, or says what trains one.
    """
    if run is not None and (Path(run) / "record.json").is_file():
        return Path(run)
    found = _listed(runs) if run is None else _listed(Path(run)) or _listed(runs)
    if run is None and len(found) == 1:
        return found[0]
    where = f"{runs}: expected one trained run" if run is None else f"run {run}: expected a folder with a record.json"
    if not found:
        raise StudyError(f"{where}, found none: no model is trained yet; `make repro` (or `dvc repro`) trains them")
    raise StudyError(f"{where}, found {len(found) if run is None else 'none'}; name one of {_names(found)}")


def load_run(root: Path) -> tuple[RunConfig, DANet, dict[str, Any]]:
    """Configuration, network and record of the run in folder `root`.

    Raises StudyError when the run is missing, its record is of another version of the study, or its model is damaged.
    """
    folder = RunFolder(root, root / "checkpoint.pt")  # no checkpoint is read
    config = recorded_config(read_training_record(folder.record), folder.record)
    tensors, record = load_finished(folder, config)
    model = build_model(config.dataset, tensors["classifier.weight"].shape[0], None, config.variant)
    model.load_state_dict(tensors)
    return config, model, record


def recorded_config(record: Any, path: Path) -> RunConfig:
    """The configuration a run was made with, from its record alone, as strictly checked as params.yaml is."""
    try:
        config, label = record["config"], record["label"]
        dataset = {
            "title": config["dataset"]["name"],
            "root": "",
            "render": None,
            "allow_partial": False,
            **config["dataset"],
        }
        variant = {"label": label, **{key: value for key, value in config["variant"].items() if key != "name"}}
        return RunConfig(
            build_strictly(Dataset, dataset, f"{path}: dataset"),
            config["variant"]["name"],
            build_strictly(Variant, variant, f"{path}: variant"),
            config["trial"],
            config["seed"],
            Evaluation(trials=1, ranks=20, batch_size=_BATCH, metric="cosine", galleries="rand_perm", rerank=None),
            Checkpoints(every_epochs=1, share_of_time=1),
        )
    except ConfigError as error:
        raise StudyError(f"{error}; the run is of another version of the study: train it again, `dvc repro`") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{path} is no record of a run ({type(error).__name__}: {error}); train the run again, `dvc repro`"
        ) from None


def describe(path: Path) -> str:
    """A run's record as text: what it is, its configuration, provenance, versions and last epoch, one value per line.

    Raises StudyError for a record that is missing, damaged or lacks one of these.
    """
    record = read_training_record(path)
    sections = {
        "run": {key: record[key] for key in ("dataset", "variant", "label", "trial", "seed", "command", "seconds")},
        "configuration": record["config"],
        "provenance": record["provenance"],
        "versions": record["versions"],
        f"last of {len(record['history'])} epochs": record["history"][-1],
    }
    leaves = {title: list(_leaves(values)) for title, values in sections.items()}
    width = max(len(name) for rows in leaves.values() for name, _ in rows)
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)]) for title, rows in leaves.items()
    ]
    return "\n\n".join(blocks)


# -------------------- ranking


@dataclass(frozen=True)
class Ranking:
    """The R nearest of a gallery's G crops, nearest first; equal distances in natural order of the names."""

    query: Path
    gallery: Path
    run: str  # <data set>/<run>
    pretrained_on: str  # what its backbone weights come from, in words
    index: Index  # what found them; "exact" finds all, R = G
    n_gallery: int  # G
    names: tuple[str, ...]  # (R,) paths relative to the gallery, with forward slashes
    distances: Float[np.ndarray, " R"]  # cosine distance, 0 to 2
    skipped: tuple[str, ...]  # files of the gallery that are no images, and the query where it lies there
    broken: tuple[str, ...]  # a sentence for each image that cannot be decoded and was left out

    def table(self, top: int = 10) -> pd.DataFrame:
        """The first `top` with their rank (from 1), cosine distance and path."""
        paths = [(self.gallery / name).as_posix() for name in self.names[:top]]
        ranks = pd.RangeIndex(1, len(paths) + 1, name="rank")
        return pd.DataFrame({"distance": self.distances[:top], "path": paths}, index=ranks)

    def text(self, top: int = 10) -> str:
        """`table` in plain text: rank, distance, path."""
        rows = [f"{rank:>4}  {gap:>8.4f}  {printable(path)}" for rank, gap, path in self.table(top).itertuples()]
        return "\n".join(["rank  distance  path", "----  --------  ----", *rows])

    def figure(self, top: int = 10) -> StudyFigure:
        """The query and the first `top` (at most DRAWN) as one picture, each crop as it is on disk."""
        first = list(zip(self.names, self.distances.tolist(), strict=True))[: min(top, DRAWN)]
        ranked = [RankedImage(printable(name), _picture(self.gallery / name), gap) for name, gap in first]
        query = RankedImage(printable("/".join(self.query.parts[-3:])), _picture(self.query))
        nearly = ", approximately" if self.index == "faiss-hnsw" else ""
        title = f"The nearest {len(ranked)} of {self.n_gallery:,} crops{nearly}\n{self.run}, {self.pretrained_on}"
        return ranked_list(query, ranked, title=title)


def search(
    query: str | Path,
    gallery: str | Path,
    run: str | Path | None = None,
    *,
    runs: Path = RUNS,
    device: str = "auto",
    skip_broken: bool = False,
    index: Index = "exact",
    top: int = DRAWN,
) -> Ranking:
    """Rank the crops below the folder `gallery` for the crop `query` by cosine distance of the run's test feature.

    query: an image file; when it lies in the gallery, the same file is left out there.
    gallery: a folder, searched with its sub-folders for jpg, png and bmp files.
    run: the folder of a trained run; None where there is only one below `runs`.
    skip_broken: leave out images that cannot be decoded, instead of failing at the first.
    index: "exact" ranks every crop; "faiss" and "faiss-hnsw" (nearest.py) the first `top`, the latter not all rightly.

    Raises StudyError: no such run, query or folder; no image in the folder; an image that cannot be decoded; a run
    whose network asks for the modality of an image (`streams` other than one), which a folder does not say; faiss is
    asked for and not installed.
    Source: cosine distance between test features, as in the study's evaluation (danet_core.protocols).
    """
    query, gallery = Path(query), Path(gallery)
    if not query.is_file():
        found = "a folder" if query.is_dir() else "nothing"
        raise StudyError(f"query {query}: expected an image file, found {found}; give the path of one crop")
    require(index)  # before minutes of work
    root = find_run(run, runs)
    names, skipped = list_gallery(gallery)
    itself = [name for name in names if _same_file(query, gallery / name)]
    names = [name for name in names if name not in itself]
    if not names:
        besides = ["the query itself"] * bool(itself) + [f"{len(skipped)} other files or folders"] * bool(skipped)
        found = f"only {' and '.join(besides)}" if besides else "an empty folder"
        raise StudyError(f"gallery {gallery}: expected jpg, png or bmp images, found {found}; name another folder")
    config, model, _ = load_run(root)
    if config.variant.streams != "one":
        raise StudyError(
            f"run {root}: expected a network with one stream, found streams {config.variant.streams}, which needs the "
            "modality of each image, and a folder of crops does not say it; name another run"
        )
    target = resolve_device(device)
    model = model.to(target).eval()
    with deterministic(0):
        wanted, _, _ = embed(model, [query], config, target)
        features, kept, broken = embed(model, [gallery / name for name in names], config, target, skip_broken)
    if not kept:
        raise StudyError(f"{gallery}: none of its {len(names)} images can be decoded, the first since {broken[0]}")
    order, distances = nearest(wanted[0], features, len(features) if index == "exact" else top, index)
    return Ranking(
        query,
        gallery,
        f"{config.dataset.name}/{config.name}",
        _PRETRAINED_ON[config.dataset.recipe.weights],
        index,
        len(features),
        tuple(names[kept[i]] for i in order),
        distances,
        (*(f"{name} (the query itself)" for name in itself), *skipped),
        tuple(broken),
    )


def list_gallery(gallery: Path) -> tuple[list[str], list[str]]:
    """Images below a folder and everything else there, as paths relative to it with forward slashes, in natural order.

    Hidden files and folders count as no images, and so does a link to a folder, which may lead in a circle.
    Raises StudyError when the folder is missing, is none, or may not be read.
    """
    if not gallery.is_dir():
        found = "a file" if gallery.exists() else "nothing"
        raise StudyError(f"gallery {gallery}: expected a folder of crops, found {found}; give the path of a folder")

    def refuse(error: OSError) -> None:
        raise StudyError(f"{error.filename} cannot be listed ({error.strerror}); give yourself read access to it")

    images: list[Path] = []
    others: list[Path] = []
    for folder, below, files in os.walk(gallery, onerror=refuse):
        inside = Path(folder)
        left_out = [name for name in below if name.startswith(".") or (inside / name).is_symlink()]
        below[:] = [name for name in below if name not in left_out]
        for name in files:
            is_image = Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
            (images if is_image else others).append((inside / name).relative_to(gallery))
        others += [(inside / name).relative_to(gallery) for name in left_out]
    ordered = (sorted(paths, key=lambda path: [natural_key(part) for part in path.parts]) for paths in (images, others))
    of_images, of_others = ([path.as_posix() for path in paths] for paths in ordered)
    return of_images, of_others


@torch.inference_mode()
def embed(
    model: DANet,
    paths: Sequence[Path],
    config: RunConfig,
    device: torch.device,
    skip_broken: bool | None = None,
) -> tuple[Float[np.ndarray, "n D"], list[int], list[str]]:
    """Test features of image files, in their order, with a network in evaluation mode on `device`.

    skip_broken: True leaves out what cannot be decoded; False raises StudyError for the first such file and names the
    option that leaves it out; None raises without that advice.
    Returns the features, the position in `paths` of each, and a sentence for each image left out.
    """
    height, width = config.dataset.image.height, config.dataset.image.width

    def read(path: Path) -> UInt8[np.ndarray, "3 H W"] | str:
        try:
            return decode(path, height, width)
        except StudyError as error:
            return str(error)

    features, kept, broken = [np.empty((0, model.neck.num_features), np.float32)], [], []
    # None: no bar where nobody watches; an explicit value would override the variable that batch runs set
    quiet = True if len(paths) <= _BATCH or os.environ.get("TQDM_DISABLE") else None
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(paths), desc="reading", unit="image", leave=False, disable=quiet) as bar,
    ):
        for start, part in _parts(paths):
            images = []
            for position, image in enumerate(pool.map(read, part), start):
                if isinstance(image, str):
                    if not skip_broken:
                        raise StudyError(image if skip_broken is None else f"{image}, or leave it out (--skip-broken)")
                    broken.append(image)
                else:
                    images.append(image)
                    kept.append(position)
            if images:
                batch = normalise(torch.from_numpy(np.stack(images)).to(device), config.dataset.recipe.augment)
                feat, feat_bn = model.embed(batch)
                chosen = feat if config.dataset.recipe.test_feature == "before_bn" else feat_bn
                features.append(chosen.float().cpu().numpy())
            bar.update(len(part))
    return np.concatenate(features), kept, broken


def printable(text: str) -> str:
    """A file name for terminal and picture: what is no printable character becomes a question mark."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _parts(paths: Sequence[Path]) -> Iterator[tuple[int, Sequence[Path]]]:
    return ((start, paths[start : start + _BATCH]) for start in range(0, len(paths), _BATCH))


def _same_file(left: Path, right: Path) -> bool:
    try:
        return left.samefile(right)
    except OSError:  # a broken link: decoding will say so
        return False


def _picture(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    image = load_rgb(path)
    image.thumbnail(_THUMBNAIL, Image.Resampling.LANCZOS)
    return np.asarray(image)


def _listed(folder: Path) -> list[Path]:
    """Finished runs below a folder of runs, or of the runs of one data set, in natural order."""
    found = {path.parent for pattern in ("*/record.json", "*/*/record.json") for path in folder.glob(pattern)}
    return sorted(found, key=lambda path: natural_key(path.as_posix()))


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.as_posix() for path in paths)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and printed values of a nested mapping's leaves, in their order."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
