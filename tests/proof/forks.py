"""Runs of the command line in forks of this process, each of which waits at points of the test's choice.

A fork says where it is over a pipe, and waits at a point until its gate is open: nobody sleeps, and no moment is met by
luck. It dies with the process that it came from.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio._backends._asyncio  # noqa: F401  so that no fork has to

from tests.support.commands import DEADLINE_S, POLL_S, Ended
from tests.support.fork_server import TemporaryStreams, become, import_package

import_package()
GATES = ("seam", "item", "handler")
_PR_SET_PDEATHSIG = 1


class Gate:
    """Shut until it is opened, once and for all; whoever waits at it goes on then. Forks share it."""

    def __init__(self) -> None:
        self.exit, self.entrance = os.pipe()

    def open(self) -> None:
        os.write(self.entrance, b".")

    def wait(self) -> None:
        """Wait in this thread.

        Again and again: Python handles a signal that comes just before a system call only when the call ends.
        """
        while not select.select([self.exit], [], [], POLL_S)[0]:
            pass

    def close(self) -> None:
        os.close(self.exit)
        os.close(self.entrance)


class Inside:
    """What a fork has of the process that it came from.

    :ivar gates: by the word that is said at them.
    """

    def __init__(self, gates: dict[str, Gate], reports: int) -> None:
        self.gates = gates
        self._reports = reports
        self._opened: dict[str, asyncio.Event] = {}

    def report(self, word: str) -> None:
        """Say something."""
        os.write(self._reports, word.encode() + b"\n")

    def hold(self, word: str) -> None:
        """Say it, and wait in this thread for its gate. Signals are handled meanwhile if it is the main thread."""
        self.report(word)
        self.gates[word].wait()

    async def hold_loosely(self, word: str, *, stubborn: bool = False) -> None:
        """Say it, and wait for its gate on the loop; `stubborn`: whoever cancels."""
        loop, gate = asyncio.get_running_loop(), self.gates[word]
        opened = self._opened.get(word)
        if opened is None:
            opened = self._opened[word] = asyncio.Event()
            loop.add_reader(gate.exit, opened.set)
        self.report(word)
        while not opened.is_set():
            try:
                await opened.wait()
            except asyncio.CancelledError:
                if not stubborn:
                    raise
        loop.remove_reader(gate.exit)


Prepare = Callable[[Inside], object]


def nothing(inside: Inside) -> None:
    """A fork that waits nowhere."""


class Fork:
    """One run of the command line.

    :param prepare: what it does before anything else: patch the points at which it is to wait.
    :param patience_s: how long it may neither end nor say what is waited for.

    :ivar heard: all that it has said so far.
    """

    def __init__(
        self, folder: Path, words: Sequence[str], prepare: Prepare = nothing, *, patience_s: float = DEADLINE_S
    ) -> None:
        self.gates = {name: Gate() for name in GATES}
        self.heard: list[str] = []
        self._ended: Ended | None = None
        self._patience_s = patience_s
        self._rest = b""
        self._reports, reports = os.pipe()
        self._streams = TemporaryStreams().__enter__()
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            self._streams.take()
            _prepared(prepare, Inside(self.gates, reports))
            become(str(folder), list(words))
        os.close(reports)
        self._process = os.pidfd_open(self.pid)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ended is None:
            self.send(signal.SIGKILL)
            self.end()
        for gate in self.gates.values():
            gate.close()
        self._streams.__exit__()
        os.close(self._reports)
        os.close(self._process)

    def send(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, number)

    def until(self, seen: Callable[[list[str]], object]) -> bool:
        """Listen until `seen` is true of what was heard; False if it has ended before.

        :raises AssertionError: if neither happens.
        """
        deadline = time.monotonic() + self._patience_s
        while not seen(self.heard):
            left_s = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._reports, self._process], [], [], left_s)
            if self._reports in ready and (data := os.read(self._reports, 1 << 16)):
                *words, self._rest = (self._rest + data).split(b"\n")
                self.heard += [word.decode() for word in words]
            elif self._process in ready:
                return False
            elif not ready:
                raise AssertionError(f"it neither ended nor went on within {self._patience_s} s; it said {self.heard}")
        return True

    def hears(self, word: str, times: int = 1) -> bool:
        """Listen until it has said `word` so often; False if it has ended before."""
        return self.until(lambda heard: heard.count(word) >= times)

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends in that time."""
        return bool(select.select([self._process], [], [], seconds)[0])

    def end(self) -> Ended:
        """Wait for its end, and listen to the last."""
        if self._ended is None:
            self.until(lambda _: False)
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self._ended = Ended(code, *self._streams.texts()[:2])
        return self._ended


def _prepared(prepare: Prepare, inside: Inside) -> None:
    try:
        prepare(inside)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(71)


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """An empty folder, in memory where there is such a file system: thousands of fsyncs are then free."""
    shared = "/dev/shm"
    with TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as path:
        yield Path(path)
