"""Whether an item costs more the more items came before: the last tenth of a job over the first, in the same run."""

from __future__ import annotations

import asyncio
import gc
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from async_recovery import Progress
from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.pools import check_records, make_worker
from tests.benchmarks.rounds import interleave, middle
from tests.support.counted_files import CountedFiles, run_over

TITLE = "The last tenth of 1,000,000 items over the first"
ITEMS, CONCURRENCY, BOUND = 1_000_000, 256, 1.15


class Moment(NamedTuple):
    """A commit: its durable mark; seconds by the clock and of the processor; and the bytes written so far."""

    mark: int
    seconds: float
    cpu_s: float
    written: int


def an_item(start: Moment, end: Moment) -> dict[str, float]:
    """What an item took between the two commits."""
    items = end.mark - start.mark
    return {
        "time an item": (end.seconds - start.seconds) / items,
        "time of the processor an item": (end.cpu_s - start.cpu_s) / items,
        "bytes an item": (end.written - start.written) / items,
    }


def last_over_first(items: int, folder: Path, round_number: int) -> dict[str, float]:
    """The last tenth of a run over the first, both from commit to commit."""
    files, output, moments = CountedFiles(), folder / "out.jsonl", list[Moment]()

    def told(progress: Progress) -> None:
        written = files.written.total()
        moments.append(Moment(progress.durable_mark, time.perf_counter(), time.process_time(), written))

    gc.collect()
    settings: dict[str, Any] = {"concurrency": CONCURRENCY, "version": str(round_number), "on_progress": told}
    asyncio.run(run_over(files, make_worker(round_number), range(items), output, **settings))
    check_records(output, items, round_number)
    output.unlink()
    tenth = items // 10
    first = next(moment for moment in moments if moment.mark >= tenth)
    before = next(moment for moment in reversed(moments) if moment.mark <= items - tenth)
    begin, end = an_item(moments[0], first), an_item(before, moments[-1])
    return {name: end[name] / begin[name] for name in begin}


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """Time and bytes; no fewer items than make commits enough in a tenth."""
    items = scale.of(ITEMS, least=300_000)
    costs = interleave(scale.rounds, {"ours": partial(last_over_first, items, folder)})["ours"]
    figures = []
    for row in costs[0]:
        found = middle([cost[row] for cost in costs])
        note = f"{items:,} items; {found.spread}"
        figures.append(Figure("growth", row, found.value, BOUND, at_least=False, note=note))
    return figures
