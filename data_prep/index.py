"""Reading a raw tree: what a reader returns, the checks that hold for every data set, and data/prepared/<dataset>.

A data set needs a row in params.yaml and a reader: see docs/extend.md. `layout` in the row is the name of a module of
data_prep, whose function `read_tree` reads, or the import path of a reader of one's own. A reader takes the folder, the
row, and the names of all files in the folder (relative, `/`, natural order), and returns an `Index`:

- `manifest` has one row per image: path, pid, camid, modality, and one split column per trial, split_1, split_2, ...
  A split is `train`, `val` or `test`, or empty for an image that the trial does not use.
- `galleries` has one (trials, images) array of manifest rows per setting, for protocols with fixed galleries.
- `findings` has one sentence for each problem. Missing files, leaks between splits, missing modalities and empty
  galleries are found here.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from jaxtyping import Int

from danet_core import MODALITIES
from danet_study.config import Dataset
from danet_study.files import StudyError, atomic_write_json, sha256_file
from danet_study.store import GALLERIES, MANIFEST, printable
from data_prep.folders import new_folder

PREPARED, INVENTORIES = Path("data/prepared"), Path("data/inventory")
INVENTORY = "inventory.json"
COLUMNS = ["path", "pid", "camid", "modality"]  # and split_<trial>
SUFFIXES = r"\.(?:jpe?g|png|bmp|tiff?)"  # of images, for the readers' patterns
SHOWN = 10  # findings in one message


@dataclass
class Index:
    """What a reader found in a raw tree."""

    manifest: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=[*COLUMNS, "split_1"]))
    galleries: dict[str, Int[np.ndarray, "T G"]] = field(default_factory=dict)  # manifest rows by setting
    findings: list[str] = field(default_factory=list)  # refused
    differences: list[str] = field(default_factory=list)  # refused unless the data set allows a part of itself
    warnings: list[str] = field(default_factory=list)  # accepted
    skipped: list[str] = field(default_factory=list)  # files that are no part of the layout
    checks: list[tuple[str, str, str, str]] = field(default_factory=list)  # what, expected, found, verdict

    def compare(self, what: str, expected: object, found: object) -> None:
        """Check a count, or several in a tuple."""
        wanted, got = _text(expected), _text(found)
        self.checks.append((what, wanted, got, "ok" if wanted == got else "WRONG"))
        if wanted != got:
            self.differences.append(f"{what}: expected {wanted}, found {got}")

    def forbid(self, what: str, found: Collection[object], *, partial: bool = False) -> None:
        """Check that nothing was found. `partial`: a part of a data set on purpose may have such."""
        self.checks.append((what, "0", str(len(found)), "WRONG" if len(found) else "ok"))
        if len(found):
            (self.differences if partial else self.findings).append(f"{what}: {listed(found)}")


Reader = Callable[[Path, Dataset, Sequence[str]], Index]


def raw_root(dataset: Dataset) -> Path:
    """The data set's folder: the environment variable `root_variable(dataset)` if it is set, else `root`."""
    return Path(os.environ.get(root_variable(dataset)) or dataset.root).expanduser()


def root_variable(dataset: Dataset) -> str:
    """SYSU_MM01_ROOT for `sysu`; otherwise the data set's name in capitals and _ROOT, as REGDB_ROOT."""
    return "SYSU_MM01_ROOT" if dataset.name == "sysu" else f"{dataset.name.upper()}_ROOT"


