"""What happens when items fail, decided: no await, no clock, no file; the time and the dice are arguments.

* `Retry`: whether a failed attempt is followed by another one, and after how long.
* `Breaker`: whether failures are the items' own, or the system's that all of them use.
* `Record`: how many recorded failures a job bears.
* `RateLimit` and `Gate`: when the next attempt may begin.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import msgspec

from .errors import ResultRefused, UsageError, check_number, describe, shorten

COME_BACK_SHARE, MAX_COME_BACK_S = 0.25, 15.0
SHARE_FROM_FINISHED = 100  # a share says nothing before so many have finished

Retryable = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """Try an item again after a failure, later and later.

    Before attempt n + 1 an item waits ``dice × min(maximum, initial × 2 ** (n - 1))`` seconds, where the dice give 0 to
    1: exponential backoff with full jitter (AWS Architecture Blog, 2015). It holds no worker while it waits.

    :param attempts: how often an item is tried at most, over all runs of the job.
    :param initial: bound of the first wait in seconds.
    :param maximum: bound of any wait in seconds.
    :param on: which failures are followed by another attempt: exception types, or a function that tells. A result that
        has no form as a record never is: the worker would give it again.
    :param deadline: seconds from the first attempt of an item in this run until it is given up, pauses not counted.
    :param breaker: so many failed attempts in a row, each the first one of its item, are an outage: the run pauses and
        probes; None: never.
    :param quarantine_after: give an item up after the process has died so often while it ran; None: never. After a
        death, items start in groups that the journal names, until all that may have been begun are through.
    """

    attempts: int = 5
    initial: float = 0.5
    maximum: float = 60.0
    on: Any = Exception
    deadline: float | None = None
    breaker: int | None = 50
    quarantine_after: int | None = None

    def check(self) -> None:
        """:raises UsageError: if a value can not be used."""
        check_number("attempts (retry=N for short)", self.attempts, least=1)
        check_number("initial", self.initial, least=0, kind=(int, float))
        check_number("maximum", self.maximum, least=0, kind=(int, float))
        check_number("deadline", self.deadline, least=0, kind=(int, float), optional=True)
        check_number("breaker", self.breaker, least=1, optional=True)
        check_number("quarantine_after", self.quarantine_after, least=1, optional=True)
        types = self.on if isinstance(self.on, tuple) else (self.on,)
        if not callable(self.on) and not all(isinstance(one, type) and issubclass(one, BaseException) for one in types):
            raise UsageError(f"on is {shorten(self.on)}: it must be exception types, or a function of the exception")

    def applies_to(self, error: BaseException) -> bool:
        """Whether a failure of that kind is worth another attempt."""
        if isinstance(error, ResultRefused | KeyboardInterrupt):
            return False
        if isinstance(self.on, tuple) or (isinstance(self.on, type) and issubclass(self.on, BaseException)):
            return isinstance(error, self.on)
        try:
            return bool(self.on(error))
        except Exception as failure:
            raise UsageError(
                f"the function on= of Retry failed with {describe(failure)} when it was asked about {describe(error)}: "
                "mend it. Everything that finished is saved"
            ) from failure

    def delay(self, spent: int, dice: float) -> float:
        """Seconds to wait after `spent` failed attempts.

        :param dice: 0 to 1.
        """
        doublings = min(spent - 1, 64)
        return dice * min(self.maximum, self.initial * 2.0**doublings)

    def next_attempt(self, spent: int, since_s: float, dice: float) -> float | None:
        """Seconds until the next attempt after a failure that is worth one, or None if there is none left.

        :param spent: attempts of the item that failed, this one included.
        :param since_s: seconds since its first attempt in this run.
        """
        if spent >= self.attempts:
            return None
        delay = self.delay(spent, dice)
        return None if self.deadline is not None and since_s + delay >= self.deadline else delay


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Let failures take their items' places in the output, up to a bound.

    :param max_failures: a number, or a share of the finished such as ``"1%"``, which counts from 100 finished on. One
        more ends the job. None: any number.
    """

    max_failures: int | str | None = None

    def check(self) -> None:
        """:raises UsageError: if `max_failures` is neither."""
        if isinstance(self.max_failures, str):
            self._share()
        else:
            check_number("max_failures", self.max_failures, least=0, optional=True)

    def is_exceeded(self, failed: int, finished: int) -> bool:
        """Whether `failed` recorded failures among `finished` items are too many."""
        if self.max_failures is None:
            return False
        if isinstance(self.max_failures, int):
            return failed > self.max_failures
        return finished >= SHARE_FROM_FINISHED and failed > self._share() * finished

    def _share(self) -> Fraction:
        text = str(self.max_failures)
        try:
            share = Fraction(text.removesuffix("%")) / 100  # exactly: 29 of 100 are not more than 29 %
        except (ValueError, ZeroDivisionError):
            share = Fraction(-1)
        if not text.endswith("%") or not 0 <= share <= 1:
            raise UsageError(f"max_failures is {text!r}: it must be a number, or a share from '0%' to '100%'")
        return share


class RateLimit(msgspec.Struct, frozen=True, kw_only=True):
    """How many attempts may begin a second, over the whole run.

    :param per_second: the rate; never more than this (rounded up) begin in any half-open second.
    :param burst: how many may begin at one moment (above 500 a second: as many as there are in 2 ms, too).
    """

    per_second: float
    burst: int = 1

    def check(self) -> None:
        """:raises UsageError: if a value can not be used."""
        check_number("per_second", self.per_second, least=0, kind=(int, float))
        check_number("burst", self.burst, least=1)
        if not 0 < self.per_second < math.inf:
            raise UsageError(f"per_second is {self.per_second}: it must be more than 0, and finite")
        if self.burst > max(1, math.ceil(self.per_second)):
            raise UsageError(f"burst is {self.burst}: more than the {self.per_second:g} that may begin in a second")


