"""One row in a process of its own, so that its memory and its bytes are its own.

    python -m tests.benchmarks.apart MODULE ROW ITEMS ROUND   (in the folder that it may fill)

A module names such rows in ``ROWS``: each takes the number of items and of the round, works in the current folder,
checks what it made, and returns the seconds that it took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

Row = Callable[[int, int], float]


class Spent(NamedTuple):
    """What a row took.

    :ivar seconds: as the row measured them.
    :ivar peak_bytes: of memory, at the most, above what the process had before the row.
    :ivar written_bytes: handed to the system by the process itself, by any call.
    """

    seconds: float
    peak_bytes: int
    written_bytes: int


def spent_by(module: str, row: str, items: int, round_number: int, folder: Path) -> Spent:
    """Run the row in a process and an empty folder of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.apart", module, row, str(items), str(round_number)]
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(words, cwd=empty, env=env, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{row}, {items} items: exit code {ended.returncode}: {ended.stderr[-2000:]}")
    return Spent(*json.loads(ended.stdout.splitlines()[-1]))


def number_in(path: str, name: str) -> int:
    """A number that the system keeps about this process."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def main(module: str, row: str, items: int, round_number: int) -> None:
    """Run it here and print what it took."""
    run: Row = import_module(module).ROWS[row]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    memory, written = number_in("/proc/self/status", "VmHWM"), number_in("/proc/self/io", "wchar")
    seconds = run(items, round_number)
    peak = (number_in("/proc/self/status", "VmHWM") - memory) << 10
    print(json.dumps(Spent(seconds, peak, number_in("/proc/self/io", "wchar") - written)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
