"""Data stages: python -m data_prep check | prepare | pack | weights | verify DATASET.

Exit status: 0 done, 1 refused with the reasons on stderr, 2 wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from danet_study.files import StudyError

if TYPE_CHECKING:
    from danet_study.config import Study
    from data_prep.index import Index

HELP = {
    "check": "write build/inventory/DATASET.json, which shows whether the raw folder changed; renders a rendered set",
    "prepare": "read and check the raw folder, and write data/prepared/DATASET",
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
        command.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE")
        if name in ("pack", "verify"):
            command.add_argument("--workers", type=int, metavar="N", help="processes; default: one per core")
        if name == "verify":
            command.add_argument("--deep", action="store_true", help="also decode every image")
    options = parser.parse_args(arguments)
    try:
        from danet_study.config import load_study

        return run(load_study(options.params), options)
    except StudyError as error:
        print(f"data_prep {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run(study: Study, options: argparse.Namespace) -> int:
    """Run a parsed command."""
    dataset = study.dataset(options.dataset)
    recipe = study.run(f"{dataset.name}-1", next(iter(study.variants)), 0).recipe
    if options.command == "weights":
        from data_prep.weights import make_weights

        out = Path(f"data/weights/{dataset.name}.safetensors")
        make_weights(dataset.image, recipe, study.pretraining, out)
        print(f"{out} written")
        return 0
    if options.command == "pack":
        from data_prep.pack import pack

        meta = pack(dataset, workers=options.workers)
        size = f"{meta['height']} x {meta['width']}"
        print(f"{dataset.name}: {meta['n']:,} images of {size} packed, SHA-256 {meta['content_sha256'][:16]}")
        return 0
    from data_prep import index

    if options.command == "check":
        print(index.write_inventory(dataset))
    elif options.command == "prepare":
        found = index.prepare(dataset, ids_per_batch=recipe.ids_per_batch)
        _accepted(found)
        print(f"{dataset.name}: {len(found.manifest):,} images prepared")
    else:
        from tabulate import tabulate

        from data_prep.pack import inspect_images

        if dataset.synthetic:
            index.inventory(dataset)  # renders
        found = index.read(dataset, ids_per_batch=recipe.ids_per_batch)
        if options.deep:
            root, table = index.raw_root(dataset), found.manifest
            paths, image = [root / path for path in table["path"]], dataset.image
            failures, flat = inspect_images(paths, list(table["modality"]), image.height, image.width, options.workers)
            found.findings += failures
            if flat:
                found.warnings.append(f"{len(flat)} images of nearly one gray value: {index.listed(flat)}")
        print(tabulate(found.checks, ["check", "expected", "found", ""], disable_numparse=True))
        _accepted(found)
        index.settle(found, dataset)
    return 0


def _accepted(found: Index) -> None:
    from data_prep.index import listed

    for warning in found.warnings:
        print(f"accepted: {warning}")
    if found.skipped:
        print(f"skipped: {len(found.skipped)} files that are no part of the layout: {listed(found.skipped)}")


if __name__ == "__main__":
    sys.exit(main())
