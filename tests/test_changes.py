"""What was left there has changed, between two runs or during one: refused or continued, never a wrong output."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from async_recovery import run_resumable, sources
from async_recovery.checkpoint import encode_line
from async_recovery.contracts import RunSummary
from async_recovery.errors import (
    AsyncRecoveryError,
    CheckpointUnusable,
    InputChanged,
    InvalidItem,
    ItemFailed,
    JobMismatch,
    OutputChanged,
    UsageError,
)
from async_recovery.file_ledger import FileLedger
from async_recovery.sources import CsvSource, JsonLinesSource, TextSource

from .support.file_jobs import OtherWorker, Worker, json_lines, names_in, replay_of, snapshot
from .support.threaded_loop import run

NAMES = [f"item {number:02d}" for number in range(20)]
MARK = 3
AHEAD = {4, 5, 6, 8, 9}
DONE = {0, 1, 2} | AHEAD

Lines = list[str]


class Format(NamedTuple):
    """How lines become an input; `tiny`: pages of two lines, so that the mark's page is not the first."""

    suffix: str
    first: str
    line: str
    tiny: bool

    def bytes(self, lines: Lines, *, last: str = "\n") -> bytes:
        text = "\n".join([*([self.first] if self.first else []), *(self.line.format(line) for line in lines)])
        return (text + last).encode() if text else b""


FORMATS = {
    "text": Format(".txt", "", "{}", tiny=False),
    "text, tiny pages": Format(".txt", "", "{}", tiny=True),
    "jsonl": Format(".jsonl", "", '"{}"', tiny=False),
    "csv, tiny pages": Format(".csv", "name", "{}", tiny=True),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def resume(
    worker: Worker,
    items: Any,
    folder: Path,
    *,
    output: str = "out.jsonl",
    **options: Any,
) -> RunSummary:
    return run(run_resumable(worker, items, output=folder / output, concurrency=4, drain_timeout=0, **options))


def interrupt(items: Any, folder: Path, **options: Any) -> None:
    """A run that ends with the items 0–2 below the mark, 4, 5, 6, 8 and 9 ahead of it, 3 and all from 10 on undone."""
    with pytest.raises(ItemFailed, match=r"item 7 .*as the test says"):
        resume(Worker(hangs={NAMES[3]}, fails={NAMES[7]}), items, folder, **options)


def refuse(error: type[AsyncRecoveryError], match: str, items: Any, folder: Path, **options: Any) -> None:
    """A run that is refused before any item is begun, and leaves every byte in the folder as it was."""
    worker, before = options.pop("worker", None) or Worker(), snapshot(folder)
    with pytest.raises(error, match=match) as caught:
        resume(worker, items, folder, **options)
    assert type(caught.value) is error
    assert worker.calls == []
    assert snapshot(folder) == before


def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 32)
    monkeypatch.setattr(sources, "PAGE_BYTES", 16)
    monkeypatch.setattr(sources, "COMPARED_BYTES", 8)


def changed(index: int) -> Callable[[Lines], Lines]:
    """The line at `index` is another, of the same length."""
    return lambda lines: [*lines[:index], "ITEM" + lines[index][4:], *lines[index + 1 :]]


def inserted(index: int) -> Callable[[Lines], Lines]:
    return lambda lines: [*lines[:index], "item new", *lines[index:]]


def removed(index: int) -> Callable[[Lines], Lines]:
    return lambda lines: [*lines[:index], *lines[index + 1 :]]


def shortened(count: int) -> Callable[[Lines], Lines]:
    return lambda lines: lines[:count]


def grown(lines: Lines) -> Lines:
    return [*lines, "item 20", "item 21"]


REFUSED: dict[str, Callable[[Lines], Lines]] = {
    "the first line": changed(0),
    "a line before the mark, in its page": changed(2),
    "an item ahead of the mark": changed(5),
    "the last item that is ahead": changed(9),
    "inserted at the start": inserted(0),
    "inserted just before the mark": inserted(2),
    "inserted at the mark": inserted(3),
    "inserted between those ahead": inserted(7),
    "removed at the start": removed(0),
    "removed just before the mark": removed(2),
    "removed at the mark": removed(3),
    "removed ahead of the mark": removed(6),
    "removed between those ahead": removed(7),
    "shortened to nothing": shortened(0),
    "shortened below the mark": shortened(2),
    "shortened to the mark": shortened(3),
    "shortened below those ahead": shortened(9),
}

CONTINUED: dict[str, Callable[[Lines], Lines]] = {
    "nothing": list,
    "the item at the mark": changed(3),
    "an item between those ahead": changed(7),
    "the first item beyond those ahead": changed(10),
    "the last line": changed(19),
    "inserted beyond those ahead": inserted(10),
    "removed beyond those ahead": removed(10),
    "shortened to those ahead": shortened(10),
    "grown": grown,
}

