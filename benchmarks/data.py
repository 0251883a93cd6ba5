"""Rendering and packing: images per second on one core."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import Times, main, page, table
from danet_core.config import load_study
from danet_core.parameters import Dataset, Image, SplitCounts
from data_prep.pack import pack
from data_prep.prepare import Folders, prepare
from data_prep.synthetic import render_regdb, render_sysu

ROUNDS = 5
PEOPLE = 6  # of each split; with the counts below some hundred images, a second or two of work


def small(dataset: Dataset, root: Path, tiny: bool) -> Dataset:
    """The data set with few identities, to be drawn in `root`."""
    assert dataset.render is not None
    changes: dict[str, object] = {"ids": 4 if tiny else 4 * PEOPLE}
    if dataset.layout == "sysu":
        people, count = (2, 1) if tiny else (PEOPLE, 3)
        changes = {"train_ids": people, "val_ids": people, "test_ids": people, "absent": 0.0}
        changes["images"] = SplitCounts(count, count, count)
    render = dataclasses.replace(dataset.render, **changes)  # type: ignore[arg-type]  # names come from above
    return dataclasses.replace(dataset, root=str(root), render=render)


def rendering(dataset: Dataset, root: Path) -> int:
    """Draw the data set with one process; the number of images."""
    draw = render_sysu if dataset.layout == "sysu" else render_regdb
    return sum(draw(root, dataset.render, workers=1)["counts"]["images"].values())  # type: ignore[arg-type]


def rates(dataset: Dataset, sizes: list[Image], rounds: int, folder: Path) -> list[tuple[object, ...]]:
    """Rows of the table for one layout: rendering, then packing at each size."""
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        started = time.perf_counter()
        count = rendering(dataset, folder / f"{dataset.name}-{number}")
        seconds.setdefault("render", []).append(time.perf_counter() - started)
    tree = dataclasses.replace(dataset, root=str(folder / f"{dataset.name}-0"))
    folders = Folders(folder / "prepared", folder / "packed")
    prepare(tree, folders=folders)
    for number in range(rounds):
        for size in sizes:
            goal = Folders(folders.prepared, folder / f"packed-{number}-{size.height}")
            started = time.perf_counter()
            pack(dataclasses.replace(tree, image=size), workers=1, folders=goal)
            seconds.setdefault(f"pack at {size.height}x{size.width}", []).append(time.perf_counter() - started)
    return [
        (f"{dataset.name}: {name}", count, Times(np.array(times) / count), f"{count / np.median(times):,.0f}")
        for name, times in seconds.items()
    ]


def section(tiny: bool) -> str:
    study = load_study()
    sizes = [Image(96, 48), Image(384, 128)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="danet-bench-") as folder:
        for name in ("synth_sysu", "synth_regdb", "synth_sysu_paper_scale"):
            dataset = small(study.dataset(name), Path(folder) / name, tiny)
            rows += rates(dataset, sizes, 1 if tiny else ROUNDS, Path(folder))
    return page(
        "## Rendering and packing",
        """One process each, with reading, decoding, resizing, writing and hashing; the stages use all cores. The data
        sets differ in file format and in the height of a crop.""",
        table(("work", "images", "time for each", "images/s and core"), rows),
    )


if __name__ == "__main__":
    main(section)
