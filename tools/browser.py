"""Find the Chromium that the browser tests drive; install it where it is missing and the system allows.

python -m tools.browser
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from danet_core.files import StudyError
from tools.command import command

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """Where Chromium (or Chrome) is, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install() -> str:
    """Where Chromium is, after installing Debian's package if need be.

    Raises StudyError where that takes rights or a package manager that are not there, or fails.
    """
    if found := chromium():
        return found
    advice = "install Chromium (on Debian `apt-get install chromium`) and call this again"
    if shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise StudyError(f"the browser tests need {NAMES[0]}, and none of {', '.join(NAMES)} was found; {advice}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise StudyError(f"`{' '.join(words)}` ended with {done.returncode} ({said}); {advice}")
    if found := chromium():
        return found
    raise StudyError(f"apt-get installed chromium, and none of {', '.join(NAMES)} was found; {advice}")


@command("tools.browser")
def main() -> int:
    print(f"browser: {install()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
