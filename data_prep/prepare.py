"""Preparing: a raw tree -> data/prepared/<dataset>, read and verified.

Writes manifest.csv, inventory.json and, for SYSU-MM01's layout, galleries.npz. An embedded set is rendered first. The
folder is written below a temporary name and renamed when complete.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danet_core.files import StudyError, atomic_write_json, exclusive, read_json, replace_folder
from danet_core.store import GALLERIES, MANIFEST, galleries_bytes, lock_path, manifest_text
from data_prep.reading import Reading

if TYPE_CHECKING:
    from danet_core.parameters import Dataset

INVENTORY = "inventory.json"


@dataclass(frozen=True)
class Folders:
    """Where the two stages write, relative to the working directory as in dvc.yaml."""

    prepared: Path = Path("data/prepared")
    packed: Path = Path("data/packed")


FOLDERS = Folders()


def render(dataset: Dataset) -> None:
    """Draw an embedded data set's raw tree; nothing to do for a distributed one."""
    if dataset.render is None:
        return
    from data_prep import synthetic

    draw: Callable[..., Any] = synthetic.render_sysu if dataset.layout == "sysu" else synthetic.render_regdb
    draw(dataset.raw_root(), dataset.render)


def read(
    dataset: Dataset, *, root: Path | None = None, allow_partial: bool = False, expected: Any = "published"
) -> Reading:
    """Read a raw tree with the reader of its layout.

    `expected`: the counts that must be met exactly; "published" takes the facts of the real set, and none for a
    rendered one. A subset on purpose is allowed by `allow_partial` or by the data set's own, from params.yaml.
    Raises StudyError when the tree is absent or cannot be read.
    """
    from data_prep import regdb, sysu_mm01

    module, reader = (sysu_mm01, sysu_mm01.read_sysu) if dataset.layout == "sysu" else (regdb, regdb.read_regdb)
    if expected == "published":
        expected = None if dataset.synthetic else module.EXPECTED
    root = dataset.raw_root() if root is None else root
    if dataset.synthetic and not root.is_dir():
        raise StudyError(f"{root} is no folder; render the tree: python -m data_prep prepare {dataset.name}")
    if not dataset.synthetic and not root.is_dir():
        variable = {"sysu": "SYSU_MM01_ROOT", "regdb": "REGDB_ROOT"}[dataset.layout]
        raise StudyError(
            f"{dataset.title}'s images are not at {root}: expected the tree {module.TREE}; get them through "
            f"{module.LICENCE}, put them there, set {variable}, or take {dataset.name} out of `study` in params.yaml"
        )
    allow_partial = allow_partial or dataset.allow_partial
    reading = reader(root, expected=expected, train_splits=dataset.train_splits, allow_partial=allow_partial)
    if dataset.synthetic:
        _check_against_render(reading)
    return reading


def prepare(
    dataset: Dataset, *, allow_partial: bool = False, expected: Any = "published", folders: Folders = FOLDERS
) -> Reading:
    """Render if embedded, read and verify a data set, and write data/prepared/<dataset>, whole or not at all.

    Raises StudyError for rendered images in the place of real ones, and for the first finding that is neither accepted
    as documented nor, with `allow_partial` here or in params.yaml, a difference in counts.
    """
    allow_partial = allow_partial or dataset.allow_partial
    final = folders.prepared / dataset.name
    with exclusive(lock_path(final), f"the preparation of {dataset.name}"):
        render(dataset)
        _refuse_rendered(dataset)
        reading = read(dataset, allow_partial=allow_partial, expected=expected)
        partial = reading.settle(allow_partial, f"python -m data_prep verify {dataset.name}")
        with _temporary_folder(final) as folder:
            (folder / MANIFEST).write_bytes(manifest_text(reading.manifest).encode())
            if reading.galleries:
                (folder / GALLERIES).write_bytes(galleries_bytes(reading.galleries))
            atomic_write_json(folder / INVENTORY, reading.inventory(dataset.name, dataset.synthetic, partial))
            replace_folder(folder, final)
    return reading


def _refuse_rendered(dataset: Dataset) -> None:
    """Rendered images never pass for real ones, not even as a part of them that was allowed."""
    path = dataset.raw_root() / "render.json"
    if not dataset.synthetic and path.is_file():
        raise StudyError(
            f"{path.parent} was rendered by this study, as its {path.name} says; expected the real images of "
            f"{dataset.title}: name another folder, or run the rendered data set"
        )


def _check_against_render(reading: Reading) -> None:
    """Compare with the counts that the renderer left in render.json, where it did."""
    path = reading.root / "render.json"
    if not path.is_file():
        return
    wanted, found = read_json(path).get("counts", {}), reading.counts
    remedy = f"remove {reading.root} and prepare again, which renders it anew"
    if reading.layout == "sysu":
        pairs = [
            (
                f"cam {cam}: identities / images",
                (row["ids"], row["images"]),
                (found["cameras"][cam]["ids"], found["cameras"][cam]["images"]),
            )
            for cam, row in wanted.get("cameras", {}).items()
        ]
        pairs += [(f"{split} identities", n, found["ids"][split]) for split, n in wanted.get("ids", {}).items()]
    else:
        names = {"visible": "visible", "thermal": "infrared"}
        pairs = [(f"{name} images", n, found["images"][names[name]]) for name, n in wanted.get("images", {}).items()]
        pairs += [(f"{m} identities", wanted["ids"], n) for m, n in found["identities"].items() if "ids" in wanted]
    for name, a, b in pairs:
        reading.check(name, a, b, reading.root, remedy)


@contextlib.contextmanager
def _temporary_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, removed on leaving unless renamed by then; the caller holds its lock."""
    folder = final.with_name(f".{final.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