def scan(root: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and modification time in ns of all files below `root`, by relative name, in natural order.

    The size of a broken link is -1. Raises StudyError if a folder cannot be listed.
    """

    def refuse_folder(error: OSError) -> NoReturn:
        raise StudyError(f"{printable(error.filename)} cannot be listed ({error.strerror}); check access rights")

    found: dict[str, tuple[int, int]] = {}
    for folder, folders, names in os.walk(root, onerror=refuse_folder, followlinks=True):
        here = Path(folder).resolve()  # a link to a folder that holds it is not followed
        folders[:] = [name for name in folders if not here.is_relative_to(Path(folder, name).resolve())]
        for path in (Path(folder, name) for name in names):
            try:
                status = path.stat()
                size_and_time = status.st_size, status.st_mtime_ns
            except OSError:
                size_and_time = -1, 0
            found[path.relative_to(root).as_posix()] = size_and_time
    return {name: found[name] for name in sorted(found, key=natural_key)}


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key under which `2.jpg` precedes `10.jpg`."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if i % 2 else (0, part.casefold()) for i, part in enumerate(parts)], name


def inventory(dataset: Dataset) -> dict[str, Any]:
    """Number of files of the raw tree and a hash; for photographs also that of their reader's source.

    The hash of photographs is that of names, sizes and times. A rendered set is rendered if it is missing or was
    edited; its hash is that of the content. Raises StudyError if photographs are missing.
    """
    root = raw_root(dataset)
    if dataset.render is not None:
        from data_prep.render.synthetic import render  # here: photographs need no renderer

        record = render(root, dataset.layout, dataset.render)
        return {"files": record["counts"]["files"], "sha256": record["content_sha256"]}
    _require_folder(dataset)
    digest, tree = hashlib.sha256(), scan(root)
    for name, (size, modified) in tree.items():
        digest.update(f"{name}\0{size}\0{modified}\0".encode("utf-8", "surrogateescape"))
    reader = sha256_file(Path(inspect.getfile(_reader(dataset))))
    return {"files": len(tree), "sha256": digest.hexdigest(), "reader_sha256": reader}


def content_sha256(dataset: Dataset, index: Index) -> str:
    """Hash of names and bytes of all files of the raw tree: the same for every copy of the data set, but slow.

    `index` gets a finding if one photograph belongs to two identities.
    """
    root, digest = raw_root(dataset), hashlib.sha256()
    contents = {name: sha256_file(root / name) if size >= 0 else "" for name, (size, _) in scan(root).items()}
    for name, content in contents.items():
        digest.update(f"{name}\0{content}\0".encode("utf-8", "surrogateescape"))
    images = index.manifest.assign(content=index.manifest["path"].map(contents)).sort_values("content", kind="stable")
    n_ids = images.groupby("content")["pid"].transform("nunique")
    index.forbid("photographs that two identities share", images.loc[n_ids > 1, "path"])
    return digest.hexdigest()


def write_inventory(dataset: Dataset, folder: Path = INVENTORIES) -> Path:
    """Write the inventory of photographs to `folder`/<dataset>.json, on which the stage `prepare` depends.

    Raises StudyError for a rendered set: `prepare` renders it.
    """
    if dataset.synthetic:
        raise StudyError(f"{dataset.name} is rendered, and only photographs are checked; run prepare")
    path = folder / f"{dataset.name}.json"
    atomic_write_json(path, inventory(dataset))
    return path


def read(dataset: Dataset, *, ids_per_batch: int = 2) -> Index:
    """Read and check a raw tree; nothing is refused yet, see `settle`. Raises StudyError if there is no tree."""
    _require_folder(dataset)
    root = raw_root(dataset)
    reader, tree = _reader(dataset), scan(root)
    index = reader(root, dataset, list(tree))
    try:
        manifest = index.manifest.astype({"path": str, "pid": np.int64, "camid": np.int64, "modality": str})
        splits = dict.fromkeys(["split_1", *split_columns(manifest)], str)
        index.manifest = manifest.fillna("").astype(splits).reset_index(drop=True)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        found = " ".join(str(error).split())[:80]
        raise StudyError(f"datasets.{dataset.name}: {dataset.layout} returned no valid Index ({found})") from None
    if "render.json" in tree and not dataset.synthetic:
        index.findings.append(f"the images were rendered by this study (render.json); {dataset.title} is expected")
    _check_files(index, tree)
    if len(index.manifest):
        _check_splits(index, dataset, ids_per_batch)
        _check_galleries(index)
    elif not index.findings:
        index.findings.append(f"no file fits the layout {dataset.layout} (first file: {listed(tree, 1)})")
    return index


def settle(index: Index, dataset: Dataset) -> bool:
    """Raise StudyError with all that is refused; returns whether the set is a part of what it should be."""
    findings, remedy = index.findings, ""
    if index.differences and not dataset.allow_partial:
        findings = findings + index.differences
        remedy = f"; for a subset on purpose, set datasets.{dataset.name}.allow_partial in params.yaml"
    refuse(findings, raw_root(dataset), remedy)
    return bool(index.differences)


def refuse(findings: Sequence[str], where: Path, remedy: str = "") -> None:
    """Raise StudyError with the findings, at most ten of them, if there are any."""
    if len(findings) == 1:
        raise StudyError(f"{printable(where)}: {findings[0]}{remedy}")
    if findings:
        more = [f"and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
        lines = "\n  ".join([*findings[:SHOWN], *more])
        raise StudyError(f"{printable(where)}: {len(findings)} findings{remedy}\n  {lines}")


def prepare(dataset: Dataset, *, ids_per_batch: int = 2, prepared: Path = PREPARED) -> Index:
    """Render if needed, read and check a data set, and write `prepared`/<dataset>, whole or not at all.

    It holds manifest.csv, inventory.json, and galleries.npz for protocols with fixed galleries.
    Raises StudyError with all findings, at most ten lines; an older `prepared`/<dataset> stays then.
    """
    raw = inventory(dataset)
    index = read(dataset, ids_per_batch=ids_per_batch)
    partial = settle(index, dataset)
    manifest = index.manifest[[*COLUMNS, *split_columns(index.manifest)]]
    with new_folder(prepared / dataset.name) as folder:
        manifest.to_csv(folder / MANIFEST, index_label="row", lineterminator="\n", encoding="utf-8")
        if index.galleries:
            arrays: dict[str, Any] = {name: index.galleries[name].astype("<i4") for name in sorted(index.galleries)}
            np.savez(folder / GALLERIES, **arrays)  # members have no time stamp: equal galleries, equal bytes
        about = {
            "dataset": dataset.name,
            "layout": dataset.layout,
            "protocol": dataset.protocol,
            "synthetic": dataset.synthetic,
            "partial": partial,
            "raw": raw,
            "counts": counts(manifest),
            "warnings": [_safe(text) for text in (*index.warnings, *index.differences)],
            "skipped": {"files": len(index.skipped), "first": [_safe(name) for name in index.skipped[:20]]},
        }
        atomic_write_json(folder / INVENTORY, about)
    return index


def split_columns(manifest: pd.DataFrame) -> list[str]:
    """split_1, split_2, ... as far as the manifest has them."""
    return sorted((name for name in map(str, manifest) if re.fullmatch(r"split_[0-9]+", name)), key=natural_key)


def counts(manifest: pd.DataFrame) -> dict[str, Any]:
    """Identities and images of each modality by trial and split."""
    return {
        column.removeprefix("split_"): {
            str(split): {
                "identities": int(rows["pid"].nunique()),
                **{name: int((rows["modality"] == name).sum()) for name in MODALITIES},
            }
            for split, rows in manifest.groupby(column)
            if split
        }
        for column in split_columns(manifest)
    }


def listed(values: Iterable[object], limit: int = 3) -> str:
    """The first values, and how many more there are."""
    values = list(values)
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(_safe, values[:limit])) + more


def _check_files(index: Index, tree: dict[str, tuple[int, int]]) -> None:
    paths = index.manifest["path"]
    size = paths.map(lambda path: tree.get(path, (-1, 0))[0])
    index.forbid("images that are listed, but missing or broken links", paths[size < 0])
    index.forbid("images of 0 bytes", paths[size == 0])
    index.forbid("images listed twice", paths[paths.duplicated()])
    index.forbid("image names that are not UTF-8 (rename them)", [path for path in paths if printable(path) != path])
    index.forbid("modality neither visible nor infrared", set(index.manifest["modality"]) - set(MODALITIES))


def _check_splits(index: Index, dataset: Dataset, ids_per_batch: int) -> None:
    """Leaks, missing modalities and too few identities, over all trials."""
    trials = split_columns(index.manifest)
    used = index.manifest.melt(["pid", "modality"], trials, "trial", "split").query("split != ''")
    train, test = used[used["split"].isin(dataset.train_splits)], used[used["split"] == "test"]

    def forbid(what: str, found: Iterable[Any]) -> None:  # of pairs of a trial and a value
        index.forbid(what, [f"{value} (trial {trial.removeprefix('split_')})" for trial, value in found])

    n_splits = used.groupby(["trial", "pid"])["split"].nunique()
    forbid("identities in two splits", n_splits.index[n_splits > 1])
    for name, part in (("training", train), ("test", test)):
        there = set(zip(part["trial"], part["modality"], strict=True))
        absent = [(trial, modality) for trial in trials for modality in MODALITIES if (trial, modality) not in there]
        forbid(f"modalities without {name} image", absent)
    n_modalities = train.groupby(["trial", "pid"])["modality"].nunique()
    forbid("training identities with one modality only", n_modalities.index[n_modalities == 1])
    n_ids = train.groupby("trial")["pid"].nunique()
    few = n_ids[n_ids < ids_per_batch].items()
    forbid(f"too few training identities for recipe.ids_per_batch, {ids_per_batch} (lower it)", few)


def _check_galleries(index: Index) -> None:
    test = np.flatnonzero(index.manifest["split_1"] == "test")
    wrong = [name for name, rows in index.galleries.items() if rows.size == 0 or not np.isin(rows, test).all()]
    index.forbid("galleries that are empty or hold other than test images", wrong)


def _reader(dataset: Dataset) -> Reader:
    """The function that `layout` names: `read_tree` of a module of data_prep, or an import path."""
    path = dataset.layout if "." in dataset.layout else f"data_prep.{dataset.layout}.read_tree"
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StudyError(f"datasets.{dataset.name}.layout: {path} is no reader ({error}); see docs/extend.md") from None


def _require_folder(dataset: Dataset) -> None:
    root, variable = raw_root(dataset), root_variable(dataset)
    remedy = f"set datasets.{dataset.name}.root in params.yaml or {variable}"
    if dataset.published:
        source = getattr(importlib.import_module(_reader(dataset).__module__), "REQUEST", "its authors")
        remedy = f"request it ({source}), then set {variable}"
    if not root.is_dir():
        raise StudyError(f"{dataset.title} is not at {printable(root)}; {remedy}")


def _safe(value: object) -> str:
    """A value on one line, also if it holds bytes that are not UTF-8."""
    return printable(str(value)).replace("\n", "\\n")


def _text(value: object) -> str:
    """Numbers with thousands separators; tuples with slashes."""
    if isinstance(value, tuple):
        return " / ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else _safe(value)
