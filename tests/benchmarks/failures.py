"""What failures cost, and what it costs to be ready for them.

    python -m tests.benchmarks.failures [--rounds 5] [--against WORKTREE]

1. Items that fail: 50,000 items, concurrency 200, five attempts, failures recorded. Attempts a second until the last
   item is first handed out, where 1 in 100 items always fails, by those where none does.
2. Ready: the job ``ours`` of `tests/benchmarks/pools.py`, with retry and a timeout, by the same job without.
3. With ``--against``: the same job without them, by that of another checkout of the package, such as a git worktree of
   the commit before; each run in a process of its own.

What is compared is interleaved; the figures are medians over the rounds. The first one is a matter of the clock, since
waits count; the others are of the processor's time, which says more on a machine that is busy with other things. Both
are printed. The exit code is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import async_recovery

ROOT = Path(__file__).resolve().parents[2]
CONCURRENCIES = (16, 256, 4096)
ITEMS, CONCURRENCY, FAILING = 50_000, 200, 100


class Cost(NamedTuple):
    """Of one run, an item or an attempt.

    :ivar wall_us: microseconds by the clock.
    :ivar cpu_us: microseconds of the processor.
    """

    wall_us: float
    cpu_us: float


class Clock:
    """Measures from its making on."""

    def __init__(self) -> None:
        gc.collect()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def cost(self, count: int) -> Cost:
        return Cost((time.perf_counter() - self._wall) / count * 1e6, (time.process_time() - self._cpu) / count * 1e6)


def failing(latency_s: float, every: int | None, round_number: int, folder: Path) -> Cost:
    """One job; what an attempt costs until the last item is first handed out.

    :param latency_s: seconds that an attempt waits.
    :param every: one in so many items always fails; None: none does.
    """
    begun, until_last, clock = 0, None, Clock()

    async def worker(item: int) -> dict[str, int]:
        nonlocal begun, until_last
        begun += 1
        if item == ITEMS - 1 and until_last is None:
            until_last = clock.cost(begun)
        await asyncio.sleep(latency_s)
        if every is not None and item % every == 0:
            raise ConnectionError(f"{item} is bad")
        return {"value": item * 7 + round_number}

    summary = asyncio.run(
        async_recovery.run_resumable(
            worker,
            range(ITEMS),
            output=folder / f"failing-{every}-{round_number}.jsonl",
            concurrency=CONCURRENCY,
            retry=async_recovery.Retry(attempts=5),
            on_error="record",
            version=str(round_number),
        )
    )
    expected = 0 if every is None else ITEMS // every
    assert summary.failed == expected
    assert summary.executed == ITEMS + 4 * expected, f"{summary.executed} attempts: some did not count"
    assert until_last is not None
    print(f"   {expected} of {ITEMS} items fail: ended by itself after {summary.elapsed_s:.1f} s", flush=True)
    return until_last


def engine(items: int, concurrency: int, round_number: int, folder: Path, **policies: Any) -> Cost:
    """The job ``ours`` of the benchmark of the engine, with these arguments besides."""
    ours: Callable[..., Any] = runpy.run_path(str(Path(__file__).with_name("pools.py")))["ours"]
    clock = Clock()
    asyncio.run(ours(items, concurrency, round_number, folder, **policies))
    return clock.cost(items)


def engine_of(checkout: Path, items: int, concurrency: int, round_number: int, folder: Path) -> Cost:
    """The same, with the package of that checkout, in a process of its own."""
    words = [str(Path(__file__)), "--once", str(checkout), str(items), str(concurrency), str(round_number), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    found = subprocess.run([sys.executable, *words], env=env, cwd=folder, stdout=subprocess.PIPE, check=True)
    return Cost(*json.loads(found.stdout))


def once(checkout: str, items: str, concurrency: str, round_number: str, folder: str) -> None:
    """In the process of its own: print what it cost."""
    loaded = Path(async_recovery.__file__).resolve()
    assert loaded.is_relative_to(Path(checkout).resolve()), f"{loaded} is not of {checkout}"
    warm_up = Path(folder) / "warm-up"
    warm_up.mkdir(exist_ok=True)
    engine(int(items) // 20, int(concurrency), int(round_number), warm_up)
    print(json.dumps(engine(int(items), int(concurrency), int(round_number), Path(folder))))


Measure = Callable[[int, Path], Cost]


def compare(name: str, bound: float, rounds: int, first: Measure, second: Measure, *, by_clock: bool = False) -> bool:
    """Measure both in turns and print by how much the second one costs more; whether that is below the bound."""
    pairs: list[tuple[Cost, Cost]] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for number in range(rounds):
            order = (first, second) if number % 2 == 0 else (second, first)
            costs = [measure(number, Path(folder)) for measure in order]
            pairs.append((costs[0], costs[1]) if number % 2 == 0 else (costs[1], costs[0]))
            for path in Path(folder).glob("*.jsonl"):
                path.unlink()
    cpu = statistics.median(two.cpu_us / one.cpu_us for one, two in pairs) - 1
    wall = statistics.median(two.wall_us / one.wall_us for one, two in pairs) - 1
    us = [statistics.median(pair[side].cpu_us for pair in pairs) for side in (0, 1)]
    least = min(two.cpu_us for _, two in pairs) / min(one.cpu_us for one, _ in pairs) - 1
    each = " ".join(f"{two.cpu_us / one.cpu_us - 1:+.1%}" for one, two in pairs)
    is_within = (wall if by_clock else cpu) < bound
    print(f"{name}: {cpu:+.1%} processor time, {wall:+.1%} by the clock")
    print(f"   {us[0]:.2f} to {us[1]:.2f} µs of the processor; rounds {each}; the least of each {least:+.1%}")
    print(f"   {'within' if is_within else 'NOT within'} {bound:.0%}", flush=True)
    return is_within


def main() -> int:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000, help="of the benchmark of the engine")
    parser.add_argument("--latency", type=float, default=0.002, help="of an attempt of the first job, in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of the package")
    parser.add_argument("--once", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("async_recovery").setLevel(logging.CRITICAL)
    if arguments.once:
        once(*arguments.once)
        return 0
    rounds, items = arguments.rounds, arguments.items
    none, some = (partial(failing, arguments.latency, every) for every in (None, FAILING))
    kept = [compare(f"1 in {FAILING} fails", 0.05, rounds, none, some, by_clock=True)]
    policies: dict[str, Any] = {"retry": 5, "timeout": 30.0}
    for concurrency in CONCURRENCIES:
        plain = partial(engine, items, concurrency)
        kept.append(compare(f"ready, at {concurrency}", 0.15, rounds, plain, partial(plain, **policies)))
        if arguments.against is not None:
            other, this = (partial(engine_of, path, items, concurrency) for path in (arguments.against, ROOT))
            kept.append(compare(f"against {arguments.against}, at {concurrency}", 0.03, rounds, other, this))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
