"""What a fixed job costs, in counts and not in seconds: they are the same on any machine, however busy.

The jobs run on the virtual clock over the real file ledger. A number that grew is
a cost that somebody added; one that fell is written down here, and what was gained is kept. Of an item, calls are
counted: those of functions of this package, and of C's from there. A loop without a call, and what another library does
within one, are not: the table `instructions` of the benchmarks has them.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import async_recovery
from async_recovery import engine, journal, records
from async_recovery.checkpoint import Ahead, Bookmark, Job, Spent, State
from async_recovery.files import make_durable
from async_recovery.journal import Journal
from async_recovery.output_file import OutputFile, framing_of
from async_recovery.progress import Progress

from .support.counted_files import CountedFiles, run_over
from .support.threaded_loop import ThreadedLoop, run

PACKAGE = str(Path(async_recovery.__file__).parent)
ITEM_S = 1 / 128  # exact in binary: the clock meets each whole second
ITEMS = 1344  # of one worker, 10.5 s: no commit falls together with the end
MORE = 1280  # 10 s more
TEXT = "x" * 230  # records of 250 bytes and more


class Counts(NamedTuple):
    """What one job took.

    :ivar calls: of the seam, by operation.
    :ivar hops: jobs that were handed to a thread: each wakes the loop once.
    """

    commits: int
    calls: Counter[str]
    hops: int
    written: Counter[str]
    output: int


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in the journal are as long everywhere."""
    monkeypatch.chdir(tmp_path)


def job(items: int, *, concurrency: int = 1, straggles_s: float = 0.0) -> Counts:
    """A job of `concurrency` times 128 items a second, counted; its output is whole.

    :param straggles_s: what item 0 takes.
    """
    Path("items.txt").write_text("".join(f"{number:06}\n" for number in range(items)))
    files, told = CountedFiles(syncs=False), list[Progress]()

    async def worker(item: str) -> dict[str, str]:
        await asyncio.sleep(straggles_s if straggles_s and item == "000000" else ITEM_S)
        return {"text": TEXT}

    async def main() -> int:
        options: dict[str, Any] = {"concurrency": concurrency, "on_progress": told.append, "version": "1"}
        summary = await run_over(files, worker, "items.txt", "out.jsonl", **options)
        assert summary.executed == summary.processed == items
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ThreadedLoop)
        return loop.hops

    hops, output = run(main()), Path("out.jsonl").read_bytes()
    assert output == b"".join(b'{"index":%d,"text":"%s"}\n' % (index, TEXT.encode()) for index in range(items))
    return Counts(told[-1].commits, Counter(files.calls), hops, files.written, len(output))


class LargestWrite(CountedFiles):
    """Knows how much was written at once at most."""

    largest = 0

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.largest = max(self.largest, len(data))
        return super().pwrite(descriptor, data, offset)


def state_of(mark: int) -> State:
    """A commit in a journal."""
    job = Job("text", "jobs:work", None, "jsonl")
    return State(1, job, None, mark, mark, 100, Bookmark(None, 0, 0), None, 0)


def an_item(count: Callable[[int], Counter[str]]) -> dict[str, int]:
    """What `count` finds for each item more; what happens once a page or once a commit is left out."""
    fewer, more = count(ITEMS), count(ITEMS + MORE)
    return {name: times for name in more if (times := round((more[name] - fewer[name]) / MORE))}


