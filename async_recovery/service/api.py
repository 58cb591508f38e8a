"""The HTTP interface: one short function a route."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from importlib.resources import files
from typing import Any, Protocol

import anyio.to_thread
import msgspec
from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..errors import StorageFailed, UsageError
from .folder import Folder, OutsideOfFolder
from .jobs import Input, Job, NotNow
from .manager import KeyReused, Manager, NoSuchWorker, TooMany
from .openapi import document
from .output import NOTHING, open_output, output_response
from .problems import Problem
from .recorded import FailuresView, Groups, failures_page
from .requests import (
    MOST_AT_ONCE,
    JobRequest,
    Room,
    body_of,
    change_of,
    check_query,
    key_of,
    lines_of,
    no_body,
    number_of,
    options_of,
    read_job_request,
    state_of,
)
from .samples import Feed, Sample
from .views import view_of

MOST_LISTENERS = 600  # to all jobs together: fewer than there may be connections, so that some are left for others
BODIES_AT_ONCE = 4
MOST_UPLOADS = 1000
HEARTBEAT_S = 15
SEND_TIMEOUT_S = 30.0
ENDED_GROUPS = 50
JSON = "application/json"

Handler = Callable[[Request], Awaitable[Response]]


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type=JSON)


@contextlib.contextmanager
def refusals(folder: Folder) -> Iterator[None]:
    """What the manager refuses becomes the problem that it is over HTTP."""
    try:
        yield
    except KeyError:
        raise Problem(404, "there is no job of that id") from None
    except (NotNow, KeyReused) as error:
        raise Problem(409, str(error)) from None
    except TooMany as error:
        raise Problem(429, str(error), headers={"retry-after": "60"}) from None
    except (OutsideOfFolder, NoSuchWorker) as error:
        raise Problem(404, str(error)) from None
    except UsageError as error:
        raise Problem(422, str(error)) from None
    except (StorageFailed, OSError) as error:
        raise Problem(507, folder.told(error)) from error


class _Methods:
    """One path: the handler of each method."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._handlers = handlers
        self._allowed = ", ".join(sorted(handlers.keys() | ({"HEAD"} if "GET" in handlers else set())))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        handler = self._handlers.get(method)
        if handler is None:
            raise Problem(405, f"this path has {self._allowed}", headers={"allow": self._allowed})
        request = Request(scope, receive, send)
        response = await handler(request)
        await response(scope, receive, send)


@functools.cache
def _assets() -> dict[str, tuple[bytes, str, str]]:
    """The files of the page: their bytes, media type, and a tag that tells them from others."""
    found = {}
    for file in files(__package__).joinpath("page").iterdir():
        body, media_type = file.read_bytes(), MEDIA_TYPES[os.path.splitext(file.name)[1]]
        found[file.name] = (body, media_type, f'"{zlib.crc32(body):08x}"')
    return found


MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


