"""The worker of the forks of layers 14 and 15. It notes what it begins and what it ends, and waits where it is told to.

``--worker tests.proof.staged_worker:work``; the notes are ``ran.log`` and ``done.log``, an item a line.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from tests.support.jobs import LOG

from .forks import Inside

DONE = "done.log"

inside: Inside
held: frozenset[int] = frozenset()
wait: Callable[[], Any]
latencies_s: dict[int, float] = {}
begun: list[int] = []


def hold(fork: Inside, *numbers: int, stubborn: bool = False, blocking: bool = False) -> None:
    """In a fork: wait at these items.

    :param stubborn: no cancellation ends the wait.
    :param blocking: wait in the thread that the worker runs in; for `work` that is the loop's.
    """
    global inside, held, wait
    inside, held = fork, frozenset(numbers)
    wait = (lambda: fork.hold("item")) if blocking else (lambda: fork.hold_loosely("item", stubborn=stubborn))


async def work(item: str) -> dict[str, int]:
    """Asynchronous."""
    number = _begin(item)
    waiting = wait() if number in held else None
    await (waiting or asyncio.sleep(latencies_s.get(number, 0)))
    return _end(number)


def plain(item: str) -> dict[str, int]:
    """Runs in a thread."""
    number = _begin(item)
    if number in held:
        wait()
    return _end(number)


async def waits_for_thread(item: str) -> dict[str, int]:
    """Asynchronous, and what it waits for is a thread that nobody can end."""
    return await asyncio.to_thread(plain, item)


def _begin(item: str) -> int:
    number = int(item)
    begun.append(number)
    _note(LOG, number)
    return number


def _end(number: int) -> dict[str, int]:
    _note(DONE, number)
    return {"number": number}


def _note(name: str, number: int) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"%7d\n" % number)
    os.close(descriptor)
