"""The server: uvicorn, with bounds of its own for connections, and without hands on the signals of the process."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from .connection import BoundedConnection

KEEP_ALIVE_S = 15
LAST_ANSWERS_S = 3  # for what is being answered when the server stops
BACKLOG = 1024
ENOUGH_DESCRIPTORS = 1 << 16


class Server:
    """Serves `app` on sockets that listen already, until `stop`."""

    def __init__(self, app: ASGIApp, sockets: Sequence[socket.socket]) -> None:
        self._sockets = list(sockets)
        descriptors = _raised_descriptors()
        # asyncio accepts up to the backlog at each turn, some turns before the first is refused; jobs have files, too.
        most, backlog = min(BoundedConnection.most_connections, descriptors // 3), min(BACKLOG, descriptors // 8)
        config = uvicorn.Config(
            app,
            http=type("Connection", (BoundedConnection,), {"most_connections": most}),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=backlog,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_ANSWERS_S,
        )
        self._server = _Quiet(config)
        self._stop: Callable[[], object] = lambda: None
        self._cancel: Callable[[], object] = lambda: None

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    async def serve(self, *, stop: Callable[[], object], cancel: Callable[[], object]) -> None:
        """Serve until `Server.stop`, which calls `stop` as well; `Server.cancel` calls `cancel`."""
        self._stop, self._cancel = stop, cancel
        await self._server.serve(self._sockets)

    def stop(self) -> None:
        """No new connection; what is being answered is."""
        self._stop()
        self._server.should_exit = True

    def cancel(self) -> None:
        """As `stop`, in a hurry."""
        self._cancel()
        self._server.should_exit = self._server.force_exit = True


def _raised_descriptors() -> int:
    """How many descriptors the process may have, as many as it may allow itself: those of 900 connections, and jobs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
        return enough
    return ENOUGH_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


class _Quiet(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals belong to the command."""
        yield
