"""An ASGI application behind a real uvicorn on loopback, within the test's own loop, and raw bytes sent to it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import uvicorn
from starlette.types import ASGIApp

from async_recovery.service.connection import BoundedConnection
from async_recovery.service.listen import Address, open_sockets

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class Connection(NamedTuple):
    """A connection to it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def to_end(self) -> bytes:
        """All that the server sends until it closes; a reset is an end, too."""
        got = bytearray()
        with contextlib.suppress(ConnectionError):
            while block := await self.reader.read(65536):
                got += block
        return bytes(got)

    async def answer(self) -> tuple[int, bytes]:
        """The status and the body of the next answer, which has to have a length."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        return statuses(head)[0], await self.reader.readexactly(int(length[1]))


class Served(NamedTuple):
    """A server that listens."""

    port: int
    server: uvicorn.Server

    @contextlib.asynccontextmanager
    async def connected(self, sent: bytes = b"") -> AsyncIterator[Connection]:
        """A connection over which that was sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(sent)
            yield Connection(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def said(self, sent: bytes, *, half_close: bool = False) -> bytes:
        """All that comes of a connection over which that was sent, and nothing after it if `half_close`."""
        async with self.connected(sent) as connection:
            if half_close:
                with contextlib.suppress(OSError):
                    connection.writer.write_eof()
            return await connection.to_end()


@contextlib.asynccontextmanager
async def served(app: ASGIApp, http: type[Any] = BoundedConnection, **options: Any) -> AsyncIterator[Served]:
    """Serve it, as the service does."""
    (listener,) = open_sockets(Address("127.0.0.1", 0, ("127.0.0.1",)))
    chosen = {"log_config": None, "access_log": False, "proxy_headers": False, "server_header": False, "ws": "none"}
    config = uvicorn.Config(app, http=http, timeout_graceful_shutdown=1, **{**chosen, **options})
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield Served(listener.getsockname()[1], server)
    finally:
        server.should_exit = True
        await task


def statuses(said: bytes) -> list[int]:
    """Of all answers in what was said."""
    return [int(status) for status in _STATUS.findall(said)]
