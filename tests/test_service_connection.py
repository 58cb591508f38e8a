"""The guard behind a real server, attacked over raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from async_recovery.service.connection import BoundedConnection
from async_recovery.service.guard import Guard
from async_recovery.service.problems import HANDLERS, Problem

from .support.served import Connection, Served, served, statuses

TOKEN = "a-token-of-more-than-sixteen"
LIMIT = 100_000
HOST = b"Host: 127.0.0.1\r\n"
RIGHT = b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
LAST = b"Connection: close\r\n"
GET = b"GET /jobs HTTP/1.1\r\n" + HOST + RIGHT
POST = b"POST /jobs HTTP/1.1\r\n" + HOST + RIGHT


class Impatient(BoundedConnection):
    """A connection whose bounds a test can wait for."""

    head_s = 0.1
    stalled_s = 0.1
    most_connections = 20


async def page(request: Request) -> Response:
    """Needs no token."""
    return PlainTextResponse("page")


async def jobs(request: Request) -> Response:
    """Says what it was asked for, and how many bytes came."""
    body = await request.body()
    if body.startswith(b"!"):
        raise Problem(400, "that is no job")
    return JSONResponse({"path": request.url.path, "id": request.path_params.get("id"), "bytes": len(body)})


async def endless(request: Request) -> Response:
    """More than any buffer holds."""

    async def blocks() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536
            await asyncio.sleep(0)  # uvicorn's send does not wait any more once the client has gone

    return StreamingResponse(blocks())


def app(**options: float) -> Guard:
    """A guarded application with a token."""
    routes = [
        Route("/", page),
        Route("/healthz", page),
        Route("/endless", endless, methods=["GET", "POST"]),
        Route("/jobs", jobs, methods=["GET", "POST"]),
        Route("/jobs/{id}", jobs, methods=["GET", "DELETE", "PATCH"]),
    ]
    inner = Starlette(routes=routes, exception_handlers=dict(HANDLERS))
    return Guard(
        inner,
        hosts=["127.0.0.1", "localhost"],
        token=TOKEN,
        body_limit=lambda scope: LIMIT,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def _no_tracebacks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever is sent, the log has no error, no traceback, and no token."""
    caplog.set_level(logging.INFO)
    yield
    records = caplog.get_records("call")
    assert [record.getMessage() for record in records if record.levelno >= logging.ERROR or record.exc_info] == []
    assert TOKEN not in "".join(record.getMessage() for record in records)


async def test_ordinary_requests() -> None:
    """Several on one connection, with and without a body."""
    async with served(app()) as service, service.connected() as connection:
        for sent, body in [
            (b"GET / HTTP/1.1\r\n" + HOST + b"\r\n", b"page"),
            (GET + b"\r\n", b'{"path":"/jobs","id":null,"bytes":0}'),
            (POST + b"Content-Length: 3\r\n\r\nabc", b'{"path":"/jobs","id":null,"bytes":3}'),
            (
                POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
                b'{"path":"/jobs","id":null,"bytes":3}',
            ),
        ]:
            connection.writer.write(sent)
            assert await connection.answer() == (200, body)


