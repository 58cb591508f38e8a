"""The output of a job over HTTP: what of it is committed, whole or a range of it."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from typing import Any

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import UsageError
from ..status import read_status
from .problems import Problem

BLOCK_BYTES = 256 << 10
TRIES = 3
_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{1,18})?|-(\d{1,18}))")
MEDIA_TYPE = "application/x-ndjson"


class Opened(msgspec.Struct, frozen=True):
    """An output: a descriptor (None: there is nothing yet), how many bytes of it count, and whether it is complete."""

    descriptor: int | None
    size: int
    is_whole: bool = False

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    @property
    def tag(self) -> str:
        """Tells it from all others."""
        if self.descriptor is None:
            return '"empty"'
        there = os.fstat(self.descriptor)
        return f'"{there.st_ino:x}-{there.st_mtime_ns:x}-{self.size:x}"'


NOTHING = Opened(None, 0)


def where_of(path: str, committed: int | None) -> tuple[str, int | None]:
    """Where an output lies now, and how many bytes of it count; None: all.

    :param path: of the complete output. :param committed: how much of the partial one counts, where a run knows that.
    """
    partial = f"{path}.partial"
    if committed is not None and os.path.exists(partial):
        return partial, committed
    if os.path.exists(path):
        return path, None
    try:
        return partial, read_status(path).output_bytes or 0
    except UsageError:
        return partial, 0  # nothing has begun


def open_output(path: str, committed: int | None) -> Opened:
    """Open the output, whether it is complete or not."""
    for _ in range(TRIES):
        where, size = where_of(path, committed)
        try:
            descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # there is none, or it has just got its own name
            continue
        there = os.fstat(descriptor).st_size
        return Opened(descriptor, there if size is None else min(size, there), size is None)
    return NOTHING


async def output_response(request: Request, opened: Opened, name: str) -> Response:
    """The answer: all of it, a range, or that it has not changed. It closes what is opened."""
    tag = opened.tag
    headers = {
        "accept-ranges": "bytes",
        "etag": tag,
        "cache-control": "no-cache",
        "content-disposition": f'attachment; filename="{name}"',
    }
    if request.headers.get("if-none-match") == tag:
        opened.close()
        return Response(None, 304, headers)
    asked: Any = request.headers.get("range") if request.headers.get("if-range", tag) == tag else None
    first, end, status = _range_of(asked, opened.size)
    if first >= end and status == 206:
        opened.close()
        raise Problem(416, "the range begins behind the end", headers={"content-range": f"bytes */{opened.size}"})
    if status == 206:
        headers["content-range"] = f"bytes {first}-{end - 1}/{opened.size}"
    headers["content-length"] = str(end - first)
    if request.method == "HEAD":
        opened.close()
        return Response(None, status, headers, media_type=MEDIA_TYPE)
    return _Streamed(opened, _blocks(opened, first, end), status, headers)


def _range_of(asked: str | None, size: int) -> tuple[int, int, int]:
    """First byte, the one after the last, and the status. Several ranges, or what is none: all of it."""
    found = _RANGE.fullmatch(asked or "")
    if found is None:
        return 0, size, 200
    first, last, suffix = (None if text is None else int(text) for text in found.groups())
    if suffix is not None:
        return max(0, size - suffix), size if suffix else 0, 206
    assert first is not None
    if last is not None and last < first:
        return 0, size, 200
    return first, size if last is None else min(size, last + 1), 206


class _Streamed(StreamingResponse):
    """An answer that closes the output, also where nobody has taken the first block of it."""

    def __init__(self, opened: Opened, blocks: AsyncIterator[bytes], status: int, headers: dict[str, str]) -> None:
        super().__init__(blocks, status, headers, media_type=MEDIA_TYPE)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._opened.close()


async def _blocks(opened: Opened, first: int, end: int) -> AsyncIterator[bytes]:
    while first < end:
        assert opened.descriptor is not None
        block = await anyio.to_thread.run_sync(os.pread, opened.descriptor, min(BLOCK_BYTES, end - first), first)
        if not block:
            raise OSError("the output is shorter than what was committed")
        yield block
        first += len(block)
