"""The job of the benchmarks, and pools that run it: two written by hand, and ours.

It imports the package alone: `tests.benchmarks.failures` runs this file with the package of another checkout.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from async_recovery import run_resumable

BUFFER_BYTES = 64 << 10

Result = dict[str, Any]
Worker = Callable[[int], Awaitable[Result]]
Pool = Callable[[int, int, int, Path], Coroutine[Any, Any, Path | None]]


def result_of(item: int, round_number: int) -> Result:
    """What the job makes of an item: new in every round, so that nothing is written twice."""
    return {"value": item * 7 + round_number, "ok": True}


def total_of(items: int, round_number: int) -> int:
    """The sum of all values."""
    return 7 * items * (items - 1) // 2 + items * round_number


def make_worker(round_number: int) -> Worker:
    """A worker that only lets others have their turn."""

    async def worker(item: int) -> Result:
        await asyncio.sleep(0)
        return result_of(item, round_number)

    return worker


async def bare(items: int, concurrency: int, round_number: int, folder: Path) -> None:
    """A pool that keeps nothing but the sum of what it found."""
    worker, shared = make_worker(round_number), iter(range(items))

    async def pull() -> int:
        total = 0
        for item in shared:
            total += (await worker(item))["value"]
        return total

    assert sum(await asyncio.gather(*(pull() for _ in range(concurrency)))) == total_of(items, round_number)


async def by_hand(items: int, concurrency: int, round_number: int, folder: Path) -> Path:
    """A pool that writes its results as they come, in blocks of 64 KiB: no order, no fsync, no checkpoint."""
    worker, shared = make_worker(round_number), enumerate(range(items))
    encode, buffer = msgspec.json.Encoder().encode, bytearray()
    output = folder / "by_hand.jsonl"
    with output.open("wb") as file:

        async def pull() -> None:
            for index, item in shared:
                result = await worker(item)
                buffer.extend(encode({"index": index, **result}))
                buffer.extend(b"\n")
                if len(buffer) >= BUFFER_BYTES:
                    file.write(buffer)
                    buffer.clear()

        await asyncio.gather(*(pull() for _ in range(concurrency)))
        file.write(buffer)
    return output


async def ours(items: int, concurrency: int, round_number: int, folder: Path, **options: Any) -> Path:
    """The durable, ordered run, on default settings but for `options`."""
    output, worker = folder / "ours.jsonl", make_worker(round_number)
    settings = {"output": output, "concurrency": concurrency, "version": str(round_number), **options}
    summary = await run_resumable(worker, range(items), **settings)
    assert summary.executed == summary.processed == items
    return output


def timed(pool: Pool, items: int, concurrency: int, round_number: int, folder: Path) -> float:
    """Seconds that it took; afterwards what it wrote is compared, record by record, and removed."""
    gc.collect()
    start = time.perf_counter()
    output = asyncio.run(pool(items, concurrency, round_number, folder))
    seconds = time.perf_counter() - start
    if output is not None:
        check_records(output, items, round_number)
        output.unlink()
    return seconds


def check_records(output: Path, items: int, round_number: int) -> None:
    """Every record is there, once, and right."""
    decode, found = msgspec.json.Decoder().decode, bytearray(items)
    with output.open("rb") as lines:
        for line in lines:
            record = decode(line)
            index = record["index"]
            assert record == {"index": index, **result_of(index, round_number)}, f"{output}: {record}"
            found[index] += 1
    assert found == b"\x01" * items, f"{output}: {found.count(0)} of {items} records are missing, or one is doubled"
