"""Where the engine's cost an item goes, in instructions of the processor, which are the same at any load.

    python -m tests.benchmarks instructions

Counted by valgrind (Debian's package); each figure is the difference between two runs of which one has twice the items,
so that starting up is not in it. The commits that a second brings are left out: valgrind is fifty times slower than the
processor. Those that a full half of the window brings are in it.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from async_recovery import Retry
from async_recovery.checkpoint import Bookmark
from async_recovery.collector import Collector
from async_recovery.contracts import Page
from async_recovery.cursor import Cursor
from async_recovery.records import encode_record
from async_recovery.sources import IterableSource
from async_recovery.watermark import Watermark
from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.pools import Pool, bare, by_hand, ours, result_of

TITLE = "Instructions an item, and where those go that are not the pool's by hand"
ITEMS, CONCURRENCY, PAGE_ITEMS = 51_200, 256, 512
NO_COMMITS_BY_TIME = 1e6


def _run(pool: Pool, items: int, **options: Any) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        asyncio.run(partial(pool, **options)(items, CONCURRENCY, 1, Path(folder)))


def _bare(items: int) -> None:
    _run(bare, items)


def _by_hand(items: int) -> None:
    _run(by_hand, items)


def _ours(items: int) -> None:
    _run(ours, items, checkpoint_interval=NO_COMMITS_BY_TIME)


def _ready(items: int) -> None:
    _run(ours, items, checkpoint_interval=NO_COMMITS_BY_TIME, retry=Retry(attempts=3), timeout=60.0)


def _nothing(items: int) -> None:
    for item in range(items):
        result_of(item, 1)


def _encode(items: int) -> None:
    encode = msgspec.json.Encoder().encode
    for item in range(items):
        encode({"index": item, **result_of(item, 1)})


def _checked(items: int) -> None:
    for item in range(items):
        encode_record(item, result_of(item, 1))


def _input(items: int) -> None:
    async def read() -> None:
        async for _ in IterableSource(range(items)).pages(None):
            pass

    asyncio.run(read())


def _cursor(items: int) -> tuple[Cursor, Collector]:
    collector = Collector(Watermark(items), batch_items=items, batch_bytes=1 << 40)
    cursor = Cursor(collector, Bookmark(None, 0, 0), (), max_buffer_bytes=1 << 40, low_water=0, full=lambda: None)
    for first in range(0, items, PAGE_ITEMS):
        cursor.add(Page(None, range(first, first + PAGE_ITEMS), [0] * PAGE_ITEMS))
    return cursor, collector


def _take(items: int) -> None:
    cursor, _ = _cursor(items)
    while cursor.take() is not None:
        pass


def _order(items: int) -> None:
    cursor, collector = _cursor(items)
    while (taken := cursor.take()) is not None:
        collector.complete(taken[0], b"")


PIECES = {
    piece.__name__[1:]: piece
    for piece in (_bare, _by_hand, _ours, _ready, _nothing, _encode, _checked, _input, _take, _order)
}


def count(piece: str, folder: Path, items: int) -> float:
    """Instructions an item."""

    def total(items: int) -> int:
        words = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        words += [sys.executable, "-m", __name__, piece, str(items)]
        env = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(Path.cwd())}
        ended = subprocess.run(words, env=env, cwd=folder, stderr=subprocess.PIPE, text=True, check=True)
        found = re.search(r"I *refs: *([\d,]+)", ended.stderr)
        assert found is not None, ended.stderr
        return int(found[1].replace(",", ""))

    return (total(2 * items) - total(items)) / items


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """The whole, and its parts."""
    if shutil.which("valgrind") is None:
        return [Figure("instructions", "ours", math.nan, None, at_least=False, note="there is no valgrind")]
    items = scale.of(ITEMS, least=2 * PAGE_ITEMS) // PAGE_ITEMS * PAGE_ITEMS
    found = {name: count(name, folder, items) for name in PIECES}
    more = found["ours"] - found["by_hand"]
    parts = {
        "to hand it out in order (Cursor.take)": found["take"],
        "to put its record in order (Collector.complete)": found["order"] - found["take"],
        "to see that its record is faithful (encode_record over msgspec alone)": found["checked"] - found["encode"],
        "to know its input again (JSON and CRC-32 of the item)": found["input"],
    }
    figures = [
        Figure("instructions", row, found[name], None, at_least=False, unit="instructions")
        for row, name in {
            "the pool that keeps nothing": "bare",
            "by hand": "by_hand",
            "ours": "ours",
            "ours, with retry and a timeout": "ready",
        }.items()
    ]
    for row, value in parts.items():
        note = f"{value / more:.0%} of what ours takes over the pool by hand"
        figures.append(Figure("instructions", row, value, None, at_least=False, unit="instructions", note=note))
    return figures


if __name__ == "__main__":
    PIECES[sys.argv[1]](int(sys.argv[2]))
