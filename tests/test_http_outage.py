"""A real HTTP service with troubles, and a worker as a user would write it: nothing is lost, no pause is disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest

from async_recovery import Retry, RunSummary, SlowDown, run_resumable
from async_recovery.admission import Admission
from async_recovery.policies import Breaker
from tests.support.commands import DEADLINE_S
from tests.support.fork_server import PROJECT
from tests.support.http_service import ATTEMPT, DROPPED, STALLED, Plan, Request, answer_to

CONCURRENCY = 200
RETRY = Retry(attempts=5, initial=0.1, maximum=0.5)
FEW = Plan(pauses={600: 0.4, 1800: 1}, outage=(1200, 2.0), drop_every=50, stall_every=400)
FEW_ITEMS = 2400
MANY = Plan(
    pauses={number: 0.5 + number % 3 / 4 for number in range(1500, 20_000, 2500)},
    outage=(8000, 2.0),
    drop_every=50,
    stall_every=400,
)
MANY_ITEMS = 20_000


class Event(NamedTuple):
    """What happened at the client, in order.

    :ivar kind: a request "begins" or "ends", a "pause" is asked for, an outage is "seen" or "over".
    :ivar until: the end of that pause.
    """

    kind: str
    moment: float
    item: int = -1
    attempt: int = 0
    until: float = 0.0


class Client(logging.Handler):
    """The worker, and the notes that it and the log of the package make."""

    def __init__(self, url: str) -> None:
        super().__init__(logging.WARNING)
        self.events: list[Event] = []
        self._url = url
        self._attempts: Counter[int] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        for kind, words in (("seen", "failed attempts in a row"), ("over", "the outage is over")):
            if words in record.getMessage():
                self.events.append(Event(kind, time.monotonic()))

    async def run(self, items: int, output: Path, timeout: float, retry: Retry) -> RunSummary:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self._url, connector=connector) as self._session:
            return await run_resumable(
                self.fetch,
                range(items),
                output=output,
                concurrency=CONCURRENCY,
                retry=retry,
                timeout=timeout,
                on_error="record",
            )

    async def fetch(self, item: int) -> dict[str, str]:
        self._attempts[item] += 1
        attempt = self._attempts[item]
        self.events.append(Event("begins", time.monotonic(), item, attempt))
        try:
            return await self._ask(item, attempt)
        finally:
            self.events.append(Event("ends", time.monotonic(), item, attempt))

    async def _ask(self, item: int, attempt: int) -> dict[str, str]:
        # Not GET: aiohttp itself sends one again whose connection was closed.
        async with self._session.post(f"/{item}", headers={ATTEMPT: str(attempt)}) as response:
            if response.status != 429:
                response.raise_for_status()
                found: dict[str, str] = await response.json()
                return found
            retry_after = float(response.headers["Retry-After"])
        now = time.monotonic()
        self.events.append(Event("pause", now, item, attempt, now + retry_after))
        raise SlowDown(retry_after)


class Served:
    """A service that runs.

    :ivar url: where.
    :ivar log: what it remembers, once the `with` has ended.
    """

    log: list[Request]

    def __init__(self, url: str) -> None:
        self.url = url


@contextlib.contextmanager
def served(plan: Plan) -> Iterator[Served]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.http_service", msgspec.json.encode(plan).decode()],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        service = Served(f"http://127.0.0.1:{int(process.stdout.readline())}")
        yield service
        service.log = msgspec.json.decode(process.communicate(timeout=DEADLINE_S)[0], type=list[Request])
    finally:
        process.kill()
        process.communicate()


def check_requests(plan: Plan, items: int, timeout: float, folder: Path, retry: Retry = RETRY) -> None:
    """Run them all against a service with that plan, and check what client and service have seen."""
    output, package = folder / "answers.jsonl", logging.getLogger("async_recovery")
    with served(plan) as service:
        client = Client(service.url)
        package.addHandler(client)
        try:
            summary = asyncio.run(client.run(items, output, timeout, retry))
        finally:
            package.removeHandler(client)
    pauses, probes = check_pauses(client.events), check_outage(client.events)
    assert summary.failed == 0, f"{summary.failed} items have failed for good"
    lines = [msgspec.json.decode(line) for line in output.read_bytes().splitlines()]
    assert lines == [{"index": index, "answer": answer_to(index)} for index in range(items)]
    begun = {(event.item, event.attempt): event.moment for event in client.events if event.kind == "begins"}
    assert (summary.processed, summary.executed) == (items, len(begun))
    on_their_way = check_arrivals(service.log, begun, pauses)
    seen = Counter(request.status for request in service.log)
    print(
        f"{items} items, {len(begun)} attempts in {summary.elapsed_s} s, {dict(seen)} (0: lost connection, 1: stall), "
        f"{len(pauses)} pauses, {on_their_way} requests on their way when one began; {probes} probes in the outage"
    )
    assert len(pauses) >= len(plan.pauses)
    assert all(seen[status] for status in (200, 429, 503, DROPPED, STALLED))
    assert probes


def check_pauses(events: list[Event]) -> list[tuple[float, float]]:
    """No request begins while a pause lasts that the service has asked for; returns when they were."""
    pauses: list[tuple[float, float]] = []
    for event in events:
        began, until = pauses[-1] if pauses else (0.0, 0.0)
        if event.kind == "begins":
            assert event.moment >= until, f"{event} is in a pause that lasts until {until}"
        elif event.kind == "pause" and event.moment < until:
            pauses[-1] = began, max(until, event.until)
        elif event.kind == "pause":
            pauses.append((event.moment, event.until))
    return pauses


def check_arrivals(log: list[Request], begun: dict[tuple[int, int], float], pauses: list[tuple[float, float]]) -> int:
    """What arrives in a pause had begun before it; returns how many did. Each request comes once."""
    requests = {(request.item, request.attempt): request.moment for request in log}
    assert len(requests) == len(log)
    assert set(requests) <= set(begun)
    in_pauses = [(key, began) for key, at in requests.items() for began, until in pauses if began <= at < until]
    assert not [key for key, began in in_pauses if begun[key] >= began]
    return len(in_pauses)


def check_outage(events: list[Event]) -> int:
    """From the moment an outage is seen until it is over, requests begin one after the other, and not of one item."""
    probes: list[tuple[int, int]] = []
    under_way: set[tuple[int, int]] = set()
    is_down = False
    for event in events:
        key = event.item, event.attempt
        if event.kind in ("seen", "over"):
            is_down = event.kind == "seen"
            under_way.clear()
        elif event.kind == "begins" and is_down:
            assert not under_way, f"{event} in the outage, while {under_way} is under way"
            under_way.add(key)
            probes.append(key)
        elif event.kind == "ends":
            under_way.discard(key)
    assert not is_down
    assert all(attempt == 1 or (item, attempt - 1) not in probes for item, attempt in probes)
    return len(probes)


def test_an_outage_and_pauses_lose_no_request(tmp_path: Path) -> None:
    """Through 429, 503, lost connections and stalls, each item gets its answer, and no request begins in a pause."""
    check_requests(FEW, FEW_ITEMS, 1.5, tmp_path)


@pytest.mark.slow
def test_an_outage_and_pauses_lose_none_of_20_000_requests(tmp_path: Path) -> None:
    """The same for 20,000 requests."""
    check_requests(MANY, MANY_ITEMS, 2.0, tmp_path)


# Controls

PAUSE = Plan(pauses={200: 0.3}, outage=(10_000, 0.0), drop_every=50, stall_every=10_000)
OUTAGE = Plan(pauses={}, outage=(200, 1.0), drop_every=50, stall_every=10_000)
ENDLESS = Plan(pauses={}, outage=(200, 3600.0), drop_every=50, stall_every=10_000)


def test_pauses_of_one_item_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that holds only the item that asked for it is seen at the client."""

    def waits(self: Admission, index: int, item: Any, error: SlowDown) -> None:
        self._try_again(self._loop.time() + error.seconds, index, item, error)

    monkeypatch.setattr(Admission, "slow_down", waits)
    with pytest.raises(AssertionError, match="is in a pause"):
        check_requests(PAUSE, 400, 5.0, tmp_path)


def test_an_outage_without_a_breaker_is_caught(tmp_path: Path) -> None:
    """Without it the outage turns into failed items."""
    with pytest.raises(AssertionError, match="items have failed for good"):
        check_requests(ENDLESS, 400, 5.0, tmp_path, Retry(attempts=5, initial=0.01, breaker=None))


def test_probes_at_full_concurrency_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A breaker that opens, and holds nobody back, is seen at the client."""
    monkeypatch.setattr(Breaker, "probes_at", lambda self: 0.0)
    with pytest.raises(AssertionError, match="in the outage, while"):
        check_requests(OUTAGE, 800, 5.0, tmp_path)
