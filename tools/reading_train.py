"""Train a row of the readings study with one seed: `python -m tools.reading_train ROW SEED`, a stage's command."""

from __future__ import annotations

import argparse
import functools
import sys

from danet_core.config import load_study
from danet_core.record import RunFolder
from danet_core.train import train
from tools.command import command
from tools.parent import kill_myself, watch


@command("tools.reading_train")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.reading_train", description="Train a reading.")
    parser.add_argument("row", help="a key of readings.rows in params.yaml")
    parser.add_argument("seed", type=int)
    options = parser.parse_args(arguments)
    watch(kill_myself)
    config = load_study().reading(options.row, options.seed)
    train(config.trained or config, RunFolder.of(config), log=functools.partial(print, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
