"""The peak memory of a whole command, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .commands import COMMAND

MEBIBYTE = 1 << 20
WORKER = """
import asyncio


async def work(item):
    await asyncio.sleep(0)
    return {"text": item, "length": len(item)}
"""

# A small process in between: what a child has when it is forked counts as its own peak, and pytest is large.
MEASURE = """
import os
import subprocess
import sys

process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""


class Peak(NamedTuple):
    """Resident memory at the most, in bytes (`ru_maxrss` as Linux has it), and the seconds that it took."""

    peak_bytes: int
    seconds: float


def peak_of_lines(folder: Path, count: int) -> Peak:
    """The command that runs `count` lines; each has its record afterwards."""
    (folder / "jobs.py").write_text(WORKER)
    with (folder / "items.txt").open("w") as items:
        for start in range(0, count, 1000):
            items.writelines(f"https://example.org/page/{number}\n" for number in range(start, start + 1000))
    words = ["run", "--input", "items.txt", "--output", "out.jsonl", "--worker", "jobs:work", "--concurrency", "64"]
    began = time.perf_counter()
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *COMMAND, *words], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - began
    code, peak = map(int, measured.stdout.split())
    assert code == 0
    with (folder / "out.jsonl").open("rb") as output:
        assert sum(1 for _ in output) == count
    return Peak(peak, seconds)