every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.mark.parametrize("change", REFUSED)
@every_format
def test_an_input_that_changed_where_it_was_done_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, format: str, change: str
) -> None:
    """`InputChanged`, nothing published; given the old input again, the job ends as if nothing had happened.

    (Unless items that were not done had changed too, and came by before the change was found: they are done now.)
    """
    form = FORMATS[format]
    if form.tiny:
        small_pages(monkeypatch)
    path = folder / f"in{form.suffix}"
    path.write_bytes(form.bytes(NAMES))
    interrupt(path, folder)
    path.write_bytes(form.bytes(REFUSED[change](NAMES)))
    again = Worker()
    if change == "shortened below those ahead" or (form.tiny and ("ahead" in change or "at the mark" in change)):
        # What is ahead is compared when its page comes by: items of pages before it may run, and are kept.
        with pytest.raises(InputChanged, match=r"--fresh \(fresh=True\)"):
            resume(again, path, folder)
        assert names_in(folder) == {path.name, "out.jsonl.partial", "out.jsonl.checkpoint"}
    else:
        refuse(InputChanged, r"input .*has changed.*--fresh \(fresh=True\)", path, folder)
    if set(again.calls) <= {NAMES[index] for index in range(20) if index not in DONE}:
        path.write_bytes(form.bytes(NAMES))
        last = Worker()
        assert resume(last, path, folder).total_items == 20
        assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)
        assert not {NAMES[index] for index in DONE} & {*again.calls, *last.calls}


@pytest.mark.parametrize("change", CONTINUED)
@every_format
def test_an_input_that_changed_only_beyond_what_was_done_is_continued(
    folder: Path, monkeypatch: pytest.MonkeyPatch, format: str, change: str
) -> None:
    """The run goes on, what was done is not done again, and the output is that of the input as it is now."""
    form = FORMATS[format]
    if form.tiny:
        small_pages(monkeypatch)
    path = folder / f"in{form.suffix}"
    path.write_bytes(form.bytes(NAMES))
    interrupt(path, folder)
    assert replay_of(folder / "out.jsonl.checkpoint").ahead.keys() == AHEAD
    now = CONTINUED[change](NAMES)
    path.write_bytes(form.bytes(now))
    worker = Worker()
    summary = resume(worker, path, folder)
    assert (summary.total_items, summary.resumed_from, summary.executed) == (len(now), MARK, len(now) - len(DONE))
    assert (folder / "out.jsonl").read_bytes() == json_lines(now)
    assert sorted(worker.calls) == sorted(name for index, name in enumerate(now) if index not in DONE)
    assert names_in(folder) == {path.name, "out.jsonl"}


@pytest.mark.parametrize("tiny", [False, True])
def test_another_header_of_a_csv_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, *, tiny: bool) -> None:
    """The header is a part of every item: another one is another input, also while the mark is in the first page."""
    if tiny:
        small_pages(monkeypatch)
    path = folder / "in.csv"
    path.write_bytes(b"name,more\n" + b"".join(f"{name},x\n".encode() for name in NAMES))
    interrupt(path, folder)
    path.write_bytes(path.read_bytes().replace(b"name,more", b"name,less"))
    refuse(InputChanged, "has changed before the point that was reached", path, folder)


def test_another_delimiter_is_another_kind_of_source(folder: Path) -> None:
    """A CSV that is read with another delimiter is another job."""
    path = folder / "in.csv"
    path.write_bytes(b"name\n" + b"".join(f"{name}\n".encode() for name in NAMES))
    interrupt(CsvSource(path), folder)
    refuse(JobMismatch, "source 'csv', not 'csv;'", CsvSource(path, ";"), folder)


def test_a_missing_input_is_refused_on_a_resume(folder: Path) -> None:
    """The input is gone: a usage error, and nothing is touched."""
    path = folder / "in.txt"
    path.write_bytes(FORMATS["text"].bytes(NAMES))
    interrupt(path, folder)
    path.unlink()
    refuse(UsageError, "there is no input file", path, folder)


