"""Command line of a run and of a trained model: python -m danet_core train | search | show.

Exit status 0: done. 1: an error, in one sentence on stderr. 2: wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from danet_core.files import StudyError

_SKIPPED_SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run_command(options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder without write permission
        print(f"error: {error.filename or 'the disk'} cannot be used ({error.strerror or error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace) -> int:
    from danet_core.config import load_study
    from danet_core.record import RunFolder
    from danet_core.train import train

    config = load_study(options.params).run(options.dataset, options.variant, options.trial, options.seed)
    train(config, RunFolder.of(config), device=options.device, log=lambda line: print(line, flush=True))
    return 0


def _search(options: argparse.Namespace) -> int:
    from danet_core.nearest import DESCRIPTIONS
    from danet_core.search import DRAWN, printable, search
    from danet_core.style import check_picture, save_as

    check_picture(options.out)  # before minutes of work
    ranking = search(
        options.query,
        options.gallery,
        options.run,
        device=options.device,
        skip_broken=options.skip_broken,
        index=options.index,
        top=options.top,
    )
    for sentence in ranking.broken:
        print(f"left out: {printable(sentence)}", file=sys.stderr)
    for name in ranking.skipped[:_SKIPPED_SHOWN]:
        print(f"skipped: {printable(name)}", file=sys.stderr)
    if len(ranking.skipped) > _SKIPPED_SHOWN:
        print(f"skipped: and {len(ranking.skipped) - _SKIPPED_SHOWN} more", file=sys.stderr)
    print(f"query {printable(str(ranking.query))}")
    print(f"gallery {printable(str(ranking.gallery))}, {ranking.n_gallery:,} images")
    print(f"model {ranking.run}, {ranking.pretrained_on}; cosine distance, {DESCRIPTIONS[ranking.index]}\n")
    print(ranking.text(options.top))
    path = save_as(ranking.figure(options.top), options.out)
    print(
        f"\n{path} written" + (f", the first {DRAWN} of them" if min(options.top, len(ranking.names)) > DRAWN else "")
    )
    return 0


def _show(options: argparse.Namespace) -> int:
    from danet_core.search import describe, find_run

    print(describe(find_run(options.run) / "record.json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    description = "Train, use and look at the study's models."
    parser = argparse.ArgumentParser(prog="python -m danet_core", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    help = "train one run, or go on with it; started by torchrun, in several processes"
    train = commands.add_parser("train", help=help, description=help)
    train.set_defaults(run_command=_train)
    train.add_argument("--dataset", required=True, metavar="D", help="a data set of params.yaml, packed")
    train.add_argument("--variant", required=True, metavar="V", help="a variant of params.yaml")
    train.add_argument("--trial", type=_positive, default=1, metavar="T", help="RegDB's split; default: 1")
    train.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    train.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE", help="default: params.yaml")
    _add_device(train)

    help = "rank a folder of crops for one query crop, print the top and save a picture of them"
    search = commands.add_parser("search", help=help, description=help)
    search.set_defaults(run_command=_search)
    search.add_argument("--query", type=Path, required=True, metavar="IMG", help="a crop of one person")
    search.add_argument(
        "--gallery", type=Path, required=True, metavar="FOLDER", help="crops (jpg, png, bmp), also in sub-folders"
    )
    search.add_argument(
        "--run", type=Path, metavar="RUN", help="a run's folder, runs/<dataset>/<run>; default: the only one there"
    )
    search.add_argument("--top", type=_positive, default=10, metavar="K", help="how many to show; default: 10")
    search.add_argument(
        "--out", type=Path, default=Path("ranked.png"), metavar="FILE", help=".png or .pdf; default: ranked.png"
    )
    _add_device(search)
    search.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded")

    search.add_argument(
        "--index",
        choices=("exact", "faiss", "faiss-hnsw"),
        default="exact",
        help="default: exact; faiss gives the same first K, faiss-hnsw not all of them (both: make extras)",
    )

    help = "print a run's configuration, provenance, versions and last epoch"
    show = commands.add_parser("show", help=help, description=help)
    show.set_defaults(run_command=_show)
    show.add_argument("run", type=Path, metavar="RUN", help="a run's folder, runs/<dataset>/<run>")
    return parser


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
