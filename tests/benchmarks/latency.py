"""How near a run of many latencies comes to the best that can be: log-normal ones, some of them very long.

The measure is the makespan of an ideal greedy pool, computed from the very latencies of the round: whoever is free
takes the next item, and nothing costs anything but waiting.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import math
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from async_recovery import run_resumable
from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.rounds import interleave, middle, missing

TITLE = "Makespan over that of an ideal greedy pool: items of log-normal latency, mean 20 ms, sigma 1"
ITEMS, CONCURRENCY = 20_000, 200
MEAN_S, SIGMA = 0.020, 1.0
BOUND = 1.05

Latencies = Sequence[float]
Pool = Callable[[Latencies, int, Path], Coroutine[Any, Any, int]]  # how many items it has finished


def latencies_of(items: int, round_number: int) -> list[float]:
    """Seconds that each item takes; others in every round."""
    dice, mu = random.Random(round_number), math.log(MEAN_S) - SIGMA**2 / 2
    return [dice.lognormvariate(mu, SIGMA) for _ in range(items)]


def ideal_s(latencies: Latencies, concurrency: int) -> float:
    """The makespan of a pool that costs nothing: each item, in order, goes to whoever is free first."""
    free_at = [0.0] * concurrency
    for latency in latencies:
        heapq.heapreplace(free_at, free_at[0] + latency)
    return max(free_at)


async def ours(latencies: Latencies, concurrency: int, folder: Path) -> int:
    """The durable, ordered run, on default settings."""

    async def worker(item: int) -> dict[str, float]:
        await asyncio.sleep(latencies[item])
        return {"waited_s": latencies[item]}

    output = folder / "ours.jsonl"
    run = await run_resumable(worker, range(len(latencies)), output=output, concurrency=concurrency, version="latency")
    assert run.executed == run.processed
    return output.read_bytes().count(b"waited_s")


async def bare(latencies: Latencies, concurrency: int, folder: Path) -> int:
    """Tasks on a shared iterator."""
    shared, finished = iter(latencies), 0

    async def pull() -> None:
        nonlocal finished
        for latency in shared:
            await asyncio.sleep(latency)
            finished += 1

    await asyncio.gather(*(pull() for _ in range(concurrency)))
    return finished


async def chunks(latencies: Latencies, concurrency: int, folder: Path) -> int:
    """Gather over as many as may run at once; then the next ones."""
    finished = 0
    for start in range(0, len(latencies), concurrency):
        chunk = latencies[start : start + concurrency]
        finished += len(await asyncio.gather(*(asyncio.sleep(latency) for latency in chunk)))
    return finished


async def with_aiostream(latencies: Latencies, concurrency: int, folder: Path) -> int:
    """Its map, ordered."""
    from aiostream import stream

    worker: Any = asyncio.sleep
    mapped = stream.map(stream.iterate(latencies), worker, ordered=True, task_limit=concurrency)
    finished = 0
    async with mapped.stream() as results:
        async for _ in results:
            finished += 1
    return finished


def over_ideal(pool: Pool, items: int, concurrency: int, folder: Path, round_number: int) -> float:
    """The makespan of one run, over the ideal one of the same latencies."""
    latencies = latencies_of(items, round_number)
    gc.collect()
    start = time.perf_counter()
    finished = asyncio.run(pool(latencies, concurrency, folder))
    seconds = time.perf_counter() - start
    assert finished == items, f"{pool}: {finished} of {items} items"
    return seconds / ideal_s(latencies, concurrency)


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """All pools, side by side."""
    items = scale.of(ITEMS, least=400)
    concurrency = min(CONCURRENCY, items // 20)
    pools: dict[str, Pool] = {"ours": ours, "bare pool": bare, "gather in chunks": chunks, "aiostream": with_aiostream}
    absent = missing("aiostream")
    if absent:
        del pools["aiostream"]
    rows = {name: partial(over_ideal, pool, items, concurrency, folder) for name, pool in pools.items()}
    figures = []
    for name, values in interleave(scale.rounds, rows).items():
        found, bound = middle(values), BOUND if name == "ours" else None
        figures.append(Figure("latency", name, found.value, bound, at_least=False, note=found.spread))
    if absent:
        figures.append(Figure("latency", "aiostream", math.nan, None, at_least=False, note=absent))
    return figures
