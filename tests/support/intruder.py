"""What an attacker of the service sends that no client library would, and what is seen of the process that bears it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from .service_process import Served

HOST = b"Host: 127.0.0.1\r\n"
LAST = b"Connection: close\r\n"
OPENED = 0x20 | 0x1 | 0x100 | 0x40 | 0x200  # of inotify: open, access, create, moved, delete
RESET = struct.pack("ii", 1, 0)


def said(served: Served, sent: bytes, within_s: float = 20.0) -> bytes:
    """All that comes back over a connection over which that was sent."""
    got = bytearray()
    with connected(served, sent, within_s) as connection, contextlib.suppress(ConnectionError):
        while block := connection.recv(65536):
            got += block
    return bytes(got)


@contextlib.contextmanager
def connected(served: Served, sent: bytes = b"", within_s: float = 20.0) -> Iterator[socket.socket]:
    """A connection over which that was sent, as far as the service took it."""
    with socket.create_connection(("127.0.0.1", served.port), within_s) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        yield connection


def break_off(connection: socket.socket) -> None:
    """Go without a word: the other side finds the connection reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def status_of(answer: bytes) -> int:
    """The status of the first answer; 0 if there is none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def memory_of(served: Served, name: str = "VmRSS") -> int:
    """Bytes of memory that the process has, or had at most ("VmHWM")."""
    lines = Path(f"/proc/{served.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def threads_of(served: Served) -> int:
    """How many threads the process has."""
    return len(os.listdir(f"/proc/{served.process.pid}/task"))  # noqa: PTH208


def descriptors_of(served: Served) -> int:
    """How many descriptors the process has open."""
    return len(os.listdir(f"/proc/{served.process.pid}/fd"))  # noqa: PTH208


class Touched:
    """Tells whether anybody has opened or changed anything in a folder, by inotify of Linux."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._descriptor, os.fsencode(folder), OPENED) >= 0

    @property
    def is_touched(self) -> bool:
        """Whether somebody has, since it was asked last."""
        try:
            return bool(os.read(self._descriptor, 65536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Look no more."""
        os.close(self._descriptor)
