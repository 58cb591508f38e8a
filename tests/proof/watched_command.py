"""The real command in a fork that tells a socket what it does, so that it is known outside of the disk it works on."""

from __future__ import annotations

import os
import socket
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from async_recovery import FileLedger, checkpoint
from async_recovery.files import Files
from tests.support.fork_server import become

from .disks import die_with_parent

COMPACTS_ABOVE = 1000


class Hold(NamedTuple):
    """A moment chosen on purpose: before or after a process's call of that number (from 1) of a file operation.

    Or after it has "acknowledged" so many commits. The process waits there until the power has gone; then it is killed,
    or goes on.
    """

    operation: str
    number: int
    when: str
    kills: bool = True


class Told(NamedTuple):
    """What a process says to the outside, at once: an operation has begun ("step"), a commit was acknowledged …"""

    what: str
    mark: int = 0
    ahead: list[int] = []  # noqa: RUF012  never changed


class Watched:
    """The command in the fork, telling what it does."""

    def __init__(self, link: socket.socket, hold: Hold | None, *, compacts: bool) -> None:
        self._link = link
        self._hold = hold
        self._compacts = compacts
        self._calls: Counter[str] = Counter()

    def run(self, folder: Path, words: list[str], mutant: AbstractContextManager[object]) -> NoReturn:
        """With a broken durable path, perhaps; does not return."""
        die_with_parent()
        os.environ["SLOWNESS"] = "0.1"
        if self._compacts:
            checkpoint.COMPACT_ABOVE_DEAD_BYTES = COMPACTS_ABOVE
        self._watch_ledger()
        self._watch_files()
        with mutant:
            become(str(folder), words)

    def _tell(self, told: Told) -> None:
        self._link.send(msgspec.json.encode(told))

    def _stop_at(self, operation: str, when: str) -> None:
        hold = self._hold
        if hold is not None and (hold.operation, hold.number, hold.when) == (operation, self._calls[operation], when):
            self._tell(Told("held"))
            self._link.recv(1)

    def _watch_ledger(self) -> None:
        commit, finish = FileLedger.commit, FileLedger.finish

        async def told_commit(ledger: FileLedger, given: checkpoint.Commit) -> None:
            await commit(ledger, given)
            self._tell(Told("acknowledged", given.mark, [item.index for item in given.ahead]))
            self._calls["acknowledged"] += 1
            self._stop_at("acknowledged", "after")

        async def told_finish(ledger: FileLedger, *given: Any) -> None:
            self._tell(Told("finish"))
            await finish(ledger, *given)

        FileLedger.commit = told_commit  # type: ignore[method-assign, assignment]
        FileLedger.finish = told_finish  # type: ignore[method-assign, assignment]

    def _watch_files(self) -> None:
        def watch(name: str) -> None:
            operation = getattr(Files, name)

            def step(files: Files, *given: Any) -> Any:
                self._calls[name] += 1
                self._tell(Told("step"))
                self._stop_at(name, "before")
                result = operation(files, *given)
                self._stop_at(name, "after")
                return result

            setattr(Files, name, step)

        for name in [name for name in vars(Files) if not name.startswith("_")]:
            watch(name)