def functions_called(items: int, **options: Any) -> Counter[str]:
    """The functions of the package that one job calls on the loop's thread, and what they call in C."""
    called: Counter[str] = Counter()

    def profile(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            if event == "call":
                called[code.co_qualname] += 1
            elif event == "c_call":
                called[f"{code.co_qualname}: {argument.__qualname__}"] += 1

    sys.setprofile(profile)
    try:
        job(items, **options)
    finally:
        sys.setprofile(None)
    return called


IN_ORDER = {
    "TextSource._keep.<locals>.<listcomp>: str.strip": 1,  # an item is its line without the blanks around it
    "Pool._worker_task": 1,  # the worker was awaited: its task is entered again
    "Cursor.take": 1,
    "Watermark.take": 1,
    "encode_record": 1,
    "encode_record: dict.items": 1,  # each field is looked at: NaN and sets are refused
    "encode_record: Encoder.encode": 1,
    "Collector.complete": 1,
    "Collector.complete: len": 1,  # the bytes held are bounded
    "Watermark.complete": 1,
    "Watermark.complete: list.append": 1,  # released at once
}
AHEAD = {
    **{name: times for name, times in IN_ORDER.items() if name != "Watermark.complete: list.append"},
    "Collector.complete: list.append": 1,  # it is to be written to the journal,
    "Collector.take.<locals>.<genexpr>": 1,  # if the mark has not passed it by the next commit,
    "Cursor.item_crcs": 1,  # with the CRC of its item, found in one walk over the pages,
    "Watermark._advance: dict.pop": 1,  # the mark has come by,
    "Watermark._advance: list.append": 1,  # and it is released
}
AROUND_THE_COMMITS = {
    "open": 8,  # the journal that is not there, the new one, the output; and the folder for each of its five syncs
    "close": 7,  # the folder, and with the ledger journal and output
    "fsync": 8,  # the folder; the journal, its name, and once more; the output, its name; at the end both names
    "lstat": 6,  # is there a retry, a journal and its mode, an output? At the end: is it still ours?
    "rename": 2,  # the journal at the start, the output at the end
    "truncate": 1,  # what is there of an output without a journal is never adopted
    "stat": 1,  # the output before it is published
    "unlink": 1,  # the journal
    "pwrite": 2,  # the first state line, and the complete line
    "fdatasync": 1,  # the complete line; the first state line has its fsync
    "pread": 2,  # a look at whether that is to be believed, and the whole output once more before it is published
}


def test_a_commit_is_two_writes_two_syncs_and_one_hop() -> None:
    """A commit a second: each is a write, a sync and a look at it, for output and journal, in one job of the thread."""
    fewer, more = job(ITEMS), job(ITEMS + MORE)
    assert more.commits - fewer.commits == 10
    assert more.calls - fewer.calls == {"pwrite": 2 * 10, "fdatasync": 2 * 10, "pread": 2 * 10}
    shown = 5  # in the lock file, every two seconds
    assert more.hops - fewer.hops == 10 + shown


def test_a_job_of_ten_seconds_takes_these_calls() -> None:
    """All operations of a job from its lock to its published output are known, and there is a reason for each."""
    found = job(ITEMS)
    assert found.commits == 12  # mark 0, ten seconds, and the rest
    with_commits = Counter({"pwrite": 2, "fdatasync": 2, "pread": 2})
    assert found.calls - Counter(AROUND_THE_COMMITS) == {name: times * 11 for name, times in with_commits.items()}
    assert Counter(AROUND_THE_COMMITS) - found.calls == {}
    of_ledger, shown, of_source = (
        3,
        5,
        8,
    )  # open, finish, close; twice open, seek and close of the input; a look at how it begins, and one read
    assert found.hops == found.commits + of_ledger + shown + of_source


def test_items_do_not_add_commits_or_syncs() -> None:
    """The same items in an eighth of the time take commits by the clock: fewer, and as many calls for each."""
    slow, fast = job(ITEMS), job(ITEMS, concurrency=8)
    assert (slow.commits, fast.commits) == (12, 3)
    assert slow.calls - fast.calls == {"pwrite": 18, "fdatasync": 18, "pread": 18}
    assert fast.written["output"] == slow.written["output"]


def test_in_order_each_byte_is_written_once() -> None:
    """The output's bytes are written once, and the journal gets one line of less than 400 bytes a commit."""
    found = job(ITEMS)
    assert found.written["output"] == found.output
    assert found.written["journal"] == 4887
    assert found.written.total() <= 1.05 * found.output


def test_behind_a_straggler_each_byte_is_written_twice() -> None:
    """All records finish ahead of the mark: each goes to the journal with 5 bytes beside it, then to the output."""
    found = job(ITEMS, concurrency=2, straggles_s=10.5)
    assert found.written["output"] == found.output
    assert found.written["journal"] == 351672
    assert found.written.total() <= 2.1 * found.output


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_a_large_commit_is_joined_in_parts_and_synced_once(name: str) -> None:
    """A join keeps the event loop from running: of 8 MB none takes more than about 1 MiB, and there is one sync."""
    files, framing = CountedFiles(syncs=False), framing_of(name)
    output = OutputFile(name, framing, files)
    output.begin()
    files.calls.clear()
    joined = [b'{"index":%07d,"text":"%b"}' % (index, b"x" * 1000) for index in range(8000)]
    output.append(joined[:1])
    output.append(joined[1:])
    assert Counter(files.calls) == {"pwrite": 1 + 8, "fdatasync": 2, "pread": 2}
    output.close()
    assert Path(output.partial).read_bytes() == framing.join(joined, 0)


def test_a_journal_is_written_anew_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is the whole of what is ahead copied into one piece, nor does each small line take a call of its own."""
    files = LargestWrite(syncs=False)
    path = Path("journal")
    monkeypatch.setattr(journal, "worth_compacting", lambda size, live: True)
    written = Journal(str(path), files)
    written.begin(state_of(0))
    large = [Ahead(10 + index, 1, b'{"index":%d,"text":"%b"}' % (10 + index, b"x" * 500_000)) for index in range(20)]
    written.commit(large, [Spent(5, 1)], state_of(1))
    assert 500_000 < files.largest <= 1 << 20
    files.calls.clear()
    written.commit([], [], state_of(30))
    assert Counter(files.calls)["pwrite"] == 1
    written.commit([Ahead(40, 1, b"{}")], [Spent(35, 1)], state_of(31))
    assert Counter(files.calls)["pwrite"] == 2
    written.close()


def test_an_item_in_order_takes_these_calls() -> None:
    """Eleven calls an item of our functions and, from there, of C's; each of them here by its name."""
    assert an_item(functions_called) == IN_ORDER


def test_an_item_ahead_of_the_mark_takes_these_calls() -> None:
    """An item that finishes ahead of the mark is remembered, told from others, and released: nothing else is done."""
    assert an_item(lambda items: functions_called(items, concurrency=2, straggles_s=items * ITEM_S)) == AHEAD


def test_one_fsync_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a journal that syncs twice changes the counts of a commit."""
    once = make_durable
    monkeypatch.setattr(journal, "make_durable", lambda *of: (once(*of), once(*of)))
    with pytest.raises(AssertionError, match="fdatasync"):
        test_a_commit_is_two_writes_two_syncs_and_one_hop()
    with pytest.raises(AssertionError, match="fdatasync"):
        test_a_job_of_ten_seconds_takes_these_calls()


def test_one_call_more_an_item_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a record that is made twice changes the calls of an item."""
    once = records.encode_record
    monkeypatch.setattr(engine, "encode_record", lambda *of: (once(*of), once(*of))[0])
    with pytest.raises(AssertionError, match="encode_record"):
        test_an_item_in_order_takes_these_calls()


def test_a_journal_that_repeats_what_is_ahead_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with a compaction at every commit, as much is written as the square of the items."""
    monkeypatch.setattr(journal, "worth_compacting", lambda size, live: True)
    with pytest.raises(AssertionError):
        test_behind_a_straggler_each_byte_is_written_twice()
