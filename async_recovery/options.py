"""How a run behaves: every argument but the worker, the items and where things lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from .errors import UsageError, check_number, shorten
from .executors import Executor, check_executor
from .policies import RateLimit, Record, Retry
from .progress import Progress
from .workers import is_async

MAX_CONCURRENCY = 100_000  # each takes some kilobytes at once


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much a run may hold at once.

    :param window: how far the frontier may run before the durable mark, in items; None: 50,000, or 64 times the
        concurrency if that is more.
    :param max_buffer_bytes: bytes of records held in memory before no new item is started.
    """

    window: int | None = None
    max_buffer_bytes: int = 64 << 20


OnError = Literal["stop", "record"] | Record


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a run behaves; see `run_resumable`.

    :ivar on_failed_attempt: called with index, item and what was raised, also where the item is tried again.
    """

    concurrency: int = 16
    retry: Retry | int | None = None
    timeout: float | None = None
    on_error: OnError = "stop"
    rate_limit: RateLimit | float | None = None
    limits: Limits = Limits()
    checkpoint_interval: float = 1.0
    batch_size: int | None = None
    version: str | None = None
    drain_timeout: float = 10.0
    on_progress: Callable[[Progress], object] | None = None
    on_failed_attempt: Callable[[int, Any, BaseException], object] | None = None
    executor: Executor | None = None

    @property
    def retrying(self) -> Retry | None:
        """`retry` in its long form."""
        return Retry(attempts=self.retry) if isinstance(self.retry, int) else self.retry

    @property
    def recording(self) -> Record | None:
        """`on_error` in its long form; None: the first failure stops the run."""
        if isinstance(self.on_error, Record):
            return self.on_error
        return Record() if self.on_error == "record" else None

    @property
    def rate(self) -> RateLimit | None:
        """`rate_limit` in its long form."""
        return rate_of(self.rate_limit)

    @property
    def window(self) -> int:
        """The window in items."""
        return self.limits.window or max(50_000, 64 * self.concurrency)

    def check(self) -> None:
        """:raises UsageError: if a value can not be used."""
        if not isinstance(self.limits, Limits):
            raise UsageError(f"limits is {shorten(self.limits)}: it must be a Limits")
        check_number("concurrency", self.concurrency, least=1, most=MAX_CONCURRENCY)
        check_number("batch_size", self.batch_size, least=1, optional=True)
        check_number("window", self.limits.window, least=1, optional=True)
        check_number("max_buffer_bytes", self.limits.max_buffer_bytes, least=1)
        check_number("checkpoint_interval", self.checkpoint_interval, least=0, kind=(int, float))
        check_number("drain_timeout", self.drain_timeout, least=0, kind=(int, float))
        self._check_policies()
        if not (self.version is None or isinstance(self.version, str)):
            raise UsageError(f"version is {shorten(self.version)}: it must be a string")
        listener: Any = self.on_progress
        if listener is not None and (not callable(listener) or is_async(listener)):
            raise UsageError(f"on_progress is {shorten(listener)}: it must be a plain function of one Progress")
        check_executor(self.executor)

    def _check_policies(self) -> None:
        retry: Any = self.retry
        check_number("timeout", self.timeout, least=0, kind=(int, float), optional=True)
        if self.timeout == 0:
            raise UsageError("timeout is 0: it must be more, or None for no limit")
        if not isinstance(retry, Retry | int | None) or isinstance(retry, bool):
            raise UsageError(f"retry is {shorten(retry)}: it must be a Retry, or the number of attempts")
        if self.on_error not in ("stop", "record") and not isinstance(self.on_error, Record):
            raise UsageError(f"on_error is {self.on_error!r}: it must be 'stop', 'record' or a Record")
        if self.retrying is not None and is_async(self.retrying.on):
            raise UsageError("the function on= of Retry is an async def: it must be a plain function of the exception")
        rate_of(self.rate_limit)
        for policy in (self.retrying, self.recording):
            if policy is not None:
                policy.check()


def rate_of(limit: Any) -> RateLimit | None:
    """A rate limit in its long form.

    :raises UsageError: if it is none.
    """
    if not isinstance(limit, RateLimit | int | float | None) or isinstance(limit, bool):
        raise UsageError(f"rate_limit is {shorten(limit)}: it must be a RateLimit, or a number a second")
    rate = RateLimit(per_second=limit) if isinstance(limit, int | float) else limit
    if rate is not None:
        rate.check()
    return rate
