"""What a person is shown of a run: tables of snapshots and widths, and the lines that they give."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from async_recovery.progress import NOT_BEGUN, Progress
from async_recovery.readout import Words, duration, lines, plain

MINUTE_S, HOUR_S, DAY_S = 60.0, 3_600.0, 86_400.0
RESUMED = Progress(
    elapsed_s=10.0,
    resumed_from=400_000,
    executed=1_230,
    finished=401_230,
    failed=3,
    mark=400_930,
    durable_mark=400_900,
    frontier=401_246,
    ahead=300,
    in_flight=16,
    commits=10,
    held_by=400_930,
    held_s=0.2,
    share=0.425,
    share_at_start=0.4,
    retries=12,
    waiting=5,
)


def but(**changes: Any) -> Progress:
    """The run above, with these values instead."""
    return msgspec.structs.replace(RESUMED, **changes)


def drawn(progress: Progress, width: int, **more: Any) -> list[str]:
    """Its lines without their styles."""
    return ["".join(text for text, _ in line) for line in lines(progress, width, **more)]


def test_eighty_columns() -> None:
    """The whole display: a bar with percent and time left, then the counts, as many on a line as fit."""
    assert drawn(RESUMED, 80) == [
        f" 42.5 % {'━' * 23}{'─' * 33} 3 min 50 s left",
        "401,230 finished, 123 a second, mark 400,930, 300 ahead of it, 12 retries,",
        "3 failed, 5 waiting",
    ]


def test_forty_columns() -> None:
    """The same in less room: a shorter bar, more lines, nothing left out."""
    assert drawn(RESUMED, 40) == [
        " 42.5 % ━━━━━━────────── 3 min 50 s left",
        "401,230 finished, 123 a second,",
        "mark 400,930, 300 ahead of it,",
        "12 retries, 3 failed, 5 waiting",
    ]


def test_twenty_columns() -> None:
    """Without room for a bar, percent and time left are words like the others."""
    assert drawn(RESUMED, 20) == [
        "42.5 %,",
        "3 min 50 s left",
        "401,230 finished,",
        "123 a second,",
        "mark 400,930,",
        "300 ahead of it,",
        "12 retries,",
        "3 failed, 5 waiting",
    ]


def test_what_is_not_there_takes_no_room() -> None:
    """Without a known share there is no bar, and no word of retries, failures or waiting items when there are none."""
    progress = but(share=None, share_at_start=None, failed=0, retries=0, waiting=0, ahead=0)
    assert drawn(progress, 80) == ["401,230 finished, 123 a second, mark 400,930"]
    assert plain(progress) == "401,230 finished, 123 a second, mark 400,930"


def test_right_after_a_resume_counts_are_of_all_runs_and_speed_is_of_this_one() -> None:
    """One item after resuming at 400,000: counted on from there, and the speed is not theirs."""
    progress = but(elapsed_s=0.5, executed=1, finished=400_001, mark=400_001, ahead=0, share=0.4)
    assert plain(progress) == "400,001 finished (40.0 %), 2.0 a second, mark 400,001, 12 retries, 3 failed, 5 waiting"


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0.0 %"),
        (0.000_999, "0.0 %"),
        (0.999_999, "99.9 %"),
        (1.0, "100.0 %"),
        (1.000_001, "100.0 %"),
        (7.5, "100.0 %"),
        (-0.5, "0.0 %"),
    ],
)
def test_a_share_is_rounded_down_and_never_above_100(share: float, shown: str) -> None:
    """100 % means that all is done, and there is no more than that, whatever became of the input's size."""
    progress = but(share=share, share_at_start=0.0)
    first = drawn(progress, 80)[0]
    assert first.startswith(f"{shown:>7} ")
    assert (shown == "100.0 %") == ("─" not in first)
    assert f"({shown})" in plain(progress)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, "3 min 50 s left"),
        ({"share": 1.0}, "0 s left"),
        ({"share": 1.2}, "0 s left"),
        ({"share": 0.4}, None),
        ({"share": 0.3}, None),
        ({"share": 0.4 + 1e-9}, None),
        ({"share": math.nan}, None),
        ({"held_s": 9.9}, "3 min 50 s left"),
        ({"held_s": 10.0}, None),
        ({"held_s": 10.0, "held_by": None}, "3 min 50 s left"),
        ({"paused": "an outage"}, None),
        ({"elapsed_s": 98.5 * DAY_S * 0.025 / 0.575}, "98 d 12 h left"),
        ({"elapsed_s": 100 * DAY_S * 0.025 / 0.575}, None),
    ],
)
def test_time_left_is_told_only_where_it_is_more_than_a_guess(changes: dict[str, Any], left: str | None) -> None:
    """Never negative and never absurd; not at all while nothing moves, before anything has, and beyond 99 days."""
    progress = but(**changes)
    for text in ("\n".join(drawn(progress, 80)), plain(progress)):
        assert ("left" in text) == (left is not None)
        assert left is None or left in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5.0, "0 s"),
        (0.0, "0 s"),
        (59.99, "59 s"),
        (MINUTE_S, "1 min 00 s"),
        (HOUR_S - 1, "59 min 59 s"),
        (HOUR_S, "1 h 00 min"),
        (DAY_S - 1, "23 h 59 min"),
        (DAY_S, "1 d 0 h"),
        (98 * DAY_S + 23 * HOUR_S, "98 d 23 h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    """The two largest units, rounded down; a clock that went back is no time at all."""
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("executed", "elapsed_s", "shown"),
    [
        (0, 10.0, "0.0 a second"),
        (1, 100.0, "0.6 a minute"),
        (10, 10.0, "1.0 a second"),
        (99, 10.0, "9.9 a second"),
        (100, 10.0, "10 a second"),
        (123_456, 10.0, "12,346 a second"),
    ],
)
def test_rates(executed: int, elapsed_s: float, shown: str) -> None:
    """Whole numbers of fast items, a decimal of slow ones, and by the minute what takes longer than a second."""
    assert f", {shown}, " in plain(but(executed=executed, elapsed_s=elapsed_s))


def test_the_rate_is_of_the_time_since_the_earlier_snapshot() -> None:
    """A run that was fast once, and stands still now, is not told to be fast; no time since then tells nothing."""
    earlier = but(elapsed_s=5.0)
    assert "0.0 a second" in plain(RESUMED, earlier)
    assert "0.0 a second" in "".join(drawn(RESUMED, 80, earlier=earlier))
    assert "46 a second" in plain(RESUMED, but(elapsed_s=5.0, executed=1_000))
    assert "123 a second" in plain(RESUMED, RESUMED)


def test_the_time_left_follows_the_last_seconds() -> None:
    """A job whose items become slower takes longer from then on; where nothing finishes, nobody knows how long."""
    assert "1 min 55 s left" in plain(RESUMED, but(elapsed_s=5.0, share=0.4))
    assert "9 min 35 s left" in plain(RESUMED, but(elapsed_s=5.0, share=0.42))
    assert "left" not in plain(RESUMED, but(elapsed_s=5.0))
    assert "3 min 50 s left" in plain(RESUMED, but(elapsed_s=5.0, share=None))
    assert drawn(RESUMED, 80, earlier=but(elapsed_s=5.0, share=0.42))[0].endswith(" 9 min 35 s left")


def test_the_item_that_holds_the_mark_is_named() -> None:
    """When the mark stands still: which item, for how long, at which attempt."""
    held = "item 400,930 holds the mark for 1 min 15 s, attempt 2"
    progress = but(held_s=75.0, held_attempt=2)
    assert drawn(progress, 80)[-1] == held
    assert plain(progress).endswith(f"; {held}")
    assert drawn(progress, 20)[-3:] == ["item 400,930 holds", "the mark for 1 min", "15 s, attempt 2"]


def test_a_pause_explains_a_mark_that_stands_still() -> None:
    """While the run pauses, the reason is told, and no item is blamed."""
    progress = but(held_s=75.0, paused="the worker asked for a pause, 12 s left")
    assert drawn(progress, 80)[-1] == "paused: the worker asked for a pause, 12 s left"
    assert "holds" not in plain(progress)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (40, ["paused: 停止中です、しばらくお待ち下さい", "ok"]),
        (20, ["paused:", "停止中です、しばら…", "ok"]),
        (9, ["paused:", "停止中で…", "ok"]),
        (8, ["paused:", "停止中…", "ok"]),
        (1, ["…", "…", "…"]),
    ],
)
def test_wide_characters_are_counted_as_the_cells_that_they_take(width: int, shown: list[str]) -> None:
    """A character of two cells is cut before it, never through it, and no line is wider than it may be."""
    found = drawn(but(paused="停止中です、しばらくお待ち下さい ok"), width)
    assert found[-len(shown) :] == shown
    assert max(map(cell_len, found)) <= width


def test_a_terminal_that_has_only_ascii() -> None:
    """Nothing but ASCII is shown where there is nothing else."""
    found = drawn(but(paused="x" * 100), 40, ascii_only=True)
    assert found[0] == f" 42.5 % {'#' * 13}{'-' * 19}"
    assert "".join(found).isascii()


def test_failures_are_red_and_what_holds_the_run_up_is_yellow() -> None:
    """The styles are beside the words, so that a display without colors has the same words."""
    styles = {text: style for line in lines(but(held_s=99.0), 80) for text, style in line}
    assert (styles["3 failed"], styles["12 retries"]) == ("red", "yellow")
    assert Words("item 400,930 holds the mark for 1 min 39 s, attempt 1", "yellow") in lines(but(held_s=99.0), 80)[-1]


def test_one_retry_is_no_retries() -> None:
    """A single one is told in the singular."""
    assert "1 retry," in plain(but(retries=1))


COUNTS = st.integers(0, 10**12)
TIMES = st.floats(0, 1e9)
SHARES = st.none() | st.floats(-2, 3) | st.just(math.nan)


@given(
    width=st.integers(1, 200),
    progress=st.builds(
        Progress,
        **dict.fromkeys(["resumed_from", "executed", "finished", "failed", "mark", "durable_mark"], COUNTS),
        **dict.fromkeys(["frontier", "ahead", "in_flight", "commits", "retries", "waiting"], COUNTS),
        **dict.fromkeys(["elapsed_s", "held_s"], TIMES),
        **dict.fromkeys(["share", "share_at_start"], SHARES),
        held_by=st.none() | COUNTS,
        paused=st.none() | st.text(st.characters(exclude_categories=["C", "M"])),
        held_attempt=st.integers(1, 99),
    ),
    ascii_only=st.booleans(),
)
def test_any_snapshot_fits_any_width(width: int, progress: Progress, ascii_only: bool) -> None:
    """Whatever a snapshot holds: no line wider than it may be, nothing above 100 %, no negative number."""
    found = drawn(progress, width, ascii_only=ascii_only)
    assert found
    assert all(cell_len(line) <= width and "\n" not in line for line in found)
    line = plain(msgspec.structs.replace(progress, paused=None))
    assert "-" not in line
    assert "nan" not in line
    if "%" in line:
        assert 0 <= float(line.partition("(")[2].partition(" %")[0]) <= 100


def test_a_run_that_has_not_begun() -> None:
    """Zeros, and no division by them."""
    assert drawn(NOT_BEGUN, 80) == ["0 finished, 0.0 a second, mark 0"]
