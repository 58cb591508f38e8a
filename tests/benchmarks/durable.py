"""The durable run beside others that survive a crash: a worker that does nothing, 100 at once where they can.

What the others promise, and how they are used, is in `tests.benchmarks.durable_rows`.
"""

from __future__ import annotations

import shutil
from functools import partial
from math import nan
from pathlib import Path

from tests.benchmarks.apart import spent_by
from tests.benchmarks.durable_rows import ROWS
from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.rounds import interleave, middle, missing_apart, ratio

TITLE = "Items a second over those of others that survive a crash; workers that do nothing, 100 at once"
MODULE = "tests.benchmarks.durable_rows"
OURS, HAND, BYTEWAX, DBOS_STEPS, DBOS_CHUNKS, REDIS, DISKCACHE, PARALLEL, ORIGINAL = ROWS
SIZES = {  # what takes each about a second or two; ours and the pool by hand are there for their steady state
    OURS: 500_000,
    HAND: 500_000,
    BYTEWAX: 100_000,
    DBOS_STEPS: 1_000,
    DBOS_CHUNKS: 50_000,
    REDIS: 5_000,
    DISKCACHE: 20_000,
    PARALLEL: 1_000,
    ORIGINAL: 2_000,
}
MODULES = {BYTEWAX: "bytewax", DBOS_STEPS: "dbos", DBOS_CHUNKS: "dbos", REDIS: "redis", DISKCACHE: "diskcache"}
PROGRAMS = {REDIS: "redis-server", PARALLEL: "parallel"}  # Debian's packages have the same names
BOUNDS = {BYTEWAX: 6.0, HAND: 0.7}
LONG, GROWTH = {OURS: 2_000_000, ORIGINAL: 2_000}, 10
MOST = {"seconds": 1.15, "written_bytes": 1.05}  # of `Spent`: an item of ten times as many, over an item


def why_absent(row: str) -> str | None:
    """Why a peer can not take part; None if it can."""
    if row in PROGRAMS and shutil.which(PROGRAMS[row]) is None:
        return f"apt-get install {PROGRAMS[row]}"
    return missing_apart(MODULES[row]) if row in MODULES else None


def speeds(scale: Scale, folder: Path) -> list[Figure]:
    """How much faster ours is than each."""
    absent = {name: reason for name in ROWS if (reason := why_absent(name))}
    sizes = {name: scale.of(size, least=200) for name, size in SIZES.items()}

    def s_an_item(name: str, round_number: int) -> float:
        return spent_by(MODULE, name, sizes[name], round_number, folder).seconds / sizes[name]

    costs = interleave(scale.rounds, {name: partial(s_an_item, name) for name in ROWS if name not in absent})
    figures = []
    for name in ROWS:
        if name in absent:
            figures.append(Figure("durable", f"over {name}", nan, BOUNDS.get(name), at_least=True, note=absent[name]))
        elif name != OURS:
            over, rates = ratio(costs[name], costs[OURS]), (1 / middle(costs[one]).value for one in (name, OURS))
            note = "{}; {:,.0f} items/s, ours {:,.0f}; {:,} items".format(over.spread, *rates, sizes[name])
            figures.append(Figure("durable", f"over {name}", over.value, BOUNDS.get(name), at_least=True, note=note))
    return figures


def growths(scale: Scale, folder: Path) -> list[Figure]:
    """What an item costs in a run of ten times as many, over what it costs in the shorter one."""
    figures = []
    for name, items in LONG.items():
        long = scale.of(items, least=1000)
        sizes = {"short": long // GROWTH, "long": long}
        runs = {run: partial(spent_by, MODULE, name, size, folder=folder) for run, size in sizes.items()}
        spent = interleave(scale.rounds, runs)
        for what, most in MOST.items():
            costs = {run: [getattr(one, what) / sizes[run] for one in spent[run]] for run in runs}
            growth, bound = ratio(costs["long"], costs["short"]), most if name == OURS else None
            row = f"{name}: {what.replace('_', ' ')} an item of {long:,} over one of {long // GROWTH:,}"
            figures.append(Figure("durable", row, growth.value, bound, at_least=False, note=growth.spread))
    return figures


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """All of them, in turns; then whether cost grows with the number of items."""
    return [*speeds(scale, folder), *growths(scale, folder)]
