"""A database as the output beside a file: the speed of the durable run, and whether its memory stays flat."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from async_recovery import run_resumable
from tests.benchmarks.apart import Row, Spent, spent_by
from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.rounds import interleave, middle, ratio
from tests.support import postgres

TITLE = "The durable run into a database beside the one into a file; workers await asyncio.sleep(0)"
ITEMS, CONCURRENCY = 1_000_000, 256
FEWER = 4  # memory is compared with that of so many times fewer items
MEMORY_GROWTH = 1.25
SPEED_OVER_FILE = {"SQLite": 0.5, "PostgreSQL": 0.3}


async def run(output: str, items: int, round_number: int) -> None:
    """Results differ from round to round, so that nothing is written twice."""

    async def worker(item: int) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"value": item * 7 + round_number, "ok": True}

    summary = await run_resumable(
        worker, range(items), output=output, concurrency=CONCURRENCY, version=str(round_number)
    )
    assert summary.executed == items


def timed(output: str, items: int, round_number: int) -> float:
    """The seconds of a whole run, in the current folder."""
    start = time.perf_counter()
    asyncio.run(run(output, items, round_number))
    return time.perf_counter() - start


def timed_on_server(items: int, round_number: int) -> float:
    """The same into a new database of a server, which is not counted: neither its start nor its memory."""
    server = postgres.Server(folder=Path.cwd())
    try:
        return timed(server.address(server.new_database()), items, round_number)
    finally:
        server.close()


ROWS: dict[str, Row] = {
    "file": partial(timed, "out.jsonl"),
    "SQLite": partial(timed, "sqlite:///out.db"),
    "PostgreSQL": timed_on_server,
}


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """Side by side in every round, each in a process of its own."""
    items = scale.of(ITEMS, least=1_000)

    def row(name: str, count: int, round_number: int) -> Spent:
        return spent_by(__name__, name, count, round_number, folder)

    spent = interleave(scale.rounds, {name: partial(row, name, items) for name in ROWS})
    figures = []
    for name, bound in SPEED_OVER_FILE.items():
        speed = ratio([cost.seconds for cost in spent["file"]], [cost.seconds for cost in spent[name]])
        us = middle([cost.seconds / items * 1e6 for cost in spent[name]])
        note = f"{speed.spread}; {us.value:.1f} µs an item"
        figures.append(
            Figure("databases", f"speed of {name} over the file", speed.value, bound, at_least=True, note=note)
        )
        fewer = row(name, items // FEWER, scale.rounds).peak_bytes
        most = max(cost.peak_bytes for cost in spent[name])
        growth = most / fewer if fewer > 0 else nan
        note = f"{most / 2**20:.0f} MiB, and {fewer / 2**20:.0f} MiB for {items // FEWER:,} items"
        label = f"memory of {name}, {FEWER} times the items"
        most_growth = MEMORY_GROWTH if scale.factor >= 1 else None  # of few items, the fixed parts are not full yet
        figures.append(Figure("databases", label, growth, most_growth, at_least=False, note=note))
    return figures
