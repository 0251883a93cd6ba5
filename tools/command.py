"""How a command ends: with a status, and a sentence where it did not get through."""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import sys
from collections.abc import Callable
from typing import ParamSpec

from danet_core.files import StudyError

P = ParamSpec("P")


def command(name: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Makes a `main` a command line: what stops it becomes `name: sentence` on stderr, and an exit status.

    That is 1 after a StudyError and after an OSError (a full disk, a folder without write access), 130 after ^C.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def ended(*arguments: P.args, **named: P.kwargs) -> int:
            status = 1
            try:
                return main(*arguments, **named)
            except StudyError as error:
                sentence = str(error)
            except OSError as error:
                sentence = _unusable(error)
            except KeyboardInterrupt:
                status, sentence = 130, "interrupted; a second call goes on from what is finished"
            print(f"{name}: {sentence}", file=sys.stderr)
            return status

        return ended

    return decorate


def _unusable(error: OSError) -> str:
    if isinstance(error, shutil.Error):  # of a copied folder: a list of (source, target, reason)
        _, place, reason = error.args[0][0]
    else:
        place = " or ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason = error.strerror or error
    return f"{place or 'a file or device'} cannot be used ({reason}); make room or give yourself access, and call again"


def at_least(lowest: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """An argparse type: a number, by default a whole one, that is not below `lowest`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not value >= lowest:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {whole} of at least {lowest}, found {text!r}")
        return value

    return parse
