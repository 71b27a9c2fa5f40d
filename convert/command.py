"""What the commands of this folder share: how they fail, and how they are run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from megatron_patch.architecture import SettingsError


class ConvertError(Exception):
    """Something the user can act on: one line that names the file, tensor or setting."""


def run(main: Callable[[], None]) -> None:
    """Runs a command; what the user can act on ends it with one line and exit code 1.

    A terminated command cleans up as an interrupted one does.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except (ConvertError, SettingsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
