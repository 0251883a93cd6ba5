"""Command line of a trained model: python -m danet_core search | show.

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


def _search(options: argparse.Namespace) -> int:
    from danet_core.search import DRAWN, printable, search
    from danet_core.style import check_picture, save_as

    check_picture(options.out)  # before minutes of work
    ranking = search(
        options.query, options.gallery, options.run, device=options.device, skip_broken=options.skip_broken
    )
    for sentence in ranking.broken:
        print(f"left out: {printable(sentence)}", file=sys.stderr)
    for name in ranking.skipped[:_SKIPPED_SHOWN]:
        print(f"skipped: {printable(name)}", file=sys.stderr)
    if len(ranking.skipped) > _SKIPPED_SHOWN:
        print(f"skipped: and {len(ranking.skipped) - _SKIPPED_SHOWN} more", file=sys.stderr)
    print(f"query {printable(str(ranking.query))}")
    print(f"gallery {printable(str(ranking.gallery))}, {len(ranking.names):,} images")
    print(f"model {ranking.run}, {ranking.pretrained_on}; cosine distance\n")
    print(ranking.text(options.top))
    path = save_as(ranking.figure(options.top), options.out)
    print(
        f"\n{path} written" + (f", the first {DRAWN} of them" if min(options.top, len(ranking.names)) > DRAWN else "")
    )
    return 0


def _show(options: argparse.Namespace) -> int:
    from danet_core.files import read_json
    from danet_core.search import describe, find_run

    path = find_run(options.run) / "record.json"
    print(describe(read_json(path), path))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m danet_core", description="Use and look at the study's models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
    search.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    search.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded")

    help = "print a run's configuration, provenance, versions and last epoch"
    show = commands.add_parser("show", help=help, description=help)
    show.set_defaults(run_command=_show)
    show.add_argument("run", type=Path, metavar="RUN", help="a run's folder, runs/<dataset>/<run>")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
