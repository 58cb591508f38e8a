"""What the durable, ordered run costs beside what one would dare to write by hand.

    python -m tests.benchmarks.engine [--items 200000] [--rounds 5]

In one process, interleaved, medians of several rounds; workers await ``asyncio.sleep(0)`` and return a small dict
that is new in every round:

* bare: tasks on a shared iterator, nothing is kept.
* by hand: the same, and it encodes and writes the very lines of ours: no order, no fsync, no checkpoint.
* ours: `run_resumable` on default settings: ordered, every commit fsynced, resumable.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from async_recovery import run_resumable

CONCURRENCIES = (16, 256, 4096)
BUFFER_BYTES = 64 << 10

Row = Callable[[int, int, int, Path], Awaitable[None]]


def make_worker(round_number: int) -> Callable[[int], Awaitable[dict[str, Any]]]:
    """A worker whose results differ from round to round, so that nothing is written twice."""

    async def worker(item: int) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"value": item * 7 + round_number, "ok": True}

    return worker


async def bare(items: int, concurrency: int, round_number: int, folder: Path) -> None:
    """A pool that keeps nothing."""
    worker, shared = make_worker(round_number), iter(range(items))

    async def pull() -> None:
        for item in shared:
            await worker(item)

    await asyncio.gather(*(pull() for _ in range(concurrency)))


async def by_hand(items: int, concurrency: int, round_number: int, folder: Path) -> None:
    """A pool that writes its results as they come, in blocks of 64 KiB."""
    worker, shared = make_worker(round_number), enumerate(range(items))
    encode, buffer = msgspec.json.Encoder().encode, bytearray()
    with (folder / f"by_hand-{concurrency}-{round_number}.jsonl").open("wb") as file:

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


async def ours(items: int, concurrency: int, round_number: int, folder: Path) -> None:
    """The durable, ordered run."""
    output = folder / f"ours-{concurrency}-{round_number}.jsonl"
    summary = await run_resumable(
        make_worker(round_number), range(items), output=output, concurrency=concurrency, version=str(round_number)
    )
    assert summary.executed == items


ROWS: dict[str, Row] = {"bare": bare, "by hand": by_hand, "ours": ours}


def measure(items: int, rounds: int) -> list[dict[str, Any]]:
    """Median microseconds an item of each row, at each concurrency, and the ratios between them."""
    results = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for concurrency in CONCURRENCIES:
            times: dict[str, list[float]] = {name: [] for name in ROWS}
            for round_number in range(rounds):
                for name, row in ROWS.items():
                    gc.collect()
                    start = time.perf_counter()
                    asyncio.run(row(items, concurrency, round_number, Path(folder)))  # type: ignore[arg-type]
                    times[name].append((time.perf_counter() - start) / items * 1e6)
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratios = [hand / our for hand, our in zip(times["by hand"], times["ours"], strict=True)]
            bares = [b / our for b, our in zip(times["bare"], times["ours"], strict=True)]
            results.append(
                {
                    "concurrency": concurrency,
                    "us_per_item": medians,
                    "by hand / ours": statistics.median(ratios),
                    "bare / ours": statistics.median(bares),
                }
            )
    return results


def main() -> None:
    """Print the table; with --json, a JSON array instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments.items, arguments.rounds)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print("concurrency   bare   by hand   ours (µs an item)   speed over by hand   over bare")
    for row in results:
        us = row["us_per_item"]
        print(
            f"{row['concurrency']:11d} {us['bare']:6.2f} {us['by hand']:9.2f} {us['ours']:6.2f}"
            f" {row['by hand / ours']:27.2f} {row['bare / ours']:14.2f}"
        )


if __name__ == "__main__":
    main()