async def test_answers_go_out_at_once() -> None:
    """The system does not hold back the second piece of an answer until the first is acknowledged."""
    async with served(app()) as service, service.connected(GET + b"\r\n") as connection:
        await connection.answer()
        (one,) = service.server.server_state.connections
        assert one.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- attacks, one each ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n", 421),
        (b"GET / HTTP/1.1\r\n", 400),  # no Host
        (b"GET / HTTP/1.0\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST, 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Host: evil.example\r\n", 400),
        (b"GET http://127.0.0.1/ HTTP/1.1\r\n" + HOST, 400),  # absolute-form
        (b"GET http://evil.example/ HTTP/1.1\r\n" + HOST, 400),
        (b"GET //evil.example/jobs HTTP/1.1\r\n" + HOST, 401),  # a path, and no open one
        (b"CONNECT evil.example:80 HTTP/1.1\r\n" + HOST, 400),
        (b"OPTIONS * HTTP/1.1\r\n" + HOST, 400),
        (b"GET /jobs/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n" + HOST + RIGHT, 400),
        (b"GET /jobs/%ff HTTP/1.1\r\n" + HOST + RIGHT, 400),
        (b"GET /jobs/%00 HTTP/1.1\r\n" + HOST + RIGHT, 400),
        (b"GET /jobs/\xff HTTP/1.1\r\n" + HOST + RIGHT, 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST, 414),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 40_000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 200, 431),
        (b"GET /jobs HTTP/1.1\r\n" + HOST, 401),
        (b"GET /jobs?token=" + TOKEN.encode() + b" HTTP/1.1\r\n" + HOST, 401),
        (b"GET /jobs HTTP/1.1\r\n" + HOST + RIGHT + RIGHT, 400),
        (POST + b"Origin: http://evil.example\r\nContent-Length: 0\r\n", 403),
        (POST + b"Sec-Fetch-Site: cross-site\r\nContent-Length: 0\r\n", 403),
        (POST + b"Content-Length: 1000000000000\r\n", 413),
        (POST + b"Content-Length: -1\r\n", 400),
        (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n", 400),
        (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        (POST + b"Transfer-Encoding: chunked, gzip\r\n", 400),
        (POST + b"Transfer-Encoding: gzip\r\n", 400),
        (b"GET / HTTP/9.9\r\n" + HOST, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n", 400),
    ],
)
async def test_an_attack_in_one_request(sent: bytes, status: int) -> None:
    """Is refused with what fits it, by the guard or before it."""
    async with served(app()) as service:
        said = await service.said(sent + LAST + b"\r\n", half_close=True)
        assert statuses(said) == [status], said
        assert b"Traceback" not in said


async def test_smuggling_ends_the_connection() -> None:
    """What follows a request whose end is in doubt is never taken for a request."""
    hidden = b"GET /jobs/hidden HTTP/1.1\r\n" + HOST + RIGHT + LAST + b"\r\n"
    for body in (b"0\r\n\r\n" + hidden, hidden):
        length = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(body)
        async with served(app()) as service:
            said = await service.said(POST + length + body)
            assert (statuses(said), b"hidden" in said) == ([400], False)


@pytest.mark.parametrize("before", [b"", b"3\r\nabc\r\n"])
async def test_a_body_that_breaks(before: bytes) -> None:
    """One answer, whether the application waits for more of it, has not begun, or has answered long ago."""
    broken = before + b"zz\r\n"
    early = b"POST /jobs HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"  # 401 before the body
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    events = b"POST /endless HTTP/1.1\r\n" + HOST + RIGHT + b"Transfer-Encoding: chunked\r\n\r\n"
    async with served(app()) as service:
        assert statuses(await service.said(chunked + broken)) == [400]
        async with service.connected(early) as connection:
            assert (await connection.answer())[0] == 401
            connection.writer.write(broken)
            assert await connection.to_end() == b""
        async with service.connected(events) as connection:
            await connection.reader.readuntil(b"\r\n\r\n")
            connection.writer.write(broken)
            assert statuses(await connection.to_end()) == []


async def test_pipelined_requests_are_judged_one_by_one() -> None:
    """In their order; one that is refused does not open the way for the next."""
    wrong = b"GET /jobs HTTP/1.1\r\n" + HOST + b"Authorization: Bearer wrong\r\n\r\n"
    foreign = b"GET / HTTP/1.1\r\nHost: evil\r\n\r\n"
    early = POST + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000  # is refused before its body comes
    sent = GET + b"\r\n" + wrong + foreign + early + GET + b"\r\n" + GET + LAST + b"\r\n"
    async with served(app()) as service:
        assert statuses(await service.said(sent)) == [200, 401, 421, 413, 200, 200]


async def test_a_body_that_is_too_long_on_the_way() -> None:
    """413 as soon as it is, although the client goes on; the rest is read and thrown away, and the next is served."""
    block = b"%x\r\n%s\r\n" % (30_000, b"x" * 30_000)
    async with served(app()) as service, service.connected() as connection:
        connection.writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n" + block * 4)
        assert (await connection.answer())[0] == 413
        connection.writer.write(block * 4 + b"0\r\n\r\n" + GET + b"\r\n")
        assert (await connection.answer())[0] == 200


async def test_a_slow_body() -> None:
    """408, and the connection is closed."""
    async with served(app(body_idle_s=0.05)) as service:
        said = await service.said(POST + b"Content-Length: 10\r\n\r\nabc")
        assert statuses(said) == [408]
        assert b"connection: close" in said


@pytest.mark.parametrize(
    "sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", GET + b"\r\n" + b"GET / HTTP/1.1\r\n"]
)
async def test_slow_heads(sent: bytes) -> None:
    """A connection that does not get on with the head of a request is closed, behind an answered request, too."""
    async with served(app(), Impatient, timeout_keep_alive=1) as service:
        assert statuses(await service.said(sent)) == ([200] if sent.startswith(GET) else [])