def test_a_change_in_the_middle_of_a_long_prefix_is_found_before_the_output_is_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too far from both ends to be seen at once: the comparison of all of it beside the work finds it."""
    small_pages(monkeypatch)
    path = folder / "in.txt"
    path.write_bytes(FORMATS["text"].bytes(NAMES))
    with pytest.raises(ItemFailed):
        resume(Worker(fails={NAMES[15]}), path, folder)
    path.write_bytes(FORMATS["text"].bytes(changed(6)(NAMES)))
    with pytest.raises(InputChanged, match="the bytes from 0 to"):
        resume(Worker(), path, folder)
    assert not (folder / "out.jsonl").exists()
    path.write_bytes(FORMATS["text"].bytes(NAMES))
    resume(Worker(), path, folder)
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("in.txt", b"item 1\xff\n", b"item 11\n"),
        ("in.csv", b"item,11\n", b"item 11\n"),
        ("in.jsonl", b"{\n", b'"item 11"\n'),
    ],
)
def test_a_line_that_was_mended_is_gone_on_with(folder: Path, name: str, bad: bytes, good: bytes) -> None:
    """A line that can not be read ends the run after the items before it; mended, the job goes on from there."""
    form = {".txt": FORMATS["text"], ".jsonl": FORMATS["jsonl"], ".csv": FORMATS["csv, tiny pages"]}
    path = folder / name
    data = form[path.suffix].bytes(NAMES)
    assert good in data
    path.write_bytes(data.replace(good, bad))
    worker = Worker()
    with pytest.raises(InvalidItem, match=f"{path}, line {13 if name == 'in.csv' else 12}, byte .*Mend the line"):
        resume(worker, path, folder)
    assert worker.calls == NAMES[:11]
    assert names_in(folder) == {name, "out.jsonl.partial", "out.jsonl.checkpoint"}
    path.write_bytes(data)
    assert resume(Worker(), path, folder).executed == 9
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)


# Half a line at the end


def half_line_done(path: Path, folder: Path) -> None:
    """A run over ten lines without a line end at the end: the tenth, which may be half a line, is done ahead."""
    path.write_bytes(FORMATS["text"].bytes(NAMES[:10], last=""))
    interrupt(path, folder)
    assert 9 in replay_of(folder / "out.jsonl.checkpoint").ahead


@pytest.mark.parametrize("more", ["x", "x\n", "0\nitem 10\n"])
def test_half_a_line_that_was_done_and_grew_is_refused(folder: Path, more: str) -> None:
    """What was done was not the whole line: `InputChanged`, before any item is begun."""
    path = folder / "in.txt"
    half_line_done(path, folder)
    with path.open("a") as file:
        file.write(more)
    refuse(InputChanged, "item at index 9, which was finished ahead of the others, is another now", path, folder)


@pytest.mark.parametrize("more", ["", "\n", "\r\n", "\nitem 10\n", "\r\nitem 10"])
def test_half_a_line_that_was_done_and_got_its_line_end_is_continued(folder: Path, more: str) -> None:
    """It was the whole line after all: the run goes on, with what comes after it."""
    path = folder / "in.txt"
    half_line_done(path, folder)
    with path.open("a", newline="") as file:
        file.write(more)
    names = NAMES[: 11 if "10" in more else 10]
    assert resume(Worker(), path, folder).executed == len(names) - 8
    assert (folder / "out.jsonl").read_bytes() == json_lines(names)


@pytest.mark.parametrize("kept", [3, 7])
@pytest.mark.parametrize("tiny", [False, True])
def test_an_input_that_was_cut_within_a_line_can_be_restored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kept: int, *, tiny: bool
) -> None:
    """Something finished lies beyond the cut, so the half line before it is no item: never done, and no obstacle."""
    if tiny:
        small_pages(monkeypatch)
    path, whole = folder / "in.txt", FORMATS["text"].bytes(NAMES)
    path.write_bytes(whole)
    interrupt(path, folder)
    path.write_bytes(whole[: whole.index(NAMES[kept].encode()) + 3])
    worker = Worker()
    with pytest.raises(InputChanged, match="the item at index 9 was finished"):
        resume(worker, path, folder)
    assert set(worker.calls) <= {NAMES[3]}, "of the whole lines, only what was missing"
    path.write_bytes(whole)
    resume(Worker(), path, folder)
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)


def test_half_a_line_that_was_not_done_may_grow(folder: Path) -> None:
    """Nothing was done with it yet: it is read as it is now."""
    path = folder / "in.txt"
    path.write_bytes(FORMATS["text"].bytes([*NAMES[:10], "it"], last=""))
    interrupt(path, folder)
    path.write_bytes(FORMATS["text"].bytes(NAMES[:12]))
    resume(Worker(), path, folder)
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES[:12])


@pytest.mark.parametrize(
    ("more", "names"), [("", NAMES[:3]), ("\n", NAMES[:3]), ("\nitem 03", NAMES[:4]), ("x", None), ("x\n", None)]
)
def test_half_a_line_below_the_mark_holds_until_it_goes_on(folder: Path, more: str, names: Lines | None) -> None:
    """All is done, the last line without its line end, but not published: only more of that very line is refused."""
    path, partial = folder / "in.txt", folder / "out.jsonl.partial"
    path.write_bytes(FORMATS["text"].bytes(NAMES[:3], last=""))
    with pytest.raises(OutputChanged):
        resume(Worker(during={NAMES[2]: lambda: os.link(partial, folder / "link")}), path, folder)
    (folder / "link").unlink()
    assert replay_of(folder / "out.jsonl.checkpoint").state.mark == 3  # type: ignore[union-attr]
    with path.open("a") as file:
        file.write(more)
    if names is None:
        refuse(InputChanged, "the line that ended at byte 23 goes on now", path, folder)
    else:
        assert resume(Worker(), path, folder).executed == len(names) - 3
        assert (folder / "out.jsonl").read_bytes() == json_lines(names)


def test_a_file_that_is_written_while_it_is_read_is_done_to_its_former_end(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a line that grows meanwhile is left for the next run, and the log says so; a growing file ends nothing."""
    path = folder / "in.txt"
    names = [f"item {number:03d} {'x' * 4000}" for number in range(80)]
    path.write_bytes(FORMATS["text"].bytes([*names, "half"], last=""))

    def grow() -> None:
        with path.open("a") as file:
            file.write(" a line\nmore\n")

    summary = resume(Worker(during={names[0]: grow}), path, folder)
    assert summary.total_items == 80
    assert (folder / "out.jsonl").read_bytes() == json_lines(names)
    assert "has grown while it was read" in caplog.text


# Iterables


def as_list(names: Lines) -> Any:
    return names


def as_generator(names: Lines) -> Iterator[str]:
    yield from names


async def as_async_generator(names: Lines) -> AsyncIterator[str]:
    for name in names:
        yield name


every_iterable = pytest.mark.parametrize("given", [as_list, as_generator, as_async_generator])


