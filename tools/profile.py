"""Switch params.yaml between the embedded benchmark, the paper's data sets and rendered ones of their sizes.

    python -m tools.profile paper             SYSU-MM01 and RegDB with its ten trials: Tables 1 to 3
    python -m tools.profile paper sysu        only one of the two
    python -m tools.profile paper-scale       rendered sets of their sizes, with the paper's recipe (or one of them)
    python -m tools.profile embedded          back to the small rendered sets

It makes the edit that one would make by hand, in the block `study` and nowhere else: its lists `sysu`, `regdb` and
`trials` get other values, while comments, variants and seeds stay as they are. The new file replaces the old one when
it is complete and has been read back. Nothing is run; `make paper` and `make paper-scale` do both.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from danet_core.config import load_study
from danet_core.files import StudyError, atomic_path
from tools import ROOT
from tools.command import command

REAL = ("sysu", "regdb")  # data sets, each named like its layout
SETS = {"paper": "{}", "paper-scale": "synth_{}_paper_scale"}  # name of a profile's data set by layout
TRIALS = tuple(range(1, 11))  # "RegDB: ten models, scores averaged", the protocol


def profile(name: str, sets: Sequence[str] = REAL) -> dict[str, list[Any]]:
    """The lists that a profile puts into `study`: "embedded", or "paper" or "paper-scale" with some of its sets."""
    if name == "embedded":
        return {"sysu": ["synth_sysu"], "regdb": ["synth_regdb"], "trials": [1]}
    trials = list(TRIALS) if name == "paper" else [1]
    return {layout: [SETS[name].format(layout)] * (layout in sets) for layout in REAL} | {"trials": trials}


def switched(text: str, lists: Mapping[str, Sequence[Any]], path: str = "params.yaml") -> str:
    """The text of params.yaml with these lists in its block `study`, and not a character elsewhere changed.

    Comments behind the lists keep their column where there is room. Raises StudyError for a file without the block or
    one of the lists.
    """
    spans = _spans(text, lists, path)
    for key, (start, end) in sorted(spans.items(), key=lambda one: -one[1][0]):
        value = f": [{', '.join(map(str, lists[key]))}]"
        rest, newline, after = text[end:].partition("\n")
        head = text[:start] + value
        comment = re.match(r"\s+(#.*)", rest)
        if comment:
            width = len(head) - (head.rfind("\n") + 1)
            rest = " " * max(1, _comment_column(text, spans) - width) + comment[1]
        text = head + rest + newline + after
    return text


def _spans(text: str, keys: Mapping[str, Any], path: str) -> dict[str, tuple[int, int]]:
    """Where the values of `study` stand: from behind the key, its colon included, to the end of the list."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    study = _child(root, "study")
    spans = {}
    for key in keys:
        node = _child(study[1], key) if study else None
        if node is None or not isinstance(node[1], yaml.SequenceNode):
            raise StudyError(f"{path} has no list `{key}` in its block `study`; restore the file from version control")
        name, value = node
        # A list written with dashes ends, for the parser, at the next key; its last entry ends where it seems to.
        last = value if value.flow_style or not value.value else value.value[-1]
        spans[key] = (name.end_mark.index, last.end_mark.index)
    return spans


def _child(node: Any, key: str) -> tuple[Any, Any] | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next(((name, value) for name, value in pairs if name.value == key), None)


def _comment_column(text: str, spans: Mapping[str, tuple[int, int]]) -> int:
    """The first column in which a comment behind one of the lists starts."""
    columns = []
    for _, end in spans.values():
        comment = re.match(r"[^\S\n]+(?=#)", text[end:])
        if comment:
            columns.append(end + comment.end() - (text.rfind("\n", 0, end) + 1))
    return min(columns, default=0)


def switch(path: Path, lists: Mapping[str, Sequence[Any]]) -> bool:
    """Put the lists into `study` of the params.yaml at `path`, whole or not at all; whether that changed it.

    Raises StudyError when the file, as it is or as it would be, is not one that the study can read.
    """
    load_study(path)
    old = path.read_bytes().decode("utf-8")  # not read_text, which would change the line ends
    new = switched(old, lists, str(path))
    wanted = yaml.safe_load(old)
    wanted["study"] |= {key: list(values) for key, values in lists.items()}
    if yaml.safe_load(new) != wanted:
        raise StudyError(f"{path} cannot be switched automatically; set in its block `study` {_shown(lists)}")
    if new == old:
        return False
    with atomic_path(path) as temporary:
        temporary.write_bytes(new.encode("utf-8"))
        load_study(temporary)
    return True


def _shown(lists: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"`{key}: [{', '.join(map(str, values))}]`" for key, values in lists.items())


@command("tools.profile")
def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.profile", description="Switch the data sets in params.yaml.")
    parser.add_argument("name", choices=(*SETS, "embedded"))
    parser.add_argument("sets", nargs="*", metavar="SET", help="for paper and paper-scale: sysu, regdb; default: both")
    options = parser.parse_args(arguments)
    sets = options.sets or list(REAL)
    if unknown := [one for one in sets if one not in REAL] or (options.sets if options.name == "embedded" else []):
        taken = "nothing" if options.name == "embedded" else "sysu, regdb or both"
        parser.error(f"unexpected {' '.join(unknown)}; {options.name} takes {taken}")
    lists = profile(options.name, sets)
    changed = switch(root / "params.yaml", lists)
    print(f"params.yaml: `study` {'now has' if changed else 'has already'} {_shown(lists)}")
    if changed and options.name != "embedded":
        print("             the way back: python -m tools.profile embedded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
