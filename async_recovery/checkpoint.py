"""What is remembered between runs, and its exact bytes: the lines of the journal.

A journal is a text file of JSON objects, one a line, each with a checksum of its own in front::

    {"crc":"<CRC-32 of the rest as 8 hex digits>","kind":"ahead","items":[[index, item CRC, record], …]}
    {"crc":"…","kind":"spent","items":[[index, failed attempts, starts], …]}
    {"crc":"…","kind":"state","format":1,"job":{…},…,"mark":1200,…}
    {"crc":"…","kind":"complete","format":1,…}

* A *state* line is one commit. Just before it, in the same append, stand the *ahead* lines with what finished
  ahead of the mark since the commit before, and *spent* lines with the failed attempts of items that are not finished.
  Every state line is a correct place to resume from.
* A *complete* line says that the output is whole and its publication has begun.
* A line counts only if it ends with a line end, its checksum fits, and encoding what was decoded gives the same bytes.

Nothing here knows a file: bytes in, values out.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any
from zlib import crc32

import msgspec

from .errors import CheckpointUnusable

FORMAT = 1
AHEAD_LINE_BYTES = 1 << 20
SPENT_LINE_ITEMS = 1 << 15
COMPACT_ABOVE_DEAD_BYTES = 8 << 20

JSON = Any
"""A value that JSON can hold and give back unchanged."""


class Job(msgspec.Struct, frozen=True):
    """Which job it is, in plain words: a checkpoint of another job is refused.

    :ivar source: the kind of input, such as ``"text"`` or ``"jsonl"``.
    :ivar worker: ``module:qualname`` of the worker.
    :ivar version: the caller's own version of the job, or None.
    :ivar output: the form of the output: ``"jsonl"``, ``"json"``, ``"table"`` or ``"none"``.
    """

    source: str
    worker: str
    version: str | None
    output: str


class Bookmark(msgspec.Struct, frozen=True):
    """Where the source stands for a mark.

    :ivar position: where the page begins that the mark lies in, in the source's own words; None is the start.
    :ivar first_index: the index of the first item of that page.
    :ivar items_crc: CRC-32 over the item CRCs (4 bytes each, little-endian) from `first_index` to the mark.
    """

    position: JSON
    first_index: int
    items_crc: int


class Ahead(msgspec.Struct, frozen=True):
    """One item that is finished above the mark.

    :ivar index: its 0-based position.
    :ivar item_crc: CRC-32 of the raw item.
    :ivar record: its record as JSON bytes; None where there is no output.
    """

    index: int
    item_crc: int
    record: bytes | None


class OutputState(msgspec.Struct, frozen=True):
    """What the output holds at a commit.

    :ivar offset: its length in bytes.
    :ivar crc: CRC-32 of all of it.
    :ivar tail: an earlier offset at least 1 MiB back (or 0) and the CRC-32 up to there: what a start reads again.
    """

    offset: int
    crc: int
    tail: tuple[int, int]


class State(msgspec.Struct, frozen=True, tag_field="kind", tag="state", omit_defaults=True):
    """One commit as the journal remembers it.

    :ivar generation: counts the commits of the job over all its runs.
    :ivar input: the input's path, for people; what is in it decides, not where it lies.
    :ivar failed: how many of the records below the mark are recorded failures.
    :ivar ended: the run came to an end in order: nothing was in flight any more.
    """

    format: int
    job: Job
    input: str | None
    generation: int
    mark: int
    window: int
    source: Bookmark
    output: OutputState | None
    failed: int
    ended: bool = False


class Complete(msgspec.Struct, frozen=True, tag_field="kind", tag="complete"):
    """The output is whole; what is left is to publish it.

    :ivar source: the bookmark at the end of the input.
    :ivar size: bytes of the finished output, and `crc` its CRC-32; None where there is no output.
    :ivar summary: the summary of the run that finished it.
    """

    format: int
    job: Job
    input: str | None
    source: Bookmark
    size: int | None
    crc: int | None
    summary: dict[str, JSON]


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """The failed attempts of one item that is not finished.

    :ivar index: its 0-based position.
    :ivar attempts: how many, over all runs; 0: it has all its attempts again.
    :ivar starts: how often it was started, with its name in the journal, and did not end.
    """

    index: int
    attempts: int
    starts: int = 0


class SpentLine(msgspec.Struct, frozen=True, tag_field="kind", tag="spent"):
    """What one commit says of failed attempts."""

    items: list[Spent]


class AheadLine(msgspec.Struct, frozen=True, tag_field="kind", tag="ahead"):
    """The records of one ahead line, as (index, CRC-32 of the raw item, record or null)."""

    items: list[tuple[int, int, msgspec.Raw]]


class Commit(msgspec.Struct, frozen=True):
    """Everything that one durable step writes, taken at one moment.

    :ivar generation: the number of this commit; one more than the last.
    :ivar mark: the new mark; `records` are those of the items just below it, in order.
    :ivar ahead: what finished ahead of the mark since the last commit and still is. What earlier commits had ahead is
        remembered besides, until the mark has passed it.
    :ivar failed: how many of the records below the mark are recorded failures.
    :ivar spent: what was spent on items that are not finished, where that has changed since the last commit. The others
        are remembered besides, until their item is below the mark or ahead, or has nothing spent any more.
    :ivar ended: the run ends in order with this commit.
    """

    generation: int
    mark: int
    window: int
    bookmark: Bookmark
    records: list[bytes]
    ahead: list[Ahead]
    failed: int
    spent: list[Spent] = []
    ended: bool = False

    def state(self, job: Job, *, input: str | None = None, output: OutputState | None = None) -> State:
        """What a ledger remembers of this commit: the next run goes on from it.

        :param job: the job that the ledger was opened for.
        :param input: the input's path, for people.
        :param output: what the output holds then, where that is a file or counted like one.
        """
        return State(
            format=FORMAT,
            job=job,
            input=input,
            generation=self.generation,
            mark=self.mark,
            window=self.window,
            source=self.bookmark,
            output=output,
            failed=self.failed,
            ended=self.ended,
        )


class Checkpoint(msgspec.Struct, frozen=True):
    """What a ledger found when it was opened.

    :ivar state: the last commit, or None for a fresh start.
    :ivar ahead: what was finished ahead of the mark, by ascending index.
    :ivar complete: set if the job is finished and published: nothing is left to do.
    :ivar kept: the complete line was kept on purpose: the input is to be compared before its summary is given.
    :ivar spent: what was spent on items that are not finished, by index.
    """

    state: State | None = None
    ahead: dict[int, Ahead] = {}
    complete: Complete | None = None
    kept: bool = False
    spent: dict[int, Spent] = {}

    @property
    def is_over(self) -> bool:
        """The job is finished and was not kept: what the same line does now depends on no record and no item of it."""
        return self.complete is not None and not self.kept


Line = State | Complete | AheadLine | SpentLine


class _Probe(msgspec.Struct):
    kind: str
    format: int = FORMAT


def printable(text: str) -> str:
    """A path, or a message that may name one, as JSON can hold it: bytes that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


