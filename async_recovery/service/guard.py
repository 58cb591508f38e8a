"""What stands in front of the service: no request reaches it that is too large, too slow, or from the wrong place.

`Guard` is pure ASGI. In this order it asks of a request: is its head sound and of a bearable size; does it name this
service as its host (DNS rebinding); does it come from a page of another site; does it carry the token; is its body
announced in one way, and not too long. What is wrong is answered with a `Problem`, and goes no further.

A body is counted and timed while the application reads it. One that is too long or too slow looks to the application
like a client that has gone; whatever it answers to that, the client gets 413 or 408. Only the time counts in which the
application waits for the client, not the other way round.

It never gives a CORS header, so no page of another site can read an answer. Neither a token nor any other header is
ever logged. How long a client may take for the head of a request is the server's part: see `connection`.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from math import ceil
from urllib.parse import unquote_to_bytes

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import shorten
from .listen import EVERY_ADDRESS
from .problems import Problem, unforeseen

logger = logging.getLogger("async_recovery.service")

MAX_TARGET_BYTES = 8 << 10
MAX_HEADER_BYTES = 32 << 10
MAX_HEADERS = 100
BODY_IDLE_S = 30.0
BODY_LEAST_BYTES_PER_S = 1024.0
GUESSES = 20
GUESS_WINDOW_S = 60.0
GUESSING_ADDRESSES = 1024  # how many are remembered
KNOWN_HOSTS = 64  # how many spellings of allowed hosts are remembered

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)
NO_STORE = (b"cache-control", b"no-store")

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_VERSIONS = frozenset({"1.0", "1.1", "2", "3"})
_OWN_SITE = frozenset({b"same-origin", b"none"})  # none: typed in, or a bookmark
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+?)\.?(?::[0-9]{0,5})?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_READ = frozenset(
    {
        *(b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode"),
        *(b"authorization", b"content-length", b"transfer-encoding"),
    }
)

Headers = dict[bytes, bytes]
"""The headers that the guard reads, of one request, by their names in lower case."""


class Guard:
    """The middleware.

    :param app: what it stands in front of.
    :param hosts: the names and addresses, without a port, by which the service may be called, IPv6 in brackets; with
        "0.0.0.0" or "[::]" among them also any IP address. None: not asked; an outer server must do it.
    :param token: what every request must carry as ``Authorization: Bearer TOKEN``, but those for ``/``, ``/assets/…``
        and ``/healthz``; None: none.
    :param body_limit: the most bytes that the body of a request may have, given its scope.
    :param now: a clock in seconds.
    :param body_idle_s: how long to wait for the next byte of a body.
    :param body_least_bytes_per_s: of a body that takes longer than `body_idle_s` in all.
    :param guesses: wrong tokens from one address within `guess_window_s` seconds that are answered with 401.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str] | None,
        token: str | None,
        body_limit: Callable[[Scope], int],
        now: Callable[[], float] = time.monotonic,
        body_idle_s: float = BODY_IDLE_S,
        body_least_bytes_per_s: float = BODY_LEAST_BYTES_PER_S,
        guesses: int = GUESSES,
        guess_window_s: float = GUESS_WINDOW_S,
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else _Hosts(hosts)
        self._digest = None if token is None else sha256(token.encode()).digest()
        self._body_limit = body_limit
        self._now = now
        self._body_idle_s = body_idle_s
        self._body_least_bytes_per_s = body_least_bytes_per_s
        self._guesses = _Guesses(guesses, guess_window_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":  # lifespan
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            body = answer.body = self._admit(scope, receive)
        except Problem as problem:
            await problem.response()(scope, receive, answer)
            return
        try:
            await self._app(scope, receive if body is None else body, answer)
        except ClientDisconnect:
            pass  # it has gone, or its body was refused
        except Exception as error:
            if answer.started:
                raise  # an answer that breaks off must not look whole: the server closes the connection, and logs
            if not isinstance(error, Problem):
                logger.exception("%s %s failed", scope["method"], shorten(scope["path"]))
            if body is None or body.refused is None:
                found = error if isinstance(error, Problem) else unforeseen()
                await found.response()(scope, receive, answer)
        if body is not None and body.refused is not None and not answer.started:
            answer.body = None
            await body.refused.response()(scope, receive, answer)

    def _admit(self, scope: Scope, receive: Receive) -> _Body | None:
        """Its body, if it may have one; None if it has none.

        :raises Problem: if the request must not reach the application.
        """
        headers = _head(scope)
        if self._hosts is not None:
            self._hosts.check(headers)
        _check_site(scope["method"], headers)
        if self._digest is not None and not _is_open(scope):
            self._check_token(scope, headers)
        length = _body_length(scope, headers)
        if length == 0:
            return None
        limit = self._body_limit(scope)
        if length is not None and length > limit:
            raise _too_long(limit)
        return _Body(receive, limit, self._now, self._body_idle_s, self._body_least_bytes_per_s)

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            raise _unauthorized("this needs a token: send the header Authorization: Bearer TOKEN", "")
        assert self._digest is not None
        # Hashes of one length: the time tells nothing of the token, nor of how long it is.
        if hmac.compare_digest(sha256(given.strip(b" ")).digest(), self._digest):
            return
        client = scope.get("client")
        wait_s = self._guesses.add(client[0] if client else "", self._now())
        if wait_s is not None:
            raise Problem(
                429,
                "too many wrong tokens came from this address; wait, or send the right one",
                headers={"Retry-After": str(ceil(wait_s))},
            )
        raise _unauthorized(
            "the token is wrong; send the one that the service was started with", ', error="invalid_token"'
        )


class _Answer:
    """The sending side of one request: adds the headers that every answer has.

    :ivar started: whether the answer has begun.
    :ivar body: of the request: once that is refused, nothing of the application's answer goes out, unless it had begun.
    """

    __slots__ = ("_send", "body", "started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.body: _Body | None = None

    async def __call__(self, message: Message) -> None:
        if not self.started:
            if self.body is not None and self.body.refused is not None:
                return
            if message["type"] == "http.response.start":
                self.started = True
                headers = [*message.get("headers", ()), *SECURITY_HEADERS]
                if not any(name == b"cache-control" for name, _ in headers):
                    headers.append(NO_STORE)
                message = {**message, "headers": headers}
        await self._send(message)


class _Body:
    """The receiving side of a request that has a body: counts it, and times it.

    :ivar refused: why the body was refused; None as long as it was not.
    """

    __slots__ = (
        "_bytes",
        "_idle_s",
        "_least_bytes_per_s",
        "_limit",
        "_now",
        "_receive",
        "_waited_s",
        "_whole",
        "refused",
    )

    def __init__(
        self, receive: Receive, limit: int, now: Callable[[], float], idle_s: float, least_bytes_per_s: float
    ) -> None:
        self._receive = receive
        self._limit = limit
        self._now = now
        self._idle_s = idle_s
        self._least_bytes_per_s = least_bytes_per_s
        self._bytes = 0
        self._waited_s = 0.0
        self._whole = False
        self.refused: Problem | None = None

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        if self.refused is not None:
            return {"type": "http.disconnect"}
        began = self._now()
        try:
            async with asyncio.timeout(min(self._idle_s, self._left_s())):
                message = await self._receive()
        except TimeoutError:
            return self._refuse(_too_slow())
        self._waited_s += self._now() - began
        if message["type"] != "http.request":
            return message
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limit:
            return self._refuse(_too_long(self._limit))
        self._whole = not message.get("more_body", False)
        if not self._whole and self._left_s() < 0:
            return self._refuse(_too_slow())
        return message

    def _left_s(self) -> float:
        """How long the client may still let the application wait, if nothing more comes."""
        return self._idle_s + self._bytes / self._least_bytes_per_s - self._waited_s

    def _refuse(self, problem: Problem) -> Message:
        self.refused = problem
        return {"type": "http.disconnect"}


class _Hosts:
    """The hosts by which the service may be called."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name.lower().encode() for name in names}
        self._any_address = any(every.encode() in self._names for every in EVERY_ADDRESS)
        self._known: set[bytes] = set()

    def check(self, headers: Headers) -> None:
        """:raises Problem: if the header Host is missing, not sound, or does not name this service."""
        given = headers.get(b"host", b"")
        if given in self._known:
            return
        found = _HOST.fullmatch(given)
        if found is None:
            raise Problem(400, "the request has no sound Host header; send the one of the address that was asked for")
        name = found[1].lower()
        if name not in self._names and not (self._any_address and _is_address(name)):
            raise Problem(
                421,
                f"this service is not {shorten(name.decode())}; call it by its own name, or start it with --allow-host",
            )
        if len(self._known) < KNOWN_HOSTS:
            self._known.add(given)


class _Guesses:
    """Wrong tokens by the address that they came from; of a bounded number of addresses, the last ones."""

    def __init__(self, allowed: int, window_s: float) -> None:
        self._allowed = allowed
        self._window_s = window_s
        self._counts: dict[str, tuple[float, int]] = {}  # since when, how many

    def add(self, address: str, now: float) -> float | None:
        """Count one. How long the address has to wait, in seconds, if it has guessed too often; else None."""
        since, count = self._counts.get(address, (now, 0))
        if now - since >= self._window_s:
            since, count = now, 0
        if address not in self._counts and len(self._counts) >= GUESSING_ADDRESSES:
            del self._counts[next(iter(self._counts))]
        self._counts[address] = since, count + 1
        if count < self._allowed:
            return None
        if count == self._allowed:
            logger.warning("%d wrong tokens within %g s from %s", count + 1, self._window_s, address)
        return since + self._window_s - now


def _head(scope: Scope) -> Headers:
    """The headers that the guard reads.

    :raises Problem: if the target or the headers are too long or not sound.
    """
    if scope["http_version"] not in _VERSIONS:
        raise Problem(400, "this is no version of HTTP that is known here; use 1.1")
    path, raw_path = scope["path"], scope.get("raw_path") or scope["path"].encode("utf-8", "surrogatepass")
    if len(raw_path) + len(scope["query_string"]) > MAX_TARGET_BYTES:
        raise Problem(414, f"the address is too long: at most {MAX_TARGET_BYTES} bytes")
    if path[:1] not in ("/", "") or not path.isprintable() or not scope["query_string"].isascii():
        raise _bad_target()
    if b"%" in raw_path:
        try:
            unquote_to_bytes(raw_path).decode()
        except UnicodeDecodeError:
            raise _bad_target() from None
    if "/." in path and not {".", ".."}.isdisjoint(path.split("/")):
        raise _bad_target()
    total, found = 0, Headers()
    for name, value in scope["headers"]:
        total += len(name) + len(value)
        if name in _READ:
            if name in found:
                raise Problem(400, f"the header {name.decode()} came twice; send it once")
            found[name] = value
    if total > MAX_HEADER_BYTES or len(scope["headers"]) > MAX_HEADERS:
        raise Problem(431, f"the headers are too long: at most {MAX_HEADERS}, with {MAX_HEADER_BYTES} bytes in all")
    return found


def _check_site(method: str, headers: Headers) -> None:
    """:raises Problem: if a page of another site has sent the request, and does more than lead to this one.

    Browsers tell by Sec-Fetch-Site, where they hold the service's address to be trustworthy (loopback, https); else by
    Origin. Other clients send neither. A request with a foreign Origin is refused whatever its method: its page could
    not read the answer anyway.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if origin is not None and (origin.partition(b"://")[2].lower() or origin) != headers.get(b"host", b"").lower():
        raise _cross_site()  # "null", too, which stands for no page that is ours
    if site is None or site in _OWN_SITE:
        return
    if method not in _SAFE_METHODS or headers.get(b"sec-fetch-mode") != b"navigate":
        raise _cross_site()


def _is_open(scope: Scope) -> bool:
    """Whether the request needs no token: the page, which asks for it, and what says that the service lives."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in ("/", "", "/healthz") or path.startswith("/assets/")


def _body_length(scope: Scope, headers: Headers) -> int | None:
    """How many bytes the body has, 0 if there is none; None if only its end will tell.

    :raises Problem: if the request does not say it in one way. Where its body ends is then in doubt.
    """
    length, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if coding is not None:
        if length is not None or scope["http_version"] == "1.0":
            raise _bad_framing()
        return None
    if length is None:
        return 0 if scope["http_version"].startswith("1") else None
    if not _LENGTH.fullmatch(length):
        raise _bad_framing()
    return int(length)


def _is_address(name: bytes) -> bool:
    try:
        ipaddress.ip_address(name.decode().strip("[]"))
    except ValueError:
        return False
    return True


def _bad_target() -> Problem:
    return Problem(
        400, "the address can not be read: give a path that is UTF-8, percent-encoded, without . and .. in it"
    )


def _bad_framing() -> Problem:
    detail = "where the body ends is not clear: send Content-Length, a number, or Transfer-Encoding, not both"
    return Problem(400, detail, headers={"Connection": "close"})


def _cross_site() -> Problem:
    return Problem(403, "the request comes from a page of another site; use the page of this service, or no browser")


def _unauthorized(detail: str, error: str) -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": f'Bearer realm="async-recovery"{error}'})


def _too_long(limit: int) -> Problem:
    return Problem(413, f"the body is too long: at most {limit} bytes")


def _too_slow() -> Problem:
    return Problem(408, "the body came too slowly; send it again", headers={"Connection": "close"})
