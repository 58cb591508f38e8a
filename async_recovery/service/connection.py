"""What a connection may take: bounds that uvicorn does not have, as the class that its option ``http`` takes.

uvicorn waits for ever for the first byte of a connection, and for the end of a request's head: a client that opens many
and dawdles (Slowloris) holds them all. It takes any number of connections, reads on for ever what is left of a body
that nobody wants, and waits for ever for a client that takes nothing more of an answer.

A body that turns out to be broken when the application was called already makes uvicorn answer twice: a traceback.

The size of a head that comes in pieces it does bound (16 KiB, by h11). One that comes at once has at most the 256 KiB
that asyncio reads at a time, and the guard refuses it.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from .guard import NO_STORE, SECURITY_HEADERS
from .problems import Problem

_FULL = Problem(503, "the service has as many connections as it bears; try again", headers={"Retry-After": "1"})
_BROKEN = Problem(400, "the request is no HTTP; send a sound one")


def _whole(problem: Problem) -> bytes:
    """The answer as it goes over the wire, for a connection that is closed after it."""
    answer = problem.response()
    headers = [*answer.raw_headers, *SECURITY_HEADERS, NO_STORE, (b"connection", b"close")]
    lines = [b"HTTP/1.1 %d %s" % (problem.status, problem.title.encode()), *(b"%s: %s" % pair for pair in headers)]
    return b"\r\n".join([*lines, b"", bytes(answer.body)])


class BoundedConnection(H11Protocol):
    """A connection of uvicorn with h11 that can not be held open by doing nothing.

    :cvar head_s: how long a client may take to send the head of a request, from the opening of the connection or its
        first byte on; and what is left of a body after the answer. Between requests uvicorn's ``timeout_keep_alive``
        counts.
    :cvar stalled_s: how long a client may take nothing of an answer that waits to be taken.
    :cvar most_connections: those beyond are answered with 503 and closed.
    """

    head_s: ClassVar[float] = 15.0
    stalled_s: ClassVar[float] = 120.0
    most_connections: ClassVar[int] = 900

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.write(_whole(_FULL))
            transport.close()
        else:
            self._head_timer = self.loop.call_later(self.head_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:  # a request is being answered
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """One answer at most: whoever was called by then finds the connection closed, and what has begun breaks off."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_whole(_BROKEN))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
