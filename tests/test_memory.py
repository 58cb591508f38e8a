"""Memory of the whole command: small, and the same however many items there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import COMMAND

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


def peak_bytes(folder: Path, count: int) -> int:
    """Peak resident memory of the command that runs `count` lines."""
    with (folder / "items.txt").open("w") as items:
        for start in range(0, count, 1000):
            items.writelines(f"https://example.org/page/{number}\n" for number in range(start, start + 1000))
    words = ["run", "--input", "items.txt", "--output", "out.jsonl", "--worker", "jobs:work", "--concurrency", "64"]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *COMMAND, *words], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    code, peak = map(int, measured.stdout.split())
    assert code == 0
    with (folder / "out.jsonl").open("rb") as output:
        assert sum(1 for _ in output) == count
    return peak


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs elsewhere")
def test_memory_of_a_million_lines_is_small_and_flat(tmp_path: Path) -> None:
    """A million lines take less than 80 MiB at the peak, and within 10 % of what 200,000 take."""
    (tmp_path / "jobs.py").write_text(WORKER)
    # A busy machine commits later and holds more at once; that is bounded, however many lines there are.
    fewer = max(peak_bytes(tmp_path, 200_000) for _ in range(2))
    many = min(peak_bytes(tmp_path, 1_000_000) for _ in range(2))
    print(f"peak: {fewer / MEBIBYTE:.1f} MiB for 200,000 lines, {many / MEBIBYTE:.1f} MiB for 1,000,000")
    assert many < 80 * MEBIBYTE
    assert many < fewer * 1.1
