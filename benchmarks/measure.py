"""Timers and the Markdown of a page: what all benchmarks share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.benchmark import timer  # a clock that waits for the GPU first


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry a round."""

    seconds: np.ndarray

    def __str__(self) -> str:
        """Median, and half the distance between the quartiles: `12.3 ± 0.4 ms`."""
        low, median, high = np.percentile(self.seconds, [25, 50, 75])
        unit, factor = next((pair for pair in _UNITS if median * pair[1] >= 1), _UNITS[-1])
        return f"{_digits(median * factor)} ± {_digits((high - low) / 2 * factor)} {unit}"

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def over(self, other: Times) -> str:
        """This over another, a ratio for each round that both were measured in: `1.05 ± 0.01`."""
        low, median, high = np.percentile(self.seconds / other.seconds, [25, 50, 75])
        return f"{_digits(median)} ± {_digits((high - low) / 2)}"


_UNITS = (("s", 1.0), ("ms", 1e3), ("us", 1e6))


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: Mapping[str, int] | None = None,
    *,
    warm: bool = False,
) -> dict[str, Times]:
    """Time the actions in turn, `rounds` times over, so that a busy moment of the machine meets all of them.

    Each is called once beforehand, unless all are `warm` already by what went before. `calls` is how often an action
    runs in each of its turns, once if not named.
    """
    for action in () if warm else actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            number = (calls or {}).get(name, 1)
            started = timer()
            for _ in range(number):
                action()
            seconds[name].append((timer() - started) / number)
    return {name: Times(np.array(values)) for name, values in seconds.items()}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def growth(name: str, sizes: Sequence[int], times: Sequence[Times]) -> str:
    """A table of a cost against a size that doubles, with the factor of each doubling."""
    factors = ["", *(_digits(new.median / old.median) for old, new in zip(times[:-1], times[1:], strict=True))]
    rows = [(f"{size:,}", time, factor) for size, time, factor in zip(sizes, times, factors, strict=True)]
    return table((name, "time", "factor"), rows)


def page(*blocks: str) -> str:
    """Headings, tables and prose as one Markdown text; prose is wrapped."""
    return "\n\n".join(block if block[0] in "#|" else textwrap.fill(" ".join(block.split()), 118) for block in blocks)


def main(section: Callable[[bool], str]) -> None:
    """The command line of one benchmark: print its section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="sizes at which the figures mean nothing, for the tests")
    print(section(parser.parse_args().tiny))
