"""The collector: what a commit takes is complete, in order, taken once, and never changes afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_recovery.collector import Collector
from async_recovery.watermark import Watermark

NEVER = 1 << 40


def record_of(index: int) -> bytes:
    """A record whose size depends on its index; every seventh is empty, as where there is no output."""
    return b"%d;" % index * (index % 7)


def collector_of(
    taken: int, *, ahead: Mapping[int, bytes] | None = None, batch_items: int = NEVER, batch_bytes: int = NEVER
) -> Collector:
    """A collector whose first `taken` items that are not ahead are in flight."""
    watermark = Watermark[bytes](1_000, 0, ahead)
    for _ in range(taken):
        assert watermark.take(1_000) is not None
    return Collector(watermark, batch_items=batch_items, batch_bytes=batch_bytes)


def whole_state(collector: Collector) -> dict[str, Any]:
    """Every slot of the collector and of its watermark."""
    slots = {name: getattr(collector, name) for name in Collector.__slots__ if name != "watermark"}
    inner = {f"watermark.{name}": getattr(collector.watermark, name) for name in Watermark.__slots__}
    return copy.deepcopy({**slots, **inner})


def test_records_leave_in_the_order_of_the_items() -> None:
    """A commit takes what the mark has passed, in order, and beside it what has finished ahead, by ascending index."""
    collector = collector_of(6)
    for index in (5, 1, 0, 3):
        collector.complete(index, b"%d" % index)
    records, ahead = collector.take()
    assert records == [b"0", b"1"]
    assert list(ahead.items()) == [(3, b"3"), (5, b"5")]


def test_only_what_is_new_and_still_ahead_is_given_as_ahead() -> None:
    """An item ahead is given once: not again by the next commit, and not at all once the mark has passed it."""
    collector = collector_of(6)
    collector.complete(2, b"2")
    assert collector.take() == ([], {2: b"2"})
    collector.complete(4, b"4")
    assert collector.take() == ([], {4: b"4"})
    collector.complete(1, b"1")
    collector.complete(0, b"0")
    collector.complete(5, b"5")
    assert collector.take() == ([b"0", b"1", b"2"], {5: b"5"})
    collector.complete(3, b"3")
    assert collector.take() == ([b"3", b"4", b"5"], {})
    assert collector.take() == ([], {})


def test_what_was_ahead_at_the_start_is_never_given_as_new() -> None:
    """Records of a run before are in the journal already: they come out when the mark passes them, and only then."""
    collector = collector_of(2, ahead={1: b"old", 9: b"far"})
    assert (collector.held, collector.executed, collector.fresh, collector.pending) == (6, 0, 0, False)
    collector.complete(2, b"2")
    assert collector.take() == ([], {2: b"2"})
    collector.complete(0, b"0")
    assert collector.take() == ([b"0", b"old", b"2"], {})
    assert collector.watermark.ahead == {9: b"far"}


def test_what_was_taken_never_changes() -> None:
    """Later completions, takes and acknowledgements leave the values of an earlier take as they were."""
    collector = collector_of(6)
    collector.complete(0, b"0")
    collector.complete(2, b"2")
    taken = collector.take()
    before = copy.deepcopy(taken)
    collector.complete(1, b"1")
    collector.complete(3, b"3")
    assert taken == before
    second = collector.take()
    collector.acknowledge(1, taken[0])
    collector.complete(4, b"4")
    assert taken == before
    assert second == ([b"1", b"2", b"3"], {})


def test_records_are_held_until_they_are_durable() -> None:
    """Bytes ahead, waiting and being written count as held; only the acknowledgement of their commit lets them go."""
    collector = collector_of(4)
    collector.complete(0, b"four")
    collector.complete(2, b"fiver")
    assert collector.held == 9
    records, _ = collector.take()
    assert collector.held == 9
    collector.complete(3, b"6bytes")
    collector.acknowledge(1, records)
    assert collector.held == 11
    collector.complete(1, b"")
    records, _ = collector.take()
    collector.acknowledge(4, records)
    assert collector.held == 0


def test_a_commit_is_due_after_so_many_items() -> None:
    """The count of items begins anew with each take, whether its commit is acknowledged or not."""
    collector = collector_of(8, batch_items=3)
    assert [collector.complete(index, b"") for index in (7, 0, 5)] == [False, False, True]
    records, _ = collector.take()
    assert [collector.complete(index, b"") for index in (1, 2)] == [False, False]
    collector.acknowledge(1, records)
    assert collector.complete(3, b"")


def test_a_commit_is_due_after_so_many_bytes() -> None:
    """The count of bytes begins anew with each take; what becomes durable meanwhile does not count against it."""
    collector = collector_of(8, ahead={90: bytes(1_000)}, batch_bytes=10)
    assert [collector.complete(index, bytes(size)) for index, size in ((1, 4), (0, 5), (2, 1))] == [False, False, True]
    records, _ = collector.take()
    assert not collector.complete(3, bytes(9))
    collector.acknowledge(3, records)
    assert collector.complete(4, bytes(1))


def test_nothing_is_pending_once_all_is_durable() -> None:
    """A commit would write something new as long as an item has finished since the last, or the mark is not durable."""
    collector = collector_of(3)
    assert not collector.pending
    collector.complete(1, b"1")
    assert collector.pending
    records, _ = collector.take()
    assert not collector.pending  # what is ahead is taken, and the mark has not moved
    collector.acknowledge(0, records)
    collector.complete(0, b"0")
    records, _ = collector.take()
    assert collector.pending  # the mark has moved, and is not durable yet
    collector.acknowledge(2, records)
    assert not collector.pending


def test_passing_over_what_was_ahead_is_worth_a_commit() -> None:
    """At a resume, the mark can move although no item has finished in this run: that is pending, too."""
    collector = collector_of(0, ahead={0: b"old"})
    assert not collector.pending
    assert collector.watermark.take(1) is None
    assert collector.pending
    assert collector.take() == ([b"old"], {})


@pytest.mark.parametrize("index", [-1, 0, 2, 3, 9])
def test_a_wrong_completion_changes_nothing(index: int) -> None:
    """An index that is negative, finished, or was never handed out raises, and counts nowhere."""
    collector = collector_of(3, ahead={9: b"old"}, batch_items=1)
    collector.complete(0, b"0")
    collector.complete(2, b"2")
    before = whole_state(collector)
    with pytest.raises(ValueError, match=rf"index {index} was"):
        collector.complete(index, b"again")
    assert whole_state(collector) == before


@pytest.mark.parametrize("mark", [-1, 0, 3])
def test_a_wrong_acknowledgement_changes_nothing(mark: int) -> None:
    """A durable mark that would go back, or beyond the mark, raises, and the records are held as before."""
    collector = collector_of(3)
    collector.complete(0, b"0")
    collector.complete(1, b"1")
    records, _ = collector.take()
    collector.acknowledge(1, records[:1])
    before = whole_state(collector)
    with pytest.raises(ValueError, match=f"can not commit mark {mark}"):
        collector.acknowledge(mark, records[1:])
    assert whole_state(collector) == before


class CollectorMachine(RuleBasedStateMachine):
    """Random runs against plain sets: each record is taken once, in order, held as long as it must be, due in time."""

    @initialize(
        ahead=st.frozensets(st.integers(0, 30), max_size=20),
        batch_items=st.integers(1, 10),
        batch_bytes=st.integers(1, 60),
    )
    def begin(self, ahead: frozenset[int], batch_items: int, batch_bytes: int) -> None:
        self.collector = collector_of(
            0, ahead={index: record_of(index) for index in ahead}, batch_items=batch_items, batch_bytes=batch_bytes
        )
        self.batch_items, self.batch_bytes = batch_items, batch_bytes
        self.finished, self.old, self.in_flight = set(ahead), ahead, set[int]()
        self.fresh: list[int] = []
        self.executed = 0
        self.given_ahead: set[int] = set()
        self.taken: list[tuple[int, list[bytes], dict[int, bytes]]] = []
        self.acknowledged = 0

    @property
    def mark(self) -> int:
        return self.collector.watermark.mark

    @rule(times=st.integers(1, 10))
    def hand_out(self, times: int) -> None:
        for _ in range(times):
            index = self.collector.watermark.take(1_000)
            self.in_flight |= {index} if index is not None else set()

    @rule(data=st.data(), times=st.integers(1, 6))
    def finish(self, data: st.DataObject, times: int) -> None:
        for _ in range(min(times, len(self.in_flight))):
            index = data.draw(st.sampled_from(sorted(self.in_flight)))
            self.in_flight.remove(index)
            self.finished.add(index)
            self.fresh.append(index)
            self.executed += 1
            bytes_since = sum(len(record_of(fresh)) for fresh in self.fresh)
            due = len(self.fresh) >= self.batch_items or bytes_since >= self.batch_bytes
            assert self.collector.complete(index, record_of(index)) is due

    @precondition(lambda self: len(self.taken) - self.acknowledged < 3)
    @rule()
    def take(self) -> None:
        before = self.taken[-1][0] if self.taken else 0
        records, ahead = self.collector.take()
        assert records == [record_of(index) for index in range(before, self.mark)]
        assert list(ahead.items()) == [(index, record_of(index)) for index in sorted(self.fresh) if index >= self.mark]
        assert not self.given_ahead & ahead.keys()
        assert not self.old & ahead.keys()
        self.given_ahead |= ahead.keys()
        self.taken.append((self.mark, records, dict(ahead)))
        self.fresh = []

    @precondition(lambda self: len(self.taken) > self.acknowledged)
    @rule()
    def acknowledge(self) -> None:
        mark, records, _ = self.taken[self.acknowledged]
        self.collector.acknowledge(mark, records)
        self.acknowledged += 1

    @invariant()
    def counts_agree(self) -> None:
        durable = self.taken[self.acknowledged - 1][0] if self.acknowledged else 0
        assert self.collector.held == sum(len(record_of(index)) for index in self.finished if index >= durable)
        assert self.collector.pending is (bool(self.fresh) or self.mark > durable)
        assert (self.collector.fresh, self.collector.executed) == (len(self.fresh), self.executed)


TestCollectorMachine = CollectorMachine.TestCase
TestCollectorMachine.settings = settings(
    max_examples=100, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
