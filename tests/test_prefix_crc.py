"""The running CRC-32: the right one however the bytes go by, with earlier points that let its end be checked alone."""

from __future__ import annotations

from itertools import pairwise
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_recovery.prefix_crc import PrefixCrc

QUIET = settings(max_examples=200, derandomize=True, deadline=None, database=None)
grains = st.integers(1, 40)
data_and_cuts = st.binary(max_size=300).flatmap(
    lambda data: st.tuples(st.just(data), st.lists(st.integers(0, len(data)), max_size=20).map(sorted))
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """The data, cut at these places."""
    return [data[first:last] for first, last in pairwise([0, *cuts, len(data)])]


def resumed(crc: PrefixCrc, grain: int) -> PrefixCrc:
    """One that goes on from what a checkpoint remembers of another."""
    return PrefixCrc(grain, crc.offset, crc.value, crc.tail, crc.head)


def assert_right(crc: PrefixCrc, data: bytes, grain: int, *, within_grains: int) -> None:
    """All that is kept is true of `data`, and the tail lies neither too near nor too far back."""
    assert (crc.offset, crc.value) == (len(data), crc32(data))
    offset, value = crc.tail
    assert value == crc32(data[:offset])
    assert crc32(data[offset:], value) == crc.value
    assert crc.tail == (0, 0) or len(data) - offset >= grain
    assert len(data) - offset < within_grains * grain
    assert crc.head == (None if len(data) < grain else (grain, crc32(data[:grain])))


@QUIET
@given(grain=grains, source=data_and_cuts)
def test_the_crc_is_that_of_zlib_for_any_split(grain: int, source: tuple[bytes, list[int]]) -> None:
    """After each piece, the CRC, the tail and the head are right, and the tail is one to two grains back, or (0, 0)."""
    crc, before = PrefixCrc(grain), b""
    for piece in pieces(*source):
        crc.update(piece)
        before += piece
        assert_right(crc, before, grain, within_grains=2)


@QUIET
@given(grain=grains, source=data_and_cuts)
def test_the_split_makes_no_difference(grain: int, source: tuple[bytes, list[int]]) -> None:
    """The points that are kept depend on the bytes alone, whatever kind of buffer they come in."""
    data, cuts = source
    one, other = PrefixCrc(grain), PrefixCrc(grain)
    one.update(data)
    for number, piece in enumerate(pieces(data, cuts)):
        other.update((piece, bytearray(piece), memoryview(piece))[number % 3])
    assert (one.value, one.tail, one.head) == (other.value, other.tail, other.head)


@QUIET
@given(grain=grains, source=data_and_cuts, at=st.integers(0, 20))
def test_a_resume_goes_on_from_what_is_remembered(grain: int, source: tuple[bytes, list[int]], at: int) -> None:
    """Resumed at any point, everything stays right; the tail is less than three grains back, at most."""
    crc, before = PrefixCrc(grain), b""
    for number, piece in enumerate(pieces(*source)):
        if number == at:
            crc = resumed(crc, grain)
            assert_right(crc, before, grain, within_grains=2)
        crc.update(piece)
        before += piece
        assert_right(crc, before, grain, within_grains=3)


def test_a_resume_keeps_the_points_it_was_given() -> None:
    """All that a checkpoint remembers is there again; the tail moves on once a point of this run is far enough back."""
    crc = PrefixCrc(10)
    crc.update(bytes(57))
    again = resumed(crc, 10)
    assert (again.offset, again.value, again.tail, again.head) == (57, crc.value, crc.tail, crc.head)
    tails = []
    for _ in range(4):
        tails.append(again.tail[0])
        again.update(bytes(10))
    assert tails == [40, 40, 60, 70]


@QUIET
@given(grain=grains, source=data_and_cuts)
def test_any_number_of_resumes_keeps_every_point_true(grain: int, source: tuple[bytes, list[int]]) -> None:
    """Resumed after each piece, the CRC is right, and going on from the tail and from the head leads to it."""
    crc, before = PrefixCrc(grain), b""
    for piece in pieces(*source):
        crc = resumed(crc, grain)
        crc.update(piece)
        before += piece
        assert_right(crc, before, grain, within_grains=1 + len(before))


@QUIET
@given(grain=grains, data=st.binary(min_size=1, max_size=300), where=st.floats(0, 1, exclude_max=True))
def test_a_byte_changed_after_the_tail_is_seen(grain: int, data: bytes, where: float) -> None:
    """Going on from the tail over bytes of which one differs does not lead to the CRC that is remembered."""
    crc = PrefixCrc(grain)
    crc.update(data)
    offset, value = crc.tail
    again = bytearray(data[offset:])
    again[int(where * len(again))] ^= 0x10
    assert crc32(again, value) != crc.value


@pytest.mark.parametrize(
    ("size", "tail", "head"),
    [(0, 0, None), (9, 0, None), (10, 0, 10), (19, 0, 10), (20, 10, 10), (29, 10, 10), (30, 20, 10), (1_005, 990, 10)],
)
def test_the_points_lie_on_whole_grains(size: int, tail: int, head: int | None) -> None:
    """With a grain of 10 bytes: where tail and head are at a length."""
    crc = PrefixCrc(10)
    crc.update((bytes(range(256)) * 4)[:size])
    assert (crc.tail[0], crc.head and crc.head[0]) == (tail, head)
