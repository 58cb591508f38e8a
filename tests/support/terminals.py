"""A terminal: a process on one side of it, and on the other what a person would see, drawn by pyte."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pyte

from tests.support.commands import DEADLINE_S, Folder

SEEN_S = 0.02


class Terminal:
    """A terminal of so many columns and rows, on which one command of a folder runs.

    :ivar raw: every byte that was sent to it.
    """

    def __init__(self, folder: Folder, *words: str, columns: int = 80, rows: int = 24, **options: Any) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        self.raw = b""
        self._set_size(columns, rows)
        env = {"TERM": "xterm-256color", "COLUMNS": "", "LINES": "", "NO_COLOR": "", **options.pop("env", {})}
        streams = {"stdin": slave, "stdout": slave, "stderr": slave, **options}
        self.process = folder.start(*words, env=env, preexec_fn=_become_the_terminals, **streams)
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.hang_up()

    @property
    def shown(self) -> str:
        """What is on the screen now, lines without the blanks at their ends."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    @property
    def column(self) -> int:
        """Where the cursor is, from 0 on."""
        return self._screen.cursor.x

    def wait_until(self, seen: Callable[[str], object], within_s: float = DEADLINE_S) -> str:
        """Wait until the screen is such that `seen` is true of it; the end of the process is no obstacle."""
        deadline = time.monotonic() + within_s
        while not seen(self.shown):
            if not self._read() and self.process.poll() is not None and not self._read():
                raise AssertionError(f"the process ended before that was seen:\n{self.shown}")
            if time.monotonic() > deadline:
                raise AssertionError(f"that was not seen within {within_s} s:\n{self.shown}")
        return self.shown

    def press(self, keys: str) -> None:
        """As if a person pressed them; ``"\\x03"`` is Ctrl-C."""
        os.write(self._master, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        """The window gets another size, and the process is told so by the terminal."""
        self._screen.resize(rows, columns)
        self._set_size(columns, rows)

    def hang_up(self) -> None:
        """The window is closed."""
        if self._master >= 0:
            os.close(self._master)
        self._master = -1

    def end(self) -> int:
        """Wait for the end of the process, and for all that it has written."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            self._read()
            if time.monotonic() > deadline:
                raise AssertionError(f"it did not end within {DEADLINE_S} s:\n{self.shown}")
        while self._read():
            pass
        return self.process.returncode

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> bool:
        """Draw what has come; whether anything has."""
        if not select.select([self._master], [], [], SEEN_S)[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other side is closed
            time.sleep(SEEN_S)  # and its end is a matter of a moment
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)


def _become_the_terminals() -> None:
    """In the child: a session of its own, with the terminal at its standard input or error in control of it."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    fcntl.ioctl(2 if os.isatty(2) else 0, termios.TIOCSCTTY, 0)
