"""What the readers of the two layouts share: listing folders in natural order, and the table of checks.

A reader returns a `Reading`. It separates three kinds of finding:
    warnings   accepted as documented (CRLF, folder case, ...), recorded in the inventory
    checks     counts and consistency; one that fails is an error, or makes the set "partial" where the user allowed it
    problems   never excused: an empty file, a file named twice, a path outside the root
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from danet_core.files import StudyError
from danet_core.images import IMAGE_SUFFIXES, natural_key

_CAN_USE_EFFECTIVE_IDS = os.access in os.supports_effective_ids


@dataclass(frozen=True)
class Check:
    """One line of the verification table. `where` and `remedy` complete the sentence of a failed one."""

    name: str
    expected: str
    found: str
    passed: bool
    where: str = ""
    remedy: str = ""

    def sentence(self) -> str:
        """The failed check as one sentence: where, what, expected, found, remedy."""
        return f"{self.where}: {self.name}: expected {self.expected}, found {self.found}; {self.remedy}"


@dataclass
class Reading:
    """What a reader found in a raw tree; see the module's docstring for the three kinds of finding."""

    root: Path
    layout: str
    manifest: pd.DataFrame = field(default_factory=pd.DataFrame)
    galleries: dict[str, Int[np.ndarray, "T _"]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)  # every image that can be opened, also those the manifest leaves out
    counts: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def check(
        self, name: str, expected: object, found: object, where: Path, remedy: str, passed: bool | None = None
    ) -> None:
        """Add one line to the table; it passes when `expected == found` unless `passed` says otherwise."""
        verdict = expected == found if passed is None else passed
        self.checks.append(Check(name, _text(expected), _text(found), verdict, str(where), remedy))

    def warn(self, message: str) -> None:
        """Record an accepted deviation, once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def skip(self, path: str | os.PathLike[str]) -> None:
        """Record a file or folder that is no part of the layout."""
        self.skipped.append(Path(path).relative_to(self.root).as_posix())

    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def settle(self, allow_partial: bool, command: str) -> bool:
        """Raise StudyError for the first problem or failed check; return whether the set is partial.

        With `allow_partial` failed checks turn into warnings, so that the inventory and every table can say it.
        `command` is what lists all findings.
        """
        failed = self.failed()
        sentences = self.problems + ([] if allow_partial else [check.sentence() for check in failed])
        if sentences:
            more = len(sentences) - 1
            hint = f" ({more} more finding{'s' * (more > 1)}: `{command}` lists them all)" if more else ""
            subset = "; a subset on purpose: `allow_partial: true` in params.yaml, or --allow-partial"
            partial = "" if self.problems else subset
            raise StudyError(sentences[0] + partial + hint)
        for check in failed:
            self.warn(f"partial: {check.name}: expected {check.expected}, found {check.found}")
        return bool(failed)

    def inventory(self, dataset: str, synthetic: bool, partial: bool) -> dict[str, Any]:
        """The content of inventory.json; equal trees give equal content."""
        return {
            "dataset": dataset,
            "layout": self.layout,
            "synthetic": synthetic,
            "partial": partial,
            "counts": self.counts,
            "skipped": sorted(self.skipped, key=natural_key),
            "warnings": list(self.warnings),
        }


def list_folder(folder: Path) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """The sub-folders and the other entries of `folder`, each in natural order. One system call per folder, not per
    file.

    Raises StudyError where the folder may not be read.
    """
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: natural_key(entry.name))
        folders = [entry for entry in ordered if entry.is_dir()]
    except PermissionError:
        raise StudyError(
            f"{folder} cannot be listed: no read permission; give yourself read access (chmod -R u+rX)"
        ) from None
    except OSError as error:
        raise StudyError(f"{folder} cannot be listed ({error.strerror}); check the disk or the mount") from None
    names = {entry.name for entry in folders}
    return folders, [entry for entry in ordered if entry.name not in names]


def identity_folders(reading: Reading, folder: Path) -> Iterator[tuple[int, os.DirEntry[str]]]:
    """Identity and sub-folder, in natural order, of the sub-folders of `folder` that are named by a number.

    Everything else there is skipped; a second folder of one number (7 and 0007) is a problem and left out.
    """
    folders, others = list_folder(folder)
    for entry in others:
        reading.skip(entry.path)
    names: dict[int, str] = {}
    for entry in folders:
        if not re.fullmatch(r"[0-9]+", entry.name):
            reading.skip(entry.path)
            continue
        pid = int(entry.name)
        if pid in names:
            reading.problems.append(
                f"{folder}: identity {pid} has two folders, {names[pid]} and {entry.name}, expected one; merge or "
                "remove one"
            )
            continue
        names[pid] = entry.name
        yield pid, entry


def find_folder(reading: Reading, parent: Path, name: str) -> Path | None:
    """The sub-folder `name` of `parent` whatever its case; None when absent.

    Another case is a warning; two spellings beside each other are a StudyError, since either may be the incomplete one.
    """
    matches = [entry.name for entry in list_folder(parent)[0] if entry.name.casefold() == name.casefold()]
    if len(matches) > 1:
        raise StudyError(f"{parent} holds {' and '.join(matches)}, expected one folder {name}; merge or remove one")
    if not matches:
        return None
    if matches[0] != name:
        reading.warn(f"folder {matches[0]} read as {name}")
    return parent / matches[0]


def find_file(reading: Reading, folder: Path, name: str) -> Path | None:
    """The file `name` in `folder` whatever its case, as `find_folder` does for folders."""
    matches = [entry.name for entry in list_folder(folder)[1] if entry.name.casefold() == name.casefold()]
    if len(matches) > 1:
        raise StudyError(f"{folder} holds {' and '.join(matches)}, expected one file {name}; remove one")
    if not matches:
        return None
    if matches[0] != name:
        reading.warn(f"file {matches[0]} read as {name}")
    return folder / matches[0]


def take_image(reading: Reading, entry: os.DirEntry[str]) -> str:
    """Path of an image file relative to the root; a file that cannot be used becomes a problem of the reading."""
    path = Path(entry.path).relative_to(reading.root).as_posix()
    if problem := file_problem(entry):
        reading.problems.append(problem)
    else:
        reading.files.append(path)
    return path


def file_problem(entry: os.DirEntry[str]) -> str | None:
    """Why an image file cannot be used (empty, unreadable, a broken link); None when nothing is seen to be wrong."""
    try:
        size = entry.stat().st_size
    except OSError as error:
        return f"{entry.path} cannot be read ({error.strerror}), perhaps a broken link; restore it from the archive"
    if size == 0:
        return f"{entry.path} has 0 bytes, expected an image; copy it again from the archive"
    if not os.access(entry.path, os.R_OK, effective_ids=_CAN_USE_EFFECTIVE_IDS):
        return f"{entry.path} cannot be read: no read permission; give yourself read access (chmod -R u+rX)"
    return None


def image_files(reading: Reading, folder: Path) -> Iterator[os.DirEntry[str]]:
    """The image files of `folder` in natural order; anything else is recorded as skipped."""
    folders, files = list_folder(folder)
    for entry in folders:
        reading.skip(entry.path)
    for entry in files:
        hidden = entry.name.startswith(".")  # also AppleDouble files such as ._0001.jpg
        if hidden or Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
            reading.skip(entry.path)
        else:
            yield entry


def read_split_text(reading: Reading, path: Path) -> str:
    """A split file's text with `\\n` line ends; a byte-order mark or CRLF is accepted with a warning.

    Raises StudyError when the file cannot be read or is not text.
    """
    name = path.relative_to(reading.root).as_posix()
    try:
        text = path.read_bytes().decode("utf-8")
    except PermissionError:
        raise StudyError(f"{path} cannot be read: no read permission; give yourself read access (chmod u+r)") from None
    except UnicodeDecodeError as error:
        raise StudyError(
            f"{path} is not a text file ({error.reason}); copy it again from the data set's archive"
        ) from None
    except OSError as error:
        raise StudyError(
            f"{path} cannot be read ({error.strerror}); copy it again from the data set's archive"
        ) from None
    if text.startswith("\ufeff"):
        reading.warn(f"byte-order mark at the start of {name}")
        text = text[1:]
    if "\r" in text:
        reading.warn(f"CRLF line ends in {name}")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def format_ids(ids: Iterable[int], limit: int = 10) -> str:
    """Ids for a sentence: at most `limit` of them, then how many more."""
    ordered = sorted(ids)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return " ".join(map(str, ordered[:limit])) + more


def format_checks(checks: list[Check]) -> str:
    """The table that `verify` prints: check, expected, found, verdict."""
    header = ("check", "expected", "found", "verdict")
    lines = [(c.name, c.expected, c.found, "ok" if c.passed else "WRONG") for c in checks]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(3)]
    rule = tuple("-" * width for width in [*widths, len("verdict")])
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in [header, rule, *lines]
    )


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, tuple):
        return " / ".join(_text(item) for item in value)
    return str(value)
