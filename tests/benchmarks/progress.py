"""What it costs to draw progress on a terminal.

    python -m tests.benchmarks.progress [--pairs 120] [--concurrency 16 256 4096]

One long run of the job of `tests/benchmarks/pools.py`, whose progress is drawn on a pseudo-terminal that another
process reads, in every other slice of half a second; in the slices between nothing is drawn, and nothing told to the
screen. What an item costs in a slice is compared with its neighbour, so that whatever else slows the machine, or this
process, slows both. The figure is the median over all pairs of slices; how sure it is comes from drawing the pairs
again at random (a bootstrap, 95 %). The exit code is 1 if the median and its uncertainty together are 2 % or more of
the processor's time: what is not sure counts as missed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import pty
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from async_recovery import Progress, run_resumable
from async_recovery.screen import Screen
from tests.benchmarks.pools import Result, result_of

CONCURRENCIES = (16, 256, 4096)
SLICE_S, PAIRS, LEAST_PAIRS, BOUND = 0.5, 120, 60, 0.02
BOOTSTRAPS = 2000
COUNT = """
import os
frames = 0
try:
    while data := os.read(0, 65536): frames += data.count(b"finished")
except OSError: pass
print(frames)
"""


class Cost(NamedTuple):
    """What an item takes in one slice, in microseconds: by the clock, and of the processor."""

    wall_us: float
    cpu_us: float


class Difference(NamedTuple):
    """By how much more the one of each pair takes: the median, and how far it may be off."""

    median: float
    uncertainty: float


def difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Of (with, without): the median of their ratios less one, and half of what 95 % of the bootstraps span."""
    ratios, dice = [drawn / plain - 1 for drawn, plain in pairs], random.Random(1)
    medians = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAPS))
    low, high = medians[BOOTSTRAPS // 40], medians[-BOOTSTRAPS // 40]
    return Difference(statistics.median(ratios), (high - low) / 2)


@contextmanager
def terminal() -> Iterator[None]:
    """Standard error is a pseudo-terminal, which another process reads; after it: that something was drawn."""
    master, slave = pty.openpty()
    before, reading = sys.stderr, [sys.executable, "-c", COUNT]
    with subprocess.Popen(reading, stdin=master, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
        os.close(master)
        try:
            with os.fdopen(slave, "w") as sys.stderr:
                yield
        finally:
            sys.stderr = before
        assert reader.stdout is not None
        frames = int(reader.stdout.read())
    print(f"   {frames} frames", flush=True)
    assert frames > 0, "nothing was drawn"


class Slices:
    """Switches the drawing on and off while a job runs, and notes what an item costs meanwhile.

    The pairs go to and fro (with, without, without, with …), so that what changes steadily cancels.

    :ivar executed: items that the worker has finished.
    :ivar done: all slices are over: the job may end.
    """

    def __init__(self, screen: Screen, pairs: int) -> None:
        self.executed = 0
        self.done = False
        self.costs: list[tuple[Cost, Cost]] = []
        self._screen = screen
        self._pairs = pairs
        self._is_drawing = False
        live = screen._live
        assert live is not None
        refresh = live.refresh
        live.refresh = lambda: refresh() if self._is_drawing else None  # type: ignore[method-assign]

    def show(self, progress: Progress) -> None:
        """For `on_progress`."""
        if self._is_drawing:
            self._screen.show(progress)

    async def run(self) -> None:
        """All of them, after one that does not count."""
        try:
            await self._slice(is_drawing=True)
            for number in range(self._pairs):
                found: dict[bool, Cost] = {}
                for is_drawing in (True, False) if number % 2 == 0 else (False, True):
                    found[is_drawing] = await self._slice(is_drawing=is_drawing)
                self.costs.append((found[True], found[False]))
        finally:
            self.done = True

    async def _slice(self, *, is_drawing: bool) -> Cost:
        self._is_drawing = is_drawing
        executed, wall, cpu = self.executed, time.perf_counter(), time.process_time()
        await asyncio.sleep(SLICE_S)
        items = self.executed - executed
        assert items > 0, f"no item has finished in {SLICE_S} s"
        return Cost((time.perf_counter() - wall) / items * 1e6, (time.process_time() - cpu) / items * 1e6)


async def job(slices: Slices, concurrency: int, output: Path) -> None:
    """Runs for as long as there are slices."""

    def items() -> Iterator[int]:
        for item in count():
            if slices.done:
                return
            yield item

    async def worker(item: int) -> Result:
        await asyncio.sleep(0)
        slices.executed += 1
        return result_of(item, 0)

    switching = asyncio.create_task(slices.run())
    run = await run_resumable(
        worker, items(), output=output, concurrency=concurrency, version="progress", on_progress=slices.show
    )
    await switching
    assert run.executed == run.processed == slices.executed


def measure(concurrency: int, pairs: int) -> bool:
    """Print what drawing costs; whether that is surely below the bound."""
    print(f"progress drawn, {concurrency} at once, {pairs} pairs of slices of {SLICE_S} s", flush=True)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, terminal():
        screen = Screen(level=logging.ERROR, others=logging.ERROR, progress="always")
        with screen:
            slices = Slices(screen, pairs)
            asyncio.run(job(slices, concurrency, Path(folder) / "out.jsonl"))
    cpu = difference([(drawn.cpu_us, plain.cpu_us) for drawn, plain in slices.costs])
    wall = difference([(drawn.wall_us, plain.wall_us) for drawn, plain in slices.costs])
    us = [statistics.median(pair[side].cpu_us for pair in slices.costs) for side in (0, 1)]
    is_within = cpu.median + cpu.uncertainty < BOUND
    print(f"   {cpu.median:+.2%} ± {cpu.uncertainty:.2%} processor time ({us[0]:.2f} by {us[1]:.2f} µs an item)")
    print(f"   {wall.median:+.2%} ± {wall.uncertainty:.2%} by the clock")
    print(f"   {'within' if is_within else 'NOT surely within'} {BOUND:.0%}", flush=True)
    return is_within


def main() -> int:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"at least {LEAST_PAIRS}, to decide anything")
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCIES)
    arguments = parser.parse_args()
    if arguments.pairs < LEAST_PAIRS:
        parser.error(f"--pairs is {arguments.pairs}: it must be at least {LEAST_PAIRS}")
    os.environ.pop("NO_COLOR", None)
    are_within = [measure(concurrency, arguments.pairs) for concurrency in arguments.concurrency]  # each is printed
    return 0 if all(are_within) else 1


if __name__ == "__main__":
    sys.exit(main())
