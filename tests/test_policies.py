"""The decisions about failures: tables, and every short history."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_recovery import RateLimit, Record, ResultRefused, Retry, SlowDown, UsageError
from async_recovery.policies import Breaker, Gate, come_back_after

ATTEMPTS = range(1, 200)


@pytest.mark.parametrize("dice", [0.0, 0.5, 1.0])
def test_delays_double_up_to_the_maximum_and_are_jittered_over_their_whole_length(dice: float) -> None:
    """After attempt n the wait is the dice's share of min(maximum, initial · 2^(n-1)), for any n."""
    retry = Retry(attempts=1000, initial=0.5, maximum=60)
    assert [retry.delay(spent, dice) for spent in (1, 2, 3, 7, 8, 9)] == [dice * s for s in (0.5, 1, 2, 32, 60, 60)]
    assert all(0 <= retry.delay(spent, dice) <= 60 for spent in ATTEMPTS)


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_an_item_has_so_many_attempts(attempts: int) -> None:
    """There is another attempt after each failure but the last."""
    retry = Retry(attempts=attempts)
    followed = [retry.next_attempt(spent, 0, 0.5) is not None for spent in range(1, 8)]
    assert followed == [spent < attempts for spent in range(1, 8)]


def test_no_attempt_begins_after_the_deadline() -> None:
    """An attempt that would begin at the deadline or later is not made."""
    retry = Retry(attempts=10, initial=4, deadline=10)
    assert retry.next_attempt(1, 5.9, 1.0) == 4
    assert retry.next_attempt(1, 6.0, 1.0) is None
    assert retry.next_attempt(1, 6.0, 0.9) == pytest.approx(3.6)


@pytest.mark.parametrize(
    ("on", "error", "applies"),
    [
        (Exception, ValueError(), True),
        (Exception, TimeoutError(), True),
        (Exception, SystemExit(), False),
        (Exception, ResultRefused(), False),
        (BaseException, KeyboardInterrupt(), False),
        (OSError, ConnectionResetError(), True),
        (OSError, ValueError(), False),
        ((OSError, ValueError), ValueError(), True),
        ((OSError, ValueError), KeyError(), False),
        (lambda error: error.args == (503,), RuntimeError(503), True),
        (lambda error: error.args == (503,), RuntimeError(404), False),
    ],
)
def test_which_failures_are_worth_another_attempt(on: Any, error: BaseException, applies: bool) -> None:
    """By type, by several types, or as a function says; never a result that has no form as a record."""
    assert Retry(on=on).applies_to(error) is applies


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        (Retry(attempts=0), "attempts"),
        (Retry(attempts=True), "attempts"),
        (Retry(initial=-1), "initial"),
        (Retry(maximum=-0.5), "maximum"),
        (Retry(deadline=-1), "deadline"),
        (Retry(breaker=0), "breaker"),
        (Retry(on="OSError"), "on is"),
        (Retry(on=(OSError, "x")), "on is"),
        (Record(max_failures=-1), "max_failures"),
        (Record(max_failures="1"), "max_failures"),
        (Record(max_failures="101%"), "max_failures"),
        (Record(max_failures="x%"), "max_failures"),
        (RateLimit(per_second=0), "per_second"),
        (RateLimit(per_second=math.inf), "per_second"),
        (RateLimit(per_second=-1), "per_second"),
        (RateLimit(per_second=5, burst=0), "burst"),
        (RateLimit(per_second=5, burst=6), "burst"),
        (RateLimit(per_second=0.1, burst=2), "burst"),
    ],
)
def test_a_policy_that_can_not_be_used_is_refused(policy: Retry | Record | RateLimit, named: str) -> None:
    """The message names the argument."""
    with pytest.raises(UsageError, match=named):
        policy.check()


@pytest.mark.parametrize("seconds", [-1, math.inf, math.nan, "3", None, True])
def test_a_pause_is_a_number_of_seconds(seconds: Any) -> None:
    """`SlowDown` of anything else is a mistake at the place where it is made."""
    with pytest.raises(ValueError, match="number of 0 or more"):
        SlowDown(seconds)


@pytest.mark.parametrize(
    ("bound", "failed", "finished", "exceeded"),
    [
        (None, 10**6, 10**6, False),
        (0, 0, 5, False),
        (0, 1, 5, True),
        (10, 10, 10, False),
        (10, 11, 11, True),
        ("1%", 99, 99, False),
        ("1%", 1, 100, False),
        ("1%", 2, 100, True),
        ("1%", 10, 1000, False),
        ("1%", 11, 1000, True),
        ("0%", 1, 100, True),
        ("2.5%", 5, 200, False),
        ("29%", 29, 100, False),
        ("29%", 30, 100, True),
        ("100%", 200, 200, False),
    ],
)
def test_how_many_failures_are_too_many(bound: Any, failed: int, finished: int, exceeded: bool) -> None:
    """More than the number, or than the share of the finished once there are 100."""
    assert Record(max_failures=bound).is_exceeded(failed, finished) is exceeded


# The rate


def begun_by(limit: RateLimit, seed: int, seconds: float, *, late_s: float, spent: bool = False) -> list[float]:
    """When attempts begin if there is always one to begin, for timers that are up to `late_s` late and attempts that
    begin up to `late_s` after they were let go.
    """
    dice = random.Random(seed)
    gate, now, begun = Gate(limit, 0.0, spent=spent), 0.0, list[float]()
    unsettled: list[float] = []
    while now < seconds:
        unsettled.sort()
        while unsettled and unsettled[0] <= now:
            gate.settle(unsettled.pop(0))
        at = gate.opens_at(now)
        if at <= now:
            gate.begin(now)
            begins = now + late_s * dice.random()
            begun.append(begins)
            unsettled.append(begins)
        elif at == math.inf or (unsettled and unsettled[0] < at):
            now = unsettled[0]
        else:
            now = at + late_s * dice.random()
    return sorted(begun)


