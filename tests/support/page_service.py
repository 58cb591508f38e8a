"""The page with a service behind it that does what a test says: one job, whose events the test sends itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

import async_recovery

PAGE = Path(async_recovery.__file__).parent / "service" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Event = tuple[str, dict[str, Any]] | str | Exception | None


def sample(time: float, **other: Any) -> dict[str, Any]:
    """A moment of a job that finishes ten items a second and began at 0."""
    done = int(time * 10)
    zeros = dict.fromkeys(("failed", "resumed_from", "ahead", "waiting", "retries", "held_s"), 0)
    places = dict.fromkeys(("finished", "executed", "mark", "durable_mark"), done)
    unknown = dict.fromkeys(("remaining_s", "since_commit_s", "commit_s", "latency", "paused", "rate"))
    more = {
        "time": time,
        "elapsed_s": time,
        "frontier": done + 4,
        "in_flight": 4,
        "commits": int(time),
        "held_by": done,
    }
    last = {"held_attempt": 1, "share": 0.5, "items_per_s": 10.0, "window": 1000, "concurrency": 4, "errors": []}
    return zeros | places | unknown | more | last | other


def job(**other: Any) -> dict[str, Any]:
    """The job, as the service would tell of it."""
    options = {"concurrency": 4, "rate": None, "on_error": "record"}
    about: dict[str, Any] = {
        "id": "one",
        "worker": "fetch",
        "state": "running",
        "reason": None,
        "retrying": False,
        "events": [],
    }
    times = {"created": 0.0, "started": 0.0, "ended": None, "sample": None, "summary": None}
    return about | times | {"input": {"kind": "items", "name": "items", "bytes": 9}, "options": options} | other


class PageService:
    """The service.

    :ivar boot: names its life; put another one there for a restart.
    :ivar events: what a stream sends; a text as it is, an exception breaks the connection, None waits for the page to
        close it.
    :ivar asked: `Last-Event-ID` of each stream that was asked for.
    :ivar failures: the groups of what failed; None where there is no output.
    :ivar is_read: the groups tell of all that is committed.
    :ivar most_open: streams that were open at one time.
    :ivar away: nothing is answered but by breaking the connection.
    :ivar token: what each request must bear, if anything.
    :ivar offers: what `GET /service` says beside, or instead of, the usual.
    :ivar posted: paths that were posted to.
    """

    def __init__(self) -> None:
        self.boot = "a"
        self.job = job()
        self.events: list[Event] = []
        self.asked: list[str | None] = []
        self.failures: list[dict[str, Any]] | None = []
        self.is_read = True
        self.open = self.most_open = 0
        self.away = False
        self.token: str | None = None
        self.offers: dict[str, Any] = {}
        self.posted: list[str] = []
        self.url = ""
        self._number = 0
        self._changed = asyncio.Event()

    def send(self, *events: Event) -> None:
        """One more event of the stream, to who listens and to who will."""
        self.events += events
        self._changed.set()

    def restart(self, *events: tuple[str, dict[str, Any]]) -> None:
        """Go away: streams break. Put `away` back to False to be there again, with only these events."""
        self.away, self.boot, self._number = True, self.boot + "x", 0
        self.events = list(events)
        self._changed.set()

    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """What is in front of all: the outage, the token, and the policy of the page's content."""
        if self.away:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        open_to_all = request.path == "/" or request.path.startswith("/assets/")
        if self.token and not open_to_all and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"title": "Unauthorized", "detail": "a token is needed"}, status=401)
        response: web.StreamResponse = await handler(request)
        if not response.prepared:
            response.headers["Content-Security-Policy"] = POLICY
        return response

    async def asset(self, request: web.Request) -> web.StreamResponse:
        """A file of the page."""
        return web.FileResponse(PAGE / request.match_info.get("name", "index.html"))

    async def service(self, request: web.Request) -> web.StreamResponse:
        """What it offers."""
        limits = {"max_jobs": 1, "max_concurrency": 99, "max_upload_bytes": 10_000}
        return web.json_response({"version": "1", "workers": ["fetch"], "read_only": False, **limits} | self.offers)

    async def jobs(self, request: web.Request) -> web.StreamResponse:
        """The list, of one."""
        return web.json_response({"jobs": [self.job], "next": None})

    async def failed(self, request: web.Request) -> web.StreamResponse:
        """The groups that the test has given; none, and a refusal, where there is no output."""
        if self.failures is None:
            return web.json_response({"title": "Not Found", "detail": "there is no output"}, status=404)
        read = {"counted_bytes": 9 if self.is_read else 4, "committed_bytes": 9}
        return web.json_response({"groups": self.failures, "failures": [], "next": None} | read)

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Anything that is done to the job changes nothing."""
        self.posted.append(request.path)
        return web.json_response(self.job)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The events that the test gives."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        self.asked.append(request.headers.get("Last-Event-ID"))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        assert request.transport is not None
        try:
            await response.prepare(request)
            while not self.away:
                self._changed.clear()
                while self.events:
                    event = self.events.pop(0)
                    if isinstance(event, Exception):
                        raise event
                    if event is None:
                        await asyncio.Event().wait()  # until this handler is cancelled
                        continue
                    await response.write(self._said(event))
                await self._changed.wait()
        except ConnectionError:
            pass
        finally:
            self.open -= 1
        request.transport.abort()
        return response

    def _said(self, event: tuple[str, dict[str, Any]] | str) -> bytes:
        if isinstance(event, str):
            return event.encode()
        self._number += 1
        return f"id: {self.boot}-{self._number}\nevent: {event[0]}\ndata: {json.dumps(event[1])}\n\n".encode()


@asynccontextmanager
async def page_service() -> AsyncIterator[PageService]:
    """The service on a port of its own, in this loop."""
    service = PageService()

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        return await service.guard(request, handler)

    app = web.Application(middlewares=[guard])
    app.router.add_get("/", service.asset)
    app.router.add_get("/assets/{name}", service.asset)
    app.router.add_get("/service", service.service)
    app.router.add_get("/jobs", service.jobs)
    app.router.add_get("/jobs/one/failures", service.failed)
    app.router.add_get("/jobs/one/events", service.stream)
    app.router.add_post("/jobs/one/{what}", service.post)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        service.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        yield service
    finally:
        await runner.cleanup()
