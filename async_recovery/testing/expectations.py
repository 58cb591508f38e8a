"""How a suite says what must hold: without pytest, and with what was found in the message."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

Self = TypeVar("Self")


def on_a_loop(test: Callable[[Self], Awaitable[None]]) -> Callable[[Self], None]:
    """A test that is written as a coroutine function, and runs on a new loop."""

    @functools.wraps(test)
    def run(self: Self) -> None:
        asyncio.run(_awaited(test(self)))

    del run.__wrapped__  # it is no coroutine function, whoever asks
    return run


async def _awaited(test: Awaitable[None]) -> None:
    await test


def expect(found: Any, expected: Any, what: str) -> None:
    """:raises AssertionError: if they are not equal; it says what must hold."""
    if found != expected:
        raise AssertionError(f"{what}: found {found!r}, expected {expected!r}")


def expect_true(found: bool, what: str) -> None:
    """:raises AssertionError: if it is not so; it says what must hold."""
    if not found:
        raise AssertionError(what)


@contextlib.contextmanager
def expect_error(kind: type[BaseException], what: str) -> Iterator[None]:
    """:raises AssertionError: if that error is not raised within."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{what}: {kind.__name__} was expected, and nothing was raised")