@pytest.mark.parametrize("change", REFUSED)
@every_iterable
def test_an_iterable_that_changed_where_it_was_done_is_refused(
    folder: Path, given: Callable[[Lines], Any], change: str
) -> None:
    """Each item that was done is compared by its CRC, below the mark before any item is begun."""
    interrupt(given(NAMES), folder)
    other = REFUSED[change](NAMES)
    late = given is as_async_generator and ("ahead" in change or "at the mark" in change)
    if late or change == "shortened below those ahead":
        with pytest.raises(InputChanged, match="--fresh"):
            resume(Worker(), given(other), folder)  # found when it comes by: what comes before it may run
        assert names_in(folder) == {"out.jsonl.partial", "out.jsonl.checkpoint"}
    else:
        refuse(InputChanged, r"the input has changed: .*--fresh \(fresh=True\)", given(other), folder)
        resume(Worker(), given(NAMES), folder)
        assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)


@pytest.mark.parametrize("change", CONTINUED)
@every_iterable
def test_an_iterable_that_changed_only_beyond_what_was_done_is_continued(
    folder: Path, given: Callable[[Lines], Any], change: str
) -> None:
    """Given again from its beginning, it goes on where the run before had stopped."""
    interrupt(given(NAMES), folder)
    now = CONTINUED[change](NAMES)
    assert resume(Worker(), given(now), folder).executed == len(now) - len(DONE)
    assert (folder / "out.jsonl").read_bytes() == json_lines(now)


def test_a_list_is_resumed_as_a_generator(folder: Path) -> None:
    """All iterables are one kind of source: what counts is the items."""
    interrupt(NAMES, folder)
    assert resume(Worker(), as_async_generator(NAMES), folder).executed == 12


def test_items_told_by_key_are_compared_by_it(folder: Path) -> None:
    """With key=, another key is another item, and what else is in it does not matter."""
    items = [{"name": name, "object": object()} for name in NAMES]

    def key(item: dict[str, Any]) -> str:
        return str(item["name"])

    interrupt(items, folder, key=key)
    others = [{"name": name, "object": object()} for name in [*NAMES[:5], "item new", *NAMES[6:]]]
    refuse(InputChanged, "the item at index 5", others, folder, key=key)
    assert resume(Worker(), [{**item, "object": object()} for item in items], folder, key=key).executed == 12


# The output


@pytest.fixture
def text(folder: Path) -> Path:
    """A text input of `NAMES`."""
    path = folder / "in.txt"
    path.write_bytes(FORMATS["text"].bytes(NAMES))
    return path


@pytest.fixture
def interrupted(folder: Path, text: Path) -> Path:
    """The same, after a run over it that was interrupted."""
    interrupt(text, folder)
    return text


def finishes(path: Path, folder: Path, **options: Any) -> None:
    """The next run ends the job, with the right bytes and nothing left behind."""
    resume(Worker(), path, folder, **options)
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)
    assert not [name for name in names_in(folder) if name.endswith((".partial", ".checkpoint", ".lock", ".tmp"))]


@pytest.mark.parametrize("left", [-1, -30, 1, 0])
def test_a_partial_output_that_is_shorter_is_refused(folder: Path, interrupted: Path, left: int) -> None:
    """Fewer bytes than were committed: `OutputChanged` before the first item, nothing touched."""
    partial = folder / "out.jsonl.partial"
    data = partial.read_bytes()
    partial.write_bytes(data[:left])
    refuse(OutputChanged, f"has {len(data[:left])} bytes, {len(data)} were written", interrupted, folder)
    partial.write_bytes(data)
    finishes(interrupted, folder)


def test_a_partial_output_that_is_gone_is_refused(folder: Path, interrupted: Path) -> None:
    """A missing partial output of which bytes were committed is not silently written anew."""
    (folder / "out.jsonl.partial").rename(folder / "elsewhere")
    refuse(OutputChanged, r"out.jsonl.partial is missing, \d+ bytes of it were written: .*--fresh", interrupted, folder)
    (folder / "elsewhere").rename(folder / "out.jsonl.partial")
    finishes(interrupted, folder)


def test_a_byte_flipped_in_the_last_mebibyte_is_refused_at_once(folder: Path, interrupted: Path) -> None:
    """Every byte of a small output is compared before the first item."""
    partial = folder / "out.jsonl.partial"
    data = partial.read_bytes()
    for at in range(len(data)):
        partial.write_bytes(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])
        refuse(OutputChanged, "are not those that were written", interrupted, folder)
    partial.write_bytes(data)
    finishes(interrupted, folder)


class Verbose(Worker):
    """Results of 400,000 bytes."""

    async def __call__(self, item: Any) -> dict[str, Any]:
        return {**await super().__call__(item), "more": "x" * 400_000}


def test_a_byte_flipped_early_in_a_big_output_is_found_before_it_is_published(folder: Path, text: Path) -> None:
    """Beyond the last MiB the comparison beside the work finds it; the output never appears, also the next time."""
    output, partial = folder / "out.jsonl", folder / "out.jsonl.partial"
    with pytest.raises(ItemFailed):
        resume(Verbose(fails={NAMES[9]}), text, folder)
    good = partial.read_bytes()
    assert len(good) > 3_000_000
    with partial.open("r+b") as file:
        file.write(b"[")
    for _ in range(2):
        with pytest.raises(OutputChanged, match=r"the first \d+ bytes of .* are not those that were written.*--fresh"):
            resume(Verbose(), text, folder)
        assert not output.exists()
        assert partial.read_bytes()[1 : len(good)] == good[1:]
    with partial.open("r+b") as file:
        file.write(b"{")
    resume(Verbose(), text, folder)
    assert [json.loads(line)["did"] for line in output.read_bytes().splitlines()] == NAMES


