"""Data stages: python -m data_prep check | prepare | pack | weights | verify DATASET.

Exit status: 0 done, 1 refused with the reasons on stderr, 2 wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from danet_study.config import Dataset, Study, load_study
from danet_study.files import StudyError, escape_unprintable
from danet_study.processes import exit_with_pipeline
from data_prep import index
from data_prep.pack import inspect_images, pack

HELP = {
    "check": "write data/inventory/DATASET.json, which shows whether a folder of photographs changed",
    "prepare": "render or find the raw folder, check it, and write data/prepared/DATASET",
    "pack": "decode and resize the images into data/packed/DATASET",
    "weights": "write data/weights/DATASET.safetensors, the backbone weights of the data set's recipe",
    "verify": "print every check of the raw folder; writes nothing",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Prepare the study's data sets.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text in HELP.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("dataset", metavar="DATASET", help="a name under `datasets` in params.yaml")
        if name in ("pack", "verify"):
            command.add_argument("--workers", type=int, metavar="N", help="processes; default: one per core")
        if name == "verify":
            command.add_argument("--deep", action="store_true", help="also decode and hash every image")
    options = parser.parse_args(arguments)
    exit_with_pipeline()
    escape_unprintable()
    try:
        run(load_study(), options)
    except StudyError as error:
        print(f"data_prep {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(study: Study, options: argparse.Namespace) -> None:
    """Run a parsed command."""
    dataset = study.dataset(options.dataset)
    recipe = study.run(f"{dataset.name}-1", next(iter(study.variants)), 0).recipe
    match options.command:
        case "check":
            print(index.write_inventory(dataset))
        case "prepare":
            found = index.prepare(dataset, ids_per_batch=recipe.ids_per_batch)
            _print_accepted(found)
            print(f"{dataset.name}: {len(found.manifest):,} images prepared")
        case "pack":
            meta = pack(dataset, workers=options.workers)
            size = f"{meta['height']} x {meta['width']}"
            print(f"{dataset.name}: {meta['n']:,} images of {size} packed, SHA-256 {meta['content_sha256'][:16]}")
        case "weights":
            from data_prep.weights import make_weights  # here: the other commands need no torch

            out = Path(f"data/weights/{dataset.name}.safetensors")
            make_weights(dataset.image, recipe, study.pretraining, out)
            print(f"{out} written")
        case "verify":
            verify(dataset, recipe.ids_per_batch, deep=options.deep, workers=options.workers)


def verify(dataset: Dataset, ids_per_batch: int, *, deep: bool = False, workers: int | None = None) -> None:
    """Print every check; `deep`: also decode and hash every image. Raises StudyError with all findings."""
    if dataset.synthetic:
        index.inventory(dataset)  # renders
    found = index.read(dataset, ids_per_batch=ids_per_batch)
    if deep:
        paths, image = [index.raw_root(dataset) / path for path in found.manifest["path"]], dataset.image
        failures, flat = inspect_images(paths, [*found.manifest["modality"]], image.height, image.width, workers)
        found.findings += failures
        content = "" if found.findings else index.content_sha256(dataset, found)  # not of unreadable files
        if flat:
            found.warnings.append(f"{len(flat)} nearly constant images: {index.listed(flat)}")
    print(tabulate(found.checks, ["check", "expected", "found", ""], disable_numparse=True))
    _print_accepted(found)
    index.settle(found, dataset)
    if deep:
        print(f"SHA-256 of names and bytes: {content}")


def _print_accepted(found: index.Index) -> None:
    for warning in found.warnings:
        print(f"accepted: {warning}")
    if found.skipped:
        print(f"skipped: {len(found.skipped)} files that are no part of the layout: {index.listed(found.skipped)}")


if __name__ == "__main__":
    sys.exit(main())
