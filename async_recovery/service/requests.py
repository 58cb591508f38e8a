"""What may be asked of the service, and how a body is read. All that does not fit is told as a `Problem`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import msgspec
from starlette.requests import Request

from .jobs import STATES, JobOptions, State
from .problems import Problem

T = TypeVar("T")

MOST_ITEMS = 1_000_000
LONGEST_KEY = 200
MOST_AT_ONCE = 500


class InputRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the items are: one of the three.

    :ivar path: of a file, relative to the service's folder.
    :ivar items: any JSON values. :ivar upload: the id of one.
    :ivar format: of a file; None: by its suffix, else text.
    """

    path: str | None = None
    items: list[msgspec.Raw] | None = None
    upload: str | None = None
    format: Literal["text", "lines", "jsonl", "csv", "tsv"] | None = None


class JobRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job to be made.

    :ivar options: `JobOptions`.
    """

    worker: str
    input: InputRequest
    options: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ChangeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is to change while a job runs. A rate of null lifts it."""

    concurrency: int | msgspec.UnsetType = msgspec.UNSET
    rate: float | msgspec.UnsetType | None = msgspec.UNSET


class Room:
    """The bytes of JSON bodies that are held at once, by all requests together."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0

    @contextlib.contextmanager
    def for_one(self) -> Iterator[Callable[[int], None]]:
        """For one request: a function that takes so many bytes more; all are given back at the end.

        :raises Problem: (the function) if there is no room for them.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self._held + size > self._most:
                raise Problem(429, "too much is being sent at once: send it again", headers={"retry-after": "5"})
            self._held += size
            taken += size

        try:
            yield take
        finally:
            self._held -= taken


async def body_of(request: Request, kind: type[T], take: Callable[[int], None]) -> tuple[T, bytes]:
    """The body of a request, read as `kind`; and as it came.

    :param take: of its `Room`.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem(415, "the body must be JSON, and say so: Content-Type: application/json")
    blocks = []
    async for block in request.stream():
        take(len(block))
        blocks.append(block)
    body = b"".join(blocks)
    with _telling("the body"):
        return msgspec.json.decode(body, type=kind), body


def options_of(wanted: JobRequest) -> JobOptions:
    """The options of a job that is to be made."""
    with _telling("options"):
        return msgspec.convert(_whole(msgspec.json.decode(wanted.options)) if wanted.options else {}, JobOptions)


async def change_of(request: Request, take: Callable[[int], None]) -> dict[str, Any]:
    """What is to change, by name."""
    found, _ = await body_of(request, object, take)
    with _telling("the body"):
        wanted = msgspec.convert(_whole(found), ChangeRequest)
    changes = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not msgspec.UNSET}
    if not changes:
        raise Problem(422, "there is nothing to change: give concurrency, rate, or both")
    return changes


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except msgspec.ValidationError as error:
        raise Problem(422, f"{what} is not what is expected: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"{what} is no JSON: {error}") from None


def _whole(value: Any) -> Any:
    """The same with 16 for 16.0: JSON knows no difference, and some programs write all numbers like that."""
    if isinstance(value, dict):
        return {name: _whole(inner) for name, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


async def no_body(request: Request) -> None:
    """What an action is told in its path alone: a body is not read, but must not be too long."""
    async for _ in request.stream():
        pass


def read_job_request(wanted: JobRequest) -> None:
    """:raises Problem: if it names no input, or more than one; or too many items."""
    given = [name for name in ("path", "items", "upload") if getattr(wanted.input, name) is not None]
    if len(given) != 1:
        raise Problem(422, "input must have one of path, items and upload, and only that")
    if wanted.input.items is not None:
        if len(wanted.input.items) > MOST_ITEMS:
            raise Problem(
                413, f"{len(wanted.input.items)} items: at most {MOST_ITEMS} may come in a body; upload a file"
            )
        if wanted.input.format is not None:
            raise Problem(422, "format belongs to path and upload: items are JSON values")


def lines_of(items: list[msgspec.Raw]) -> bytes:
    """Items as JSON Lines, each as it was written but for white space between its parts."""
    lines = bytearray()
    for item in items:
        lines += msgspec.json.format(bytes(item), indent=-1)
        lines += b"\n"
    return bytes(lines)


def key_of(request: Request) -> str | None:
    """The Idempotency-Key."""
    key: str | None = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= LONGEST_KEY and key.isascii() and key.isprintable()):
        raise Problem(400, f"Idempotency-Key must be 1 to {LONGEST_KEY} printable characters of ASCII")
    return key


def number_of(request: Request, name: str, default: int, most: int, *, least: int = 0) -> int:
    """A whole number out of the query."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise Problem(400, f"{name} must be a whole number from {least} to {most}")
    return int(text)


def state_of(request: Request) -> State | None:
    """A state out of the query."""
    state: Any = request.query_params.get("state")
    if state is None or state in STATES:
        return state  # type: ignore[no-any-return]
    raise Problem(400, f"state must be one of {', '.join(STATES)}")


def check_query(request: Request, *names: str) -> None:
    """:raises Problem: if the query has anything else, or the same twice."""
    given = [name for name, _ in request.query_params.multi_items()]
    strange = [name for name in given if name not in names]
    if strange or len(set(given)) < len(given):
        allowed = ", ".join(names) or "nothing"
        raise Problem(400, f"the query may have {allowed}, each once")
