"""The peak memory of a job of 10,000,000 lines and as many records, on disk: small, and that of a tenth of the job."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.rounds import interleave, middle, ratio
from tests.support.peak_memory import MEBIBYTE, peak_of_lines

TITLE = "Peak memory of the whole command, 10,000,000 lines in and 10,000,000 records out"
ITEMS, BOUND_MIB, FLAT = 10_000_000, 80.0, 1.1


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """All lines, and a tenth of them."""
    assert sys.platform == "linux", "the unit of ru_maxrss differs elsewhere"
    items = scale.of(ITEMS, least=500_000)  # less does not fill a window in its tenth
    tenth = items // 10
    rows = {"all": lambda number: peak_of_lines(folder, items), "tenth": lambda number: peak_of_lines(folder, tenth)}
    costs = interleave(scale.rounds, rows)
    peaks = {name: [cost.peak_bytes / MEBIBYTE for cost in found] for name, found in costs.items()}
    peak, growth = middle(peaks["all"]), ratio(peaks["all"], peaks["tenth"])
    us = middle([cost.seconds / items * 1e6 for cost in costs["all"]]).value
    note = f"{peak.spread}; {us:.1f} µs an item with all that belongs to it"
    return [
        Figure("memory", f"{items:,} lines", peak.value, BOUND_MIB, at_least=False, unit="MiB", note=note),
        Figure("memory", f"over {tenth:,} lines", growth.value, FLAT, at_least=False, note=growth.spread),
    ]