def test_nothing_is_published_before_the_comparison_has_ended(
    folder: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the comparison takes, the finish waits for what it finds."""

    async def slow_audit(ledger: FileLedger) -> None:
        await asyncio.sleep(1000)
        raise OutputChanged("found late")

    monkeypatch.setattr(FileLedger, "audit", slow_audit)
    with pytest.raises(OutputChanged, match="found late"):
        resume(Worker(), interrupted, folder)
    assert names_in(folder) == {"in.txt", "out.jsonl.partial", "out.jsonl.checkpoint"}


def test_what_was_written_after_the_last_commit_is_cut_off(folder: Path, interrupted: Path) -> None:
    """A longer partial output and a torn journal line are what a crash leaves: cut back, never adopted."""
    for name in ("out.jsonl.partial", "out.jsonl.checkpoint"):
        with (folder / name).open("ab") as file:
            file.write(b'{"index":3,"did":"item 03"}\n' * 1000 + b'{"ind')
    finishes(interrupted, folder)


def test_a_partial_output_without_a_journal_is_refused(folder: Path, interrupted: Path) -> None:
    """Never a crash state, so it may be somebody's: named, with --checkpoint and --fresh; `fresh` overwrites it."""
    (folder / "out.jsonl.checkpoint").rename(folder / "moved")
    refuse(CheckpointUnusable, r"out.jsonl.partial.*--checkpoint.*--fresh \(fresh=True\)", interrupted, folder)
    worker = Worker()
    assert resume(worker, interrupted, folder, checkpoint=folder / "moved").executed == 12
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)
    (folder / "out.jsonl.partial").write_bytes(b"x" * 10_000)
    finishes(interrupted, folder, fresh=True)


@pytest.mark.parametrize("damage", [b"", b"\n", b"not a journal\n", b"\0" * 600, b'{"crc":"00000000",'])
def test_a_journal_with_nothing_readable_is_moved_aside_with_the_partial_output(
    folder: Path, interrupted: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The job starts anew, warns, and every byte is still there under the next free name, each time."""
    journal, partial = folder / "out.jsonl.checkpoint", folder / "out.jsonl.partial"
    for number in (1, 2):
        journal.write_bytes(damage)
        left = partial.read_bytes()
        with pytest.raises(ItemFailed):
            resume(Worker(fails={NAMES[0]}), interrupted, folder)
        assert Path(f"{journal}.damaged-{number}").read_bytes() == damage
        assert Path(f"{partial}.damaged-{number}").read_bytes() == left
        assert "is damaged: not one line of it can be read" in caplog.text
    finishes(interrupted, folder)
    assert {name for name in names_in(folder) if ".damaged-" in name} == {
        f"out.jsonl.{kind}.damaged-{number}" for kind in ("checkpoint", "partial") for number in (1, 2)
    }


def test_a_journal_with_nothing_readable_can_be_refused(folder: Path, interrupted: Path) -> None:
    """`on_damage="refuse"` stops, and `fresh` starts anew all the same."""
    (folder / "out.jsonl.checkpoint").write_bytes(b"damaged\n")
    refuse(CheckpointUnusable, r"is damaged: .*--fresh \(fresh=True\)", interrupted, folder, on_damage="refuse")
    finishes(interrupted, folder, on_damage="refuse", fresh=True)


def test_nothing_is_moved_aside_before_the_input_is_known_to_be_there(folder: Path, interrupted: Path) -> None:
    """A damaged journal and a missing input: the refusal comes first, and touches nothing."""
    (folder / "out.jsonl.checkpoint").write_bytes(b"damaged\n")
    interrupted.unlink()
    refuse(UsageError, "there is no input file", interrupted, folder)


def test_a_damaged_last_state_line_costs_one_commit(folder: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The state line before it is a correct place to resume from; the log says that something is done again."""
    with pytest.raises(ItemFailed):
        resume(Worker(fails={NAMES[7]}), text, folder, batch_size=1)
    journal = folder / "out.jsonl.checkpoint"
    *lines, last = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines, last.replace(b'"mark"', b'"MARK"')]))
    finishes(text, folder)
    assert "damaged lines in" in caplog.text


class Mismatch(NamedTuple):
    worker: Worker
    items: Callable[[Path], Any]
    options: dict[str, Any]
    difference: str