async def test_the_bound_of_slow_heads_is_not_uvicorns() -> None:
    """Without it such a connection stays open: if uvicorn gets a bound of its own, ours may go."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    async with served(app(), H11Protocol) as service, service.connected(b"GET / HTTP/1.1\r\n") as connection:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.to_end(), 0.5)


async def test_a_byte_now_and_then_wins_no_time() -> None:
    """The head as a whole has its time, however often something comes."""
    loop = asyncio.get_running_loop()
    async with served(app(), Impatient) as service, service.connected() as connection:
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                for byte in b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000:
                    connection.writer.write(bytes([byte]))
                    await connection.writer.drain()
                    turn = loop.create_future()
                    loop.call_later(0.01, turn.set_result, None)
                    await turn
                    if connection.reader.at_eof():
                        break
        assert await connection.to_end() == b""


async def flood(connection: Connection) -> None:
    """Send for ever."""
    while True:
        connection.writer.write(b"x" * 65536)
        await connection.writer.drain()


async def test_a_body_that_nobody_wants_has_an_end() -> None:
    """What is left of it after the answer is read for so long, and no longer."""
    async with served(app(), Impatient) as service, service.connected() as connection:
        connection.writer.write(POST + b"Content-Length: 1000000000000\r\n\r\n")
        assert (await connection.answer())[0] == 413
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionError):
                await flood(connection)


async def test_a_client_that_takes_nothing_of_its_answer() -> None:
    """Is let go, and with it what serves it."""
    stalled = b"GET /endless HTTP/1.1\r\n" + HOST + RIGHT + b"\r\n"
    async with served(app(), Impatient) as service, service.connected() as connection:
        connection.writer.write(stalled)
        await connection.reader.readuntil(b"\r\n\r\n")
        connection.reader._transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(5):
            while service.server.server_state.connections or service.server.server_state.tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_too_many_connections() -> None:
    """Those beyond the bound get 503; when others have gone, there is room again."""
    async with served(app(), Impatient) as service, contextlib.AsyncExitStack() as stack:
        open_ones = [await stack.enter_async_context(service.connected()) for _ in range(20)]
        refused = await service.said(b"")
        assert statuses(refused) == [503]
        assert b"retry-after: 1" in refused
        assert refused.partition(b"\r\n\r\n")[2].startswith(b'{"type":"about:blank"')
        for connection in open_ones:
            await connection.to_end()  # the bound of slow heads
        assert statuses(await service.said(GET + LAST + b"\r\n")) == [200]


async def test_token_guessing() -> None:
    """From the 21st wrong token on 429, whatever X-Forwarded-For says; the owner is served."""
    got: list[int] = []
    async with served(app()) as service, service.connected() as connection:
        for number in range(30):
            forwarded = b"X-Forwarded-For: 10.0.0.%d\r\n" % number
            wrong = b"Authorization: Bearer wrong-%d\r\n\r\n" % number
            connection.writer.write(b"GET /jobs HTTP/1.1\r\n" + HOST + forwarded + wrong)
            got.append((await connection.answer())[0])
        connection.writer.write(GET + b"\r\n")
        got.append((await connection.answer())[0])
    assert got == [401] * 20 + [429] * 10 + [200]


async def test_a_websocket_is_none() -> None:
    """What asks to become one is an ordinary request, with ordinary rules."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    async with served(app()) as service, service.connected(b"GET /jobs HTTP/1.1\r\n" + HOST + upgrade + b"\r\n") as it:
        assert (await it.answer())[0] == 401