class Gate:
    """A `RateLimit` at work.

    Two bounds hold at once. At most R = ⌈per_second⌉ begin in any half-open second (in any half-open ``1 / per_second``
    s, for less than one a second): of the last R, each is remembered with a time at which it had surely begun. And the
    generic cell rate algorithm (ITU-T I.371) spaces them out, with `burst` as its tolerance; it forgives a timer its
    lateness, up to `SLACK_S`, so that a high rate is reached although a loop's timers are coarse.

    :param now: the moment of the start.
    :param spent: nobody has counted what began up to that moment: it may have been as many as are allowed.
    :param after: the gate that this one takes the place of; it has counted.
    """

    SLACK_S = 0.002

    def __init__(self, limit: RateLimit, now: float, *, spent: bool, after: Gate | None = None) -> None:
        self._most = math.ceil(limit.per_second)
        self._span = max(1.0, 1.0 / limit.per_second)
        self._interval = 1.0 / limit.per_second
        self._tolerance = (limit.burst - 1) * self._interval + self.SLACK_S
        self._begun: deque[float] = deque()
        self._closed_until = now
        self._unsettled = 0
        if after is not None:
            self._begun, self._closed_until = deque(after._begun, self._most), after._closed_until
            self._unsettled = after._unsettled
        elif spent:
            self._closed_until = now + self._span
        self._next = now

    def opens_at(self, now: float) -> float:
        """When the next attempt may begin, as known at `now`; infinity while that depends on others that begin."""
        begun, span = self._begun, self._span
        while begun and begun[0] + span <= now:
            begun.popleft()
        earliest = max(self._next - self._tolerance, self._closed_until)
        if len(begun) + self._unsettled < self._most:
            return earliest
        return max(earliest, begun[0] + span) if begun else math.inf

    def begin(self, now: float) -> None:
        """An attempt begins; `settle` says when it surely has."""
        self._next = max(self._next, now) + self._interval
        self._unsettled += 1

    def settle(self, now: float) -> None:
        """By `now`, one more of the attempts has begun."""
        self._unsettled = max(0, self._unsettled - 1)  # those that began before there was a gate are settled as well
        self._begun.append(now)


class Breaker:
    """Tells an outage from items that fail by themselves.

    After ``retry.breaker`` failed attempts in a row, over as many different items, it opens; those of an item that has
    failed before are no news, and whoever asks leaves them out. While it is open, nothing begins but probes: single
    items that have not failed yet, at growing intervals; failures do not count. The success of any attempt that began
    since then closes it. Without an item that could be a probe there is no telling: whoever asks is to take it for
    closed.

    :ivar open: whether it is.
    """

    def __init__(self, retry: Retry) -> None:
        self._threshold = retry.breaker or math.inf
        self._retry = retry
        self._failed: set[int] = set()
        self._probes = 0
        self._at = 0.0
        self._probing: int | None = None
        self._begun: set[int] = set()  # since it opened
        self.open = False

    @property
    def calm(self) -> bool:
        """Whether there is nothing that a success would change."""
        return not self._failed and not self.open

    def failed(self, index: int, now: float) -> bool:
        """An attempt failed.

        :returns: whether it opened the breaker.
        """
        self._failed.add(index)
        if self.open:
            if index == self._probing:
                self._probing = None
                self._probes += 1
                self._at = now + self._wait()
            return False
        if len(self._failed) < self._threshold:
            return False
        self.open, self._probes, self._probing, self._at = True, 0, None, now + self._wait()
        self._begun.clear()
        return True

    def expect(self, spent: int, now: float) -> bool:
        """Whether it begins open: an earlier run has left failed attempts of so many items that it had opened, too.

        What would come of that otherwise: each restart within an outage costs those items another attempt.
        """
        self.open = spent >= self._threshold
        self._at = now
        return self.open

    def begins(self, index: int) -> None:
        """An attempt begins while it is open."""
        self._begun.add(index)

    def succeeded(self, index: int) -> bool:
        """An item has finished. An attempt that began before the outage tells nothing of it.

        :returns: whether that closed the breaker.
        """
        if self.open and index not in self._begun:
            return False
        self._failed.clear()
        was_open, self.open, self._probing = self.open, False, None
        return was_open

    def probes_at(self) -> float:
        """The moment of the next probe; infinity while one is under way."""
        return self._at if self._probing is None else math.inf

    def probe(self, index: int) -> None:
        """The item at `index` is tried, to see whether the outage is over."""
        self._probing = index

    def give_back(self, index: int, at: float) -> None:
        """The probe ended without an answer (a `SlowDown`): the next one comes at `at`."""
        if index == self._probing:
            self._probing, self._at = None, at

    def _wait(self) -> float:
        return min(self._retry.maximum, max(0.05, self._retry.initial) * 2.0 ** min(self._probes, 64))


def come_back_after(pause_s: float, concurrency: int, dice: float) -> float:
    """Seconds between two workers that come back from a pause, so that they do not come in one wave.

    All of them together take about a quarter of the pause, at most 15 s.

    :param dice: 0 to 1.
    """
    return 2 * dice * min(MAX_COME_BACK_S, COME_BACK_SHARE * pause_s) / concurrency
