"""How a command that may run for hours ends: with a status, and a sentence where it did not get through."""

from __future__ import annotations

import sys
from collections.abc import Callable

from danet_core.files import StudyError


def ended(work: Callable[[], int]) -> int:
    """The exit status of `work`: its own, 1 after a StudyError, 130 after ^C, whose work a second call goes on with."""
    try:
        return work()
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; a second call goes on where this one was", file=sys.stderr)
        return 130
