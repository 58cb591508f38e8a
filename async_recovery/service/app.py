"""The service as an ASGI application: by itself, or mounted in another one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from ..errors import AsyncRecoveryError
from ..workers import Worker
from .api import Api, Board, Bounds
from .folder import Folder
from .guard import Guard
from .manager import Limits, Manager
from .metrics import Metrics
from .problems import HANDLERS


class Service:
    """Jobs over HTTP; see `create_service`. Jobs run between its start and its end: as an async context, or with the
    lifespan of the server if the service is the whole application.

    :ivar manager: the jobs, while it has started.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        workers: Mapping[str, Worker],
        *,
        token: str | None,
        hosts: Iterable[str] | None,
        limits: Limits,
        bounds: Bounds,
    ) -> None:
        self._folder, self._workers, self._limits = Folder(data), workers, limits
        self._new_manager()  # so that a mistake is told at once
        self.manager: Manager | None = None
        self._metrics = Metrics(
            lambda: self.manager.jobs if self.manager else {},
            lambda job_id: self.manager.sample(job_id) if self.manager else None,
        )
        api = Api(self._get_board, self._metrics.text, bounds)
        self._app = guarded(api, read_only=False, token=token, hosts=hosts, bounds=bounds)

    def _new_manager(self) -> Manager:
        return Manager(self._folder, self._workers, self._limits)

    def _get_board(self) -> Board | None:
        return self.manager if self.manager is not None and self.manager.is_open else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._app(scope, receive, send)

    async def __aenter__(self) -> Service:
        """Take the folder, and carry on with every job that has not ended.

        :raises UsageError: if the folder can not be used.
        :raises AlreadyRunning: if another service has it.
        :raises StorageFailed, CheckpointUnusable: if its database can not be read.
        """
        manager = self._new_manager()
        manager.on_commit = self._metrics.committed
        self.manager = await manager.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        """Let every job drain and commit; the next start carries on."""
        manager, self.manager = self.manager, None
        if manager is not None:
            await manager.__aexit__(*error)

    @property
    def workers(self) -> list[str]:
        """The names that jobs may give for their worker."""
        return sorted(self._workers)

    def drain(self) -> None:
        """Let every job drain and commit, and begin none: the end of the context then waits for less."""
        if self.manager is not None:
            self.manager.drain()

    def hurry(self) -> None:
        """As `drain`, but what is in flight is cancelled."""
        if self.manager is not None:
            self.manager.hurry()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.__aenter__()
        except AsyncRecoveryError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        try:
            await receive()
        finally:
            await self.__aexit__()
        await send({"type": "lifespan.shutdown.complete"})


def guarded(api: Api, *, read_only: bool, token: str | None, hosts: Iterable[str] | None, bounds: Bounds) -> Guard:
    """The routes behind the guard."""

    def limit(scope: Scope) -> int:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return bounds.upload_bytes if path == "/uploads" else bounds.body_bytes

    app = Starlette(routes=api.routes(read_only=read_only), exception_handlers=dict(HANDLERS))
    app.router.redirect_slashes = False
    return Guard(app, hosts=hosts, token=token, body_limit=limit)


def create_service(
    data: str | os.PathLike[str],
    workers: Mapping[str, Worker],
    *,
    token: str | None = None,
    hosts: Iterable[str] | None = ("localhost", "127.0.0.1", "[::1]"),
    max_jobs: int = 4,
    max_queued: int = 1000,
    max_concurrency: int = 10_000,
    max_body_bytes: int = 16 << 20,
    max_upload_bytes: int = 1 << 30,
) -> Service:
    """The service, to be run by an ASGI server, or mounted in a FastAPI or Starlette application::

        service = create_service("/var/lib/jobs", {"fetch": fetch})

        @asynccontextmanager
        async def lifespan(app):
            async with service:
                yield

        app = FastAPI(lifespan=lifespan)
        app.mount("/recovery", service)

    :param data: folder of the jobs, their inputs and outputs; one service at a time has it.
    :param workers: the functions that jobs may name, by name. Only these ever run.
    :param token: what requests must carry (``Authorization: Bearer …``). Give one where others can reach the service.
    :param hosts: names by which the service may be called, so that no page of another site can (DNS rebinding). None:
        not asked; then the application around it must.
    :param max_jobs: how many jobs run at once; the others wait for their turn.
    :param max_queued: how many jobs may wait, run or be paused.
    :param max_concurrency: items at once that a job may ask for.
    :param max_body_bytes: bytes of a body in JSON; :param max_upload_bytes: of an upload.
    :raises UsageError: if a worker has no name of its own, or a bound can not be used.
    """
    return Service(
        data,
        workers,
        token=token,
        hosts=hosts,
        limits=Limits(jobs=max_jobs, queued=max_queued, concurrency=max_concurrency),
        bounds=Bounds(body_bytes=max_body_bytes, upload_bytes=max_upload_bytes),
    )
