"""What is seen of a job: its feed, its attempts, its recorded failures, its output, metrics, and their description."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import jsonschema_rs
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.types import Message

from async_recovery import SlowDown
from async_recovery.progress import NOT_BEGUN
from async_recovery.records import encode_failure, encode_record
from async_recovery.service import output as output_module
from async_recovery.service import recorded
from async_recovery.service.attempts import MOST_GROUPS, Attempts, watched
from async_recovery.service.jobs import Input, Job, JobOptions, RecordOptions, RetryOptions
from async_recovery.service.metrics import Metrics
from async_recovery.service.openapi import document
from async_recovery.service.output import Opened, open_output, output_response
from async_recovery.service.problems import Problem
from async_recovery.service.recorded import FailuresView, Groups, failures_page
from async_recovery.service.runner import Watch
from async_recovery.service.samples import MOST_SAMPLES, Feed, Sample
from async_recovery.service.views import JobView, as_json, view_of
from async_recovery.workers import Session, SessionWorker, Worker, identity, is_async

# The feed


def ids_in(message: bytes) -> list[int]:
    """The numbers of the ids in what a listener gets."""
    return [int(line.rpartition(b"-")[2]) for line in message.splitlines() if line.startswith(b"id: ")]


async def all_of(feed: Feed, last_id: str | None) -> list[int]:
    """The ids that a listener gets who comes after the end."""
    return [number async for message in feed.messages(last_id) for number in ids_in(message)]


@pytest.mark.parametrize("count", [1, 299, 300, 301, 400, 1000, 5000])
async def test_the_history_is_thinned_and_its_end_stays_dense(count: int) -> None:
    """At most 300, the first and the newest among them, in order; the newest state of the job, too."""
    feed = Feed("boot")
    feed.tell_job(b"{}")
    for _ in range(count):
        feed.tell_sample(b"{}")
    feed.close()
    job, *samples = await all_of(feed, None)
    assert len(samples) == min(count, len(samples)) <= MOST_SAMPLES
    assert samples == sorted(set(samples))
    assert (samples[0], samples[-1]) == (job + 1, job + count)
    dense = min(count, 100)
    assert samples[-dense:] == list(range(job + count - dense + 1, job + count + 1))
    if count <= MOST_SAMPLES:
        assert len(samples) == count


async def test_a_listener_that_comes_back_gets_what_came_after_and_nothing_twice() -> None:
    """For each id there was; with an id of another process, or none at all, everything."""
    feed = Feed("boot")
    for n in range(600):
        (feed.tell_job if n % 50 == 7 else feed.tell_sample)(b"{}")
    feed.close()
    whole = await all_of(feed, None)
    for last in range(whole[0] - 1, whole[-1] + 1):
        assert await all_of(feed, f"boot-{last}") == [number for number in whole if number > last]
    for other in ("", "other-5", "boot-", "boot--1", "boot-x", "boot", f"boot-{'9' * 30}", "boot-²", "-5"):
        assert await all_of(feed, other) == whole


async def test_a_feed_that_was_forgotten_goes_on_for_those_who_come_back() -> None:
    """Its ids are later than all before: the state of the job is told again."""
    first = Feed("boot")
    for _ in range(50):
        first.tell_sample(b"{}")
    first.close()
    last = (await all_of(first, None))[-1]
    again = Feed("boot")
    again.tell_job(b"{}")
    again.close()
    assert len(await all_of(again, f"boot-{last}")) == 1


async def test_a_thousand_listeners_and_a_slow_one_get_everything() -> None:
    """Each in order and once; when it closes all are let go, and none is counted any more."""
    feed = Feed("boot")
    got: list[list[int]] = [[] for _ in range(1001)]
    slow_may_go = asyncio.Event()

    async def listen(number: int) -> None:
        async for message in feed.messages(None):
            got[number] += ids_in(message)
            if number == 1000:
                await slow_may_go.wait()

    listeners = [asyncio.create_task(listen(number)) for number in range(1001)]
    for _ in range(20):
        feed.tell_sample(b"{}")
        for _ in range(3):
            await asyncio.sleep(0)
    assert feed.listeners == 1001
    feed.close()
    await asyncio.wait(listeners[:-1])
    assert all(one == got[0] and len(one) == 20 for one in got[:-1])
    slow_may_go.set()
    await asyncio.wait(listeners)
    assert got[-1] == got[0]
    assert feed.listeners == 0


async def test_a_listener_that_leaves_is_not_counted() -> None:
    """Also in the middle of its wait."""
    feed = Feed("boot")
    feed.tell_job(b"{}")
    messages = feed.messages(None)
    await anext(messages)
    waiting = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0)
    assert feed.listeners == 1
    waiting.cancel()
    await asyncio.wait({waiting})
    assert feed.listeners == 0


# Attempts


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seed", range(20))
def test_quantiles_are_those_of_the_sorted_list_within_ten_percent(seed: int) -> None:
    """For any spread, from microseconds to days."""
    dice, attempts = random.Random(seed), Attempts(Clock())
    middle, spread = dice.uniform(-11, 11), dice.uniform(0, 4)
    took = sorted(max(1e-5, min(9e5, dice.lognormvariate(middle, spread))) for _ in range(dice.randint(1, 3000)))
    for seconds in dice.sample(took, len(took)):
        attempts.took(seconds)
    latency = attempts.latency()
    assert latency is not None
    for share, found in ((0.5, latency.p50), (0.95, latency.p95), (0.99, latency.p99)):
        exact = took[max(0, -(-len(took) * round(share * 100) // 100) - 1)]
        assert abs(found - exact) <= 0.1 * exact


def test_latencies_beyond_all_bounds_are_told_as_the_bound() -> None:
    """None is lost."""
    for seconds, least, most in ((0.0, 0, 2e-5), (-1.0, 0, 2e-5), (1e9, 9e5, 2e6)):
        attempts = Attempts(Clock())
        attempts.took(seconds)
        latency = attempts.latency()
        assert latency is not None
        assert least <= latency.p50 <= most


def test_latencies_are_of_the_last_ten_to_twenty_seconds() -> None:
    """What is older does not count; after a silence there is none."""
    clock = Clock()
    attempts = Attempts(clock)
    for second in range(200):
        clock.now = float(second)
        attempts.took(10.0 ** (-4 + second / 50))
        latency = attempts.latency()
        assert latency is not None
        newest, oldest = 10.0 ** (-4 + second / 50), 10.0 ** (-4 + max(0, second - 20) / 50)
        assert 0.9 * oldest <= latency.p50 <= latency.p99 <= 1.1 * newest
    for silence in range(25):
        clock.now += 1
        assert attempts.latency() is None or silence < 20
    assert attempts.latency() is None


def test_errors_are_grouped_by_what_they_say_without_numbers() -> None:
    """The largest group first; the number of groups is bounded, and so is each text."""
    attempts = Attempts(Clock())
    for n in range(100):
        attempts.failed(n, {"n": n}, TimeoutError(f"no result within {n} s"))
        attempts.failed(n, n, SlowDown(1))
    for n in range(10 * MOST_GROUPS):
        letters = chr(ord("a") + n % 26) + chr(ord("a") + n // 26 % 26)
        attempts.failed(n, "x" * 10**5, ValueError(letters * 5000 + "\udc80"))
    first, *others = attempts.errors
    assert (first.error, first.count, first.index) == ("TimeoutError: no result within 0 s", 100, 0)
    assert first.item == "{'n': 0}"
    assert len(others) == MOST_GROUPS - 1
    assert all(len(group.error) <= 300 and len(group.item) <= 120 for group in others)
    attempts.failed(1, "\ud800", ValueError("\udc80"))
    msgspec.json.encode(attempts.errors)


async def an_async_worker(item: Any) -> Any:
    return item


def a_plain_worker(item: Any) -> Any:
    return item


class Callable_:
    """An object that is called."""

    def __call__(self, item: Any) -> Any:
        return item

    async def method(self, item: Any) -> Any:
        """A method of it."""
        return item


class AsyncCallable:
    """The same, asynchronous."""

    async def __call__(self, item: Any) -> Any:
        return item


class Sessions(SessionWorker):
    """One that holds something open."""

    name = "sessions of ours"

    def __init__(self) -> None:
        self.closed = 0

    def begin(self) -> Session:
        return OneSession(self)


class OneSession(Session):
    """What it holds open."""

    def __init__(self, worker: Sessions) -> None:
        self._worker = worker

    async def __call__(self, item: Any) -> Any:
        return item

    async def aclose(self) -> None:
        self._worker.closed += 1


def with_more(item: Any, more: int) -> Any:
    return item


WORKERS: dict[str, Worker] = {
    "async": an_async_worker,
    "plain": a_plain_worker,
    "partial": functools.partial(with_more, more=1),
    "partial of a partial": functools.partial(functools.partial(with_more, more=1), more=2),
    "partial of async": functools.partial(an_async_worker),
    "object": Callable_(),
    "async object": AsyncCallable(),
    "method": Callable_().method,
    "class": str,
    "builtin": len,
}


@pytest.mark.parametrize("name", WORKERS)
async def test_a_watched_worker_is_the_same_to_the_engine(name: str) -> None:
    """Its identity, its kind, its result; how long it took is told, also of one that fails."""
    worker, attempts = WORKERS[name], Attempts(Clock())
    seen = watched(worker, attempts)
    assert identity(seen, None) == identity(worker, None)
    assert is_async(seen) == is_async(worker)
    found = seen("abc")
    assert (await found if is_async(seen) else found) == (3 if name == "builtin" else "abc")
    assert attempts.latency() is not None


async def test_a_watched_session_is_begun_called_and_closed() -> None:
    """As the one it stands for."""
    worker, attempts = Sessions(), Attempts(Clock())
    seen = watched(worker, attempts)
    assert isinstance(seen, SessionWorker)
    assert identity(seen, None) == "sessions of ours"
    session = seen.begin()
    assert await session(5) == 5
    await session.aclose()
    assert await seen(6) == 6
    assert worker.closed == 2
    assert attempts.latency() is not None


def test_what_a_watched_worker_raises_comes_through() -> None:
    """Whatever it is."""

    def fails(item: Any) -> Any:
        raise KeyboardInterrupt

    attempts = Attempts(Clock())
    with pytest.raises(KeyboardInterrupt):
        watched(fails, attempts)(1)
    assert attempts.latency() is not None


# Recorded failures


def lines_at_random(dice: random.Random, count: int, begin: int = 0) -> list[bytes]:
    """Records of results and failures; some look like the other kind, some are long."""
    lines = []
    for index in range(begin, begin + count):
        kind = dice.choice(["result", "failure", "like"])
        if kind == "failure":
            error: Exception = dice.choice([ValueError, KeyError])(f"{dice.randint(1, 3)} of {'ab'[index % 2]}")
            record = encode_failure(index, dice.choice([index, "x" * dice.randint(0, 300), None, {"a": []}]), error)
        else:
            record = encode_record(index, {"error": {"type": "x"}} if kind == "like" else "é" * dice.randint(0, 50))
        lines.append(record + b"\n")
    return lines


def failures_of(lines: list[bytes]) -> list[dict[str, Any]]:
    """The model: each line is decoded."""
    decoded = [msgspec.json.decode(line) for line in lines]
    return [line for line in decoded if set(line) == {"index", "error", "item"}]


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "output.jsonl")


def look(path: str, groups: Groups, after: int = 0, limit: int = 100, committed: int | None = None) -> FailuresView:
    """A page of an output; partial, if it is said how much of it counts."""
    descriptor = os.open(path, os.O_RDONLY)
    opened = Opened(descriptor, os.fstat(descriptor).st_size if committed is None else committed, committed is None)
    try:
        return failures_page(opened, groups, after, limit)
    finally:
        opened.close()


def counts(view: FailuresView) -> Counter[tuple[str, str]]:
    return Counter({(group.type, group.message.translate(NO_NUMBERS)): group.count for group in view.groups})


NO_NUMBERS = str.maketrans("123456789", "000000000")


def expected_counts(lines: list[bytes]) -> Counter[tuple[str, str]]:
    return Counter((one["error"]["type"], one["error"]["message"].translate(NO_NUMBERS)) for one in failures_of(lines))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_pages_and_groups_are_those_of_the_lines(
    output: str, monkeypatch: pytest.MonkeyPatch, seed: int, block: int
) -> None:
    """Page by page until the end, in steps that are bounded however long a line is."""
    monkeypatch.setattr("async_recovery.files.READ_BYTES", block)
    monkeypatch.setattr(recorded, "BYTES_AT_ONCE", 100)
    dice = random.Random(seed)
    lines = lines_at_random(dice, 60)
    Path(output).write_bytes(b"".join(lines))
    groups, after, found = Groups(), 0, []
    longest = max(map(len, lines))
    while True:
        before = groups.counted
        view = look(output, groups, after, dice.randint(1, 5))
        found += [msgspec.to_builtins(failure) for failure in view.failures]
        assert groups.counted - before <= 100 + longest + block
        if view.next is None:
            break
        assert view.next > after, "it goes on"
        after = view.next
    assert found == failures_of(lines)
    while view.counted_bytes < view.committed_bytes:
        view = look(output, groups, 0, 0)
    assert counts(view) == expected_counts(lines)
    assert [group.count for group in view.groups] == sorted((group.count for group in view.groups), reverse=True)
    for group in view.groups:
        assert len(group.samples) == min(3, group.count)


def test_a_page_may_begin_anywhere(output: str) -> None:
    """With the first line that begins there or later."""
    lines = lines_at_random(random.Random(1), 12)
    whole = b"".join(lines)
    Path(output).write_bytes(whole)
    begins = [0, *itertools.accumulate(map(len, lines))]
    groups = Groups()
    for after in [*range(len(whole) + 2), 10**18]:
        later = [line for begin, line in zip(begins, lines, strict=False) if begin >= after]
        view = look(output, groups, after)
        assert [msgspec.to_builtins(failure) for failure in view.failures] == failures_of(later)
        assert view.next is None


def test_a_growing_output_is_counted_once(output: str) -> None:
    """As far as it is committed, wherever that is; then whole, under its own name."""
    lines = lines_at_random(random.Random(2), 50)
    Path(output).write_bytes(b"".join(lines) + b"not committed")
    groups, committed = Groups(), 0
    for number, line in enumerate(lines, 1):
        committed += len(line)
        view = look(output, groups, committed=committed)
        assert counts(view) == expected_counts(lines[:number])
        assert [failure.index for failure in view.failures] == [one["index"] for one in failures_of(lines[:number])]
    Path(output).write_bytes(b"".join(lines))
    assert counts(look(output, groups)) == expected_counts(lines)


def test_another_output_at_its_place_is_counted_anew(output: str) -> None:
    """Also where the file system gives it the number of the one before, and where it is as long."""
    first, second = lines_at_random(random.Random(3), 30), lines_at_random(random.Random(4), 30)
    groups = Groups()
    for turn, lines in enumerate([first, second, first, second]):
        path = Path(output)
        if turn % 2:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as new:
                new.write(b"".join(lines))
            Path(new.name).rename(path)
        else:
            path.write_bytes(b"".join(lines))
            os.utime(path, (turn, turn))  # a moment of its own
        assert counts(look(output, groups)) == expected_counts(lines)
    longer = b"".join(first)
    Path(output).write_bytes(longer)
    os.utime(output, (9, 9))
    look(output, groups)
    replaced = encode_record(0, "x" * (len(longer) - len(encode_record(0, "")) - 1)) + b"\n"
    assert len(replaced) == len(longer)
    Path(output).write_bytes(replaced)
    assert look(output, groups).groups == []


def test_large_items_come_in_small_pages(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one at a time."""
    monkeypatch.setattr(recorded, "PAGE_BYTES", 1000)
    lines = [encode_failure(n, "x" * 700, ValueError()) + b"\n" for n in range(7)]
    Path(output).write_bytes(b"".join(lines))
    groups, after, pages = Groups(), 0, []
    while True:
        view = look(output, groups, after)
        pages.append([failure.index for failure in view.failures])
        if view.next is None:
            break
        after = view.next
    assert pages == [[0, 1], [2, 3], [4, 5], [6]]


