"""How long the event loop keeps others waiting: the gaps that a 1 ms ticker sees beside 4096 workers.

A bare pool, which encodes the same records and drops them, has gaps too: all its workers may have something to do at
once. What counts is by how much ours are longer. Records of 1 KB come from workers that only let others have their
turn; those of 1 MB after a time of their own each, all together about as fast as a disk takes them. A bare pool that
keeps its records in memory, as every run that puts them in order has to for a while, shows what that alone takes.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from async_recovery import run_resumable
from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.rounds import interleave

TITLE = "Gaps of the event loop that a 1 ms ticker sees at the 99.9th percentile, over a bare pool beside it"
TICK_S, SHARE, BOUND_MS = 0.001, 0.999, 5.0
CONCURRENCY, MANY = 4096, 10_000
NOISE = random.Random(1).randbytes(1 << 20).hex()

Worker = Callable[[int], Awaitable[dict[str, str]]]


class Size(NamedTuple):
    """A job: so many records of so many characters, each after up to so many seconds."""

    name: str
    characters: int
    items: int
    latency_s: float


SIZES = (Size("1 KB", 1000, 2_000_000, 0.0), Size("1 MB", 1_000_000, 5000, 20.0))


def make_worker(size: Size, round_number: int) -> Worker:
    """A worker whose results are new in every round."""
    dice = random.Random(round_number)
    latencies = [dice.uniform(0, size.latency_s) for _ in range(size.items)] if size.latency_s else []

    async def worker(item: int) -> dict[str, str]:
        await asyncio.sleep(latencies[item] if latencies else 0)
        start = (item * 7919 + round_number) % 1_000_000
        return {"text": NOISE[start : start + size.characters]}

    return worker


async def bare(worker: Worker, size: Size, folder: Path, keep: Callable[[bytes], object] = len) -> None:
    """Tasks on a shared iterator; each encodes what it found."""
    shared, encode, written = iter(range(size.items)), msgspec.json.Encoder().encode, 0

    async def pull() -> None:
        nonlocal written
        for index in shared:
            result = await worker(index)
            record = encode({"index": index, **result})
            written += len(record)
            keep(record)

    await asyncio.gather(*(pull() for _ in range(CONCURRENCY)))
    assert written > size.characters * size.items


async def keeping(worker: Worker, size: Size, folder: Path) -> None:
    """The same, and all records stay in memory."""
    await bare(worker, size, folder, list[bytes]().append)


async def ours(worker: Worker, size: Size, folder: Path) -> None:
    """The durable, ordered run, on default settings."""
    output = folder / "out.jsonl"
    run = await run_resumable(worker, range(size.items), output=output, concurrency=CONCURRENCY, version="gaps")
    assert run.executed == run.processed == size.items
    assert output.stat().st_size > size.characters * size.items
    output.unlink()


async def tick(gaps: list[float]) -> None:
    """Until it is cancelled: how long each wait of 1 ms has really taken."""
    before = time.perf_counter()
    while True:
        await asyncio.sleep(TICK_S)
        now = time.perf_counter()
        gaps.append(now - before)
        before = now


def gaps_of(
    pool: Callable[[Worker, Size, Path], Awaitable[None]], size: Size, folder: Path, round_number: int
) -> list[float]:
    """The gaps beside one run, in seconds."""
    gaps: list[float] = []

    async def main() -> None:
        ticker = asyncio.create_task(tick(gaps))
        await pool(make_worker(size, round_number), size, folder)
        ticker.cancel()

    gc.collect()
    asyncio.run(main())
    return gaps


def at_share_ms(gaps: list[float]) -> float:
    """The gap that so large a share of them does not exceed, in milliseconds."""
    return sorted(gaps)[min(len(gaps) - 1, int(len(gaps) * SHARE))] * 1e3


def most_at_once(items: int, folder: Path) -> int:
    """How many items are worked on at once, where 10,000 may be."""
    now = most = 0

    async def worker(item: int) -> int:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return item

    run = asyncio.run(
        run_resumable(worker, range(items), output=folder / "many.jsonl", concurrency=MANY, version="many")
    )
    assert run.executed == run.processed == items
    with (folder / "many.jsonl").open("rb") as lines:
        assert all(line == b'{"index":%d,"result":%d}\n' % (index, index) for index, line in enumerate(lines))
    return most


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """All rounds of a row together: a percentile needs many gaps."""
    figures = []
    for whole in SIZES:
        size = whole._replace(items=scale.of(whole.items), latency_s=whole.latency_s * scale.factor)
        rows = {pool.__name__: partial(gaps_of, pool, size, folder) for pool in (bare, keeping, ours)}
        costs = interleave(scale.rounds, rows)
        gaps = {name: [gap for found in costs[name] for gap in found] for name in costs}
        ms = {name: at_share_ms(found) for name, found in gaps.items()}
        note = f"{ms['ours']:.1f} of {len(gaps['ours']):,} ticks, {ms['bare']:.1f} of {len(gaps['bare']):,} beside bare"
        value = ms["ours"] - ms["bare"]
        row = f"records of {size.name}: longer by"
        figures.append(Figure("loop_gaps", row, value, BOUND_MS, at_least=False, unit="ms", note=note))
        row, value = f"records of {size.name}: a bare pool that keeps them, longer by", ms["keeping"] - ms["bare"]
        figures.append(Figure("loop_gaps", row, value, None, at_least=False, unit="ms"))
    items = scale.of(200_000, least=5 * MANY)
    most = most_at_once(items, folder)
    row = f"at most at once, where {MANY:,} may be"
    return [*figures, Figure("loop_gaps", row, most, MANY, at_least=True, unit="items", note=f"{items:,} items")]
