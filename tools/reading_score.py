"""Score a trained row of the readings study: `python -m tools.reading_score ROW SEED`, a stage's command.

Rows that train as it does, because they only change how a run is scored, are scored with its weights at once.
"""

from __future__ import annotations

import argparse
import sys

from danet_core.config import load_study
from danet_core.evaluate import evaluate
from danet_core.record import RunFolder
from tools.command import command
from tools.parent import kill_myself, watch


@command("tools.reading_score")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.reading_score", description="Score a reading.")
    parser.add_argument("row", help="a key of readings.rows in params.yaml")
    parser.add_argument("seed", type=int)
    options = parser.parse_args(arguments)
    watch(kill_myself)
    study = load_study()
    trained = study.trained_row(options.row)
    for name in [name for name, first in study.trained_as.items() if first == trained]:
        config = study.reading(name, options.seed)
        record = evaluate(config, RunFolder.of(config))
        best = next(iter(record["settings"].values()))["mean"]
        print(f"{name}, seed {options.seed}: Rank-1 {100 * best['cmc1']:.2f} %, mAP {100 * best['mAP']:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
