"""Answers that say what is wrong: ``application/problem+json`` (RFC 9457).

A `Problem` is raised wherever a request is found wanting. `HANDLERS` makes a Starlette application answer with problems
only, its own 404 and 405 and what was not foreseen among them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """What is wrong with a request, for whoever sent it.

    :ivar status: the HTTP status.
    :ivar detail: what was found, what was expected, what to do. Nothing secret: it is the answer's body.
    :ivar title: the kind of problem, the same for each; without one, the phrase of the status.
    :ivar headers: headers of the answer.
    """

    def __init__(
        self, status: int, detail: str, *, title: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.title = HTTPStatus(status).phrase if title is None else title
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The answer."""
        body = {"type": "about:blank", "title": self.title, "status": self.status, "detail": self.detail}
        return Response(msgspec.json.encode(body), self.status, self.headers, media_type=MEDIA_TYPE)


def unforeseen() -> Problem:
    """The problem of an error that nobody foresaw: nothing of the error itself, which the log has."""
    return Problem(500, "the server failed at this request; its log says why")


async def _foreseen(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _of_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Problem(error.status_code, error.detail, headers=error.headers).response()


async def _unforeseen(request: Request, error: Exception) -> Response:
    return unforeseen().response()


HANDLERS: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    Problem: _foreseen,
    HTTPException: _of_starlette,
    Exception: _unforeseen,
}
"""For ``Starlette(exception_handlers=HANDLERS)``. The last leaves the error itself to the server's log."""