_encode = msgspec.json.Encoder().encode
_decode_probe = msgspec.json.Decoder(_Probe).decode
_decode_line = msgspec.json.Decoder(Line).decode

_HEAD = b'{"crc":"%08x",'
_HEAD_BYTES = len(_HEAD % 0)

# At most: what stands around the items of an ahead line, and in it around each record.
_FRAME_BYTES = 64
_NUMBERS_BYTES = 32


def encode_line(line: Line) -> bytes:
    """The line with its checksum and its line end."""
    body = memoryview(_encode(line))[1:]
    return b"".join((_HEAD % crc32(body), body, b"\n"))  # one copy: a line may hold a record of many MiB


def encode_ahead(items: Iterable[Ahead]) -> Iterator[bytes]:
    """Ahead lines for `items`: each at most 1 MiB, or one record that is larger."""
    group: list[tuple[int, int, msgspec.Raw]] = []
    size = _FRAME_BYTES
    for item in items:
        record = b"null" if item.record is None else item.record
        needed = _NUMBERS_BYTES + len(record)
        if group and size + needed > AHEAD_LINE_BYTES:
            yield encode_line(AheadLine(group))
            group, size = [], _FRAME_BYTES
        group.append((item.index, item.item_crc, msgspec.Raw(record)))
        size += needed
    if group:
        yield encode_line(AheadLine(group))


def encode_spent(items: Iterable[Spent]) -> Iterator[bytes]:
    """Spent lines for `items`: each at most 1 MiB."""
    everything = list(items)
    for start in range(0, len(everything), SPENT_LINE_ITEMS):
        yield encode_line(SpentLine(everything[start : start + SPENT_LINE_ITEMS]))