def test_more_kinds_than_can_be_shown_are_counted_together(output: str) -> None:
    """In a group of their own."""
    names = ["".join(pair) for pair in itertools.product("abcdefghijklmno", repeat=2)]
    lines = [encode_failure(n, n, ValueError(name)) + b"\n" for n, name in enumerate(names)]
    Path(output).write_bytes(b"".join(lines))
    view = look(output, Groups())
    assert (view.groups[0].type, view.groups[0].count) == ("others", len(names) - 100)
    assert len(view.groups) == 101


def test_an_output_that_gets_shorter_is_no_endless_line(output: str) -> None:
    """Looked at while a start cuts it back."""
    Path(output).write_bytes(b"x" * 100)
    view = look(output, Groups(), after=50, committed=1000)
    assert (view.failures, view.next) == ([], None)


# The output


async def opening(path: str) -> Opened:
    """A complete output, opened."""
    return await anyio.to_thread.run_sync(open_output, path, None)


async def asked(opened: Opened, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """An answer: its status, headers, body. What was opened is closed after it."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    named = [(name.replace("_", "-").encode(), text.encode("latin-1")) for name, text in headers.items()]
    scope = {"type": "http", "method": method, "headers": named, "path": "/", "query_string": b"", "asgi": {}}
    try:
        response = await output_response(Request(scope), opened, "out.jsonl")
        await response(scope, receive, send)
    finally:
        if opened.descriptor is not None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(opened.descriptor)
    told = {name.decode(): text.decode() for name, text in sent[0]["headers"]}
    return sent[0]["status"], told, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize("block", [2, 1 << 18])
async def test_every_range_is_as_http_has_it(output: str, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """First and last byte, from a byte on, the last bytes, behind the end; what can not be read is ignored."""
    monkeypatch.setattr(output_module, "BLOCK_BYTES", block)
    for whole in (b"abcde\n", b""):
        await anyio.Path(output).write_bytes(whole)
        size = len(whole)
        ranges: dict[str, bytes | None] = {f"bytes={first}-": whole[first:] for first in range(9)}
        ranges |= {f"bytes=-{last}": whole[max(0, size - last) :] if last else b"" for last in range(9)}
        for first, last in itertools.product(range(9), repeat=2):
            ranges[f"bytes={first}-{last}"] = whole[first : last + 1] if first <= last else None
        ranges |= dict.fromkeys(("bytes=", "bytes=-", "bytes=a-b", "bytes=0-1,3-4", "lines=0-1", "bytes=0 -1", ""))
        for asked_for, expected in ranges.items():
            opened = await opening(output)
            if expected == b"":
                with pytest.raises(Problem) as caught:
                    await asked(opened, range=asked_for)
                assert (caught.value.status, caught.value.headers) == (416, {"content-range": f"bytes */{size}"})
                continue
            status, headers, body = await asked(opened, range=asked_for)
            assert (status, body) == ((200, whole) if expected is None else (206, expected)), asked_for
            assert headers["content-length"] == str(len(body))
            if expected is not None:
                begin = whole.index(expected)
                assert headers["content-range"] == f"bytes {begin}-{begin + len(expected) - 1}/{size}"


async def test_a_range_of_what_has_changed_since_is_all_of_it(output: str) -> None:
    """And what has not changed is not sent again; a HEAD has no body."""
    await anyio.Path(output).write_bytes(b"abcde\n")
    _, headers, body = await asked(await opening(output))
    tag = headers["etag"]
    assert (await asked(await opening(output), range="bytes=1-2", if_range=tag))[::2] == (206, b"bc")
    assert (await asked(await opening(output), range="bytes=1-2", if_range='"other"'))[::2] == (200, body)
    assert (await asked(await opening(output), if_none_match=tag))[::2] == (304, b"")
    assert (await asked(await opening(output), "HEAD"))[::2] == (200, b"")
    await anyio.Path(output).write_bytes(b"ABCDE\n")
    os.utime(output, (1, 1))
    assert (await asked(await opening(output), if_none_match=tag))[::2] == (200, b"ABCDE\n")


async def test_an_output_replaced_while_it_is_sent_is_sent_as_it_was(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No block of the new one among those of the old."""
    monkeypatch.setattr(output_module, "BLOCK_BYTES", 2)
    Path(output).write_bytes(b"abcdef")
    opened = await opening(output)
    response = await output_response(Request({"type": "http", "method": "GET", "headers": []}), opened, "out.jsonl")
    got = []
    async for block in response.body_iterator:  # type: ignore[attr-defined]
        got.append(block)
        await anyio.Path(f"{output}.new").write_bytes(b"ABCDEF")
        await anyio.Path(f"{output}.new").rename(output)
    assert got == [b"ab", b"cd", b"ef"]
    opened.close()


async def test_a_client_that_is_gone_before_the_first_block_leaves_no_descriptor(output: str) -> None:
    """Its answer was never begun."""
    await anyio.Path(output).write_bytes(b"abcdef")
    opened = await opening(output)
    scope: dict[str, Any] = {"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.4"}}
    response = await output_response(Request(scope), opened, "out.jsonl")

    async def gone(*_: Any) -> Any:
        raise OSError("the client is gone")

    with pytest.raises(Exception, match=r"^$"):  # ClientDisconnect of Starlette
        await response(scope, gone, gone)
    assert opened.descriptor is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened.descriptor)


