"""A look at everything that a job left, and at what the same line would do: the journal, the output, the input.

Nothing is touched, no lock is taken, nothing is made durable: it can be done while the job runs. What is found wrong is
then looked at again if the journal has changed meanwhile, since a running job renames its files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from zlib import crc32

import anyio.to_thread
import msgspec

from .checkpoint import Bookmark, Checkpoint, Complete, Job, Replay, State, printable
from .collector import Collector
from .contracts import Source
from .cursor import Cursor, compare
from .errors import AsyncRecoveryError, UsageError
from .failures import FailuresSource
from .file_ledger import command_line, differences, paths_of, retry_of
from .files import READ_BYTES
from .output_file import framing_of
from .sources import file_source, source_of_kind
from .status import holder_of, replayed
from .watermark import Watermark

MOST_LOOKS = 3  # a job that ends between two reads is seen right at the second look; the third is for a start anew


WITH_KEEPING = "with --keep-checkpoint"


class Report(msgspec.Struct, kw_only=True):
    """What was found.

    :ivar state: ``"new"`` (nothing is there), ``"interrupted"``, ``"running"``, ``"complete"`` (and not yet published,
        or kept), ``"finished"`` (an output without a checkpoint), or ``"damaged"``.
    :ivar input: path of the input, as the run was given it.
    :ivar records: how many records of the output count.
    :ivar facts: what is right, as (subject, sentence).
    :ivar problems: what is not, likewise; empty if everything is right.
    :ivar next: what the same line would do now.
    """

    checkpoint: str
    output: str | None
    state: str = "new"
    input: str | None = None
    records: int | None = None
    facts: list[tuple[str, str]] = []
    problems: list[tuple[str, str]] = []
    next: str = "starts anew"

    def right(self, subject: str, text: str) -> None:
        self.facts.append((subject, text))

    def wrong(self, subject: str, text: str, *, stops: bool = True) -> None:
        """A problem; `stops`: the same line would end with it."""
        self.problems.append((subject, text))
        if stops and self.state != "running":
            refused = f"is refused for the {subject}, before anything is published (exit code 4)"
            is_kept = self.next.startswith(WITH_KEEPING) and subject in ("output", "input")
            self.next = f"{WITH_KEEPING} {refused}, without it starts anew" if is_kept else refused


class Target(NamedTuple):
    """What to look at.

    :ivar output: path of the output, symlinks resolved; None if it is not known, or the job has none.
    :ivar name: the output's name as it was given, whose suffix is its form.
    :ivar journal: path of the checkpoint, symlinks resolved.
    """

    output: str | None
    name: str
    journal: str


class _Record(msgspec.Struct):
    index: int


_decode = msgspec.json.Decoder(_Record).decode


def locate(path: str, checkpoint: str | None = None) -> Target:
    """Where the job lies whose output, partial output or checkpoint is `path`.

    :param checkpoint: its checkpoint, if that lies elsewhere; `path` is the output then.
    :raises UsageError: if there is nothing of the kind.
    """
    name = path.removesuffix(".partial")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{path} is not a regular file: name the output or the checkpoint of a job")
    if checkpoint is None and _is_journal(path):
        if not path.endswith(".checkpoint"):
            return Target(None, "", os.path.realpath(path))
        name, checkpoint = path.removesuffix(".checkpoint"), path
    output, journal = paths_of(name, checkpoint)
    if not any(map(os.path.exists, (f"{output}", f"{output}.partial", journal))):
        raise UsageError(f"there is neither {path} nor {journal}: name the output or the checkpoint of a job")
    return Target(output, name, journal)


async def verify(
    target: Target, *, input: str | None = None, source: Source | None = None, job: Job | None = None
) -> Report:
    """Compare journal, output and input.

    :param input: path of the input; None: the one that the journal names.
    :param source: the input itself, if it is known.
    :param job: the job that is to be run; None: whichever was left there.
    :raises UsageError: if a file can not be read.
    :raises CheckpointUnusable: if a newer version wrote the journal.
    """
    report, found = await anyio.to_thread.run_sync(_look, target, job)
    left = found.complete or found.state
    if found.complete is not None and found.complete.job.source == FailuresSource.kind:
        return report  # its source may be replaced already
    if left is not None:
        await check_items(
            report, found, left, source or source_of(left.job.source, input or left.input), given=source is not None
        )
    elif source is not None:
        await source.check(None, whole=False)
    elif input is not None:
        await _count_items(report, file_source(input))
    return report


def source_of(kind: str, path: str | None) -> Source | None:
    """The input of that kind at `path`, if it came from a file."""
    return FailuresSource(path) if path is not None and kind == FailuresSource.kind else source_of_kind(kind, path)


def _look(target: Target, job: Job | None) -> tuple[Report, Checkpoint]:
    report, found = Report(checkpoint="", output=None), Checkpoint()
    try:
        for _ in range(MOST_LOOKS):
            stamp = _stamp(target.journal)
            report, found = _look_once(target, job)
            _look_for_retry(report, target.output)
            if not report.problems or _stamp(target.journal) == stamp:
                break
    except OSError as error:
        raise UsageError(f"{error.filename or target.journal} can not be read: {error.strerror}") from error
    return report, found


def _look_once(target: Target, job: Job | None) -> tuple[Report, Checkpoint]:
    output, name, journal = target
    report = Report(checkpoint=printable(journal), output=None if output is None else printable(output))
    report.facts, report.problems = [], []
    holder = holder_of(output, journal)
    try:
        replay = replayed(journal)
    except FileNotFoundError:
        if output is not None or job is None:
            _look_at_output_alone(report, output, name)
        return report, Checkpoint()
    _look_at_journal(report, replay, job)
    left = replay.complete or replay.state
    if left is not None and left.job.output not in ("none", "records") and output is None:
        raise UsageError(f"{journal} belongs to an output: name that, and this one with --checkpoint")
    if holder is not None:
        report.state = "running"
        report.next = f"is refused while process {holder.pid} on {holder.host} runs the job (exit code 75)"
    if replay.complete is not None:
        _look_at_complete(report, replay.complete, output, name)
        return report, Checkpoint(complete=replay.complete, kept=replay.kept)
    if replay.state is not None:
        _look_at_state(report, replay, replay.state, output, name)
    return report, Checkpoint(replay.state, replay.ahead)


def _look_for_retry(report: Report, output: str | None) -> None:
    if output is None:
        return
    journal = f"{retry_of(output)}.checkpoint"
    with contextlib.suppress(FileNotFoundError):
        replay = replayed(journal)
        left = replay.complete or replay.state
        line = command_line("retry-failed", output, job=left.job if left else None)
        text = f"its failed items are being run again, and that is not finished: `{line}` goes on with it ({journal})"
        report.wrong("retry", text)


def _look_at_journal(report: Report, replay: Replay, job: Job | None) -> None:
    left = replay.complete or replay.state
    if left is None:
        report.state = "damaged"
        report.next = "moves the journal and the partial output aside and starts anew (--on-damage refuse: exit code 4)"
        report.wrong("journal", f"not one line of {report.checkpoint} can be read", stops=False)
        return
    report.input = left.input
    if isinstance(left, Complete):
        report.state, report.next = "complete", "publishes the output, and runs nothing"
        if replay.kept:
            report.next = f"{WITH_KEEPING} compares the input and runs nothing, without it starts anew"
        report.right("journal", "the job is complete")
    else:
        report.state = "interrupted"
        report.next = f"resumes at index {left.mark}, passing over {len(replay.ahead)} items finished ahead of it"
        report.right("journal", f"the mark is {left.mark}, {len(replay.ahead)} items are finished ahead of it")
    if replay.size > replay.end:
        report.right("journal", f"{replay.size - replay.end} bytes after the last commit do not count, and are cut off")
    if replay.damaged_before_end:
        text = f"damaged lines: {replay.damaged_before_end}; the items that they remembered are done again"
        report.wrong("journal", text, stops=False)
    if job is not None and left.job != job:
        report.wrong("journal", f"it is that of another job: it has {differences(left.job, job)}")


def _look_at_state(report: Report, replay: Replay, state: State, output: str | None, name: str) -> None:
    for index, item in replay.ahead.items():
        if item.record is not None and (other := _not_of(item.record, index)):
            report.wrong("journal", f"the record that is ahead at index {index} is {other}")
    if state.output is None or output is None:
        return
    partial, offset = f"{output}.partial", state.output.offset
    size = _size(partial) or 0
    if size < offset:
        report.wrong("output", f"{partial} has {size} bytes, {offset} were written")
        return
    if size > offset:
        report.right("output", f"{size - offset} bytes after the last commit do not count, and are cut off")
    if offset:
        _look_at_records(report, _Lines(partial, offset), name, (state.mark, state.output.crc))


def _look_at_complete(report: Report, complete: Complete, output: str | None, name: str) -> None:
    if complete.size is None or complete.crc is None or output is None:
        return
    if complete.job.source == FailuresSource.kind:
        report.right("output", "it has all new records, and the same line puts it in the place of the old one")
        return
    size, path = _size(f"{output}.partial"), f"{output}.partial"
    if size is None:
        size, path = _size(output), output
    if size != complete.size:
        found = "is missing" if size is None else f"has {size} bytes"
        report.wrong("output", f"{path} {found}, {complete.size} were completed")
    else:
        expected = complete.summary["total_items"], complete.crc
        _look_at_records(report, _Lines(path, size), name, expected, whole=True)


def _look_at_output_alone(report: Report, output: str | None, name: str) -> None:
    if output is None:
        raise UsageError(f"there is no checkpoint {report.checkpoint} any more")
    if _size(f"{output}.partial") is not None:
        text = f"there is a partial output {output}.partial, but no checkpoint {report.checkpoint} that explains it"
        report.wrong("output", f"{text}: name the right one with --checkpoint")
    elif (size := _size(output)) is not None:
        report.state = "finished"
        _look_at_records(report, _Lines(output, size), name, None, whole=True)


def _look_at_records(
    report: Report, lines: _Lines, name: str, expected: tuple[int, int] | None, *, whole: bool = False
) -> None:
    """Every index once and in order, each record whole, and the CRC of all.

    :param expected: the number of records and the CRC of the bytes; None if neither is remembered.
    :param whole: it is a finished output, which ends as its form does.
    """
    count, problem = 0, ""
    for record in _records(lines, array=framing_of(name).form == "json", whole=whole):
        other = "missing or cut" if record is None else _not_of(record, count)
        if other and not problem:
            problem = f"the record of index {count} is {other}"
        count += 1
    if expected is not None and not problem and count != expected[0]:
        problem = f"there are {count} records, not {expected[0]}"
    if expected is not None and (lines.offset, lines.crc) != (lines.end, expected[1]):
        problem = f"the first {lines.end} bytes are not those that were written; {problem or 'yet all are records'}"
    if problem:
        report.wrong("output", f"{lines.path}: {problem}", stops=expected is not None)
    else:
        report.records = count
        crc = "" if expected is None else ", their CRC as it was committed"
        report.right("output", f"{count} records, every index once and in order, {lines.end} bytes{crc}")


class _Lines:
    """The lines of the first `end` bytes of a file, line ends included; and, afterwards, their CRC-32."""

    def __init__(self, path: str, end: int) -> None:
        self.path, self.end = path, end
        self.offset = self.crc = 0

    def __iter__(self) -> Iterator[bytes]:
        pending = bytearray()
        with open(self.path, "rb") as file:
            while block := file.read(min(READ_BYTES, self.end - self.offset)):
                self.crc, self.offset = crc32(block, self.crc), self.offset + len(block)
                pending += block
                if b"\n" in block:
                    *lines, rest = bytes(pending).split(b"\n")
                    pending = bytearray(rest)
                    for line in lines:
                        yield line + b"\n"
        if pending:
            yield bytes(pending)


def _records(lines: Iterable[bytes], *, array: bool, whole: bool) -> Iterator[bytes | None]:
    """The records in the lines of an output; None where there should be one, or an end, and is not."""
    if not array:
        for line in lines:
            yield line[:-1] if line.endswith(b"\n") else None
        return
    opened = closed = False
    follows = True
    for line in lines:
        if not opened:
            opened, closed = True, line == b"[]\n"
            if line not in (b"[\n", b"[]\n"):
                yield None
        elif line == b"]\n" and not follows:
            closed, follows = True, True
        elif closed or not follows:
            yield None
        else:
            record = line.removesuffix(b"\n")
            follows = record.endswith(b",")
            yield record.removesuffix(b",")
    if whole and not closed:
        yield None


def _not_of(record: bytes, index: int) -> str:
    """What is wrong with a record of `index`; empty if nothing is."""
    try:
        found = _decode(record.decode()).index  # what is skipped must be UTF-8 as well
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "no record: that is a JSON object with an index, alone on its line"
    return "" if found == index else f"that of index {found}"


async def _count_items(report: Report, source: Source) -> None:
    """An output without a checkpoint: as many records as the input has items."""
    items = 0
    async for page in source.pages(None):
        items += len(page.items)
    if items == report.records:
        report.right("input", f"{items} items, as many as there are records")
    else:
        report.wrong("input", f"{items} items, but {report.records or 0} records in the output", stops=False)


async def check_items(
    report: Report, found: Checkpoint, left: State | Complete, source: Source | None, *, given: bool
) -> None:
    """The input against what is remembered of it; `given`: it is that of a run to be."""
    if source is None:
        report.right("input", "it did not come from a file, and is not compared here")
        return
    mark = left.mark if isinstance(left, State) else left.summary["total_items"]
    furthest = max(found.ahead, default=mark - 1)
    try:
        await source.check(left.source.position, whole=False)
        await source.check(left.source.position, whole=True)
        items = await _compare(source, left.source, mark, found, furthest)
    except UsageError as error:
        if given:  # as the run itself would say
            raise
        report.wrong("input", f"{error}: name it with --input, or look from the folder that the run was started in")
        return
    except AsyncRecoveryError as error:
        report.wrong("input", str(error), stops=not found.is_over)
        return
    if found.complete is not None and items > mark:
        tell = report.right if found.is_over else report.wrong
        tell("input", f"it has grown: {mark} items were done, and there are more now")
    else:
        ahead = f", and the {len(found.ahead)} ahead of it," if found.ahead else ""
        report.right("input", f"the {mark} items below the mark{ahead} are those that were done")


async def _compare(source: Source, bookmark: Bookmark, mark: int, found: Checkpoint, furthest: int) -> int:
    """Compare the items from the bookmark to the `furthest` that is done; returns how many have been seen."""
    watermark = Watermark(1, mark, dict.fromkeys(found.ahead, b""))
    collector = Collector(watermark, batch_items=1, batch_bytes=1)
    cursor = Cursor(collector, bookmark, found.ahead.values(), max_buffer_bytes=1, low_water=1, full=lambda: None)
    await compare(source, bookmark, cursor, furthest)
    return cursor.total_items


def _is_journal(path: str) -> bool:
    if path.endswith(".checkpoint"):
        return os.path.exists(path)
    try:
        with open(path, "rb") as file:
            return file.read(8) == b'{"crc":"'
    except OSError:
        return False


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return None
    return there.st_ino, there.st_size, there.st_mtime_ns
