"""The server: uvicorn, with bounds of its own for connections, and without hands on the signals of the process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from .connection import BoundedConnection

KEEP_ALIVE_S = 15
LAST_ANSWERS_S = 3  # for what is being answered when the server stops
BACKLOG = 1024


class Server:
    """Serves `app` on sockets that listen already, until `stop`."""

    def __init__(self, app: ASGIApp, sockets: Sequence[socket.socket]) -> None:
        self._sockets = list(sockets)
        config = uvicorn.Config(
            app,
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
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


class _Quiet(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals belong to the command."""
        yield
