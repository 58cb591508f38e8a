"""The entry point: ``async-recovery``, and ``python -m async_recovery``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line. While it is still being imported, a Ctrl-C ends as it does later: with no traceback."""
    import signal

    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    from .cli import main

    main()


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # this folder, which Python puts first: see `chosen_worker`
    main()
