"""Command line of the data stages: python -m data_prep prepare | pack | verify | weights | sheet DATASET.

Exit status 0: done, or everything as expected. 1: an error, in one sentence on stderr, or a check that failed. 2: wrong
usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from danet_core.durations import timed
from danet_core.files import StudyError

if TYPE_CHECKING:
    from danet_core.config import Study

_PROBLEMS_SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        from danet_core.config import load_study

        return options.run(load_study(options.params), options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder without write permission
        print(f"error: {error.filename or 'the disk'} cannot be used ({error.strerror or error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


def _prepare(study: Study, options: argparse.Namespace) -> int:
    from data_prep.prepare import prepare

    with timed(f"prepare-{options.dataset}", Path()):
        reading = prepare(study.dataset(options.dataset), allow_partial=options.allow_partial)
    for warning in reading.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{options.dataset}: {len(reading.manifest):,} images prepared")
    return 0


def _pack(study: Study, options: argparse.Namespace) -> int:
    from data_prep.pack import pack

    with timed(f"pack-{options.dataset}", Path()):
        meta = pack(study.dataset(options.dataset), workers=options.workers)
    print(
        f"{options.dataset}: {meta['n']:,} images packed at {meta['height']}x{meta['width']}, sha256 "
        f"{meta['content_sha256'][:16]}"
    )
    return 0


def _verify(study: Study, options: argparse.Namespace) -> int:
    from data_prep.pack import check_images
    from data_prep.prepare import read
    from data_prep.reading import format_checks

    dataset = study.dataset(options.dataset)
    allow_partial = options.allow_partial or dataset.allow_partial
    reading = read(dataset, root=options.root, allow_partial=allow_partial)
    if options.deep:
        check_images(reading, workers=options.workers)
    print(f"{dataset.title}: {reading.root}")
    print(format_checks(reading.checks))
    for warning in reading.warnings:
        print(f"accepted: {warning}")
    if reading.skipped:
        print(
            f"skipped: {len(reading.skipped)} files or folders that are not part of the layout, first "
            f"{reading.skipped[0]}"
        )
    failed = reading.failed()
    for sentence in [*reading.problems, *(check.sentence() for check in failed)][:_PROBLEMS_SHOWN]:
        print(f"error: {sentence}", file=sys.stderr)
    hidden = len(reading.problems) + len(failed) - _PROBLEMS_SHOWN
    if hidden > 0:
        print(f"and {hidden} more", file=sys.stderr)
    if reading.problems or (failed and not allow_partial):
        print(f"{dataset.name}: {len(reading.problems)} problems, {len(failed)} of {len(reading.checks)} checks failed")
        return 1
    print(
        f"{dataset.name}: {'partial, ' if failed else ''}{len(reading.checks) - len(failed)} of "
        f"{len(reading.checks)} checks passed"
    )
    return 0


def _weights(study: Study, options: argparse.Namespace) -> int:
    from data_prep.weights import make_weights

    out = Path("data/weights") / f"{options.dataset}.safetensors"
    with timed(f"weights-{options.dataset}", Path()):
        make_weights(study.dataset(options.dataset), study.pretraining, out)
    print(f"{out} written")
    return 0


def _sheet(study: Study, options: argparse.Namespace) -> int:
    from data_prep.sheet import write_sheet

    dataset = study.dataset(options.dataset)
    write_sheet(dataset.raw_root(), dataset.layout, options.out)
    print(f"{options.out} written")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Prepare, verify and pack the study's data sets."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help, description=help)
        one.set_defaults(run=run)
        one.add_argument(
            "dataset", metavar="DATASET", help="a name under `datasets` in params.yaml, e.g. sysu or synth_regdb"
        )
        one.add_argument(
            "--params", type=Path, default=Path("params.yaml"), metavar="FILE", help="default: params.yaml"
        )
        return one

    def partial(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--allow-partial", action="store_true", help="accept differences in counts: the set is a subset on purpose"
        )

    def workers(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--workers", type=_positive, metavar="N", help="decoding processes; default: one per core, at most 12"
        )

    partial(command("prepare", _prepare, "render if embedded, read, verify, and write data/prepared/DATASET"))
    workers(
        command(
            "pack", _pack, "decode and resize data/prepared/DATASET into data/packed/DATASET; a killed pack resumes"
        )
    )
    verify = command(
        "verify", _verify, "check a raw tree against the published counts and print a table; writes nothing"
    )
    verify.add_argument("--deep", action="store_true", help="also decode every image")
    verify.add_argument(
        "--root", type=Path, metavar="DIR", help="the raw tree; default: from params.yaml or the environment"
    )
    partial(verify)
    workers(verify)
    command("weights", _weights, "write data/weights/DATASET.safetensors, the backbone weights of its recipe")
    sheet = command("sheet", _sheet, "draw a sheet of sample images per identity and camera")
    sheet.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png or .jpg file")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
