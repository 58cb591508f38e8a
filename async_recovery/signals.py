"""SIGINT and SIGTERM of a run from a terminal."""

from __future__ import annotations

import logging
import os
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from .errors import Stopped

if TYPE_CHECKING:
    import asyncio

    from .screen import Screen

logger = logging.getLogger("async_recovery")


class Stoppable(Protocol):
    """A run, or whatever ends as one does."""

    def stop(self) -> object:
        """Begin nothing more, let end what is in flight."""
        ...

    def cancel(self) -> object:
        """Cancel what is in flight."""
        ...


class Signals:
    """SIGINT and SIGTERM. Until there is a run they end the process: nothing has begun.

    After that the first one drains and commits, the second cancels what is in flight and commits, the third ends.
    A plain handler, not one of the loop's: it is there before the loop, and the third one works even when the worker
    blocks the loop. Nothing but the third one happens in the handler itself.
    """

    def __init__(self) -> None:
        self.exit_code = Stopped.exit_code
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._run: Stoppable | None = None
        self._screen: Screen | None = None
        self._bell: tuple[socket.socket, socket.socket]

    def install(self) -> None:
        """From now on they come here, whatever they meant before."""
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)
        os.register_at_fork(after_in_child=self._restore)  # a process that the worker forks is not ours to drain

    def obey(self, run: Stoppable, screen: Screen) -> None:
        """From now on they stop `run`, which is on the running loop and shown on `screen`."""
        import asyncio

        self._screen = screen
        self._run, self._loop = run, asyncio.get_running_loop()
        # Python runs a handler only between two instructions: a signal that comes just as the loop goes to sleep, or
        # to another thread, has to wake it.
        self._bell = bell, rope = socket.socketpair()
        bell.settimeout(0)
        rope.settimeout(0)
        # A step of Python's, in which a handler runs: uvloop has none.
        self._loop.add_reader(bell, lambda: bell.recv(4096))
        signal.set_wakeup_fd(rope.fileno(), warn_on_full_buffer=False)

    def ignore(self) -> None:
        """The end is decided."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _restore(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        self._count += 1
        if self._loop is None or self._count > 2:
            if self._screen is not None:
                self._screen.wipe()
            os._exit(self.exit_code)
        self._loop.call_soon_threadsafe(self._stop if self._count == 1 else self._cancel)

    def _stop(self) -> None:
        assert self._run is not None
        logger.info("stopping: waiting for the items in flight; again to cancel them")
        self._run.stop()

    def _cancel(self) -> None:
        assert self._run is not None
        logger.info("cancelling the items in flight; again to leave at once")
        self._run.cancel()