def decode_line(line: bytes) -> Line | None:
    """The line's value, given without its line end; None if it does not count.

    :raises CheckpointUnusable: if it is intact, but written by a newer version of this package.
    """
    body = line[_HEAD_BYTES:]
    if line[:_HEAD_BYTES] != _HEAD % crc32(body):
        return None
    try:
        probe = _decode_probe(b"{" + body)
        if probe.format > FORMAT:
            raise CheckpointUnusable(
                f"the checkpoint has format {probe.format}, this version reads up to {FORMAT}: "
                "resume with the version of async_recovery that wrote it, or a newer one"
            )
        value = _decode_line(b"{" + body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if _encode(value)[1:] == body else None


def unfinished(spent: dict[int, Spent], mark: int, ahead: Container[int]) -> dict[int, Spent]:
    """Of what was spent, that on items neither below `mark` nor `ahead` of it."""
    return {i: item for i, item in spent.items() if (item.attempts or item.starts) and i >= mark and i not in ahead}


def worth_compacting(size: int, live: int) -> bool:
    """Whether a journal of `size` bytes, `live` of them still needed, is to be written anew.

    A rewrite costs less than half of the dead bytes that it drops, and each byte is dropped once: so all rewrites
    together write less than half of what was appended. The first bound keeps small journals from frequent rewrites.
    """
    dead = size - live
    return dead > COMPACT_ABOVE_DEAD_BYTES and 3 * dead > 2 * size


class Replay:
    """Reads a journal, block by block, and knows where a run resumes.

    The last state line that counts is taken, with the ahead lines before it. A damaged state line costs that
    commit's work, a damaged ahead line the records in it; neither costs correctness.

    :ivar state: the last state line that counts.
    :ivar complete: the last complete line that counts, if no state line follows it.
    :ivar kept: there is a complete line and never a state line: the journal of a finished job that was kept.
    :ivar end: offset just after the last state or complete line that counts: the journal is cut back to it.
    :ivar damaged_lines: how many whole lines did not count.
    :ivar damaged_before_end: those of them before `end`. The others may be a commit that a crash has torn.
    """

    def __init__(self) -> None:
        self.state: State | None = None
        self.complete: Complete | None = None
        self.end = 0
        self.damaged_lines = self.damaged_before_end = 0
        self._offset = 0
        self._rest = bytearray()
        self._ahead: dict[int, Ahead] = {}
        self._pending: list[Ahead] = []
        self._spent: dict[int, Spent] = {}
        self._pending_spent: dict[int, Spent] = {}
        self._prune_above = self._prune_spent_above = 1024

    @property
    def size(self) -> int:
        """How many bytes have been read."""
        return self._offset + len(self._rest)

    @property
    def kept(self) -> bool:
        return self.complete is not None and self.state is None

    @property
    def ahead(self) -> dict[int, Ahead]:
        """What is finished ahead of the mark of `state`, in the order of the indices."""
        mark = self.state.mark if self.state else 0
        return {index: self._ahead[index] for index in sorted(self._ahead) if index >= mark}

    @property
    def spent(self) -> dict[int, Spent]:
        """What was spent on items that are not finished."""
        return unfinished(self._spent, self.state.mark if self.state else 0, self._ahead)

    def feed(self, data: bytes) -> None:
        """The next bytes of the journal, in blocks of any size."""
        self._rest += data
        if data.find(b"\n") < 0:
            return
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        for line in lines:
            self._offset += len(line) + 1
            self._line(line)

    def _line(self, line: bytes) -> None:
        if not line:
            return
        value = decode_line(line)
        if isinstance(value, AheadLine):
            for index, item_crc, raw in value.items:
                record = bytes(raw)
                self._pending.append(Ahead(index, item_crc, None if record == b"null" else record))
        elif isinstance(value, SpentLine):
            self._pending_spent.update((item.index, item) for item in value.items)
        elif isinstance(value, State):
            self._ahead.update((item.index, item) for item in self._pending)
            self._pending.clear()
            self._spent |= self._pending_spent
            self._pending_spent.clear()
            self.state, self.complete, self.end = value, None, self._offset
            self.damaged_before_end = self.damaged_lines
            if len(self._ahead) > self._prune_above:
                self._ahead = self.ahead
                self._prune_above = 2 * len(self._ahead) + 1024
            if len(self._spent) > self._prune_spent_above:
                self._spent = self.spent
                self._prune_spent_above = 2 * len(self._spent) + 1024
        elif isinstance(value, Complete):
            self.complete, self.end = value, self._offset
            self.damaged_before_end = self.damaged_lines
        else:
            self.damaged_lines += 1
