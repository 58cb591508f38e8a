"""An event loop on a clock of its own: when nothing can run, it is at once the time of the next timer.

Threads are real: while a job runs on one, the loop waits for it and the clock stands still.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Crash(BaseException):
    """The process dies here: nothing after it runs."""


class _Selector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """Waits only for real events: until then the loop's clock is moved on."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        loop = self.loop
        loop.step()
        if timeout is None or loop.jobs:
            ready = super().select(None if loop.jobs or timeout is None else 0)
        else:
            ready = super().select(0)
            if not ready:
                loop.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop. `on_step` is called before each round of callbacks."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now = 0.0
        self.jobs = 0
        self.steps = 0
        self.on_step: Callable[[int], None] | None = None
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def step(self) -> None:
        self.steps += 1
        if self.on_step is not None:
            self.on_step(self.steps)

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        return super().call_soon_threadsafe(*args, **kwargs)
