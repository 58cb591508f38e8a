"""Every order in which the system calls of a run that gives up its lock, and of others that try to take it, can come.

The locks are real, on a real file; a thread is a process, and makes a call when it has the turn. An order is written as
the choices of whose turn it is. One again::

    .venv/bin/python -m tests.proof.lock_orders small 0.1.0.2
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from async_recovery import lock
from async_recovery.errors import AlreadyRunning
from async_recovery.lock import Lock

from .forks import quick_folder
from .lock_mutants import MUTANTS
from .scheduled_loop import Choices

CALLS = ("open", "flock", "stat", "unlink", "close")  # a lock is made of these
LONGEST = 100

_here = threading.local()


class Party(threading.Thread):
    """A process: what it does goes on one call at a time.

    It is made when it waits for the first of its turns.

    :ivar ended: it has nothing more to do; `error`: and ended so.
    """

    error: BaseException | None = None

    def __init__(self, name: str, deeds: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self.ended = False
        self._deeds, self._turn, self._over = deeds, threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._over.acquire()
        self.start()
        self._wait()

    def run(self) -> None:
        _here.party = self
        try:
            self._deeds()
        except BaseException as error:
            self.error = error
        finally:
            self.ended = True
            self._over.release()

    def pause(self) -> None:
        """In the thread: wait for the next turn."""
        self._over.release()
        self._turn.acquire()

    def go_on(self) -> None:
        """To its next call, or its end."""
        self._turn.release()
        self._wait()

    def _wait(self) -> None:
        assert self._over.acquire(timeout=LONGEST), "it hangs in a call"


class InTurns:
    """A module whose calls wait for the turn of their party."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        whole = getattr(self._module, name)
        return whole if name not in CALLS else functools.partial(self._in_turn, whole)

    @staticmethod
    def _in_turn(whole: Callable[..., Any], *given: Any) -> Any:
        if hasattr(_here, "party"):
            _here.party.pause()
        return whole(*given)


OTHERS = 2
SMALL, LARGE = "small", "large"  # large: the others, too, give it up again


class World:
    """A holder that is done, and others that want its lock.

    :ivar broken: what did not hold.
    """

    def __init__(self, path: Path, size: str) -> None:
        self.path, self.broken = path, list[str]()
        self._size = size
        first = Lock(str(path))
        first.acquire()
        self._working = {"the holder": first}
        self.parties = [Party("the holder", lambda: self._give_up(first))]
        self.parties += [Party(f"other {number}", self._try) for number in range(OTHERS)]

    def _give_up(self, first: Lock) -> None:
        _here.party.pause()  # it works
        del self._working["the holder"]
        first.release()

    def _try(self) -> None:
        me, mine = threading.current_thread().name, Lock(str(self.path))
        try:
            mine.acquire()
        except AlreadyRunning:
            return
        if self._working:
            self.broken.append(f"{me} begins beside {', '.join(self._working)}")
        self._working[me] = mine
        if self._size == LARGE:
            _here.party.pause()  # it works
            del self._working[me]
            mine.release()

    def check(self) -> None:
        """When all have ended."""
        for mine in self._working.values():
            mine.release()
        self.broken += [f"{party.name}: {party.error!r}" for party in self.parties if party.error]
        if self.path.exists():
            self.broken.append("the lock's file is left")
        last = Lock(str(self.path))
        try:
            last.acquire()
        except AlreadyRunning as error:
            self.broken.append(f"nobody holds it, and yet: {error}")
        last.release()


def order(given: Sequence[int], size: str = SMALL) -> tuple[Choices, list[str]]:
    """One order: its choices, and what did not hold in it."""
    choices, turns = Choices(given), 0
    with quick_folder() as folder, mock.patch.multiple(lock, os=InTurns(os), fcntl=InTurns(lock.__dict__["fcntl"])):
        world = World(folder / "lock", size)
        while waiting := {party.name: party for party in world.parties if not party.ended}:
            waiting[choices.of(list(waiting))].go_on()
            turns += 1
            assert turns < LONGEST, "it never ends"
        world.check()
    return choices, world.broken


class Piece(NamedTuple):
    """All orders that begin with these choices; with a defect until the first violation."""

    size: str
    first: tuple[int, ...] = ()
    mutant: str | None = None


def pieces(size: str) -> list[Piece]:
    """All orders."""
    parties = range(OTHERS + 1)
    return [Piece(size, (one, two)) for one in parties for two in parties]


def explore(piece: Piece) -> tuple[int, list[str]]:
    """How many orders there are in a piece, and the violations."""
    count, broken = 0, list[str]()
    given: list[int] | None = list(piece.first)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})  # turns are much quicker taken on one core
    with MUTANTS[piece.mutant].patch() if piece.mutant else contextlib.nullcontext():
        while given is not None and not (piece.mutant and broken):
            choices, found = order(given, piece.size)
            made = ".".join(map(str, choices.made))
            broken += [f"python -m tests.proof.lock_orders {piece.size} {made}: {line}" for line in found]
            count += 1
            given = choices.following(len(piece.first))
    return count, broken


if __name__ == "__main__":
    made = [int(choice) for choice in sys.argv[2].split(".")]
    print("\n".join(order(made, sys.argv[1])[1]) or "every invariant holds")
