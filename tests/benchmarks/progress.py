"""What it costs to draw progress on a terminal.

    python -m tests.benchmarks.progress [--items 200000] [--rounds 7]

The job ``ours`` of `tests/benchmarks/pools.py` with its progress drawn on a pseudo-terminal, which another process
reads, by the same job without; interleaved, medians over the rounds. The exit code is 1 if it costs 2 % or more of the
processor's time.
"""

from __future__ import annotations

import argparse
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from async_recovery.screen import REDRAWS_PER_S, Screen
from tests.benchmarks.failures import Cost, compare, engine

CONCURRENCIES = (16, 256, 4096)


@contextmanager
def terminal() -> Iterator[None]:
    """Standard error is a pseudo-terminal, which another process reads; after it: that something was drawn."""
    master, slave = pty.openpty()
    before, count = sys.stderr, [sys.executable, "-c", COUNT]
    with subprocess.Popen(count, stdin=master, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
        os.close(master)
        with os.fdopen(slave, "w") as sys.stderr:
            yield
        sys.stderr = before
        assert reader.stdout is not None
        frames = int(reader.stdout.read())
    print(f"   {frames} frames", flush=True)
    assert frames > 0, "nothing was drawn"


COUNT = """
import os
frames = 0
try:
    while data := os.read(0, 65536): frames += data.count(b"finished")
except OSError: pass
print(frames)
"""


def drawn(items: int, concurrency: int, round_number: int, folder: Path) -> Cost:
    """The job with its progress drawn."""
    with terminal():
        screen = Screen(level=logging.ERROR, others=logging.ERROR, progress="always")
        with screen:
            return engine(items, concurrency, round_number, folder, on_progress=screen.show)


def main() -> int:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    os.environ.pop("NO_COLOR", None)
    kept = []
    for concurrency in CONCURRENCIES:
        name = f"progress drawn {REDRAWS_PER_S} times a second, at {concurrency}"
        plain, shown = (partial(job, arguments.items, concurrency) for job in (engine, drawn))
        kept.append(compare(name, 0.02, arguments.rounds, plain, shown))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