MISMATCHES = {
    "worker": Mismatch(OtherWorker(), Path, {}, r"worker '.*:Worker', not '.*:OtherWorker'"),
    "version": Mismatch(Worker(), Path, {"version": "2"}, "version None, not '2'"),
    "source": Mismatch(Worker(), JsonLinesSource, {}, "source 'text', not 'jsonl'"),
    "kind of CSV": Mismatch(Worker(), lambda path: CsvSource(path, "\t"), {}, "source 'text', not 'tsv'"),
    "iterable": Mismatch(Worker(), lambda _: NAMES, {}, "source 'text', not 'iterable'"),
    "output": Mismatch(Worker(), Path, {"output": "out.json"}, "output 'jsonl', not 'json'"),
    "all": Mismatch(OtherWorker(), lambda _: NAMES, {"version": "2"}, "source .*, worker .*, version "),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_the_journal_of_another_job_is_refused(folder: Path, text: Path, name: str) -> None:
    """`JobMismatch` names each difference, what was found and what is wanted; also once the job is complete."""
    other = MISMATCHES[name]
    journal: dict[str, Any] = {"checkpoint": folder / "journal"}
    interrupt(text, folder, **journal)
    match = rf"{folder}/journal is of another job: it has {other.difference}.*--fresh"
    options = {**journal, **other.options, "worker": other.worker}
    refuse(JobMismatch, match, other.items(text), folder, **options)
    resume(Worker(), text, folder, **journal, keep_checkpoint=True)
    refuse(JobMismatch, match, other.items(text), folder, **options)
    refuse(JobMismatch, match, other.items(text), folder, keep_checkpoint=True, **options)


def test_another_output_of_the_same_form_does_not_fit_the_journal(folder: Path, interrupted: Path) -> None:
    """The journal's bytes are not in that output: `OutputChanged`, and neither output is touched."""
    journal = folder / "out.jsonl.checkpoint"
    refuse(
        OutputChanged, "other.jsonl.partial is missing", interrupted, folder, output="other.jsonl", checkpoint=journal
    )


def test_a_newer_format_is_refused(folder: Path, interrupted: Path) -> None:
    """A journal of a newer version is neither resumed nor called damaged; `fresh` alone starts anew."""
    journal = folder / "out.jsonl.checkpoint"
    state = replay_of(journal).state
    assert state is not None
    with journal.open("ab") as file:
        file.write(encode_line(msgspec.structs.replace(state, format=2)))
    refuse(CheckpointUnusable, "has format 2, this version reads up to 1", interrupted, folder)
    finishes(interrupted, folder, fresh=True)


# The output while it is written


def replace(partial: Path) -> None:
    copy = partial.with_name("copy")
    copy.write_bytes(partial.read_bytes())
    copy.replace(partial)


def hide(partial: Path) -> None:
    partial.rename(partial.with_name("real"))
    partial.symlink_to("real")


def flip(partial: Path) -> None:
    with partial.open("r+b") as file:
        file.seek(20)
        file.write(b"~")


def append(partial: Path) -> None:
    with partial.open("ab") as file:
        file.write(b"x" * 1000)  # more than the commits to come overwrite


MEDDLING: dict[str, Callable[[Path], object]] = {
    "renamed": lambda partial: partial.rename(partial.with_name("rotated")),
    "deleted": lambda partial: partial.unlink(),
    "replaced by its copy": replace,
    "hard-linked": lambda partial: os.link(partial, partial.with_name("linked")),
    "moved behind a symlink": hide,
    "cut": lambda partial: os.truncate(partial, 10),
    "a byte flipped": flip,
    "appended to": append,
}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", MEDDLING)
def test_an_output_that_somebody_meddled_with_during_the_run_is_not_published(
    folder: Path, text: Path, name: str, *, resumed: bool
) -> None:
    """Moved, replaced, linked, cut or written to: `OutputChanged` at the finish, under its own name nothing appears."""
    output, partial = folder / "out.jsonl", folder / "out.jsonl.partial"
    output.write_bytes(b"old")
    if resumed:
        interrupt(text, folder)
    worker = Worker(during={NAMES[19]: lambda: MEDDLING[name](partial)})
    with pytest.raises(OutputChanged, match=r"out.jsonl.partial.*--fresh \(fresh=True\)"):
        resume(worker, text, folder, batch_size=4)
    assert output.read_bytes() == b"old"
    assert len(worker.calls) == (12 if resumed else 20)
    others = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in ("rotated", "linked", "real")}
    finishes(text, folder, fresh=True)
    assert all((folder / name).read_bytes() == data for name, data in others.items())


def test_an_output_that_is_put_back_is_published_without_any_work(folder: Path, text: Path) -> None:
    """What was renamed during the run and is named back is the finished output: nothing runs again."""
    partial = folder / "out.jsonl.partial"
    with pytest.raises(OutputChanged, match="Put it back"):
        resume(Worker(during={NAMES[19]: lambda: partial.rename(folder / "rotated")}), text, folder, batch_size=4)
    (folder / "rotated").rename(partial)
    worker = Worker()
    assert resume(worker, text, folder).executed == 0
    assert worker.calls == []
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)


# After completion


def test_without_keep_checkpoint_the_same_line_starts_anew(folder: Path, text: Path) -> None:
    """The old output stays, whole, until the new one is complete."""
    output = folder / "out.jsonl"
    finishes(text, folder)
    old = output.read_bytes()
    text.write_bytes(FORMATS["text"].bytes(NAMES[:12]))
    interrupt(text, folder)
    assert output.read_bytes() == old
    worker = Worker()
    assert resume(worker, text, folder).executed == 4
    assert output.read_bytes() == json_lines(NAMES[:12])


@pytest.mark.parametrize("given", [None, as_list, as_generator, as_async_generator])
def test_a_kept_checkpoint_gives_the_same_summary_and_runs_nothing(
    folder: Path, text: Path, given: Callable[[Lines], Any] | None
) -> None:
    """`keep_checkpoint`: the same call compares the input and gives the stored summary, as often as it is made."""

    def items() -> Any:
        return text if given is None else given(NAMES)

    first = resume(Worker(), items(), folder, keep_checkpoint=True)
    assert (first.executed, first.checkpoint_cleared, first.total_items) == (20, False, 20)
    before = snapshot(folder)
    for _ in range(2):
        worker = Worker()
        again = resume(worker, items(), folder, keep_checkpoint=True)
        assert again == msgspec.structs.replace(first, executed=0)
        assert worker.calls == []
        assert snapshot(folder) == before
    assert names_in(folder) == {"in.txt", "out.jsonl", "out.jsonl.checkpoint"}


