"""How much is written for each byte of output, in runs of a minute on default settings.

Counted at the seam: what was handed to pwrite, for output, journal and temporary files. The minute is one of the
virtual clock, on which a commit takes no time: so the figures are counts, the same on any machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.latency import MEAN_S, latencies_of
from tests.support.counted_files import CountedFiles, run_over
from tests.support.threaded_loop import run

TITLE = "Bytes written over bytes of output: records of 250 bytes and more, a commit a second, a minute"
RUN_S = 60.0
BOUNDS = {"in order": 1.05, "log-normal latency": 1.5, "everything behind one straggler": 2.1}
CONCURRENCIES = {"in order": 50, "log-normal latency": 50, "everything behind one straggler": 16}
TEXT = "x" * 230

Latency = Callable[[int], float]


def latency_of(row: str, items: int, run_s: float) -> Latency:
    """Seconds that each item takes."""
    if row == "in order":
        return lambda item: MEAN_S
    if row == "log-normal latency":
        return latencies_of(items, 0).__getitem__
    return lambda item: MEAN_S if item else run_s  # 48,000 items: the window is not full before the end


def written_for(row: str, run_s: float, folder: Path) -> tuple[float, str]:
    """Bytes written over the bytes of the output, and how many those are."""
    concurrency, output, files = CONCURRENCIES[row], folder / f"{row}.jsonl", CountedFiles(syncs=False)
    items = round(concurrency * run_s / MEAN_S)
    latency = latency_of(row, items, run_s)

    async def worker(item: int) -> dict[str, str]:
        await asyncio.sleep(latency(item))
        return {"text": f"{item * 2654435761 % 2**32:010}{TEXT}"}

    run(run_over(files, worker, range(items), output, concurrency=concurrency, version="bytes"))
    size, lines = output.stat().st_size, output.read_bytes().count(b"\n")
    assert lines == items
    assert files.written["output"] == size >= 250 * items
    output.unlink()
    return (
        files.written.total() / size,
        f"{size / 1e6:.1f} MB of output, {files.written['journal'] / 1e6:.2f} MB beside",
    )


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """Each row once: there is nothing in it that differs from round to round."""
    figures = []
    for row, bound in BOUNDS.items():
        value, note = written_for(row, max(5.0, RUN_S * scale.factor), folder)
        figures.append(Figure("bytes_written", row, value, bound, at_least=False, note=note))
    return figures
