"""An HTTP service that has its troubles, in a process of its own: pauses, an outage, lost connections, stalls.

As a script it serves on a free port of loopback, which it says in the first line of its standard output. When its
standard input ends, it writes the log of all requests, as JSON, and ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from hashlib import sha256

import msgspec
from aiohttp import web

ATTEMPT = "X-Attempt"
LATENCY_S, STALL_S = 0.004, 60.0
DROPPED, STALLED = 0, 1


class Plan(msgspec.Struct):
    """Which troubles, by the number of the request. Those that an outage or a pause turns away have none.

    :ivar pauses: at which request it asks for a pause of all, and of how many seconds.
    :ivar outage: at which request an outage begins, and how many seconds it lasts.
    :ivar drop_every: one in so many connections is closed without an answer, if the item comes for the first time.
    :ivar stall_every: one in so many such requests gets no answer.
    """

    pauses: dict[int, float]
    outage: tuple[int, float]
    drop_every: int
    stall_every: int


class Request(msgspec.Struct):
    """What the service remembers of one request.

    :ivar moment: its arrival, on the monotonic clock, which is the same one in all processes.
    :ivar status: of its answer; or `DROPPED`, `STALLED`.
    """

    moment: float
    item: int
    attempt: int
    status: int


def answer_to(item: int) -> str:
    """What a client can not know without asking."""
    return sha256(b"%d" % item).hexdigest()


class Service:
    """The service."""

    def __init__(self, plan: Plan) -> None:
        self.log: list[Request] = []
        self._plan = plan
        self._seen: Counter[int] = Counter()
        self._busy_until = self._down_until = 0.0
        self._number = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        now, item = time.monotonic(), int(request.match_info["item"])
        entry = Request(now, item, int(request.headers[ATTEMPT]), self._status(item, now))
        self.log.append(entry)
        if entry.status == 429:
            return web.Response(status=429, headers={"Retry-After": f"{self._busy_until - now:.3f}"})
        if entry.status == 503:
            return web.Response(status=503)
        if entry.status == DROPPED:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        await asyncio.sleep(STALL_S if entry.status == STALLED else LATENCY_S)
        return web.json_response({"answer": answer_to(item)})

    def _status(self, item: int, now: float) -> int:
        """What comes of a request; a pause and an outage begin with the one that meets them."""
        if now < self._down_until:
            return 503
        if now < self._busy_until:
            return 429
        plan, number = self._plan, self._number
        self._number += 1
        self._seen[item] += 1
        if number == plan.outage[0]:
            self._down_until = now + plan.outage[1]
            return 503
        if number in plan.pauses:
            self._busy_until = now + plan.pauses[number]
            return 429
        if self._seen[item] == 1 and number % plan.stall_every == plan.stall_every - 1:
            return STALLED
        return DROPPED if self._seen[item] == 1 and number % plan.drop_every == 0 else 200


async def serve(plan: Plan) -> None:
    """Until standard input ends."""
    service, app = Service(plan), web.Application()
    app.router.add_post("/{item}", service.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(msgspec.json.encode(service.log).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(msgspec.json.decode(sys.argv[1], type=Plan)))
