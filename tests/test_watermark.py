"""The watermark against a trivial model: in all states that six items can reach, and at random beyond.

The model keeps plain sets and looks for everything anew; the watermark counts. They must never differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache, partial
from itertools import combinations
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from async_recovery.watermark import Watermark

ITEMS = 6
Frozen = tuple[Any, ...]


class Model:
    """What a watermark is, in words of sets: everything is looked for anew each time."""

    def __init__(self, window: int, mark: int, ahead: frozenset[int]) -> None:
        self.window = window
        self.durable = self.frontier = self.collected = mark
        self.finished = frozenset(range(mark)) | ahead

    @property
    def mark(self) -> int:
        index = 0
        while index < self.frontier and index in self.finished:
            index += 1
        return index

    @property
    def in_flight(self) -> set[int]:
        return set(range(self.frontier)) - self.finished

    def take(self, stop: int) -> int | None:
        for index in range(self.frontier, min(stop, self.durable + self.window)):
            self.frontier = index + 1
            if index not in self.finished:
                return index
        return None

    def complete(self, index: int) -> bool:
        self.finished |= {index}
        return index >= self.mark

    def may_commit(self, mark: int) -> bool:
        return self.durable <= mark <= self.mark


def value_of(index: int) -> str:
    """The value that the item at `index` is finished with."""
    return f"value {index}"


def start(window: int, mark: int, ahead: frozenset[int]) -> tuple[Watermark[str], Model]:
    """A watermark and its model, both at the same beginning."""
    return Watermark(window, mark, {index: value_of(index) for index in ahead}), Model(window, mark, ahead)


def agree(watermark: Watermark[str], model: Model) -> None:
    """The watermark shows in every part what the model says."""
    mark = model.mark
    assert watermark.mark == mark
    assert watermark.frontier == model.frontier
    assert watermark.durable == model.durable
    assert watermark.in_flight == len(model.in_flight)
    assert watermark.ahead == {index: value_of(index) for index in model.finished if index >= mark}
    assert watermark.released == [value_of(index) for index in range(model.collected, mark)]


def whole_state(watermark: Watermark[str]) -> Frozen:
    """Every slot of the watermark, private ones included, as one value that can be compared and kept."""
    slots = (getattr(watermark, name) for name in Watermark.__slots__)
    return tuple(
        tuple(sorted(slot.items())) if isinstance(slot, dict) else tuple(slot) if isinstance(slot, list) else slot
        for slot in slots
    )


def twin(watermark: Watermark[str]) -> Watermark[str]:
    """Another watermark in the same state, that shares nothing with the first."""
    other: Watermark[str] = object.__new__(Watermark)
    for name in Watermark.__slots__:
        slot = getattr(watermark, name)
        setattr(other, name, slot.copy() if isinstance(slot, dict | list) else slot)
    return other


def collect(watermark: Watermark[str], model: Model) -> None:
    """Take the released values away, as the writer does."""
    watermark.released = []
    model.collected = model.mark


def refused_unchanged(watermark: Watermark[str], step: partial[Any]) -> None:
    """A step that is not allowed raises ValueError, and no slot has changed."""
    before = whole_state(watermark)
    with pytest.raises(ValueError, match=r"^(index -?\d+ was|can not commit mark) "):
        step()
    assert whole_state(watermark) == before


def steps(watermark: Watermark[str], model: Model) -> Iterator[tuple[Watermark[str], Model]]:
    """Every state that one step leads to; the steps that are not allowed are tried too, and change nothing."""
    for stop in range(-1, ITEMS + 1):
        after, expected = twin(watermark), copy.copy(model)
        assert after.take(stop) == expected.take(stop)
        yield after, expected
    for index in range(-2, ITEMS + 2):
        if index not in model.in_flight:
            refused_unchanged(watermark, partial(watermark.complete, index, "again"))
            continue
        after, expected = twin(watermark), copy.copy(model)
        assert after.complete(index, value_of(index)) is expected.complete(index)
        yield after, expected
    for mark in range(-1, ITEMS + 2):
        if not model.may_commit(mark):
            refused_unchanged(watermark, partial(watermark.commit, mark))
            continue
        after, expected = twin(watermark), copy.copy(model)
        after.commit(mark)
        expected.durable = mark
        yield after, expected
    after, expected = twin(watermark), copy.copy(model)
    collect(after, expected)
    yield after, expected


def beginnings() -> Iterator[tuple[int, frozenset[int]]]:
    """Every mark in six items, with every set of indices that can be ahead of it."""
    for mark in range(ITEMS + 1):
        above = range(mark, ITEMS)
        for size in range(len(above) + 1):
            yield from ((mark, frozenset(ahead)) for ahead in combinations(above, size))


def explore(todo: list[tuple[Watermark[str], Model]]) -> list[tuple[Watermark[str], Model]]:
    """All the states that can be reached from those in `todo`: each is compared with its model, and goes every step."""
    seen: set[Frozen] = set()
    reached = []
    while todo:
        watermark, model = todo.pop()
        key = (whole_state(watermark), tuple(vars(model).values()))
        if key not in seen:
            seen.add(key)
            agree(watermark, model)
            reached.append((watermark, model))
            todo.extend(steps(watermark, model))
    return reached


@cache
def all_states() -> list[tuple[Watermark[str], Model]]:
    """Every state that six items can reach, from every window up to six and every beginning."""
    return explore([start(window, *begin) for window in range(1, ITEMS + 1) for begin in beginnings()])


def test_every_interleaving_agrees_with_the_model() -> None:
    """In every state of six items, each step allowed does what the model does, each other step raises and changes
    nothing: taking with any end, completing any index (double, unknown, negative), committing any mark, at any moment.
    """
    frontiers = {(watermark.window, watermark.frontier) for watermark, _ in all_states()}
    assert frontiers == {(window, frontier) for window in range(1, ITEMS + 1) for frontier in range(ITEMS + 1)}


@pytest.mark.parametrize("window", range(1, ITEMS + 1))
def test_the_exploration_leaves_no_state_out(window: int) -> None:
    """From a fresh start, the states explored are exactly those with durable <= mark <= frontier <= durable + window
    and any set of items ahead between mark and frontier: nothing was cut short.
    """
    found = {
        (watermark.durable, watermark.mark, watermark.frontier, frozenset(watermark.ahead))
        for watermark, _ in explore([start(window, 0, frozenset())])
    }
    assert found == {
        (durable, mark, frontier, frozenset(ahead))
        for frontier in range(ITEMS + 1)
        for mark in range(frontier + 1)
        for durable in range(max(0, frontier - window), mark + 1)
        for size in range(frontier - mark + 1)
        for ahead in combinations(range(mark + 1, frontier), size)
    }


def test_the_mark_never_waits_for_nothing() -> None:
    """No deadlock: where nothing is in flight and all is durable, taking hands out an item or moves the mark, unless
    all six are finished.
    """
    quiet = [twin(watermark) for watermark, model in all_states() if not model.in_flight]
    for watermark in quiet:
        watermark.commit(watermark.mark)
        mark = watermark.mark
        assert watermark.take(ITEMS) is not None or watermark.mark > mark or mark == ITEMS
    assert len(quiet) > ITEMS


def test_values_leave_in_order_each_once() -> None:
    """Whatever the order of completion, the values released are those of the items in order, each of them once."""
    for completed_first in range(ITEMS):
        watermark, _ = start(ITEMS, 0, frozenset())
        assert [watermark.take(ITEMS) for _ in range(ITEMS)] == list(range(ITEMS))
        released: list[str] = []
        for index in (*range(completed_first, ITEMS), *reversed(range(completed_first))):
            watermark.complete(index, value_of(index))
            released += watermark.released
            watermark.released = []
        assert released == [value_of(index) for index in range(ITEMS)]


def test_the_frontier_stops_at_the_window_before_the_durable_mark() -> None:
    """Finishing items does not widen the window: committing them does."""
    watermark = Watermark[str](2)
    assert [watermark.take(9), watermark.take(9), watermark.take(9)] == [0, 1, None]
    watermark.complete(0, "")
    assert (watermark.mark, watermark.take(9)) == (1, None)
    watermark.commit(1)
    assert [watermark.take(9), watermark.take(9)] == [2, None]


def test_a_finished_item_is_never_handed_out_again() -> None:
    """Items that are ahead at the start are passed over, also those far above the window; their values come out."""
    watermark = Watermark(3, 5, {5: "e", 7: "g", 8: "h", 1_000: "z"})
    assert [watermark.take(10), watermark.take(10)] == [6, None]
    watermark.complete(6, "f")
    watermark.commit(watermark.mark)
    assert watermark.take(10) == 9
    assert (watermark.released, watermark.ahead, watermark.in_flight) == (["e", "f", "g", "h"], {1_000: "z"}, 1)


def test_the_argument_ahead_stays_the_callers_own() -> None:
    """The watermark works on a copy of the mapping it was given."""
    ahead = {0: "a"}
    watermark = Watermark(1, 0, ahead)
    assert watermark.take(1) is None
    assert (watermark.released, ahead) == (["a"], {0: "a"})


@pytest.mark.parametrize(
    ("window", "mark", "ahead", "message"),
    [
        (0, 0, {}, "the window is 0"),
        (-1, 0, {}, "the window is -1"),
        (1, -1, {}, "the mark is -1"),
        (1, 3, {5: "", 2: ""}, "index 2 can not be ahead of the mark 3"),
        (1, 0, {-1: ""}, "index -1 can not be ahead of the mark 0"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(window: int, mark: int, ahead: dict[int, str], message: str) -> None:
    """A window without room, a negative mark and an item ahead below the mark are errors that name the number."""
    with pytest.raises(ValueError, match=message):
        Watermark(window, mark, ahead)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (-1, "index -1 was never handed out"),
        (0, "index 0 was finished before"),
        (2, "index 2 was finished before"),
        (3, "index 3 was never handed out"),
        (9, "index 9 was finished before"),
    ],
)
def test_a_wrong_completion_says_what_was_wrong(index: int, message: str) -> None:
    """The error tells an item that was finished before from one that was never handed out, and names the index."""
    watermark = Watermark(5, 0, {9: "ahead"})
    for expected in range(3):
        assert watermark.take(9) == expected
    watermark.complete(0, "")
    watermark.complete(2, "")
    with pytest.raises(ValueError, match=rf"^{message} \(mark 1, frontier 3\)$"):
        watermark.complete(index, "")


class WatermarkMachine(RuleBasedStateMachine):
    """Random steps in a large window, checked against the model after each of them."""

    @initialize(
        window=st.integers(1, 40),
        mark=st.integers(0, 100),
        ahead=st.frozensets(st.integers(0, 60), max_size=40),
    )
    def begin(self, window: int, mark: int, ahead: frozenset[int]) -> None:
        self.watermark, self.model = start(window, mark, frozenset(mark + distance for distance in ahead))
        self.values: list[str] = []
        self.first = mark

    @rule(distance=st.integers(-2, 50), times=st.integers(1, 20))
    def take(self, distance: int, times: int) -> None:
        stop = self.model.frontier + distance
        for _ in range(times):
            assert self.watermark.take(stop) == self.model.take(stop)

    @rule(data=st.data(), times=st.integers(1, 20))
    def complete(self, data: st.DataObject, times: int) -> None:
        for _ in range(min(times, len(self.model.in_flight))):
            index = data.draw(st.sampled_from(sorted(self.model.in_flight)))
            assert self.watermark.complete(index, value_of(index)) is self.model.complete(index)

    @rule(distance=st.integers(-120, 70))
    def complete_wrongly(self, distance: int) -> None:
        index = self.model.mark + distance
        if index not in self.model.in_flight:
            refused_unchanged(self.watermark, partial(self.watermark.complete, index, "wrong"))

    @rule(share=st.floats(0, 1))
    def commit(self, share: float) -> None:
        mark = self.model.durable + round(share * (self.model.mark - self.model.durable))
        self.watermark.commit(mark)
        self.model.durable = mark

    @rule(distance=st.integers(1, 200))
    def commit_wrongly(self, distance: int) -> None:
        refused_unchanged(self.watermark, partial(self.watermark.commit, self.model.mark + distance))
        refused_unchanged(self.watermark, partial(self.watermark.commit, self.model.durable - distance))

    @rule()
    def collect(self) -> None:
        self.values += self.watermark.released
        collect(self.watermark, self.model)
        assert self.values == [value_of(index) for index in range(self.first, self.model.mark)]

    @invariant()
    def agrees(self) -> None:
        agree(self.watermark, self.model)


TestWatermarkMachine = WatermarkMachine.TestCase
TestWatermarkMachine.settings = settings(
    max_examples=150, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
