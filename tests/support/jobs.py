"""Workers for real processes, as the text of a module that lies in the folder of the job.

Items are numbers. Each run of an item is a line in ``ran.log``, written with one system call before anything else, so
that even a process that is killed at once has said what it began. The lines have 8 bytes: a kill can tear a write where
two pages of the file meet, and no such line lies across that.
"""

from __future__ import annotations

from pathlib import Path

LOG = "ran.log"

MODULE = '''
import asyncio
import os
import random
import signal
import time

LOG = os.open("ran.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def began(item):
    os.write(LOG, b"%7d\\n" % int(item))
    return random.Random(int(item))


def result(item, dice):
    return {"number": int(item), "text": "é" * dice.randrange(40), "square": int(item) ** 2}


async def quick(item):
    return result(item, began(item))


async def random_latency(item):
    """Most items take a few milliseconds, a few take long: what finishes ahead of the mark is much."""
    dice = began(item)
    latency_s = dice.expovariate(1 / 0.004) if dice.random() < 0.97 else dice.uniform(0.05, 0.15)
    await asyncio.sleep(latency_s * float(os.environ.get("SLOWNESS", "1")))
    return result(item, dice)


async def straggler(item):
    """Item 0 takes long, all others 20 ms."""
    dice = began(item)
    await asyncio.sleep(float(os.environ["STRAGGLER_S"]) if item == "0" else 0.02)
    return result(item, dice)


async def item_0_last(item):
    dice = began(item)
    await asyncio.sleep(0.005 if item == "0" else 0)
    return result(item, dice)


async def held_at_3(item):
    """Waits at item 3 until there is a file "go"; all others are quick."""
    dice = began(item)
    while item == "3" and not os.path.exists("go"):
        await asyncio.sleep(0.005)
    return result(item, dice)


async def held_from_3(item):
    """Waits at item 3 and all after it until there is a file "go"."""
    dice = began(item)
    while int(item) >= 3 and not os.path.exists("go"):
        await asyncio.sleep(0.005)
    return result(item, dice)


async def stubborn_from_3(item):
    """The same, and no cancellation can end it."""
    dice = began(item)
    while int(item) >= 3 and not os.path.exists("go"):
        try:
            await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            pass
    return result(item, dice)


async def blocks_loop_at_3(item):
    dice = began(item)
    if item == "3" and not os.path.exists("go"):
        time.sleep(600)
    return result(item, dice)


def blocks_thread_from_3(item):
    dice = began(item)
    if int(item) >= 3 and not os.path.exists("go"):
        time.sleep(600)
    return result(item, dice)


async def awaits_thread_from_3(item):
    """Asynchronous, and what it waits for is a thread that nobody can end."""
    return await asyncio.to_thread(blocks_thread_from_3, item)


async def terminates_child(item):
    """Forks, sends the child SIGTERM, and tells which signal ended it."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"!")
        time.sleep(20)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    return {"signal": os.WTERMSIG(os.waitpid(child, 0)[1])}
'''


def runs_in(log: Path) -> list[int]:
    """The items begun, in that order, by all processes."""
    return [int(line) for line in log.read_bytes().split()] if log.exists() else []


def count_of_runs(log: Path) -> int:
    """How many items have been begun, by all processes."""
    return log.stat().st_size // 8 if log.exists() else 0
