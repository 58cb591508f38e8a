"""The guard of the service, without a server: what it lets through, what it refuses, and how it says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from async_recovery.service import guard as guard_module
from async_recovery.service.guard import CONTENT_SECURITY_POLICY, Guard
from async_recovery.service.problems import HANDLERS, Problem

from .support.asgi_calls import Answer, call, never, piece, scope_of
from .support.virtual_loop import run_virtual

TOKEN = "a-token-of-more-than-sixteen"
LIMIT = 1000
SECURITY = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that says ok, whatever it is asked."""
    await Response("ok")(scope, receive, send)


async def unreached(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that no request must reach."""
    raise AssertionError(f"the guard let it through: {scope}")


async def echo(request: Request) -> Response:
    """Answers with the number of bytes that came."""
    return JSONResponse(len(await request.body()))


ECHO = Starlette(routes=[Route("/jobs", echo, methods=["GET", "POST"])], exception_handlers=dict(HANDLERS))


def guarded(app: ASGIApp = fine, **options: Any) -> Guard:
    """A guard of loopback without a token."""
    hosts = ("localhost", "127.0.0.1", "[::1]")
    return Guard(app, **{"hosts": hosts, "token": None, "body_limit": lambda scope: LIMIT, **options})


def pieces(*messages: Message) -> Receive:
    """A client that sends these, and then goes."""
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0) if left else {"type": "http.disconnect"}

    return receive


# --- the host ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", [b"127.0.0.1:8080", b"127.0.0.1", b"LocalHost:9000", b"localhost.", b"localhost.:80", b"[::1]", b"[::1]:80"]
)
async def test_its_own_hosts_are_served(host: bytes) -> None:
    """With any port or none: what forwards a port changes that, and it is no matter of DNS."""
    guard = guarded()
    for _ in range(2):  # the second time from what it remembers
        assert (await call(guard, scope_of(host=host))).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"evil.example", 421),
        (b"evil.example:8080", 421),
        (b"127.0.0.1.evil.example", 421),
        (b"localhost.evil.example", 421),
        (b"xlocalhost", 421),
        (b"10.0.0.1:8080", 421),
        (b"0.0.0.0:8080", 421),
        (b"[::2]", 421),
        (None, 400),
        (b"", 400),
        (b":8080", 400),
        (b"localhost:x", 400),
        (b"localhost:808080", 400),
        (b"localhost:80:80", 400),
        (b"evil@localhost", 400),
        (b"localhost/", 400),
        (b"localhost evil", 400),
        (b"localhost,evil", 400),
        (b"\xff", 400),
        (b"::1", 400),
    ],
)
async def test_dns_rebinding_and_other_hosts_are_refused(host: bytes | None, status: int) -> None:
    """A name that leads here but is not ours, or no sound name, reaches nothing, not even the page."""
    guard = guarded(unreached)
    for target in ("/", "/jobs"):
        answer = await call(guard, scope_of(target, host=host))
        assert (answer.status, bool(answer.detail)) == (status, True)


@pytest.mark.parametrize("every", ["0.0.0.0", "[::]"])
async def test_every_address_takes_addresses_and_no_names(every: str) -> None:
    """Where it listens on every address, its names are any address: DNS has no part in those."""
    guard = guarded(hosts=[every, "Box"])
    for host, status in [(b"10.1.2.3:80", 200), (b"[fd00::1]:80", 200), (b"box", 200), (b"evil", 421), (b"1.2.3", 421)]:
        assert (await call(guard, scope_of(host=host))).status == status


async def test_embedded_it_may_leave_hosts_to_others() -> None:
    """With `hosts=None` any host will do, and none."""
    for host in (b"evil.example", None):
        assert (await call(guarded(hosts=None), scope_of(host=host))).status == 200


async def test_what_it_remembers_of_hosts_is_bounded() -> None:
    """A client that writes an allowed host in ever new ways fills no memory."""
    guard = guarded()
    for number in range(1000):
        assert (await call(guard, scope_of(host=b"localhost:%d" % number))).status == 200
    assert guard._hosts is not None
    assert len(guard._hosts._known) == guard_module.KNOWN_HOSTS


# --- pages of other sites ---------------------------------------------------------------------------------------------

OWN = "http://127.0.0.1:8080"


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE", "PUT", "BREW"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl
        ({"Origin": OWN}, 200),
        ({"Origin": OWN, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9090"}, 403),  # another service of this machine
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Origin": "http://127.0.0.1:8080.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "127.0.0.1:9090"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "anything"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),  # a form
        ({"Origin": OWN, "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
async def test_pages_of_other_sites_change_nothing(method: str, headers: dict[str, str], status: int) -> None:
    """What changes something comes from the service's own page, or from no page at all."""
    answer = await call(guarded(), scope_of(method=method, headers=headers))
    assert answer.status == status
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link that leads here
        ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_pages_of_other_sites_read_nothing(method: str, headers: dict[str, str], status: int) -> None:
    """They may lead to the service, but neither fetch nor embed what is its own; a preflight gets no leave."""
    answer = await call(guarded(), scope_of(method=method, headers=headers))
    assert answer.status == status
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_without_hosts_a_page_of_no_origin_is_still_refused() -> None:
    """An Origin of "null" is not the host of a request that names none."""
    for origin in ("null", "", "http://"):
        answer = await call(guarded(hosts=None), scope_of(method="POST", host=None, headers={"Origin": origin}))
        assert answer.status == (403 if origin else 200)  # without host and origin it is no browser


# --- the token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/", "/assets/page.js", "/healthz", "", "/?token=x"])
@pytest.mark.parametrize("root", ["", "/recovery"])
async def test_what_needs_no_token(target: str, root: str) -> None:
    """The page, which asks for the token, what belongs to it, and the sign of life; also below a path."""
    guard = guarded(token=TOKEN)
    assert (await call(guard, scope_of(root + target, root_path=root))).status == 200


@pytest.mark.parametrize(
    "target",
    [
        *("/jobs", "/jobs/", "/metrics", "/readyz", "/openapi.json", "/service", "/assets", "/healthz/", "/healthzz"),
        *("//", "//jobs", "/jobs/assets/", "/x/healthz", f"/jobs?token={TOKEN}", f"/jobs?access_token={TOKEN}"),
    ],
)
async def test_all_else_needs_the_token(target: str) -> None:
    """401 with what is asked for; no part of a URL helps, nor does a path that only looks like an open one."""
    for root, path in (("", target), ("/recovery", f"/recovery{target}")):
        guard = guarded(token=TOKEN)
        answer = await call(guard, scope_of(path, root_path=root))
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == 'Bearer realm="async-recovery"'
        assert "Authorization: Bearer" in answer.detail
        right = await call(guard, scope_of(path, root_path=root, headers={"Authorization": f"bearer  {TOKEN}"}))
        assert right.status == 200


@pytest.mark.parametrize(
    "given",
    [
        *("Bearer x", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"),
        *(f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN} {TOKEN}", "Bearer \xff\xfe", "Bearer " + "x" * 20_000),
    ],
)
async def test_a_wrong_token_is_refused(given: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of whatever length and bytes; nothing of it is in the answer or in the log."""
    caplog.set_level(0)
    answer = await call(guarded(unreached, token=TOKEN), scope_of(headers={"Authorization": given}))
    assert answer.status == 401
    assert TOKEN not in str(answer) + caplog.text


async def test_two_tokens_are_refused() -> None:
    """A header that decides and comes twice is ambiguous, whatever stands in it."""
    for name in ("Authorization", "Host", "Origin", "Content-Length", "Transfer-Encoding", "Sec-Fetch-Site"):
        twice = [(name, f"Bearer {TOKEN}")] * 2
        answer = await call(guarded(unreached, hosts=None), scope_of(headers=twice, host=None))
        assert (answer.status, name.lower() in answer.detail) == (400, True)


async def guess(guard: Guard, token: str = "wrong", client: Any = ("10.0.0.1", 1)) -> Answer:
    """One request with that token."""
    return await call(guard, scope_of(headers={"Authorization": f"Bearer {token}"}, client=client))


async def test_guessing_is_slowed_for_who_guesses(caplog: pytest.LogCaptureFixture) -> None:
    """After 20 wrong tokens within a minute 429 for wrong ones, from that address; the right one is always served."""
    clock = 100.0
    guard = guarded(token=TOKEN, now=lambda: clock)
    for _ in range(20):
        assert (await guess(guard)).status == 401
        clock += 1.0
    answer = await guess(guard)
    assert (answer.status, answer.headers["retry-after"]) == (429, "40")
    assert (await guess(guard, client=("10.0.0.1", 2))).status == 429
    assert (await guess(guard, client=("10.0.0.2", 1))).status == 401
    assert (await guess(guard, client=None)).status == 401
    assert (await guess(guard, TOKEN)).status == 200
    assert (await call(guard, scope_of(client=("10.0.0.1", 1)))).status == 401  # none is not a wrong one
    clock = 159.9
    assert (await guess(guard)).headers["retry-after"] == "1"
    clock = 160.0
    assert (await guess(guard)).status == 401
    assert [record.getMessage() for record in caplog.records] == ["21 wrong tokens within 60 s from 10.0.0.1"]


async def test_guessing_from_many_addresses_fills_no_memory() -> None:
    """Only so many addresses are remembered; the oldest are forgotten first."""
    guard = guarded(token=TOKEN, now=lambda: 0.0, guesses=1)
    for number in range(5000):
        assert (await guess(guard, client=(f"10.0.{number >> 8}.{number & 255}", 1))).status == 401
    assert len(guard._guesses._counts) == guard_module.GUESSING_ADDRESSES
    assert (await guess(guard, client=("10.0.19.135", 1))).status == 429
    assert (await guess(guard, client=("10.0.0.0", 1))).status == 401


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "raw"),
    [
        ("http://127.0.0.1/jobs", None),  # absolute-form, as uvicorn passes it on
        ("*", None),
        ("jobs", None),
        ("/jobs/\x00", None),
        ("/jobs/\n", None),
        ("/jobs/\x1b[0m", None),
        ("/jobs/\ufffd", b"/jobs/%ff"),
        ("/jobs/\ufffd", b"/jobs/%C3%28"),
        ("/jobs/\ud800", None),
        ("/jobs/..", None),
        ("/assets/../jobs", None),
        ("/assets/../../etc/passwd", b"/assets/%2e%2e/..%2Fetc/passwd"),
        ("/./jobs", None),
        ("/jobs?é", None),
    ],
)
async def test_targets_that_can_not_be_read_are_refused(target: str, raw: bytes | None) -> None:
    """No path of its own, not UTF-8, or with what files and logs would trip over."""
    scope = scope_of(target.encode("utf-8", "surrogatepass").decode("utf-8", "replace"), headers={})
    scope = {**scope, "path": target.partition("?")[0], "raw_path": raw}
    answer = await call(guarded(unreached), scope)
    assert (answer.status, "can not be read" in answer.detail) == (400, True)


@pytest.mark.parametrize("target", ["/jobs/é", "/jobs/a b", "/jobs/..x", "/jobs/.x/y...", "/jobs?a=../%ff"])
async def test_odd_targets_that_are_sound_are_served(target: str) -> None:
    """UTF-8, blanks and dots in names are none of the guard's business, nor is what a query means."""
    scope = scope_of(target)
    assert (await call(guarded(), {**scope, "raw_path": scope["path"].encode()})).status == 200


async def test_long_targets_and_headers_are_refused() -> None:
    """8 KiB of target, 32 KiB of headers, 100 headers, and not a byte more."""
    guard = guarded()
    for target, status in [
        ("/" + "a" * 8191, 200),
        ("/" + "a" * 8192, 414),
        ("/?" + "a" * 8191, 200),
        ("/?" + "a" * 8192, 414),
    ]:
        assert (await call(guard, scope_of(target))).status == status
    own = len("host" + "127.0.0.1:8080")
    for headers, status in [
        ([("x", "y" * (32768 - own - 1))], 200),
        ([("x", "y" * (32768 - own))], 431),
        ([("x", "y")] * 99, 200),
        ([("x", "y")] * 100, 431),
    ]:
        assert (await call(guard, scope_of(headers=headers))).status == status


# --- the body ---------------------------------------------------------------------------------------------------------


async def post(app: ASGIApp, receive: Receive, headers: dict[str, str] | None = None, **options: Any) -> Answer:
    """A request with a body, chunked without other headers."""
    chunked = {"Transfer-Encoding": "chunked"} if headers is None else headers
    return await call(guarded(app, **options), scope_of(method="POST", headers=chunked), receive)


@pytest.mark.parametrize(
    "headers",
    [
        *(
            {"Content-Length": text}
            for text in ("", "x", "-1", "+1", "1.0", "1 0", "0x1", "1,1", "٣".encode().decode("latin-1"))
        ),
        {"Content-Length": "9" * 19},
        {"Content-Length": "3", "Transfer-Encoding": "chunked"},
    ],
)
async def test_a_body_that_is_not_clear_is_refused(headers: dict[str, str]) -> None:
    """A bad length, or two ways to say it (request smuggling): 400, and the connection is closed."""
    answer = await post(unreached, never, headers)
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert "where the body ends" in answer.detail


async def test_chunked_is_none_of_http_1_0() -> None:
    """Whoever stands in between may not know it."""
    scope = scope_of(method="POST", headers={"Transfer-Encoding": "chunked"}, http_version="1.0")
    assert (await call(guarded(unreached), scope)).status == 400


async def test_a_body_that_is_too_long_is_refused_at_once() -> None:
    """By its length, before a byte is read; the limit is the one for that request."""

    def limit(scope: Scope) -> int:
        return 10 if scope["path"] == "/jobs" else LIMIT

    for number, status in [(10, 200), (11, 413), (10**17, 413)]:
        receive = pieces(piece(b"x" * 10)) if status == 200 else never
        answer = await post(ECHO, receive, {"Content-Length": str(number)}, body_limit=limit)
        assert answer.status == status
        assert status == 200 or answer.detail == "the body is too long: at most 10 bytes"


async def test_a_body_that_becomes_too_long_is_refused_on_the_way() -> None:
    """Not a byte above the limit reaches the application; what it says to that is not sent."""
    whole = await post(ECHO, pieces(piece(b"x" * 600, more=True), piece(b"x" * 400)))
    assert (whole.status, whole.body) == (200, b"1000")
    for last in (piece(b"x" * 401), piece(b"x" * 401, more=True)):
        answer = await post(ECHO, pieces(piece(b"x" * 600, more=True), last))
        assert (answer.status, answer.detail) == (413, "the body is too long: at most 1000 bytes")


async def test_an_application_that_goes_on_gets_nothing_more_of_it() -> None:
    """It sees a client that has gone, as often as it asks; whatever it answers or raises, the client gets 413."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            assert await receive() == {"type": "http.disconnect"}
        await Response("ok")(scope, receive, send)

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise Problem(400, "that was no JSON")

    for one in (app, fails):
        assert (await post(one, pieces(piece(b"x" * 1001, more=True), piece(b"y")))).status == 413


async def test_an_answer_that_has_begun_is_not_replaced() -> None:
    """A body that is refused later only ends for the application."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        ended = await receive()
        await send({"type": "http.response.body", "body": ended["type"].encode()})

    answer = await post(app, pieces(piece(b"x" * 1001, more=True)))
    assert (answer.status, answer.body) == (200, b"http.disconnect")


def slow(loop_time: Callable[[], float], every_s: float, size: int, count: int) -> Receive:
    """A client that sends a piece of `size` bytes every so many seconds."""
    sent = 0

    async def receive() -> Message:
        nonlocal sent
        await asyncio.sleep(every_s)  # of virtual time
        sent += 1
        return piece(b"x" * size, more=sent < count)

    return receive


@pytest.mark.parametrize(
    ("every_s", "size", "count", "status", "after_s"),
    [
        (29.0, 1, 1, 200, 29.0),
        (31.0, 1, 1, 408, 30.0),  # nothing for too long
        (1.0, 10, 100, 200, 100.0),  # exactly as fast as it must be
        (1.0, 1, 1000, 408, 33.3),  # a byte now and then
        (0.5, 1, 60, 200, 30.0),  # slow, but short
    ],
)
def test_a_slow_body_is_refused(every_s: float, size: int, count: int, status: int, after_s: float) -> None:
    """No byte for 30 s, or fewer than 10 a second beyond that: 408, and the connection is closed."""

    async def main() -> tuple[Answer, float]:
        now = asyncio.get_running_loop().time
        receive = slow(now, every_s, size, count)
        return await post(ECHO, receive, now=now, body_least_bytes_per_s=10.0), now()

    answer, ended = run_virtual(main())
    assert (answer.status, round(ended, 6)) == (status, after_s)
    if status == 408:
        assert answer.headers["connection"] == "close"
        assert "too slowly" in answer.detail


async def test_only_the_clients_slowness_counts() -> None:
    """An application that takes long over each piece loses no client."""
    clock = 0.0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal clock
        while (await receive()).get("more_body"):
            clock += 1000.0
        await Response("ok")(scope, receive, send)

    receive = pieces(*[piece(b"x", more=True)] * 100, piece(b"x"))
    assert (await post(app, receive, now=lambda: clock)).status == 200


def test_what_waits_for_the_client_to_go_may_wait() -> None:
    """A stream of events that listens for its client's end does so for hours, with and without a body before."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await Response("ok")(scope, receive, send)

    def client() -> Receive:
        first = [piece(b"x")]

        async def receive() -> Message:
            if first:
                return first.pop()
            await asyncio.sleep(10_000)  # of virtual time
            return {"type": "http.disconnect"}

        return receive

    for headers in ({}, {"Content-Length": "1"}):
        assert run_virtual(post(app, client(), headers)).status == 200


async def test_a_client_that_goes_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of its body: no traceback, and no answer but what Starlette sends to nobody."""
    caplog.set_level(0)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    for headers in ({"Content-Length": "10"}, {"Transfer-Encoding": "chunked"}):
        receive = pieces(piece(b"x", more=True))
        await guarded(ECHO)(scope_of(method="POST", headers=headers), receive, send)
    assert [message["status"] for message in sent if "status" in message] == [500, 500]
    assert [record for record in caplog.records if record.name.startswith("async_recovery")] == []


# --- the answers ------------------------------------------------------------------------------------------------------


async def test_every_answer_has_the_headers_of_security() -> None:
    """Those of the application, its problems, and the guard's own refusals; each header once."""

    async def missing(request: Request) -> Response:
        raise Problem(404, "there is no such job", headers={"X-Own": "1"})

    app = Starlette(routes=[Route("/jobs", missing), Route("/fine", echo)], exception_handlers=dict(HANDLERS))
    guard = guarded(app, token=TOKEN)
    authorized = {"Authorization": f"Bearer {TOKEN}"}
    for scope, status in [
        (scope_of("/jobs", headers=authorized), 404),
        (scope_of("/jobs", "POST", headers=authorized), 405),
        (scope_of("/none", headers=authorized), 404),
        (scope_of("/fine", headers=authorized), 200),
        (scope_of("/jobs"), 401),
        (scope_of("/jobs", host=b"evil"), 421),
        (scope_of("/jobs", headers={"Origin": "null"}), 403),
        (scope_of("/jobs", "POST", headers={**authorized, "Content-Length": "1001"}), 413),
    ]:
        answer = await call(guard, scope, pieces(piece()))
        assert answer.status == status
        assert SECURITY.items() <= answer.headers.items()
        if status != 200:
            assert answer.detail
    assert (await call(guard, scope_of("/jobs", headers=authorized))).headers["x-own"] == "1"
    allowed = (await call(guard, scope_of("/jobs", "POST", headers=authorized))).headers["allow"]
    assert set(allowed.split(", ")) == {"GET", "HEAD"}


async def test_an_application_may_let_an_answer_be_kept() -> None:
    """Its own Cache-Control is the only one."""
    answer = await call(guarded(Response("x", headers={"Cache-Control": "max-age=60"})), scope_of())
    assert answer.headers["cache-control"] == "max-age=60"


async def test_an_error_that_nobody_foresaw(caplog: pytest.LogCaptureFixture) -> None:
    """500, with nothing of the error; the log has it, with its traceback, and the path in one line."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("secret")

    answer = await call(guarded(app), scope_of("/jobs/a b"))
    assert answer.status == 500
    assert "secret" not in str(answer)
    assert answer.detail
    assert SECURITY.items() <= answer.headers.items()
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "GET '/jobs/a b' failed")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_an_answer_that_breaks_off_is_the_servers_to_close() -> None:
    """An error in the middle of an answer goes on: what came so far must not look whole."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await call(guarded(app), scope_of())


async def test_an_error_within_starlette_is_a_problem_too() -> None:
    """`HANDLERS` has the answer; the error goes on to the log of the server."""

    async def broken(request: Request) -> Response:
        raise ValueError("secret")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    app = guarded(Starlette(routes=[Route("/jobs", broken)], exception_handlers=dict(HANDLERS)))
    with pytest.raises(ValueError, match="secret"):
        await app(scope_of(), pieces(piece()), send)
    assert sent[0]["status"] == 500
    assert (b"content-type", b"application/problem+json") in sent[0]["headers"]
    assert b"secret" not in sent[1]["body"]


async def test_a_problem_without_handlers_is_answered_too() -> None:
    """One that an application of any kind lets through."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise Problem(409, "the job has ended", title="Too late", headers={"X-Own": "1"})

    answer = await call(guarded(app), scope_of())
    assert (answer.status, answer.detail, answer.headers["x-own"]) == (409, "the job has ended", "1")
    assert b'"title":"Too late"' in answer.body


# --- other scopes, other places ---------------------------------------------------------------------------------------


async def test_lifespan_goes_through_and_websockets_do_not() -> None:
    """The application starts and ends with the server; a websocket is closed before it opens."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope, receive, send))

    async def send(message: Message) -> None:
        seen.append(message)

    scope = {"type": "lifespan"}
    await guarded(app)(scope, never, send)
    await guarded(app)({"type": "websocket", "path": "/", "headers": []}, never, send)
    assert seen == [(scope, never, send), {"type": "websocket.close", "code": 1008}]


async def test_mounted_it_guards_what_is_below() -> None:
    """Within another application, its paths are relative to where it is mounted; no other path is its business."""
    inner = Guard(ECHO, hosts=None, token=TOKEN, body_limit=lambda scope: LIMIT)
    outer = Starlette(routes=[Route("/jobs", echo), Mount("/recovery", inner)])
    own = await call(outer, scope_of("/jobs"), pieces(piece()))
    assert (own.status, "content-security-policy" in own.headers) == (200, False)
    assert (await call(outer, scope_of("/recovery/healthz"))).status == 404  # open, but not there
    assert (await call(outer, scope_of("/recovery/jobs"))).status == 401
    authorized = {"Authorization": f"Bearer {TOKEN}"}
    assert (await call(outer, scope_of("/recovery/jobs", headers=authorized), pieces(piece()))).body == b"0"
