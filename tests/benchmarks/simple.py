"""The durable run beside what most people write, which keeps nothing: `asyncio.Semaphore` with gather, and libraries.

The libraries come from the extra ``bench``; each gives its results in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from tests.benchmarks.apart import Row, spent_by
from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.pools import Pool, Result, make_worker, ours, timed, total_of
from tests.benchmarks.rounds import Costs, Middle, interleave, middle, missing, ratio

TITLE = "The durable, ordered run beside pools that keep nothing; workers await asyncio.sleep(0)"
ITEMS, MEMORY_ITEMS, MEMORY_ROUNDS = 50_000, 1_000_000, 1
CONCURRENCIES = (16, 256, 4096)
MEMORY_CONCURRENCY = 256
OVER_GATHER, OVER_LIBRARIES, MEMORY_OVER_OURS = 4.5, 6.0, 100.0


async def gather(items: int, concurrency: int, round_number: int, folder: Path) -> None:
    """What most people write: a task for each item, and a semaphore."""
    worker, semaphore = make_worker(round_number), asyncio.Semaphore(concurrency)

    async def one(item: int) -> Result:
        async with semaphore:
            return await worker(item)

    results = await asyncio.gather(*(one(item) for item in range(items)))
    assert sum(result["value"] for result in results) == total_of(items, round_number)


async def check_stream(results: AsyncIterator[Any], items: int, round_number: int) -> None:
    """Take the results; each has to come, and at its place."""
    index = 0
    async for result in results:
        assert result["value"] == index * 7 + round_number, f"{result} came at {index}"
        index += 1
    assert index == items, f"{index} of {items} results"


async def with_aiostream(items: int, concurrency: int, round_number: int, folder: Path) -> None:
    """Its map, ordered."""
    from aiostream import stream

    worker: Any = make_worker(round_number)
    mapped = stream.map(stream.iterate(range(items)), worker, ordered=True, task_limit=concurrency)
    async with mapped.stream() as results:
        await check_stream(results, items, round_number)


async def with_aiometer(items: int, concurrency: int, round_number: int, folder: Path) -> None:
    """Its run_all: a list in order."""
    import aiometer

    worker = make_worker(round_number)
    jobs: list[Any] = [partial(worker, item) for item in range(items)]
    results = await aiometer.run_all(jobs, max_at_once=concurrency)
    assert len(results) == items
    assert sum(result["value"] for result in results) == total_of(items, round_number)


async def with_pypeln(items: int, concurrency: int, round_number: int, folder: Path) -> None:
    """Its map over tasks, put in order.

    The source is an async generator: an ordinary iterable goes through a thread, which takes three times as long and,
    with a `maxsize`, now and then loses the last items (pypeln 0.4.9).
    """
    import pypeln

    async def numbers() -> AsyncIterator[int]:
        for item in range(items):
            yield item

    stage = pypeln.task.map(make_worker(round_number), numbers(), workers=concurrency, maxsize=concurrency)
    await check_stream(aiter(pypeln.task.ordered(stage)), items, round_number)


LIBRARIES: dict[str, Pool] = {"aiostream": with_aiostream, "aiometer": with_aiometer, "pypeln": with_pypeln}


def apart(pool: Pool, items: int, round_number: int) -> float:
    """A pool in a process of its own."""
    return timed(pool, items, MEMORY_CONCURRENCY, round_number, Path())


ROWS: dict[str, Row] = {"gather": partial(apart, gather), "ours": partial(apart, ours)}


def speeds(concurrency: int, costs: Costs, absent: dict[str, str]) -> list[Figure]:
    """How much faster ours is, at one concurrency."""
    our, least = costs["ours"], partial(Figure, "simple", at_least=True)
    at, over = f"{concurrency} at once: speed over", ratio(costs["gather"], our)
    figures = [least(f"{at} Semaphore + gather", over.value, OVER_GATHER, note=f"{over.spread}; {us('gather', costs)}")]
    for name in LIBRARIES:
        if name in absent:
            figures.append(least(f"{at} {name}", nan, None, note=absent[name]))
        else:
            over = ratio(costs[name], our)
            figures.append(least(f"{at} {name}", over.value, None, note=f"{over.spread}; {us(name, costs)}"))
    present = {name: costs[name] for name in LIBRARIES if name not in absent}
    if present:
        fastest = ratio([min(once) for once in zip(*present.values(), strict=True)], our)
    else:
        fastest = Middle(nan, "not one is there")
    note = f"{fastest.spread}; of {', '.join(present)}"
    return [*figures, least(f"{at} the fastest of these libraries", fastest.value, OVER_LIBRARIES, note=note)]


def us(name: str, costs: Costs) -> str:
    """What an item takes there, and with ours."""
    return f"{middle(costs[name]).value:.1f} µs an item, ours {middle(costs['ours']).value:.2f}"


def memory(scale: Scale, folder: Path) -> Figure:
    """The peak of gather over that of ours, each in a process of its own."""
    items = scale.of(MEMORY_ITEMS)
    rows = {name: partial(spent_by, __name__, name, items, folder=folder) for name in ROWS}
    spent = interleave(MEMORY_ROUNDS, rows)
    peaks = {name: [float(one.peak_bytes) for one in runs] for name, runs in spent.items()}
    times = ratio(peaks["gather"], peaks["ours"])
    mib = ", ".join(f"{name} {middle(values).value / 2**20:.1f} MiB" for name, values in peaks.items())
    note = f"{items:,} items: {mib} above idle"
    row = f"{MEMORY_CONCURRENCY} at once: peak memory of Semaphore + gather over ours"
    return Figure("simple", row, times.value, MEMORY_OVER_OURS, at_least=True, note=note)


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """Speeds side by side at each concurrency; then memory."""
    absent = {name: reason for name in LIBRARIES if (reason := missing(name))}
    present = {name: pool for name, pool in LIBRARIES.items() if name not in absent}
    pools: dict[str, Pool] = {"ours": ours, "gather": gather, **present}
    items, figures = scale.of(ITEMS), list[Figure]()

    def us_an_item(pool: Pool, concurrency: int, round_number: int) -> float:
        return timed(pool, items, concurrency, round_number, folder) / items * 1e6

    for concurrency in CONCURRENCIES:
        rows = {name: partial(us_an_item, pool, concurrency) for name, pool in pools.items()}
        figures += speeds(concurrency, interleave(scale.rounds, rows), absent)
    return [*figures, memory(scale, folder)]