KEPT_CHANGES: dict[str, Callable[[Lines], Lines]] = {
    "the first": changed(0),
    "one in the middle": changed(9),
    "the last": changed(19),
    "inserted": inserted(5),
    "removed": removed(5),
    "shortened": shortened(19),
    "nothing left": shortened(0),
    "grown": grown,
}


@pytest.mark.parametrize("change", KEPT_CHANGES)
@pytest.mark.parametrize("given", [None, as_list, as_generator, as_async_generator])
def test_a_kept_checkpoint_and_another_input_is_refused(
    folder: Path, text: Path, given: Callable[[Lines], Any] | None, change: str
) -> None:
    """Changed anywhere, or grown: `InputChanged` that says that the job is complete and names --fresh."""

    def items(names: Lines) -> Any:
        return text if given is None else given(names)

    resume(Worker(), items(NAMES), folder, keep_checkpoint=True)
    names = KEPT_CHANGES[change](NAMES)
    text.write_bytes(FORMATS["text"].bytes(names))
    refuse(InputChanged, r"the job is complete, but .*--fresh", items(names), folder, keep_checkpoint=True)
    resume(Worker(), items(names), folder, keep_checkpoint=True, fresh=True)
    assert (folder / "out.jsonl").read_bytes() == json_lines(names)


@pytest.mark.parametrize("more", ["x", "x\n"])
def test_a_kept_checkpoint_and_half_a_line_that_grew_is_refused(folder: Path, text: Path, more: str) -> None:
    """The last line was done without its line end; more of it is a changed input, a mere line end is not."""
    text.write_bytes(FORMATS["text"].bytes(NAMES, last=""))
    resume(Worker(), text, folder, keep_checkpoint=True)
    text.write_bytes(FORMATS["text"].bytes(NAMES, last=more))
    refuse(InputChanged, r"the job is complete, but .*goes on now.*--fresh", text, folder, keep_checkpoint=True)
    text.write_bytes(FORMATS["text"].bytes(NAMES, last="\n\n \n"))
    assert resume(Worker(), text, folder, keep_checkpoint=True).executed == 0


@pytest.mark.parametrize("change", ["cut", "a byte flipped", "appended to", "deleted"])
def test_a_kept_checkpoint_and_another_output_is_refused(folder: Path, text: Path, change: str) -> None:
    """The finished output is not the one that was completed: `OutputChanged`, not a summary that is not true."""
    resume(Worker(), text, folder, keep_checkpoint=True)
    MEDDLING[change](folder / "out.jsonl")
    refuse(OutputChanged, r"missing or differs from the \d+ bytes.*--fresh", text, folder, keep_checkpoint=True)


def test_a_kept_checkpoint_is_no_obstacle_without_keep_checkpoint(folder: Path, text: Path) -> None:
    """Without it now: the job starts anew, the old output stays until the end, and the checkpoint goes."""
    output = folder / "out.jsonl"
    resume(Worker(), text, folder, keep_checkpoint=True)
    old = output.read_bytes()
    interrupt(text, folder)
    assert output.read_bytes() == old
    finishes(text, folder)


def test_fresh_starts_anew_whatever_is_there(folder: Path, interrupted: Path) -> None:
    """`fresh` runs every item again; the old output stays until the new one is complete."""
    (folder / "out.jsonl").write_bytes(b"old")
    interrupt(interrupted, folder, fresh=True)
    assert (folder / "out.jsonl").read_bytes() == b"old"
    worker = Worker()
    assert resume(worker, interrupted, folder, fresh=True).executed == 20
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)
    assert names_in(folder) == {"in.txt", "out.jsonl"}


# Forms and names of the output


def array(names: Iterable[str]) -> bytes:
    lines = json_lines(names).splitlines()
    return b"[\n" + b",\n".join(lines) + b"\n]\n" if lines else b"[]\n"


@pytest.mark.parametrize("count", [0, 1, 2, 20])
@pytest.mark.parametrize(
    ("output", "expected"), [("out.json", array), ("out.JSON", array), ("out.jsonl", json_lines), ("out", json_lines)]
)
def test_the_output_is_an_array_or_json_lines(
    folder: Path, output: str, expected: Callable[[Lines], bytes], count: int
) -> None:
    """`.json` gives a JSON array, `[]` without items, all else JSON Lines, empty without items."""
    resume(Worker(), NAMES[:count], folder, output=output)
    data = (folder / output).read_bytes()
    assert data == expected(NAMES[:count])
    assert names_in(folder) == {output}
    if expected is array:
        assert [record["did"] for record in json.loads(data)] == NAMES[:count]


@pytest.mark.parametrize("stop_at", range(0, 20, 3))
def test_an_array_is_resumed_on_a_record_boundary(folder: Path, text: Path, stop_at: int) -> None:
    """However far the first run came, the array of the resumed one is that of a run without a stop."""
    with pytest.raises(ItemFailed):
        resume(Worker(fails={NAMES[stop_at]}), text, folder, output="out.json", batch_size=2)
    resume(Worker(), text, folder, output="out.json")
    assert (folder / "out.json").read_bytes() == array(NAMES)