class Board(Protocol):
    """What is shown: the jobs of a service, or the one run of a command."""

    @property
    def jobs(self) -> Mapping[str, Job]: ...

    def about(self) -> dict[str, Any]:
        """``workers``, ``read_only``, ``has_output``, ``max_jobs`` and ``max_concurrency``."""
        ...

    def feed(self, job_id: str) -> Feed: ...

    def sample(self, job_id: str) -> Sample | None: ...

    def output_of(self, job_id: str) -> tuple[str, int | None] | None:
        """Path of the complete output, and how much of the partial one is committed, as for `where_of`.

        None: the records go to no file.
        """
        ...


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may bring.

    :param body_bytes: of JSON. :param upload_bytes: of one upload.
    """

    body_bytes: int = 16 << 20
    upload_bytes: int = 1 << 30


class Api:
    """The routes.

    :param board: gives what is shown; None while the service has not started.
    :param metrics: gives the text for Prometheus.
    """

    def __init__(self, board: Callable[[], Board | None], metrics: Callable[[], bytes], bounds: Bounds) -> None:
        self._get_board, self._metrics, self._bounds = board, metrics, bounds
        self._groups: dict[str, Groups] = {}
        self._room = Room(BODIES_AT_ONCE * bounds.body_bytes)
        self._listeners = 0

    def routes(self, *, read_only: bool) -> list[BaseRoute]:
        """All of them; `read_only`: those that change nothing."""
        looks: list[tuple[str, str, Handler]] = [
            ("GET", "/", partial(self.asset, name="index.html")),
            ("GET", "/assets/{name}", self.asset),
            ("GET", "/service", self.service),
            ("GET", "/healthz", self.healthz),
            ("GET", "/readyz", self.readyz),
            ("GET", "/metrics", self.metrics),
            ("GET", "/openapi.json", self.openapi),
            ("GET", "/jobs", self.jobs),
            ("GET", "/jobs/{id}", self.job),
            ("GET", "/jobs/{id}/events", self.events),
            ("GET", "/jobs/{id}/output", self.output),
            ("GET", "/jobs/{id}/failures", self.failures),
        ]
        acts: list[tuple[str, str, Handler]] = [
            ("POST", "/uploads", self.upload),
            ("POST", "/jobs", self.submit),
            ("POST", "/jobs/{id}/pause", partial(self.step, step=Manager.pause)),
            ("POST", "/jobs/{id}/unpause", partial(self.step, step=Manager.unpause)),
            ("POST", "/jobs/{id}/cancel", partial(self.step, step=Manager.cancel)),
            ("POST", "/jobs/{id}/retry-failed", partial(self.step, step=Manager.retry_failed)),
            ("PATCH", "/jobs/{id}", self.change),
            ("DELETE", "/jobs/{id}", self.delete),
        ]
        by_path: dict[str, dict[str, Handler]] = {}
        for method, path, handler in looks if read_only else looks + acts:
            by_path.setdefault(path, {})[method] = handler
        return [Route(path, _Methods(methods)) for path, methods in by_path.items()]

    # What is shown

    @property
    def _board(self) -> Board:
        board = self._get_board()
        if board is None:
            raise Problem(503, "the service has not started, or is about to stop", headers={"retry-after": "1"})
        return board

    @property
    def _manager(self) -> Manager:
        board = self._board
        assert isinstance(board, Manager)  # the routes that need it are there for it alone
        return board

    def _job(self, request: Request) -> Job:
        job = self._board.jobs.get(request.path_params["id"])
        if job is None:
            raise Problem(404, "there is no job of that id")
        return job

    async def asset(self, request: Request, name: str | None = None) -> Response:
        """The page, and what belongs to it."""
        found = _assets().get(name or request.path_params["name"])
        if found is None:
            raise Problem(404, "there is no such file")
        body, media_type, tag = found
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(None, 304, headers)
        return Response(body, 200, headers, media_type=media_type)

    async def service(self, request: Request) -> Response:
        """What this service is, and allows."""
        check_query(request)
        board = self._board
        return answer({"version": __version__, **board.about(), "max_upload_bytes": self._bounds.upload_bytes})

    async def healthz(self, request: Request) -> Response:
        """The process answers."""
        return answer({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """It takes jobs."""
        return answer({"status": "ok", "jobs": len(self._board.jobs)})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        self._board  # noqa: B018  503 before the start
        return Response(self._metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """This interface, as OpenAPI tells it."""
        about = self._board.about()
        workers, concurrency = tuple(about["workers"]), about["max_concurrency"]
        return Response(document(workers, concurrency, read_only=about["read_only"]), media_type=JSON)

    async def jobs(self, request: Request) -> Response:
        """The jobs, the newest first."""
        check_query(request, "state", "limit", "after")
        state, limit = state_of(request), number_of(request, "limit", 50, MOST_AT_ONCE, least=1)
        jobs = list(self._board.jobs.values())[::-1]
        if (after := request.query_params.get("after")) is not None:
            if after not in self._board.jobs:
                raise Problem(404, "after must be what `next` of the answer before said; that job may be gone since")
            jobs = jobs[jobs.index(self._board.jobs[after]) + 1 :]
        if state is not None:
            jobs = [job for job in jobs if job.state == state]
        shown = [view_of(job, self._board.sample(job.id), events=False) for job in jobs[:limit]]
        return answer({"jobs": shown, "next": shown[-1].id if len(jobs) > limit else None})

    async def job(self, request: Request) -> Response:
        """One job."""
        check_query(request)
        job = self._job(request)
        return answer(view_of(job, self._board.sample(job.id)))

    async def events(self, request: Request) -> Response:
        """What happens to a job, as it happens."""
        check_query(request)
        feed = self._board.feed(self._job(request).id)
        if request.method == "HEAD":
            return Response(None, media_type=EventSourceResponse.media_type)
        if self._listeners >= MOST_LISTENERS:
            raise Problem(503, f"{MOST_LISTENERS} listen already, the most that may", headers={"retry-after": "10"})
        messages = feed.messages(request.headers.get("last-event-id"))
        return _Listening(self, messages, ping=HEARTBEAT_S, send_timeout=SEND_TIMEOUT_S)

    async def output(self, request: Request) -> Response:
        """The output, as far as it is committed."""
        check_query(request)
        job = self._job(request)
        where = self._board.output_of(job.id)
        if where is None:
            raise Problem(404, "the records of this run go to no file")
        opened = await anyio.to_thread.run_sync(open_output, *where)
        return await output_response(request, opened, f"{job.id}.jsonl")

    async def failures(self, request: Request) -> Response:
        """The recorded failures, as far as they are committed."""
        check_query(request, "limit", "after")
        job = self._job(request)
        limit, after = number_of(request, "limit", 100, MOST_AT_ONCE), number_of(request, "after", 0, 10**18)
        groups = self._groups.setdefault(job.id, Groups())
        if len(self._groups) > ENDED_GROUPS:
            del self._groups[next(iter(self._groups))]
        where = self._board.output_of(job.id)

        def look() -> FailuresView:
            opened = NOTHING if where is None else open_output(*where)
            try:
                return failures_page(opened, groups, after, limit)
            finally:
                opened.close()

        async with groups.busy:
            return answer(await anyio.to_thread.run_sync(look))

    # What is done

    async def upload(self, request: Request) -> Response:
        """A file of items."""
        check_query(request, "name")
        folder, name = self._manager.folder, request.query_params.get("name", "")
        with refusals(folder):
            kept = await anyio.to_thread.run_sync(folder.forget_uploads, time.time())
        if kept >= MOST_UPLOADS:
            raise Problem(429, f"{MOST_UPLOADS} uploads are kept: they go a day after", headers={"retry-after": "3600"})
        with refusals(folder):
            upload, size = await folder.receive(name, request.stream())
        return answer({"id": upload, "name": upload.split("-", 2)[-1], "bytes": size}, 201)

    async def submit(self, request: Request) -> Response:
        """A new job."""
        check_query(request)
        key = key_of(request)
        with self._room.for_one() as take:
            return await self._submit(request, key, take)

    async def _submit(self, request: Request, key: str | None, take: Callable[[int], None]) -> Response:
        wanted, body = await body_of(request, JobRequest, take)
        read_job_request(wanted)
        options = options_of(wanted)
        manager = self._manager

        def make_input(job_id: str) -> Input:
            asked = wanted.input
            if asked.items is not None:
                return manager.folder.write_items(job_id, lines_of(asked.items))
            if asked.upload is not None:
                return manager.folder.link_upload(job_id, asked.upload, asked.format)
            return manager.folder.input_at(asked.path or "", asked.format)

        with refusals(manager.folder):
            job, is_new = await manager.submit(wanted.worker, options, make_input, key=key, asked=body)
        headers = {"location": f"{request.scope.get('root_path', '')}/jobs/{job.id}"}
        return answer(view_of(job, manager.sample(job.id)), 201 if is_new else 200, headers)

    async def step(self, request: Request, step: Callable[[Manager, str], Awaitable[Job]]) -> Response:
        """Pause, unpause, cancel, retry."""
        check_query(request)
        job = self._job(request)
        await no_body(request)
        with refusals(self._manager.folder):
            changed = await step(self._manager, job.id)
        return answer(view_of(changed, self._manager.sample(job.id)))

    async def change(self, request: Request) -> Response:
        """Another concurrency, another rate."""
        check_query(request)
        job = self._job(request)
        with self._room.for_one() as take:
            changes = await change_of(request, take)
        with refusals(self._manager.folder):
            changed = await self._manager.change(job.id, **changes)
        return answer(view_of(changed, self._manager.sample(job.id)))

    async def delete(self, request: Request) -> Response:
        """Forget an ended job, with its output."""
        check_query(request)
        job = self._job(request)
        with refusals(self._manager.folder):
            await self._manager.delete(job.id)
        self._groups.pop(job.id, None)
        return Response(None, 204)


class _Listening(EventSourceResponse):
    """Events for one listener, who counts as one from the moment he is let in."""

    def __init__(self, api: Api, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._api = api
        api._listeners += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._api._listeners -= 1
