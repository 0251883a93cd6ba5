"""Reading a raw tree: what a reader returns, the checks that hold for every data set, and data/prepared/<dataset>.

A data set of your own needs a row in params.yaml and a reader. `layout` in the row is the import path of the reader, a
function of the folder, the row, and the names of all files in the folder (relative, `/`, natural order):

    # my_package.py, with `layout: my_package.read_mine`
    import re
    import pandas as pd
    from data_prep.index import Index

    def read_mine(root, dataset, files):
        index, rows = Index(), []
        test = set(map(int, (root / "test_ids.txt").read_text().split()))
        for name in files:
            match = re.fullmatch(r"(visible|infrared)/(\\d+)_c(\\d+)_.*\\.png", name)
            if match is None:
                index.skipped.append(name)  # Thumbs.db and the like: listed, not refused
                continue
            modality, pid, camid = match[1], int(match[2]), int(match[3])
            rows.append((name, pid, camid, modality, "test" if pid in test else "train"))
        index.manifest = pd.DataFrame(rows, columns=["path", "pid", "camid", "modality", "split_1"])
        return index

The manifest has one row per image and one split column per trial, split_1, split_2, ..: `train`, `val` or `test`, empty
for an image that the trial does not use. `galleries` has, for protocols with fixed galleries, one (trials, images)
array of manifest rows per setting. Whatever the reader cannot accept it adds to `index.findings`, a sentence each.
Existence of the files, leaks between splits, missing modalities and empty galleries are checked here.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from danet_core import MODALITIES
from danet_study.config import Dataset
from danet_study.files import StudyError, atomic_write_json, exclusive, replace_folder
from danet_study.store import GALLERIES, MANIFEST, printable
from data_prep.pack import refuse

PREPARED, INVENTORIES = Path("data/prepared"), Path("build/inventory")
INVENTORY = "inventory.json"
READERS = {"sysu_mm01": "data_prep.sysu_mm01.read_sysu", "regdb": "data_prep.regdb.read_regdb"}
COLUMNS = ("path", "pid", "camid", "modality", "split_1")
SUFFIXES = r"\.(?:jpe?g|png|bmp|tiff?)"  # of images, for the readers' patterns


@dataclass
class Index:
    """What a reader found in a raw tree."""

    manifest: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(COLUMNS)))
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
        self.checks.append((what, "0", str(len(found)), "WRONG" if found else "ok"))
        if found:
            (self.differences if partial else self.findings).append(f"{what}: {listed(found)}")


Reader = Callable[[Path, Dataset, Sequence[str]], Index]


def raw_root(dataset: Dataset) -> Path:
    """The data set's folder: the environment variable `root_variable(dataset)` if it is set, else `root`."""
    return Path(os.environ.get(root_variable(dataset)) or dataset.root).expanduser()


def root_variable(dataset: Dataset) -> str:
    """SYSU_MM01_ROOT for `sysu`; otherwise the data set's name in capitals and _ROOT, as REGDB_ROOT."""
    return "SYSU_MM01_ROOT" if dataset.name == "sysu" else f"{dataset.name.upper()}_ROOT"