def test_a_symlinked_output_keeps_its_link(folder: Path, text: Path) -> None:
    """The target is written, with everything beside it; the link, also over two steps, survives every resume."""
    (folder / "deep").mkdir()
    (folder / "links").mkdir()
    (folder / "links" / "out.jsonl").symlink_to("../middle")
    (folder / "middle").symlink_to(folder / "deep" / "real.data")
    interrupt(text, folder, output="links/out.jsonl")
    assert names_in(folder / "deep") == {"real.data.partial", "real.data.checkpoint"}
    resume(Worker(), text, folder, output="deep/real.data")  # the same job under its other name
    resume(Worker(), text, folder, output="links/out.jsonl")
    assert (folder / "links" / "out.jsonl").is_symlink()
    assert (folder / "middle").is_symlink()
    assert (folder / "deep" / "real.data").read_bytes() == json_lines(NAMES)
    assert names_in(folder / "deep") == {"real.data"}
    assert names_in(folder / "links") == {"out.jsonl"}


def test_the_name_that_was_given_chooses_the_form_and_not_the_target(folder: Path, text: Path) -> None:
    """`out.json` that leads to `data` is an array, after a resume too."""
    (folder / "out.json").symlink_to("data")
    interrupt(text, folder, output="out.json")
    resume(Worker(), text, folder, output="out.json")
    assert (folder / "data").read_bytes() == array(NAMES)


def test_names_that_are_not_utf_8_are_fine(folder: Path) -> None:
    """What people are to read, in journal and summary, is written with escapes; the files bear their names."""
    path, output = (folder / os.fsdecode(name) for name in (b"in\xff.txt", b"out\xff.jsonl"))
    path.write_bytes(FORMATS["text"].bytes(NAMES))
    interrupt(path, folder, output=output.name)
    summary = resume(Worker(), path, folder, output=output.name, keep_checkpoint=True)
    assert output.read_bytes() == json_lines(NAMES)
    assert summary.output == f"{folder}/out\\udcff.jsonl"
    assert resume(Worker(), path, folder, output=output.name, keep_checkpoint=True).output == summary.output


def test_a_symlinked_checkpoint_keeps_its_link(folder: Path, text: Path) -> None:
    """The journal behind a symlink is replaced where it lies."""
    (folder / "far").mkdir()
    (folder / "journal").symlink_to("far/journal")
    interrupt(text, folder, checkpoint=folder / "journal")
    assert names_in(folder / "far") == {"journal"}
    finishes(text, folder, checkpoint=folder / "journal")
    assert (folder / "journal").is_symlink()
    assert names_in(folder / "far") == set()


@pytest.mark.parametrize(
    ("output", "checkpoint"),
    [("a", "a"), ("a", "a.partial"), ("a", "a.lock"), ("a.lock", "a"), ("a.tmp", "a"), ("a.lock", "a.checkpoint")],
)
def test_output_and_checkpoint_that_would_overwrite_each_other_are_refused(
    folder: Path, text: Path, output: str, checkpoint: str
) -> None:
    """One file can not be two of: output, partial output, journal, its temporary file, lock."""
    (folder / output).write_bytes(b"precious")
    refuse(UsageError, "would overwrite each other", text, folder, output=output, checkpoint=folder / checkpoint)


@pytest.mark.parametrize(
    ("input", "options"),
    [
        ("out.jsonl", {}),
        ("out.jsonl.partial", {}),
        ("out.jsonl.checkpoint", {}),
        ("out.jsonl.checkpoint.tmp", {}),
        ("out.jsonl.lock", {}),
        ("j", {"checkpoint": "j"}),
        ("j.lock", {"checkpoint": "j"}),
    ],
)
def test_an_input_that_would_be_overwritten_is_refused(folder: Path, input: str, options: dict[str, str]) -> None:
    """The input as output, partial output, journal, temporary file or lock, also under another name: refused."""
    path = folder / input
    path.write_bytes(FORMATS["text"].bytes(NAMES))
    (folder / "symlink").symlink_to(path)
    os.link(path, folder / "hard link")
    given = {name: folder / value for name, value in options.items()}
    for name in (input, "symlink", "hard link"):
        refuse(UsageError, "would be overwritten", TextSource(folder / name), folder, **given)


def test_what_is_no_regular_file_is_never_replaced(folder: Path, text: Path) -> None:
    """A FIFO, a folder (or /dev/null) as output or checkpoint is refused: the rename would put a file in its place."""
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to("fifo")
    for name in ("fifo", "link", "."):
        refuse(UsageError, "is not a regular file|is a folder", text, folder, output=name)
        refuse(UsageError, "is not a regular file|is a folder", text, folder, checkpoint=folder / name)


def test_a_cancelled_run_is_resumed(folder: Path, text: Path) -> None:
    """A cancellation commits what has finished; the next run does the rest."""

    async def main() -> None:
        worker = Worker(hangs={NAMES[5]})
        async with asyncio.timeout(3.5):
            await run_resumable(worker, text, output=folder / "out.jsonl", concurrency=2, drain_timeout=0)

    with pytest.raises(TimeoutError):
        run(main())
    state = replay_of(folder / "out.jsonl.checkpoint")
    assert state.state is not None
    assert (state.state.mark, set(state.ahead)) == (5, set())
    finishes(text, folder)
