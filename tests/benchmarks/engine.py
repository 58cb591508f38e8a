"""What the durable, ordered run costs beside what one would dare to write by hand, in one process.

* bare: tasks on a shared iterator, nothing is kept.
* by hand: the same, and it encodes and writes the very lines of ours: no order, no fsync, no checkpoint.
* ours: `run_resumable` on default settings: ordered, every commit fsynced, resumable.
* ready: ours with retry, a timeout an item, and progress on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.pools import Pool, bare, by_hand, ours, timed
from tests.benchmarks.rounds import Costs, interleave, middle, ratio

TITLE = "The durable, ordered run beside pools written by hand; workers await asyncio.sleep(0)"
ITEMS = 200_000
BOUNDS = {16: 0.75, 256: 0.70, 4096: 0.62}  # of the speed of by hand, at so many at once
MOST_US, LEAST_READY = 1.5, 0.85


def figures_of(concurrency: int, costs: Costs) -> list[Figure]:
    """The rows at one concurrency; `costs` are in µs an item."""
    at, us = f"{concurrency} at once:", ", ".join(f"{name} {middle(took).value:.2f}" for name, took in costs.items())
    least, most = partial(Figure, "engine", at_least=True), partial(Figure, "engine", at_least=False, unit="µs")
    hand, nothing = ratio(costs["by hand"], costs["ours"]), ratio(costs["bare"], costs["ours"])
    more = middle([our - hand for our, hand in zip(costs["ours"], costs["by hand"], strict=True)])
    ready = ratio(costs["ours"], costs["ready"])
    return [
        least(f"{at} speed over by hand", hand.value, BOUNDS[concurrency], note=hand.spread),
        most(f"{at} an item more than by hand", more.value, MOST_US, note=more.spread),
        least(f"{at} speed of ready over ours", ready.value, LEAST_READY, note=ready.spread),
        least(f"{at} speed over bare", nothing.value, None, note=f"{nothing.spread}; µs an item: {us}"),
    ]


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """All rows, side by side at each concurrency."""
    items, seen, figures = scale.of(ITEMS), list[object](), list[Figure]()
    ready = partial(ours, retry=5, timeout=30.0, on_progress=seen.append)
    pools: dict[str, Pool] = {"bare": bare, "by hand": by_hand, "ours": ours, "ready": ready}

    def us_an_item(pool: Pool, concurrency: int, round_number: int) -> float:
        return timed(pool, items, concurrency, round_number, folder) / items * 1e6

    for concurrency in BOUNDS:
        rows = {name: partial(us_an_item, pool, concurrency) for name, pool in pools.items()}
        figures += figures_of(concurrency, interleave(scale.rounds, rows))
    assert seen, "there was no progress to see"
    return figures