def scan(root: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time (ns) of all files below `root`, by relative name, each folder in natural order.

    The size of a broken link is -1. Raises StudyError if a folder cannot be listed.
    """
    found: dict[str, tuple[int, int]] = {}

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: natural_key(entry.name))
            status = os.stat(folder)  # noqa: PTH116 - on strings, for speed
        except OSError as error:
            raise StudyError(f"{printable(folder)} cannot be listed ({error.strerror}); check access rights") from None
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder that holds it
            return
        for entry in ordered:
            if entry.is_dir():
                walk(entry.path, f"{prefix}{entry.name}/", above | {here})
            else:
                try:
                    file = entry.stat()
                    found[prefix + entry.name] = (file.st_size, file.st_mtime_ns)
                except OSError:
                    found[prefix + entry.name] = (-1, 0)

    walk(str(root), "", frozenset())
    return found


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key under which `2.jpg` precedes `10.jpg`."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if i % 2 else (0, part.casefold()) for i, part in enumerate(parts)], name


def inventory(dataset: Dataset) -> dict[str, Any]:
    """Number of files of the raw tree and a hash, for stages that depend on the tree without hashing every file.

    Photographs: a hash of names, sizes and modification times. A rendered set is rendered if it is missing or was
    edited; its hash is that of the content. Raises StudyError if the folder is missing.
    """
    root = raw_root(dataset)
    if dataset.render is not None:
        from data_prep.render.synthetic import render

        record = render(root, dataset.layout, dataset.render)
        return {"files": record["counts"]["files"], "sha256": record["content_sha256"]}
    if not root.is_dir():
        raise StudyError(_absent(dataset, root))
    digest, tree = hashlib.sha256(), scan(root)
    for name, (size, modified) in tree.items():
        digest.update(f"{name}\0{size}\0{modified}\0".encode("utf-8", "surrogateescape"))
    return {"files": len(tree), "sha256": digest.hexdigest()}


def write_inventory(dataset: Dataset, folder: Path = INVENTORIES) -> Path:
    """Write `inventory` to `folder`/<dataset>.json, which the stage `prepare` depends on."""
    path = folder / f"{dataset.name}.json"
    atomic_write_json(path, inventory(dataset))
    return path


def read(dataset: Dataset, *, ids_per_batch: int = 2) -> Index:
    """Read and check a raw tree; nothing is refused yet, see `settle`. Raises StudyError if there is no tree."""
    root = raw_root(dataset)
    if not root.is_dir():
        raise StudyError(_absent(dataset, root))
    reader, tree = _reader(dataset), scan(root)
    index = reader(root, dataset, list(tree))
    try:
        manifest = index.manifest.astype({"path": str, "pid": np.int64, "camid": np.int64, "modality": str})
        splits = dict.fromkeys(["split_1", *split_columns(manifest)], str)
        index.manifest = manifest.fillna("").astype(splits).reset_index(drop=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = " ".join(str(error).split())[:80]
        raise StudyError(
            f"datasets.{dataset.name}: {dataset.layout} returned no Index as in data_prep/index.py ({found})"
        ) from None
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
    if not dataset.allow_partial:
        findings = findings + index.differences
        if index.differences:
            remedy = f"; for a subset on purpose, set datasets.{dataset.name}.allow_partial in params.yaml"
    refuse(findings, printable(raw_root(dataset)), remedy)
    return bool(index.differences)


def prepare(dataset: Dataset, *, ids_per_batch: int = 2, prepared: Path = PREPARED) -> Index:
    """Render if needed, read and check a data set, and write `prepared`/<dataset>, whole or not at all.

    It holds manifest.csv, inventory.json, and galleries.npz for protocols with fixed galleries.
    Raises StudyError with all findings, at most ten lines; an older `prepared`/<dataset> stays then.
    """
    final, partial = prepared / dataset.name, prepared / f"{dataset.name}.partial"
    with exclusive(prepared / f".{dataset.name}.lock", str(final)):
        raw = inventory(dataset)
        index = read(dataset, ids_per_batch=ids_per_batch)
        is_partial = settle(index, dataset)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            manifest = index.manifest.assign(row=np.arange(len(index.manifest)))
            manifest = manifest[["row", *COLUMNS[:4], *split_columns(manifest)]]
            manifest.to_csv(partial / MANIFEST, index=False, lineterminator="\n", encoding="utf-8")
            if index.galleries:
                arrays: dict[str, Any] = {k: index.galleries[k].astype("<i4") for k in sorted(index.galleries)}
                np.savez(partial / GALLERIES, **arrays)  # members have no time stamp: equal galleries, equal bytes
            about = {
                **{"dataset": dataset.name, "layout": dataset.layout, "protocol": dataset.protocol},
                **{"synthetic": dataset.synthetic, "partial": is_partial, "raw": raw, "counts": counts(manifest)},
                "warnings": [*map(_safe, [*index.warnings, *index.differences])],
                "skipped": {"files": len(index.skipped), "first": [*map(_safe, index.skipped[:20])]},
            }
            atomic_write_json(partial / INVENTORY, about)
            replace_folder(partial, final)
        except OSError as error:
            raise StudyError(f"{final} cannot be written ({error.strerror}); make room on the disk") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return index


def split_columns(manifest: pd.DataFrame) -> list[str]:
    """split_1, split_2, .. as far as the manifest has them."""
    return sorted((name for name in map(str, manifest) if re.fullmatch(r"split_[0-9]+", name)), key=natural_key)


def counts(manifest: pd.DataFrame) -> dict[str, Any]:
    """Identities and images of each modality by trial and split."""
    result: dict[str, Any] = {}
    for column in split_columns(manifest):
        used = manifest[manifest[column] != ""]
        result[column.removeprefix("split_")] = {
            str(split): {
                "identities": int(rows["pid"].nunique()),
                **{name: int((rows["modality"] == name).sum()) for name in MODALITIES},
            }
            for split, rows in used.groupby(column)
        }
    return result


def counts_by_camera(manifest: pd.DataFrame, trial: int = 1) -> pd.DataFrame:
    """Identities and images by split, camera and modality, of a manifest of `trial`."""
    used = manifest[manifest[f"split_{trial}"] != ""].rename(columns={f"split_{trial}": "split"})
    grouped = used.groupby(["split", "camid", "modality"])
    return grouped.agg(identities=("pid", "nunique"), images=("path", "size"))


def listed(values: Iterable[object], limit: int = 3) -> str:
    """The first values, and how many more there are."""
    values = list(values)
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(_safe(value) for value in values[:limit]) + more


def _check_files(index: Index, tree: dict[str, tuple[int, int]]) -> None:
    paths, manifest = index.manifest["path"], index.manifest
    index.forbid("images that are listed, but missing or broken links", [p for p in paths if tree.get(p, (-1,))[0] < 0])
    index.forbid("images of 0 bytes", [p for p in paths if tree.get(p, (-1,))[0] == 0])
    index.forbid("images listed twice", list(paths[paths.duplicated()]))
    index.forbid("image names that are not UTF-8 (rename them)", [p for p in paths if printable(p) != p])
    index.forbid("modality neither visible nor infrared", sorted(set(manifest["modality"]) - set(MODALITIES)))


def _check_splits(index: Index, dataset: Dataset, ids_per_batch: int) -> None:
    """Leaks, missing modalities and too few identities, over all trials."""
    shared, alone, untrained, untested, few = [], [], [], [], []
    for column in split_columns(index.manifest):
        trial = f" (trial {column.removeprefix('split_')})"
        used = index.manifest[index.manifest[column] != ""]
        splits = used.groupby("pid")[column].nunique()
        shared += [f"{pid}{trial}" for pid in splits.index[splits > 1]]
        train = used[used[column].isin(dataset.train_splits)]
        test = used[used[column] == "test"]
        untested += [name + trial for name in MODALITIES if name not in set(test["modality"])]
        if absent := [name + trial for name in MODALITIES if name not in set(train["modality"])]:
            untrained += absent
            continue
        n_modalities = train.groupby("pid")["modality"].nunique()
        alone += [f"{pid}{trial}" for pid in n_modalities.index[n_modalities == 1]]
        if len(n_modalities) < ids_per_batch:
            few.append(f"{len(n_modalities)}{trial}")
    index.forbid("identities in two splits", shared)
    index.forbid("modalities without training image", untrained)
    index.forbid("modalities without test image", untested)
    index.forbid("training identities with one modality only", alone)
    index.forbid(f"fewer training identities than recipe.ids_per_batch, {ids_per_batch}", few)


def _check_galleries(index: Index) -> None:
    test = np.flatnonzero(index.manifest["split_1"] == "test")
    for name, rows in index.galleries.items():
        whole = rows.ndim == 2 and rows.size > 0 and bool(np.isin(rows, test).all())
        index.forbid(f"galleries that are empty or hold other than test images: {name}", [] if whole else [name])


def _reader(dataset: Dataset) -> Reader:
    module, _, name = READERS.get(dataset.layout, dataset.layout).rpartition(".")
    try:
        reader = getattr(importlib.import_module(module), name)
        if not callable(reader):
            raise AttributeError("no function")
        return reader
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(READERS)
        raise StudyError(
            f"datasets.{dataset.name}.layout: {dataset.layout} is neither of {known} nor importable ({error})"
        ) from None


def _absent(dataset: Dataset, root: Path) -> str:
    place = f"{dataset.title} is not at {printable(root)}"
    if not dataset.published:
        return f"{place}; set datasets.{dataset.name}.root in params.yaml or {root_variable(dataset)}"
    source = getattr(importlib.import_module(_reader(dataset).__module__), "REQUEST", "its authors")
    return f"{place}; request it ({source}), then set {root_variable(dataset)}"


def _safe(value: object) -> str:
    """A value on one line, also if it holds bytes that are not UTF-8."""
    return printable(str(value)).replace("\n", "\\n")


def _text(value: object) -> str:
    """Numbers with thousands separators; tuples with slashes."""
    if isinstance(value, tuple):
        return " / ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else _safe(value)
