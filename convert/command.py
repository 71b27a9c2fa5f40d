"""What the commands of this folder share: how they fail, and how they are run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from megatron_patch.architecture import SettingsError, one_line


class ConvertError(Exception):
    """Something the user can act on: one line that names the file, tensor or setting."""

    def __init__(self, line: str):
        super().__init__(one_line(line))


def run(main: Callable[[], None]) -> None:
    """Runs a command; what the user can act on ends it with one line and exit code 1.

    A terminated command cleans up as an interrupted one does.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except (ConvertError, SettingsError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = error.filename if error.filename is not None else "the system"
        sys.exit(f"error: {one_line(f'{where}: {error.strerror or error}')}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