# --- garbage ----------------------------------------------------------------------------------------------------------

METHODS = [
    b"GET",
    b"POST",
    b"DELETE",
    b"PATCH",
    b"HEAD",
    b"OPTIONS",
    b"PUT",
    b"TRACE",
    b"get",
    b"G\xffT",
    b"",
    b"A" * 50,
]
TARGETS = [b"/", b"/jobs", b"/jobs/1", b"/healthz", b"/jobs/..", b"/%", b"/%zz", b"/jobs/%C3", b"http://x/", b"*", b""]
TARGETS += [
    b"/jobs?" + b"a=" * 30,
    b"/a" * 5000,
    b"/jobs/%F0%9F%92%A9",
    b"/jobs/\xc3\xa9",
    b"//",
    b"/jobs#x",
    b"/\\..\\",
]
VALUES = [
    b"",
    b"0",
    b"1",
    b"5",
    b"-1",
    b"99999999999999999999",
    b"999999",
    b"chunked",
    b"null",
    b"127.0.0.1",
    b"evil.example",
]
VALUES += [
    b"evil.example",
    b"same-origin",
    b"cross-site",
    b"navigate",
    b"Bearer " + TOKEN.encode(),
    b"Bearer x",
    b"close",
    b"100-continue",
]
VALUES += [b"\xff\xfe", b"a" * 3000, b"\x00", b" ", b"http://127.0.0.1", b"websocket", b"bytes=0-", b"1, 1", b"gzip"]
NAMES = [b"Host", b"Content-Length", b"Transfer-Encoding", b"Origin", b"Sec-Fetch-Site", b"Sec-Fetch-Mode", b"Expect"]
NAMES += [b"Authorization", b"Connection", b"Upgrade", b"Range", b"Cookie", b"X", b"", b"X Y", b"\xe9", b"Content-Type"]


def garbage(dice: random.Random) -> bytes:
    """Bytes of no sense, or a request of which parts are wrong, cut short, repeated or damaged."""
    if dice.random() < 0.1:
        return dice.randbytes(dice.randrange(200))
    sound = dice.random() < 0.7
    method, target = (dice.choice(METHODS[:8]), dice.choice(TARGETS)) if sound else map(dice.choice, (METHODS, TARGETS))
    lines = [b"%s %s HTTP/1.1" % (method, target)]
    if sound:
        lines += [b"Host: 127.0.0.1", b"Authorization: Bearer " + TOKEN.encode()]
    lines += [b"%s: %s" % (dice.choice(NAMES), dice.choice(VALUES)) for _ in range(dice.choice([0, 0, 1, 1, 2, 5]))]
    body = dice.choice([b"", b"", b"abc", b"!", b"3\r\nabc\r\n0\r\n\r\n", b"zz\r\n", dice.randbytes(30), b"x" * 5000])
    sent = bytearray(b"\r\n".join([*lines, b"", body]))
    while sent and dice.random() < 0.2:
        sent[dice.randrange(len(sent))] = dice.randrange(256)
    if dice.random() < 0.1:
        del sent[dice.randrange(len(sent)) :]
    return bytes(sent) * dice.choice([1, 1, 1, 2])


async def test_ten_thousand_requests_of_garbage() -> None:
    """None gets a 5xx, and none leaves a traceback; then the service is well."""
    dice = random.Random(8)
    sent = [garbage(dice) for _ in range(10_000)]
    got: dict[int, int] = {}

    async def one_after_the_other(service: Served, requests: list[bytes]) -> None:
        for request in requests:
            for status in statuses(await service.said(request, half_close=True)):
                got[status] = got.get(status, 0) + 1
                assert status < 500, request

    async with served(app()) as service, asyncio.TaskGroup() as group:
        for first in range(4):
            group.create_task(one_after_the_other(service, sent[first::4]))
    assert {200, 400, 401, 403, 404, 405, 413, 414, 421} <= got.keys()
    async with served(app()) as service:
        assert statuses(await service.said(GET + LAST + b"\r\n")) == [200]
