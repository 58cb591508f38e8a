"""A worker whose items fail, for real processes, as the text of a module; and what its log says.

How an item ends depends on the item alone, and so does the output: some fail for good, some in their first attempts
over all lives of the job, some ask once in each life for a pause of all. Each event is a line in ``ran.log``, written
with one system call: the begin of an attempt before anything else, its end just before the worker returns or raises.
The engine takes what a coroutine returns or raises without a turn of the loop between, so the log has the order of the
engine. The lines have 32 bytes: a kill can tear a write where two pages of the file meet, and no such line lies there.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

LOG = "ran.log"
LINE_BYTES = 32
ATTEMPTS = 4
FLAKY_FAILURES = ATTEMPTS - 1

MODULE = f'''
import asyncio
import os
import random
import time
from collections import Counter

from async_recovery import SlowDown

LOG = os.open("{LOG}", os.O_RDWR | os.O_CREAT | os.O_APPEND)
LINES = os.pread(LOG, 1 << 30, 0).splitlines()
FAILURES = Counter(int(line[19:25]) for line in LINES if line.startswith(b"F"))
ASKED = set()


def note(kind, item, pause_ms=0):
    os.write(LOG, b"%c %16d %6d %5d\\n" % (kind, time.monotonic_ns(), item, pause_ms))


async def worker(text):
    item = int(text)
    note(b"S", item)
    dice = random.Random(item)
    await asyncio.sleep(dice.expovariate(1 / 0.004) * float(os.environ["SLOWNESS"]))
    if item % 41 == 11 and item not in ASKED:
        ASKED.add(item)
        pause_ms = dice.randrange(5, 60)
        note(b"P", item, pause_ms)
        raise SlowDown(pause_ms / 1000)
    if item % 17 == 3 or (item % 5 == 0 and FAILURES[item] < {FLAKY_FAILURES}):
        FAILURES[item] += 1
        note(b"F", item)
        raise ValueError(f"{{item}} is bad")
    note(b"D", item)
    return {{"number": item, "text": "é" * dice.randrange(40)}}
'''


class Event(NamedTuple):
    """One line of the log.

    :ivar kind: an attempt begins ("S"), or ends: done ("D"), failed ("F"), or with the wish for a pause ("P").
    :ivar moment: when, in nanoseconds, on the one clock that all processes of a machine have.
    :ivar pause_ms: how long a pause it asks for.
    """

    kind: str
    moment: int
    item: int
    pause_ms: int


def fails_for_good(item: int) -> bool:
    return item % 17 == 3


def read_events(log: Path, since: int = 0) -> list[Event]:
    """All of them but the first `since`."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(since * LINE_BYTES)
        lines = file.read().splitlines()
    fields = (line.decode().split() for line in lines)
    return [Event(kind, int(moment), int(item), int(pause_ms)) for kind, moment, item, pause_ms in fields]


def count_of_events(log: Path) -> int:
    return log.stat().st_size // LINE_BYTES if log.exists() else 0
