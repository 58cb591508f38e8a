"""What a slow disk costs: 10 ms more for each fsync and fdatasync of the durable path, over the same disk without.

The items of `tests.benchmarks.latency` show whether waiting for the disk holds up the workers; items that cost nothing
show how much the engine goes on with meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.latency import latencies_of
from tests.benchmarks.pools import check_records, make_worker
from tests.benchmarks.rounds import interleave, ratio
from tests.support.counted_files import SlowFiles, run_over

TITLE = "10 ms more for each fsync and fdatasync, over the same without"
MORE_S = 0.010
MAKESPAN, RATE = 1.05, 0.6
WAITING_ITEMS, WAITING_CONCURRENCY = 20_000, 200
NO_OP_ITEMS, NO_OP_CONCURRENCY = 1_000_000, 256

Work = Callable[[int], Awaitable[Any]]


def seconds(worker: Work, items: int, concurrency: int, more_s: float, output: Path) -> tuple[float, int]:
    """How long one run takes, and how often it synced."""
    files = SlowFiles(more_s)
    gc.collect()
    start = time.perf_counter()
    run = asyncio.run(run_over(files, worker, range(items), output, concurrency=concurrency, version="slow disk"))
    took = time.perf_counter() - start
    assert run.executed == run.processed == items
    return took, files.syncs


def waiting(items: int, folder: Path, more_s: float, round_number: int) -> tuple[float, int]:
    """Items of log-normal latency."""
    latencies, output = latencies_of(items, round_number), folder / "waiting.jsonl"

    async def worker(item: int) -> dict[str, float]:
        await asyncio.sleep(latencies[item])
        return {"waited_s": latencies[item]}

    took = seconds(worker, items, min(WAITING_CONCURRENCY, items // 20), more_s, output)
    assert output.read_bytes().count(b"waited_s") == items
    output.unlink()
    return took


def no_op(items: int, folder: Path, more_s: float, round_number: int) -> tuple[float, int]:
    """Items that cost nothing."""
    output = folder / "no_op.jsonl"
    took = seconds(make_worker(round_number), items, NO_OP_CONCURRENCY, more_s, output)
    check_records(output, items, round_number)
    output.unlink()
    return took


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """Both jobs on both disks."""
    few, many = scale.of(WAITING_ITEMS, least=2000), scale.of(NO_OP_ITEMS)
    rows = {
        f"{job.__name__} {more_s}": partial(job, items, folder, more_s)
        for job, items in ((waiting, few), (no_op, many))
        for more_s in (0.0, MORE_S)
    }
    costs = interleave(scale.rounds, rows)
    took = {name: [cost[0] for cost in found] for name, found in costs.items()}
    syncs = {name: round(sum(cost[1] for cost in found) / len(found)) for name, found in costs.items()}
    makespan = ratio(took[f"waiting {MORE_S}"], took["waiting 0.0"])
    rate = ratio(took["no_op 0.0"], took[f"no_op {MORE_S}"])
    note = f"{makespan.spread}; {syncs[f'waiting {MORE_S}']} syncs"
    rate_note = f"{rate.spread}; {many:,} items, {syncs[f'no_op {MORE_S}']} syncs"
    row, rate_row = f"makespan, {few:,} items of log-normal latency", "rate of items that cost nothing"
    return [
        Figure("slow_disk", row, makespan.value, MAKESPAN, at_least=False, note=note),
        Figure("slow_disk", rate_row, rate.value, RATE, at_least=True, note=rate_note),
    ]
