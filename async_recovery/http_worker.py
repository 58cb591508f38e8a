"""The built-in worker ``http``: GETs each item, with one session of aiohttp for the whole run (extra ``http``)."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from .errors import SlowDown, UsageError, check_number
from .files import DISK, write_all
from .workers import Session, SessionWorker

if TYPE_CHECKING:
    import aiohttp

KEEP_HEADERS = ("content-type",)
MAX_BODY_BYTES = 10 << 20
MAX_PAUSE_S = 3600.0  # a server may ask for a pause, but not for the end of the job
CONNECT_S, SILENCE_S = 30.0, 300.0  # without a --timeout
_WHOLE_URL = re.compile(r"https?://[^/?#]", re.IGNORECASE)
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class HttpFailed(Exception):
    """The server's answer is no success, or too long. The message is the same in each run."""


class HttpWorker(SessionWorker):
    """GETs an item: a URL, or an object with a field ``url``.

    The result is ``{"url", "status", "headers", "body"}``. The body is text, by the charset that the answer names, else
    UTF-8; bytes that are none are written as ``\\xff``. With `save_dir`, it is ``{"url", "status", "headers", "file",
    "bytes"}`` instead, where the file in `save_dir` is named by the URL alone: two items with one URL have one file.
    The file is durable before the result counts.

    Any status but 2xx, after redirects, is a failure. A 429 or 503 with Retry-After makes the whole run pause, for an
    hour at most.

    :param keep_headers: headers of the answer that go into the record; others, such as Date, differ from run to run.
        One that comes several times is joined by ", "; Set-Cookie, whose values hold commas, is always a list.
    :param save_dir: folder for the bodies; made if it is not there.
    :param max_body_bytes: a longer answer is a failure.
    :raises UsageError: if aiohttp is not installed.
    """

    def __init__(
        self,
        *,
        keep_headers: Iterable[str] = KEEP_HEADERS,
        save_dir: str | os.PathLike[str] | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        check_number("max_body_bytes (--max-output)", max_body_bytes, least=0)
        try:
            import aiohttp  # noqa: F401
        except ImportError as error:
            raise UsageError("the worker http needs aiohttp: pip install 'async-recovery[http]'") from error
        self.keep_headers = sorted({name.lower() for name in keep_headers})
        self.save_dir = None if save_dir is None else os.fsdecode(save_dir)
        if self.save_dir == "":
            raise UsageError("save_dir (--save-dir) is '': name a folder")
        self.max_body_bytes = max_body_bytes
        words = ["http"]
        if self.keep_headers != sorted(KEEP_HEADERS):
            words += [word for name in self.keep_headers for word in ("--keep-header", name)]
        if self.save_dir is not None:
            words += ["--save-dir", self.save_dir]
        self.name = shlex.join(words)

    def begin(self) -> Session:
        return _Http(self)


class _Http(Session):
    """The session of one run; opened with its first item."""

    def __init__(self, worker: HttpWorker) -> None:
        self._worker = worker
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, item: Any) -> dict[str, Any]:
        import aiohttp

        url = item.get("url") if isinstance(item, Mapping) else item
        if not isinstance(url, str):
            raise ValueError("the item is neither a URL nor an object with a field url")
        if not _WHOLE_URL.match(url):
            raise ValueError("the URL is not whole: put https:// (or http://) and the name of the server in front")
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        async with self._session.get(url) as answer:
            if answer.status in (429, 503) and (pause_s := retry_after(answer.headers, time.time())) is not None:
                raise SlowDown(pause_s)
            if not 200 <= answer.status < 300:
                raise HttpFailed(f"the server answered with status {answer.status}")
            body = await self._read(answer)
            kept = {
                name: _kept(name, found)
                for name in self._worker.keep_headers
                if (found := answer.headers.getall(name, []))
            }
            result = {"url": url, "status": answer.status, "headers": kept}
            if self._worker.save_dir is None:
                return {**result, "body": _decode(body, answer.charset)}
        name = safe_name(url)
        await asyncio.to_thread(write_whole, self._worker.save_dir, name, body)
        return {**result, "file": name, "bytes": len(body)}

    async def _read(self, answer: aiohttp.ClientResponse) -> bytearray:
        body = bytearray()
        async for block in answer.content.iter_any():
            body += block
            if len(body) > self._worker.max_body_bytes:
                raise HttpFailed(f"the answer has more than {self._worker.max_body_bytes} bytes (--max-output)")
        return body

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """The pause that an answer asks for, in seconds, an hour at most; None if it asks for none.

    :param now: seconds since the epoch, for a pause that ends at a date.
    """
    text = headers.get("Retry-After", "").strip()
    try:
        pause_s = float(text)
    except ValueError:
        try:
            pause_s = parsedate_to_datetime(text).timestamp() - now
        except ValueError:
            return None
    return min(max(pause_s, 0.0), MAX_PAUSE_S) if pause_s == pause_s else None


def safe_name(url: str) -> str:
    """The name of a URL's file: what can be read of it in letters, digits and ``-._``, and a hash of all of it.

    It begins with a letter or a digit and has no slash, at most 100 characters, and names differ where URLs do.
    """
    digest = sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    path = re.sub(r"^[A-Za-z]+://", "", url).split("?")[0].split("#")[0]
    stem = _UNSAFE.sub("-", path).strip("-.")
    suffix = os.path.splitext(path.rpartition("/")[2])[1] if "/" in path else ""
    suffix = suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", suffix) else ""
    stem = stem.removesuffix(suffix)
    return f"{stem[:60].strip('-.') or 'page'}-{digest}{suffix}"


def write_whole(folder: str, name: str, body: bytes | bytearray) -> None:
    """The file is there as a whole, durably, or not at all. What a kill leaves of it is overwritten by the next try.

    One writer of a name at a time, the others wait: two items can have one URL, also those of two processes, and a
    cancelled item goes on here.
    """
    os.makedirs(folder, exist_ok=True)
    path, part = os.path.join(folder, name), os.path.join(folder, f".{name}.part")
    descriptor = _open_alone(part)
    try:
        DISK.truncate(descriptor, 0)
        write_all(DISK, descriptor, body, 0)
        DISK.fsync(descriptor)
        DISK.rename(part, path)  # while it is locked
    finally:
        DISK.close(descriptor)
    DISK.fsync_directory(folder)


def _open_alone(path: str) -> int:
    """A descriptor of the file at `path`, locked; whoever had it before may have given it another name meanwhile."""
    while True:
        descriptor = DISK.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            there = DISK.lstat(path)
            if there is not None and os.path.samestat(there, DISK.stat(descriptor)):
                return descriptor
        except BaseException:
            DISK.close(descriptor)
            raise
        DISK.close(descriptor)


def _kept(name: str, values: list[str]) -> str | list[str]:
    """A header that comes several times is one with commas (RFC 9110, 5.3), but for Set-Cookie, which can not be."""
    return values if name == "set-cookie" else ", ".join(values)


def _decode(body: bytearray, charset: str | None) -> str:
    try:
        return body.decode(charset or "utf-8", "backslashreplace")
    except (LookupError, UnicodeError):  # there is no such charset, or it is one of Python's that are not for texts
        return body.decode("utf-8", "backslashreplace")