def most_in_a_second(begun: list[float], span: float = 1.0) -> int:
    return max((sum(start <= other < start + span for other in begun[i:]) for i, start in enumerate(begun)), default=0)


@settings(max_examples=150, deadline=None)
@given(
    per_second=st.one_of(st.integers(1, 60), st.floats(0.2, 60)),
    burst=st.integers(1, 60),
    late_s=st.sampled_from([0.0, 0.001, 0.02, 0.3]),
    spent=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_second_has_more_than_the_rate(per_second: float, burst: int, late_s: float, spent: bool, seed: int) -> None:
    """In any half-open second at most per_second begin, whatever the burst, however late timers and attempts are."""
    limit = RateLimit(per_second=per_second, burst=min(burst, max(1, int(per_second))))
    begun = begun_by(limit, seed, 8, late_s=late_s, spent=spent)
    assert most_in_a_second(begun) <= math.ceil(per_second)
    assert most_in_a_second(begun, max(1.0, 1 / per_second)) <= math.ceil(per_second)
    if spent:
        assert not begun or begun[0] >= 1


@pytest.mark.parametrize("per_second", [0.5, 1, 7, 100, 2000])
def test_the_rate_is_reached(per_second: float) -> None:
    """With timers as coarse as an event loop's, nearly as many begin as may."""
    begun = begun_by(RateLimit(per_second=per_second), 1, 20, late_s=0.001)
    assert len(begun) >= 0.98 * 20 * per_second


@pytest.mark.parametrize("burst", [1, 3, 10])
def test_so_many_begin_at_one_moment_after_a_rest_and_no_more(burst: int) -> None:
    """The burst is what may begin at once; what follows is spaced out."""
    gate, at_once = Gate(RateLimit(per_second=10, burst=burst), 0.0, spent=False), 0
    while gate.opens_at(5.0) <= 5.0:
        gate.begin(5.0)
        gate.settle(5.0)
        at_once += 1
    assert at_once == burst
    assert gate.opens_at(5.0) >= 5.09


# The breaker


def test_so_many_failures_in_a_row_over_different_items_open_the_breaker() -> None:
    """The same item again does not count, and a success begins the row anew: every history of six events over two."""
    for history in itertools.product((0, 1, "ok"), repeat=6):
        breaker, row, open_ = Breaker(Retry(breaker=2)), set[int](), False
        for what in history:
            if what == "ok":
                breaker.begins(2)
                assert breaker.succeeded(2) is open_
                row, open_ = set(), False
            else:
                index = 0 if what == 0 else 1
                row.add(index)
                opens = not open_ and len(row) == 2
                assert breaker.failed(index, 0.0) is opens
                open_ = open_ or opens
            assert (breaker.open, breaker.calm) == (open_, not row and not open_)


def test_a_success_from_before_the_outage_does_not_end_it() -> None:
    """Only an attempt that began since the breaker opened tells; the next opening forgets those."""
    breaker = Breaker(Retry(breaker=1))
    for _ in range(2):
        breaker.failed(0, 0.0)
        assert not breaker.succeeded(1)
        assert breaker.open
        breaker.begins(1)
        assert breaker.succeeded(1)
        assert not breaker.open


def test_probes_come_one_at_a_time_at_growing_intervals() -> None:
    """The next probe waits for the answer to the last one, and twice as long, up to the maximum."""
    breaker, now, waits = Breaker(Retry(breaker=1, initial=1, maximum=10)), 100.0, list[float]()
    breaker.failed(0, now)
    for index in range(1, 7):
        at = breaker.probes_at()
        waits.append(at - now)
        now = at
        breaker.probe(index)
        assert breaker.probes_at() == math.inf
        breaker.failed(500, now)  # an attempt that began before the outage
        assert breaker.probes_at() == math.inf
        breaker.failed(index, now)
    assert waits == [1, 2, 4, 8, 10, 10]


def test_a_probe_that_is_asked_to_slow_down_is_no_answer() -> None:
    """The next one comes when the pause is over."""
    breaker = Breaker(Retry(breaker=1))
    breaker.failed(0, 0.0)
    breaker.probe(1)
    breaker.give_back(2, 30.0)
    assert breaker.probes_at() == math.inf
    breaker.give_back(1, 30.0)
    assert breaker.probes_at() == 30.0


def test_without_a_threshold_nothing_opens() -> None:
    """`breaker=None` turns it off."""
    breaker = Breaker(Retry(breaker=None))
    assert not any(breaker.failed(index, 0.0) for index in range(10_000))


def test_workers_come_back_over_a_quarter_of_the_pause_in_the_mean() -> None:
    """All of them together, and within 15 seconds after a long one."""
    assert sum(come_back_after(8, 200, 0.5) for _ in range(200)) == pytest.approx(2)
    assert sum(come_back_after(8, 200, 1.0) for _ in range(200)) == pytest.approx(4)
    assert sum(come_back_after(3600, 200, 0.5) for _ in range(200)) == pytest.approx(15)


def test_a_function_that_can_not_tell_is_named() -> None:
    """Whatever it raises: what it was asked about, and that it is the function's own failure."""
    with pytest.raises(UsageError, match=r"on= of Retry failed with AttributeError.*asked about ValueError: x"):
        Retry(on=lambda error: error.nosuch).applies_to(ValueError("x"))
