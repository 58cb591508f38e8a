"""A run on a cluster of this machine: scheduler and workers are processes of their own.

    python -m tests.benchmarks.cluster [--rounds 3] [--quick]

1. Items that wait for 200 ms, on 8 workers with 200 at once each: the share of the ideal throughput, 8,000 a second.
   The whole run counts, from the call to the published output.
2. Items that do nothing, on 2 workers, in chunks of the size that the run picks itself: items a second.
3. What an item costs the coordinator in time of its processor: the limit of one job, on a machine of its own.

The exit code is 1 if a bound is missed; with --quick (a hundredth of the items) never.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from async_recovery import DaskExecutor, run_resumable
from tests.support.dask_cluster import DaskCluster, wait_for

WAIT_S = 0.2
LEAST_SHARE, LEAST_ITEMS_PER_S = 0.85, 20_000


async def waits(item: int) -> dict[str, int]:
    """An item that waits, as for an answer."""
    await asyncio.sleep(WAIT_S)
    return {"value": item}


async def nothing(item: int) -> dict[str, int]:
    """An item that does nothing."""
    return {"value": item}


def measured(cluster: DaskCluster, folder: Path, name: str, items: int, concurrency: int) -> tuple[float, float]:
    """Seconds that a run took, and seconds of the coordinator's processor."""
    from tests.benchmarks import cluster as here  # by its name, and not as the program

    worker = getattr(here, name)
    executor = DaskExecutor(cluster.address)
    began, cpu = time.perf_counter(), time.process_time()
    output = folder / f"{time.monotonic_ns()}.jsonl"
    summary = asyncio.run(
        run_resumable(worker, range(items), output=output, concurrency=concurrency, executor=executor)
    )
    took = time.perf_counter() - began, time.process_time() - cpu
    assert summary.executed == items
    output.unlink()
    return took


def rows(workers: int, name: str, items: int, concurrency: int, rounds: int) -> list[tuple[float, float]]:
    """Each round on the same cluster; the first run, in which the workers import the module, does not count."""
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as there, DaskCluster(Path(there), python_path=root) as cluster:
        cluster.start_workers(workers)
        log = Path(there) / "worker.log"
        wait_for(lambda: log.exists() and log.read_text().count("Registered to") >= workers)
        measured(cluster, Path(there), name, 10 * workers, concurrency)
        return [measured(cluster, Path(there), name, items, concurrency) for _ in range(rounds)]


def main() -> int:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    factor = 100 if arguments.quick else 1
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    items, concurrency = 50_000 // factor, 8 * 200
    took = rows(8, "waits", items, concurrency, arguments.rounds)
    shares = [items * WAIT_S / concurrency / seconds for seconds, _ in took]
    share = statistics.median(shares)
    print(f"{items} items of {WAIT_S:g} s at 8 x 200: {share:.2f} of the ideal throughput ({_all(shares)})")
    items = 100_000 // factor
    took = rows(2, "nothing", items, 32, arguments.rounds)
    speeds = [items / seconds for seconds, _ in took]
    speed = statistics.median(speeds)
    print(f"{items} items that do nothing, on 2 workers: {speed:,.0f} items a second ({_all(speeds)})")
    costs = [cpu / items * 1e6 for _, cpu in took]
    print(f"the coordinator: {statistics.median(costs):.1f} µs of its processor an item ({_all(costs)})")
    is_reached = share >= LEAST_SHARE and speed >= LEAST_ITEMS_PER_S
    return 0 if is_reached or arguments.quick else 1


def _all(values: list[float]) -> str:
    return "rounds " + ", ".join(f"{value:,.0f}" if value > 1_000 else f"{value:.2f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
