"""The journal: whatever is cut off or damaged in it, a replay gives what was committed, or nothing.

The journals here tell the story of a run, line by line, so that each test knows what was committed at every state
line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from zlib import crc32

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_recovery import checkpoint
from async_recovery.checkpoint import (
    AHEAD_LINE_BYTES,
    COMPACT_ABOVE_DEAD_BYTES,
    FORMAT,
    SPENT_LINE_ITEMS,
    Ahead,
    AheadLine,
    Bookmark,
    Complete,
    Job,
    OutputState,
    Replay,
    Spent,
    State,
    decode_line,
    encode_ahead,
    encode_line,
    encode_spent,
    worth_compacting,
)
from async_recovery.errors import CheckpointUnusable

from .support.journal_lines import Found, Line, expected, joined, line_of_each_byte

QUIET = settings(derandomize=True, deadline=None, database=None)
JOB = Job("text", "jobs:fetch", "v1 \u20ac", "jsonl")
SMALL = State(FORMAT, Job("", "", None, ""), None, 1, 3, 9, Bookmark(None, 0, 0), None, 0)


@dataclass(frozen=True)
class Committed:
    """One commit of the story: what it appended, and what was ahead of its mark then."""

    fresh: list[Line]
    state: Line
    ahead: dict[int, Ahead]


def bookmark(mark: int) -> Bookmark:
    """A bookmark with a position as a text source has it."""
    return Bookmark({"offset": mark * 31, "tail": [0, 0], "header": None, "at": "\u00e9\n"}, mark // 4 * 4, mark * 7919)


def state_line(generation: int, mark: int) -> Line:
    """The state line of a commit."""
    output = OutputState(mark * 40, mark * 104729, (0, 0))
    state = State(FORMAT, JOB, "/data/urls.txt", generation, mark, 12, bookmark(mark), output, mark // 9)
    return Line(encode_line(state), state)


def complete_line(mark: int) -> Line:
    """The complete line of a run of that many items."""
    summary = {"total_items": mark, "processed": mark, "elapsed_s": 1.25, "output": "results.jsonl"}
    complete = Complete(FORMAT, JOB, "/data/urls.txt", bookmark(mark), mark * 40, 0xDEADBEEF, summary)
    return Line(encode_line(complete), complete)


def ahead_item(index: int) -> Ahead:
    """What is remembered of an item that is ahead."""
    return Ahead(index, crc32(b"%d" % index), b'{"index":%d,"text":"\\n \xe2\x82\xac %d"}' % (index, index * index))


def ahead_lines(items: Sequence[Ahead], each: int) -> Iterator[Line]:
    """Ahead lines with `each` items, as they would be if the items were large."""
    for first in range(0, len(items), each):
        some = tuple(items[first : first + each])
        (data,) = encode_ahead(some)
        yield Line(data, some)


def tell(items: int, *, window: int, per_commit: int, each: int, seed: int) -> list[Committed]:
    """The commits of a run that finishes its items in random order, `per_commit` of them before each commit."""
    dice = random.Random(seed)
    finished: set[int] = set()
    written: set[int] = set()
    commits = [Committed([], state_line(0, 0), {})]
    mark = 0
    while mark < items:
        for _ in range(per_commit):
            waiting = sorted(set(range(mark, min(mark + window, items))) - finished)
            finished.update(dice.sample(waiting, min(1, len(waiting))))
            while mark in finished:
                mark += 1
        ahead = {index: ahead_item(index) for index in sorted(finished) if index >= mark}
        fresh = [item for index, item in ahead.items() if index not in written]
        written |= finished
        commits.append(Committed([*ahead_lines(fresh, each)], state_line(len(commits), mark), ahead))
    return commits


@cache
def story() -> list[Committed]:
    """A run of 30 items in a window of 12."""
    return tell(30, window=12, per_commit=3, each=2, seed=4)


def appended(commits: list[Committed]) -> list[Line]:
    """What these commits append to a journal."""
    return [line for commit in commits for line in (*commit.fresh, commit.state)]


def anew(commit: Committed) -> list[Line]:
    """What a commit writes if it is a compaction."""
    return [*ahead_lines(list(commit.ahead.values()), 2), commit.state, commit.state]


def begun() -> list[Line]:
    """A journal from its beginning to its complete line."""
    return [story()[0].state, *appended(story()), complete_line(30)]


def compacted() -> list[Line]:
    """A journal that was written anew when most was ahead, and went on from there to its complete line."""
    number = max(range(len(story())), key=lambda number: len(story()[number].ahead))
    return [*anew(story()[number]), *appended(story()[number + 1 :]), complete_line(30)]


def kept() -> list[Line]:
    """The journal of a finished job that was kept."""
    return [complete_line(30), complete_line(30)]


JOURNALS: dict[str, Callable[[], list[Line]]] = {"begun": begun, "compacted": compacted, "kept": kept}
every_journal = pytest.mark.parametrize("journal", JOURNALS.values(), ids=JOURNALS)


def replayed(data: bytes, block: int) -> Found:
    """What a replay finds, fed in blocks of `block` bytes."""
    replay = Replay()
    for first in range(0, len(data), block):
        replay.feed(data[first : first + block])
    return Found(replay.state, replay.ahead, replay.complete, replay.kept, replay.end, replay.damaged_lines)


def was_committed(found: Found) -> bool:
    """Whether the state is one that was committed, and what is ahead a part of what was ahead then, in order."""
    if found.state is None:
        return not found.ahead
    truth = next((commit for commit in story() if commit.state.value == found.state), None)
    return truth is not None and found.ahead.items() <= truth.ahead.items() and [*found.ahead] == sorted(found.ahead)


def flipped(lines: list[Line], at: int, number: int) -> tuple[Found, Found]:
    """What must be found if the byte at `at`, in line `number`, is another: an ordinary one, or a line end."""
    start = sum(len(line.data) for line in lines[:number])
    end = start + len(lines[number].data)
    if at + 1 < end:
        pieces = 1 if at in (start, end - 2) else 2  # a line end at either end cuts off an empty line, which is none
        return expected(lines, {number}, 1), expected(lines, {number}, pieces)
    merged = expected(lines, {number, number + 1}, 1 if number + 1 < len(lines) else 0)
    return merged, merged  # its line end is gone: it runs into the next line, or is not a line any more


def test_the_story_is_worth_telling() -> None:
    """The journals under test have many commits, several ahead lines in some, and much ahead at a compaction."""
    assert len(story()) > 8
    assert max(len(commit.fresh) for commit in story()) > 1
    assert max(len(commit.ahead) for commit in story()) > 5
    assert sum(isinstance(line.value, tuple) for line in compacted()) > 5


@every_journal
def test_an_undamaged_journal_is_read_back_whole(journal: Callable[[], list[Line]]) -> None:
    """The last state, all that was ahead of it and the complete line are found, in blocks of every size."""
    lines = journal()
    data = joined(lines)
    want = expected(lines, set())
    for block in range(1, len(data) + 1):
        assert replayed(data, block) == want, block
    assert want.complete == lines[-1].value


def test_every_commit_is_found_while_it_is_the_last() -> None:
    """After each commit, in a journal only appended to and in one written anew, all that it made durable is found."""
    for number, commit in enumerate(story()):
        for lines in ([story()[0].state, *appended(story()[: number + 1])], anew(commit)):
            found = replayed(joined(lines), 4096)
            assert (found.state, found.ahead) == (commit.state.value, commit.ahead)
            assert (found.complete, found.kept, found.damaged_lines) == (None, False, 0)
            assert found.end == len(joined(lines))


@every_journal
def test_a_journal_cut_at_every_length_loses_only_what_was_cut(journal: Callable[[], list[Line]]) -> None:
    """Cut anywhere, a replay finds exactly the lines that are still whole, and `end` is just after the one it takes."""
    lines = journal()
    data = joined(lines)
    for length, number in enumerate([*line_of_each_byte(lines), len(lines)]):
        found = replayed(data[:length], (4096, 977, 64)[length % 3])
        assert found == expected(lines, set(range(number, len(lines)))), length
        assert was_committed(found)


@every_journal
def test_any_byte_flipped_loses_only_its_line(journal: Callable[[], list[Line]]) -> None:
    """With any single byte changed, to a line end or three other values, exactly the lines it stands in are lost."""
    lines = journal()
    data = joined(lines)
    for at, number in enumerate(line_of_each_byte(lines)):
        ordinary, line_end = flipped(lines, at, number)
        assert was_committed(ordinary)
        assert was_committed(line_end)
        others = {0x0A, data[at] ^ 0x01, data[at] ^ 0x80, data[at] ^ 0x20, (data[at] + at) % 256} - {data[at]}
        for value in others:
            damaged = data[:at] + bytes([value]) + data[at + 1 :]
            assert replayed(damaged, (4096, 977, 256)[at % 3]) == (line_end if value == 0x0A else ordinary), (at, value)


def test_any_byte_changed_to_any_other_loses_only_its_line() -> None:
    """In a small journal, all 255 other values of every byte."""
    lines = [Line(encode_line(small), small) for small in (SMALL, msgspec.structs.replace(SMALL, generation=2))]
    lines[1:1] = ahead_lines([Ahead(5, 6, b"{}"), Ahead(7, 8, None)], 2)
    data = joined(lines)
    for at, number in enumerate(line_of_each_byte(lines)):
        ordinary, line_end = flipped(lines, at, number)
        for value in {*range(256)} - {data[at]}:
            damaged = data[:at] + bytes([value]) + data[at + 1 :]
            assert replayed(damaged, 4096) == (line_end if value == 0x0A else ordinary), (at, value)


def test_no_single_byte_takes_both_of_two_lines_with_an_empty_one_between() -> None:
    """This is how a journal written anew ends: whichever byte is damaged, one of the two state lines is found."""
    line = encode_line(SMALL)
    data = line + b"\n" + line
    for at in range(len(data)):
        for value in {0x0A, data[at] ^ 0x01, 0x00} - {data[at]}:
            damaged = data[:at] + bytes([value]) + data[at + 1 :]
            assert replayed(damaged, 4096).state == SMALL, (at, value)


WOUNDS = st.tuples(
    st.sampled_from(["zeros", "ones", "gone", "garbage", "line ends", "inserted"]),
    st.floats(0, 1),
    st.integers(1, 600),
    st.randoms(use_true_random=False),
)


@settings(QUIET, max_examples=300)
@given(
    journal=st.sampled_from([begun, compacted, kept]),
    wounds=st.lists(WOUNDS, min_size=1, max_size=4),
    block=st.sampled_from([1, 100, 5000]),
)
def test_any_damage_at_all_gives_what_was_committed(
    journal: Callable[[], list[Line]], wounds: list[tuple[str, float, int, random.Random]], block: int
) -> None:
    """Bytes zeroed, overwritten, torn out or put in at several places: a committed state and a part of what was ahead
    then, or nothing; the same is found again once the journal is cut back to `end`; never an exception.
    """
    data = joined(journal())
    for kind, share, length, dice in wounds:
        at = int(share * len(data))
        noise = bytes(dice.randrange(256) for _ in range(length))
        fill = {"zeros": bytes(length), "ones": b"\xff" * length, "gone": b"", "line ends": b"\n" * length}
        after = data[at:] if kind == "inserted" else data[at + length :]
        data = data[:at] + fill.get(kind, noise) + after
    found = replayed(data, block)
    assert was_committed(found)
    assert found.complete in (None, complete_line(30).value)
    cut_back = replayed(data[: found.end], 4096)
    assert replace(cut_back, damaged_lines=found.damaged_lines) == found


@settings(QUIET, max_examples=100)
@given(cuts=st.lists(st.integers(0, 9_000), max_size=40), journal=st.sampled_from([begun, compacted, kept]))
def test_the_blocks_make_no_difference(cuts: list[int], journal: Callable[[], list[Line]]) -> None:
    """Blocks of any mixture of sizes, empty ones included, give what one block gives."""
    data = joined(journal())
    replay = Replay()
    for first, last in pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        replay.feed(data[first:last])
        assert replay.size == last
    whole = replayed(data, len(data))
    assert (replay.state, replay.ahead, replay.end) == (whole.state, whole.ahead, whole.end)
    assert (replay.complete, replay.damaged_lines) == (whole.complete, 0)


def test_an_empty_journal_holds_nothing() -> None:
    """Nothing fed, or nothing but an unfinished line: no state, nothing ahead, and `end` at 0."""
    nothing = Found(None, {}, None, kept=False, end=0, damaged_lines=0)
    assert replayed(b"", 1) == nothing
    assert replayed(SMALL_LINE[:-1], 10) == nothing


def test_damage_before_the_last_commit_is_told_from_a_torn_end() -> None:
    """A whole line that does not count costs committed work only if a state line follows it."""
    lines, bad = story(), b"no line of this\n"
    first, rest = joined([lines[0].state]), joined([lines[1].state])
    replay = Replay()
    replay.feed(first + bad + rest + bad + bad[:5])
    assert (replay.damaged_lines, replay.damaged_before_end) == (2, 1)


def test_what_was_not_committed_is_not_found() -> None:
    """Ahead lines after the last state line belong to a commit that never happened, and lie behind `end`."""
    commit = next(commit for commit in story() if commit.fresh)
    found = replayed(joined([story()[0].state, *commit.fresh]), 64)
    assert (found.state, found.ahead) == (story()[0].state.value, {})
    assert found.end == len(story()[0].state.data)


def test_an_ahead_line_outlives_its_own_state_line() -> None:
    """What was read before a damaged state line is given with the next one, for it was ahead then, too."""
    ahead = [*ahead_lines([ahead_item(5), ahead_item(6)], 2)]
    lost, last = state_line(1, 3), state_line(2, 6)
    found = replayed(joined(ahead) + b"x" + lost.data + last.data, 64)
    assert (found.state, found.ahead, found.damaged_lines) == (last.value, {6: ahead_item(6)}, 1)


def test_a_state_line_after_a_complete_line_begins_anew() -> None:
    """A complete line counts only while no state line follows it."""
    found = replayed(joined([complete_line(30), state_line(0, 0)]), 4096)
    assert (found.complete, found.kept, found.state) == (None, False, state_line(0, 0).value)


def test_the_memory_of_a_replay_does_not_grow_with_the_journal() -> None:
    """Of 60,000 items that were ahead at some time, a replay holds no more than a few windows at any moment."""
    replay, held = Replay(), 0
    for generation in range(600):
        first = generation * 100
        for line in ahead_lines([ahead_item(index) for index in range(first + 1, first + 101)], 50):
            replay.feed(line.data)
        replay.feed(state_line(generation, first).data)
        held = max(held, len(replay._ahead) + len(replay._pending))
        assert [*replay.ahead] == list(range(max(1, first), first + 101))
    assert held < 4_000


def spent_line(*items: Spent) -> bytes:
    (data,) = encode_spent(items)
    return data


def test_what_was_spent_is_found_with_the_state_line_that_follows_it() -> None:
    """The last word on each item counts; nothing is said of items that are finished, nor before its state line."""
    replay = Replay()
    replay.feed(state_line(0, 0).data + spent_line(Spent(3, 1), Spent(9, 2), Spent(5, 0, 1), Spent(12, 4)))
    assert replay.spent == {}
    replay.feed(joined([*ahead_lines([ahead_item(12)], 1), state_line(1, 0)]))
    assert replay.spent == {3: Spent(3, 1), 9: Spent(9, 2), 5: Spent(5, 0, 1)}
    replay.feed(spent_line(Spent(9, 3), Spent(5, 0)) + state_line(2, 4).data)
    assert replay.spent == {9: Spent(9, 3)}


def test_a_damaged_line_of_what_was_spent_costs_that_alone() -> None:
    """The commit counts all the same; the items have the attempts that the lines before gave them."""
    first, second = spent_line(Spent(7, 1)), spent_line(Spent(7, 2))
    for at in range(len(second) - 1):
        damaged = second[:at] + bytes([second[at] ^ 1]) + second[at + 1 :]
        replay = Replay()
        replay.feed(state_line(0, 0).data + first + state_line(1, 0).data + damaged + state_line(2, 3).data)
        assert replay.state == state_line(2, 3).value
        assert replay.spent == {7: Spent(7, 1)}
        assert replay.damaged_lines >= 1


def test_lines_of_what_was_spent_are_bounded() -> None:
    """However many items failed since the last commit."""
    lines = list(encode_spent(Spent(index, 5) for index in range(100_000)))
    assert len(lines) == -(-100_000 // SPENT_LINE_ITEMS)
    assert max(map(len, lines)) < 1 << 20
    replay = Replay()
    replay.feed(b"".join(lines) + state_line(0, 0).data)
    assert len(replay.spent) == 100_000


def test_the_memory_of_what_was_spent_does_not_grow_with_the_journal() -> None:
    """Of 60,000 items that have failed once, a replay holds those of a few windows."""
    replay, held = Replay(), 0
    for generation in range(600):
        first = generation * 100
        replay.feed(spent_line(*(Spent(index, 1) for index in range(first, first + 100))))
        replay.feed(state_line(generation, first).data)
        held = max(held, len(replay._spent))
        assert len(replay.spent) == 100
    assert held < 4_000


def with_checksum(body: bytes) -> bytes:
    """A line whose checksum fits, whatever stands in it; without its line end."""
    return b'{"crc":"%08x",%b' % (crc32(body), body)


def body_of(value: State | Complete) -> bytes:
    """What the checksum of that line is made of."""
    return encode_line(value)[len(b'{"crc":"01234567",') : -1]


SMALL_LINE = encode_line(SMALL)
BODY = body_of(SMALL)
DEEP = b"[" * 200_000 + b"]" * 200_000


def test_a_line_with_a_fitting_checksum_counts() -> None:
    """The control of the tests below: with a body as it is written, a line put together by hand does count."""
    assert decode_line(with_checksum(BODY)) == SMALL
    assert with_checksum(BODY) + b"\n" == SMALL_LINE


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(BODY.replace(b":1,", b": 1,", 1), id="a space"),
        pytest.param(BODY + b" ", id="a space at the end"),
        pytest.param(BODY[:-1], id="no closing brace"),
        pytest.param(BODY + b"}", id="one brace more"),
        pytest.param(BODY.replace(b'"mark":3,', b""), id="no mark"),
        pytest.param(BODY.replace(b'"mark":3,', b'"mark":3,"more":1,'), id="an unknown field"),
        pytest.param(BODY.replace(b'"mark":3,', b'"mark":3,"mark":3,'), id="a field twice"),
        pytest.param(BODY.replace(b'"mark":3,', b'"mark":"3",'), id="text for a number"),
        pytest.param(BODY.replace(b'"mark":3,', b'"mark":3.0,'), id="a float for an integer"),
        pytest.param(BODY.replace(b'"mark":3,', b'"mark":null,'), id="null for a number"),
        pytest.param(BODY.replace(b'"mark":3,"window":9,', b'"window":9,"mark":3,'), id="another order"),
        pytest.param(BODY.replace(b'"format":1', b'"format":"2"'), id="a format that is no number"),
        pytest.param(BODY.replace(b'"state"', b'"estate"'), id="an unknown kind"),
        pytest.param(BODY.replace(b'"kind":"state",', b""), id="no kind"),
        pytest.param(BODY.replace(b'"source":"",', b'"source":"\xff",'), id="not UTF-8"),
        pytest.param(BODY.replace(b'"source":"",', b'"source":"\\u0041",'), id="an escape that is not needed"),
        pytest.param(b'"kind":"ahead","items":[[1,2]]}', id="an item without its record"),
        pytest.param(b'"kind":"ahead","items":[[1,2,x]]}', id="a record that is no JSON"),
        pytest.param(b'"kind":"ahead","items":[[1,2,' + DEEP + b"]]}", id="a record deeper than any stack"),
        pytest.param(BODY.replace(b"null", DEEP), id="a position deeper than any stack"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"}", id="a brace"),
    ],
)
def test_a_line_counts_only_if_it_is_what_we_would_write(body: bytes) -> None:
    """Even with a checksum that fits, a line that would not be encoded as these very bytes does not count."""
    assert body != BODY
    assert decode_line(with_checksum(body)) is None
    assert replayed(with_checksum(body) + b"\n" + SMALL_LINE, 4096).state == SMALL


@pytest.mark.parametrize(
    "line", [b"", b"{", b'{"crc":"00000000",', b"null", bytes(100), SMALL_LINE, with_checksum(BODY)[:-1], BODY]
)
def test_a_line_without_a_fitting_checksum_does_not_count(line: bytes) -> None:
    """Empty, short and foreign lines, and a line with its line end still on it, are no lines of a journal."""
    assert decode_line(line) is None


NEWER = [
    BODY.replace(b'"format":1', b'"format":2'),
    BODY.replace(b'"format":1', b'"format":999'),
    b'"kind":"state","format":2,"nothing":"that we know"}',
    b'"kind":"a kind to come","format":2}',
    body_of(Complete(FORMAT + 1, JOB, None, bookmark(1), None, None, {})),
]


@pytest.mark.parametrize("body", NEWER)
def test_a_newer_format_is_refused_by_name(body: bytes) -> None:
    """An intact line of a newer version is never skipped as if it were damaged: the error names both formats."""
    journal = SMALL_LINE + with_checksum(body) + b"\n" + SMALL_LINE
    with pytest.raises(CheckpointUnusable, match=r"has format (2|999), this version reads up to 1: resume with"):
        replayed(journal, 100)


@pytest.mark.parametrize("body", NEWER)
def test_a_damaged_line_of_a_newer_format_is_only_damaged(body: bytes) -> None:
    """What looks like a newer format, but does not fit its checksum, is no reason to refuse the journal."""
    damaged = with_checksum(body).replace(b'"kind"', b'"Kind"') + b"\n"
    found = replayed(SMALL_LINE + damaged, 100)
    assert (found.state, found.end, found.damaged_lines) == (SMALL, len(SMALL_LINE), 1)


characters = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | characters,
    lambda inner: st.lists(inner) | st.dictionaries(characters, inner),
    max_leaves=8,
)
sizes = st.integers(0, 2**70)
paths = st.none() | characters
jobs = st.builds(Job, characters, characters, paths, characters)
bookmarks = st.builds(Bookmark, json_values, sizes, sizes)
outputs = st.none() | st.builds(OutputState, sizes, sizes, st.tuples(sizes, sizes))
formats = st.just(FORMAT)
states = st.builds(State, formats, jobs, paths, sizes, sizes, sizes, bookmarks, outputs, sizes)
summaries = st.dictionaries(characters, json_values)
completes = st.builds(Complete, formats, jobs, paths, bookmarks, st.none() | sizes, st.none() | sizes, summaries)


@settings(QUIET, max_examples=200)
@given(value=states | completes)
def test_any_state_and_complete_line_comes_back_as_it_was(value: State | Complete) -> None:
    """Positions, paths and summaries of any form keep every digit and character, and are always one line."""
    line = encode_line(value)
    assert line.index(b"\n") == len(line) - 1
    assert repr(decode_line(line[:-1])) == repr(value)  # repr tells 1 from 1.0 and from True


def items_of(lines: Sequence[bytes]) -> list[Ahead]:
    """What stands in these ahead lines, one after the other."""
    found = []
    for line in lines:
        value = decode_line(line[:-1])
        assert isinstance(value, AheadLine)
        for index, item_crc, raw in value.items:
            found.append(Ahead(index, item_crc, None if bytes(raw) == b"null" else bytes(raw)))
    return found


def record_of(size: int) -> bytes:
    """A record of that many bytes."""
    return b'{"r":"%b"}' % (b"x" * (size - 8))


@settings(QUIET, max_examples=200)
@given(
    records=st.lists(st.none() | st.integers(8, 900).map(record_of), max_size=60),
    first=st.sampled_from([0, 10**6, 10**15]),
)
def test_ahead_lines_are_within_their_bound_and_no_shorter_than_need_be(
    records: list[bytes | None], first: int
) -> None:
    """Every item comes back in order; a line is within its bound unless it holds one record; two never fit in one."""
    items = [Ahead(first + number, 2**32 - 1 - number, record) for number, record in enumerate(records)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "AHEAD_LINE_BYTES", 1_000)
        lines = list(encode_ahead(items))
    assert items_of(lines) == items
    for line in lines:
        assert len(items_of([line])) == 1 if len(line) > 1_000 else items_of([line])
    for one, other in pairwise(lines):
        needed = sum(32 + len(item.record or b"null") for item in (*items_of([one]), items_of([other])[0]))
        assert needed > 1_000 - 64


def test_ahead_lines_split_at_one_mebibyte() -> None:
    """Records that fit together share a line of at most 1 MiB; a larger one has a line of its own; none, no line."""
    half = AHEAD_LINE_BYTES // 2
    records = [record_of(size) for size in (4 * half, half, half - 1_000, half, 10, 4 * half, 10)]
    items = [Ahead(index, 0, record) for index, record in enumerate(records)]
    lines = list(encode_ahead(items))
    assert [[item.index for item in items_of([line])] for line in lines] == [[0], [1, 2], [3, 4], [5], [6]]
    assert [len(line) <= AHEAD_LINE_BYTES for line in lines] == [False, True, True, False, True]
    assert list(encode_ahead([])) == []


def test_ahead_lines_without_records_are_bounded_too() -> None:
    """Where there is no output, the numbers alone make up a line: they count."""
    items = [Ahead(10**9 + index, 2**32 - 1, None) for index in range(60_000)]
    lines = list(encode_ahead(iter(items)))
    assert items_of(lines) == items
    assert len(lines) == 3
    assert max(map(len, lines)) <= AHEAD_LINE_BYTES


def test_a_replay_gives_items_without_records_as_such() -> None:
    """With no output, what is ahead has an index and a CRC, and None in the place of its record."""
    items = [Ahead(4, 9, None), Ahead(5, 8, b"{}")]
    assert replayed(b"".join(encode_ahead(items)) + SMALL_LINE, 10).ahead == {4: items[0], 5: items[1]}


MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "live", "worth"),
    [
        (0, 0, False),
        (8 * MIB, 0, False),
        (8 * MIB + 1, 0, True),
        (8 * MIB + 1_000, 1_000, False),
        (8 * MIB + 1_001, 1_000, True),
        (30 * MIB, 10 * MIB, False),
        (30 * MIB, 10 * MIB - 1, True),
        (30 * MIB + 1, 10 * MIB, True),
        (9_000 * MIB, 4_000 * MIB, False),
    ],
)
def test_a_journal_is_written_anew_exactly_beyond_both_bounds(size: int, live: int, *, worth: bool) -> None:
    """Worth it if more than 8 MiB are dead, and more than two thirds of all: on either bound it is not yet."""
    assert worth_compacting(size, live) is worth


Life = list[tuple[int, int]]  # of each commit: bytes appended, and how many percent of what was live die with it
LIVES: dict[str, Life] = {
    "nothing is ever ahead": [(500, 100)] * 60_000,
    "a straggler holds all, then lets go": ([(MIB, 0)] * 30 + [(500, 100)]) * 40,
    "a third stays live": [(MIB, 8)] * 3_000,
    "all dies each time": [(9 * MIB, 100)] * 300,
    "much stays for long": [(100 * MIB, 0)] + [(MIB // 2, 1)] * 3_000,
    "small and large by turns": [(10, 50), (20 * MIB, 3), (MIB, 90)] * 500,
}


def written(life: Life, worth: Callable[[int, int], bool]) -> tuple[int, int, bool]:
    """Bytes appended and bytes rewritten over a journal's life, and whether it was ever larger than it may be."""
    size = live = appended_bytes = rewritten = 0
    too_large = False
    for grows, dies in life:
        appended_bytes += grows
        live = live * (100 - dies) // 100 + grows
        size += grows
        if worth(size, live):
            rewritten += live
            size = live
        too_large = too_large or size > max(3 * live, live + COMPACT_ABOVE_DEAD_BYTES)
    return appended_bytes, rewritten, too_large


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_bytes_written_stay_linear(life: Life) -> None:
    """All rewrites together write less than half of what is appended, and the journal has at most three times the
    bytes that are live, or 8 MiB more than those.
    """
    appended_bytes, rewritten, too_large = written(life, worth_compacting)
    assert rewritten < appended_bytes / 2
    assert not too_large


@settings(QUIET, max_examples=60)
@given(life=st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 100)), min_size=1, max_size=200))
def test_bytes_written_stay_linear_in_any_life(life: Life) -> None:
    """The same for commits of any size, with any share of what is live dying at any time."""
    appended_bytes, rewritten, too_large = written(life, worth_compacting)
    assert rewritten < appended_bytes / 2
    assert not too_large


@pytest.mark.parametrize(
    "worth",
    [
        lambda size, live: size - live > COMPACT_ABOVE_DEAD_BYTES,
        lambda size, live: 3 * (size - live) > size,
        lambda size, live: size > live,
        lambda size, live: False,
    ],
    ids=["8 MiB alone", "a third is dead", "anything is dead", "never"],
)
def test_the_check_of_bytes_written_can_fail(worth: Callable[[int, int], bool]) -> None:
    """The control of the two tests above: other rules break one of the bounds in one of the lives."""
    outcomes = [written(life, worth) for life in LIVES.values()]
    assert any(rewritten >= appended_bytes / 2 or too_large for appended_bytes, rewritten, too_large in outcomes)
