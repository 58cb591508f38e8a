"""Requests to an ASGI application without a server: a receive and a send that the test plays."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
from starlette.types import ASGIApp, Message, Scope

HOST = b"127.0.0.1:8080"


class Answer(NamedTuple):
    """What an application has sent. A header that comes twice is joined by " | "."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        """What the problem says, which must be one."""
        assert self.headers["content-type"] == "application/problem+json"
        found = msgspec.json.decode(self.body, type=dict[str, Any])
        assert (found["type"], found["status"]) == ("about:blank", self.status)
        assert found["title"]
        return str(found["detail"])


def scope_of(
    target: str = "/jobs",
    method: str = "GET",
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    *,
    host: bytes | None = HOST,
    **others: Any,
) -> Scope:
    """The scope of a request."""
    path, _, query = target.partition("?")
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    found = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
    return {
        "type": "http",
        "method": method,
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "client": ("127.0.0.1", 50000),
        "headers": [*([] if host is None else [(b"host", host)]), *found],
        **others,
    }


def piece(body: bytes = b"", *, more: bool = False) -> Message:
    """A piece of a request's body."""
    return {"type": "http.request", "body": body, "more_body": more}


async def never() -> Message:
    """A client that sends nothing, and stays."""
    raise AssertionError("nothing was to be received")


async def call(app: ASGIApp, scope: Scope, receive: Callable[[], Awaitable[Message]] = never) -> Answer:
    """The whole answer, which must be one: begun once, ended once."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *pieces = sent
    assert start["type"] == "http.response.start"
    assert [message.get("more_body", False) for message in pieces] == [True] * (len(pieces) - 1) + [False]
    headers: dict[str, str] = {}
    for name, value in start["headers"]:
        before = headers.get(name.decode())
        headers[name.decode()] = value.decode() if before is None else f"{before} | {value.decode()}"
    return Answer(start["status"], headers, b"".join(message["body"] for message in pieces))