def test_an_output_that_gets_its_name_while_it_is_opened_is_found(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked for under the name that it had until then."""
    Path(f"{output}.partial").write_bytes(b"abc\n")
    real = os.open

    def publishing(path: str, flags: int) -> int:
        if Path(f"{output}.partial").exists():
            Path(f"{output}.partial").rename(output)
        return real(path, flags)

    monkeypatch.setattr(output_module.os, "open", publishing)  # type: ignore[attr-defined]
    opened = open_output(output, 4)
    assert (opened.size, opened.is_whole) == (4, True)
    opened.close()
    assert open_output(f"{output}.none", 4) == Opened(None, 0)
    assert open_output(f"{output}.none", None) == Opened(None, 0)


# Metrics, and what is said of all this


def jobs_of(*states: str) -> Iterator[Job]:
    """A job in each of these states."""
    for number, state in enumerate(states, 1):
        yield Job(
            number,
            f"job-{number:016x}",
            'wo"rk\ner',
            Input("items", "x", "x", 1),
            JobOptions(),
            1.0,
            state=state,  # type: ignore[arg-type]
        ).made(1.0)


def sample() -> Sample:
    """Of a run that has not begun."""
    return Watch(lambda seconds: None).sample(NOT_BEGUN, window=10, concurrency=3, rate=None)


def test_metrics_can_be_read_and_tell_only_of_jobs_that_have_not_ended() -> None:
    """Those of a job are gone when it has ended, also where nobody asks for any."""
    jobs = {job.id: job for job in jobs_of("queued", "running", "paused", "complete", "failed", "cancelled")}
    metrics = Metrics(lambda: jobs, lambda job: sample())
    running = next(job for job in jobs.values() if job.state == "running")
    metrics.committed(running, 0.02)
    told = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for one in family.samples:
            told[one.name, tuple(sorted(one.labels.items()))] = one.value
    of_jobs = {dict(labels)["job"] for _, labels in told if "job" in dict(labels)}
    assert of_jobs == {job.id for job in jobs.values() if not job.has_ended}
    for state in ("queued", "running", "paused", "complete", "failed", "cancelled"):
        assert told["async_recovery_jobs", (("state", state),)] == 1
    labels = (("job", running.id), ("worker", running.worker))
    assert told["async_recovery_commit_duration_seconds_count", labels] == 1
    jobs[running.id] = running.completed(2.0, {"failed": 0})
    assert running.id not in metrics.text().decode()
    for number in range(50):
        job = Job(number, f"job-{number + 100:016x}", "w", running.input, JobOptions(), 1.0, state="running")
        jobs[job.id] = job
        metrics.committed(job, 0.1)
        jobs[job.id] = job.completed(2.0, {"failed": 0})
    assert len(metrics._commits._metrics) <= 2


def test_the_description_tells_of_every_field_and_of_nothing_else() -> None:
    """Each view and each request as its type has it."""
    schemas = msgspec.json.decode(document(("w",), 100, read_only=False))["components"]["schemas"]
    for kind in (JobView, Sample, FailuresView, JobOptions, RetryOptions, RecordOptions):
        assert list(schemas[kind.__name__]["properties"]) == list(kind.__struct_fields__)
    for kind in (JobOptions, RetryOptions, RecordOptions):
        assert list(schemas[f"Asked{kind.__name__}"]["properties"]) == list(kind.__struct_fields__)
    assert schemas["AskedJobOptions"]["properties"]["concurrency"]["maximum"] == 100


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_told_is_what_the_description_says(read_only: bool) -> None:
    """Jobs in every state, with a sample and without, validated against it; it refers to nothing that is not there."""
    whole = msgspec.json.decode(document(("w",), 100, read_only=read_only))
    references = {text.partition('"')[0] for text in msgspec.json.encode(whole).decode().split('"#/')[1:]}
    for reference in references:
        assert functools.reduce(lambda found, name: found[name], reference.split("/"), whole)
    schema = {"$ref": "#/components/schemas/JobView", "components": whole["components"]}
    validator = jsonschema_rs.Draft202012Validator(schema)
    options = JobOptions(retry=RetryOptions(), on_error=RecordOptions("1%"), rate=1, version="v")
    for job in jobs_of("queued", "running", "paused", "complete", "failed", "cancelled"):
        validator.validate(msgspec.json.decode(as_json(job)))
        full = msgspec.structs.replace(job, options=options, reason="why", summary={"failed": 1}, retries_of="x")
        validator.validate(msgspec.json.decode(msgspec.json.encode(view_of(full, sample()))))
        assert view_of(full).retrying == (not job.has_ended)
    assert ("post" in whole["paths"]["/jobs"]) == (not read_only)
