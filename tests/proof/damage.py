"""Damage to what a job left: its journal or its output, one thing at a time; and what must come of it.

What must come of it is worked out from the damage and from what the job did, and not by what loads a journal. Then the
real ledger is opened on it, over files in memory, and goes on to the end where it opens. A damage's id replays it::

    .venv/bin/python -m tests.proof.damage small/journal/flip/412/10
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple
from unittest import mock
from zlib import crc32

import msgspec

from async_recovery import checkpoint, output_file
from async_recovery.checkpoint import Ahead, AheadLine, Checkpoint, Complete, Job, OutputState, State, decode_line
from async_recovery.errors import CheckpointUnusable, Mismatch, OutputChanged
from async_recovery.file_ledger import FileLedger
from tests.support.journal_lines import Found, Line, expected, joined

from .cases import ELSEWHERE, FEW, MANY
from .crash_model import MemoryFiles, settled
from .explorer import NOTHING, Case, Life, Point, Violation, facts_of, in_memory, now, watched

HEAD_BYTES = len(b'{"crc":"00000000",')
NOTHING_FOUND = Found(None, {}, None, kept=False, end=0, damaged_lines=0)


@dataclass(frozen=True)
class Scene:
    """A job, and the moment at which it was stopped; everything that it wrote is on the disk.

    :ivar stopped: which of the moments of the job's life is that one.
    :ivar torn: what was begun after the last commit: bytes of the output, and of the journal.
    :ivar compared_bytes: how much of the output's end a start compares at least.
    """

    case: Case
    stopped: Callable[[list[Point]], Point]
    torn: tuple[bytes, bytes] = (b"", b"")
    compared_bytes: int = output_file.COMPARED_BYTES

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """What lies there, by its path."""
        with self.installed():
            life = Life(self.case, self.case.scripts(), MemoryFiles(settled({}), "posix"), NOTHING)
            points = watched(life)
            life.live(first=True)
        world = self.stopped(points).world
        files = {path: world.read(path) or b"" for path in world.names}
        if any(self.torn):
            files[f"{self.case.output}.partial"] += self.torn[0]
            files[self.case.journal] += self.torn[1]
        return files

    @functools.cached_property
    def lines(self) -> tuple[Line, ...]:
        """The journal's lines; one that is empty, or torn, says nothing."""
        lines = []
        for data in self.files[self.case.journal].splitlines(keepends=True):
            value = decode_line(data.removesuffix(b"\n")) if data.endswith(b"\n") else None
            if isinstance(value, AheadLine):
                raws = ((index, crc, bytes(raw)) for index, crc, raw in value.items)
                ahead = (Ahead(index, crc, None if raw == b"null" else raw) for index, crc, raw in raws)
                lines.append(Line(data, tuple(ahead)))
            else:
                lines.append(Line(data, value if isinstance(value, State | Complete) else ()))
        return tuple(lines)

    @property
    def output(self) -> str | None:
        """Where the output lies at that moment."""
        names = [f"{self.case.output}.partial", f"{self.case.output}"]
        return next((name for name in names if name in self.files), None)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The ledger without threads and locks."""
        with in_memory(self.case), mock.patch.object(output_file, "COMPARED_BYTES", self.compared_bytes):
            yield


def after(generation: int) -> Callable[[list[Point]], Point]:
    """When that commit had been acknowledged."""
    return lambda points: [p for p in points if p.words == "acknowledged" and p.level == (1, generation)][-1]


def before(step: str) -> Callable[[list[Point]], Point]:
    """Just before the last step of that kind."""
    return lambda points: points[max(n for n, p in enumerate(points) if p.words.startswith(step)) - 1]


ARRAY = "/async-recovery-model.json"
SCENES = {
    "small": Scene(Case("", FEW), after(1)),
    "ahead": Scene(Case("", FEW), after(3)),
    "torn": Scene(Case("", FEW), after(2), torn=(b'{"index":2,"of":1,"x":', b'{"crc":"012')),
    "compacted": Scene(Case("", MANY, compacts=True), after(6)),
    "array": Scene(Case("", FEW, output=ARRAY), after(3)),
    "no-output": Scene(Case("", FEW, output=None, checkpoint=ELSEWHERE), after(3)),
    "long-output": Scene(Case("", FEW), after(3), compared_bytes=16),
    "complete": Scene(Case("", FEW), before("rename")),
    "complete-array": Scene(Case("", FEW, output=ARRAY), before("rename")),
    "published": Scene(Case("", FEW[:2]), before("unlink")),
    "kept": Scene(Case("", FEW[:2], keep=True), lambda points: points[-1]),
}


class Damage(NamedTuple):
    """What lies there after it, and what must be found.

    :ivar words: which damage it is.
    :ivar journal: bytes of the journal, None if it is gone; `output` likewise.
    :ivar found: what the lines say that are still whole.
    """

    words: str
    journal: bytes | None
    output: bytes | None
    found: Found


def damages(scene: Scene, *, every_value: bool) -> Iterator[Damage]:
    """All of them: each byte changed, each length, lines out of order; to the journal, then to the output.

    :param every_value: a byte is changed to all 255 others, and not to six that differ in kind.
    """
    yield from journal_damages(scene, every_value=every_value)
    output = None if scene.output is None else scene.files[scene.output]
    if output is None:
        return
    journal, found = scene.files[scene.case.journal], expected(scene.lines, ())
    for words, data in (*bytes_changed(output, every_value=every_value), *grown(output), ("gone", None)):
        yield Damage(f"output/{words}", journal, data, found)


def journal_damages(scene: Scene, *, every_value: bool) -> Iterator[Damage]:
    """Those to the journal."""
    lines, output = scene.lines, scene.files.get(scene.output or "")
    data = joined([*lines])
    lost = lost_lines(lines)
    without = functools.cache(lambda gone: expected(lines, gone))
    for words, damaged in bytes_changed(data, every_value=every_value):
        kind, at, *_ = words.split("/")
        gone = range(lost[int(at)][0], len(lines)) if kind == "cut" else lost[int(at)]
        yield Damage(f"journal/{words}", damaged, output, without(tuple(gone)))
    whole = [line for line in lines if line.data.endswith(b"\n")]
    for words, order in reordered(len(whole)):
        moved = [*(whole[number] for number in order), *lines[len(whole) :]]
        yield Damage(f"journal/{words}", joined(moved), output, expected(moved, ()))
    for words, number, line in respelled(lines):
        changed = [*lines[:number], Line(line, lines[number].value), *lines[number + 1 :]]
        yield Damage(f"journal/{words}", joined(changed), output, expected(changed, {number}))
    yield Damage("journal/gone", None, output, NOTHING_FOUND)


def lost_lines(lines: tuple[Line, ...]) -> list[tuple[int, ...]]:
    """For each byte of the journal, the lines that do not count when it is another: its line, or a line end's two."""
    lost: list[tuple[int, ...]] = []
    for number, line in enumerate(lines):
        lost += [(number,)] * (len(line.data) - 1)
        lost.append((number, number + 1) if line.data.endswith(b"\n") else (number,))
    return [*lost, (len(lines),)]


def bytes_changed(data: bytes, *, every_value: bool) -> Iterator[tuple[str, bytes]]:
    """Each byte another, and cut at each length."""
    for at, byte in enumerate(data):
        some = {0x00, 0x0A, byte ^ 0x01, byte ^ 0x20, byte ^ 0x80, (byte + at) % 256}
        for value in sorted((set(range(256)) if every_value else some) - {byte}):
            yield f"flip/{at}/{value}", data[:at] + bytes([value]) + data[at + 1 :]
    for length in range(len(data)):
        yield f"cut/{length}", data[:length]


def reordered(count: int) -> Iterator[tuple[str, list[int]]]:
    """Any two lines swapped; any line doubled where it stands, dropped, or written again at the end."""
    order = list(range(count))
    for one, other in itertools.combinations(order, 2):
        swapped = list(order)
        swapped[one], swapped[other] = other, one
        yield f"swap/{one}/{other}", swapped
    for number in order:
        yield f"double/{number}", [*order[: number + 1], *order[number:]]
        yield f"drop/{number}", [*order[:number], *order[number + 1 :]]
        yield f"again/{number}", [*order, number]


def respelled(lines: Iterable[Line]) -> Iterator[tuple[str, int, bytes]]:
    """Lines that say the same as before, with a checksum that is right, but not as they are written: blanks put in."""
    for number, line in enumerate(lines):
        if not line.value:
            continue
        said = decode_line(line.data[:-1])
        for at in range(HEAD_BYTES, len(line.data) - 1):
            body = line.data[HEAD_BYTES:at] + b" " + line.data[at:-1]
            if said == _said(body):
                yield f"respell/{number}/{at}", number, b'{"crc":"%08x",' % crc32(body) + body + b"\n"


def _said(body: bytes) -> object:
    try:
        return checkpoint._decode_line(b"{" + body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def grown(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Longer than it was."""
    for name, more in GROWTH.items():
        yield f"grown/{name}", data + more


GROWTH = {
    "line-end": b"\n",
    "zeros": bytes(4096),
    "half-a-record": b'{"index":2,"of":1,',
    "record": b'{"index":2,"of":1,"x":"xx"}\n',
    "array-record": b',\n{"index":2,"of":1,"x":"xx"}',
    "bracket": b"\n]\n",
    "itself": b'{"index":0,"of":1,"x":""}\n' * 40,
}


class SealedFiles(MemoryFiles):
    """Files one of which shows nothing but zeros once it is sealed: what is damaged in it can make no difference."""

    sealed: str | None = None

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        data = super().pread(descriptor, size, offset)
        is_sealed = self.sealed is not None and self._descriptors[descriptor] == self.world.names.get(self.sealed)
        return bytes(len(data)) if is_sealed else data


@dataclass
class Tally:
    """What came of the damages: how many of each kind of outcome, and what was wrong."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.outcomes + other.outcomes, self.wrong + other.wrong)


class Inspector:
    """Carries out damages of one scene and sees what comes of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.scene = SCENES[name]
        self.case = self.scene.case
        self.script = self.case.scripts()[1]
        self._lived: set[object] = set()

    def inspect(self, damages: Iterable[Damage]) -> Tally:
        """All of `damages`; what is wrong is in the tally with the damage's id."""
        tally = Tally()
        for wrong in self.wrongs(damages, tally.outcomes):
            tally.wrong.append(wrong)
        return tally

    def wrongs(self, damages: Iterable[Damage], outcomes: Counter[str]) -> Iterator[str]:
        """What is wrong, with the damage's id, while `damages` are carried out; all are counted in `outcomes`."""
        with self.scene.installed():
            for damage in damages:
                outcome = self.must(damage)
                outcomes[outcome] += 1
                try:
                    self.carry_out(damage, outcome)
                except Exception as error:
                    yield f"{self.name}/{damage.words}: it must be {outcome}, but {type(error).__name__}: {error}"

    def must(self, damage: Damage) -> str:
        """What must come of it: refused, found by the audit, moved aside, or resumed."""
        found, there = damage.found, damage.output
        if found.complete is not None:
            return "resumed" if self.case.output is None or there == self.script.end else "refused"
        partial = there if self.scene.output != self.case.output else None
        if damage.journal is None:
            return "resumed" if partial is None else "refused"
        if found.state is None:
            return "moved aside"
        state = found.state.output or OutputState(0, 0, (0, 0))
        right = self.script.steps[found.state.generation].output
        if state.offset == 0 or (partial or b"")[: state.offset] == right:
            return "resumed"
        compared = slice(state.tail[0], state.offset)
        return "refused" if (partial or b"")[compared] != right[compared] else "found by the audit"

    def carry_out(self, damage: Damage, outcome: str) -> None:
        """:raises Violation: if anything else comes of it."""
        files, before = self._files(damage)
        ledger = self._ledger(files)
        try:
            found = now(ledger.open(Job("t", "w", None, ledger.form)))
        except Mismatch as error:
            now(ledger.close())
            require(outcome == "refused", f"it is refused: {error}")
            require(error.exit_code == 4, "another exit code")
            require(_all(files) == before, "it is refused, and something has changed")
            return
        require(outcome != "refused", "it is opened")
        said = damage.found
        if said.complete is not None:
            said = replace(said, state=None, ahead={})
        require((found.state, found.complete) == (said.state, said.complete), "another state is found")
        require(found.ahead == said.ahead, f"ahead of the mark, {sorted(found.ahead)} are found")
        if outcome == "found by the audit":
            self._audited(ledger, files)
        elif outcome == "moved aside":
            self._moved_aside(ledger, files, damage, before)
        elif self._is_new(ledger, files):
            files.sealed = self.case.journal
            self._goes_on(ledger, files, found)

    def _goes_on(self, ledger: FileLedger, files: MemoryFiles, found: Checkpoint, case: Case | None = None) -> None:
        """To the end, where the output must be right, byte for byte."""
        case = case or self.case
        if found.state is not None:  # lines out of order can have more ahead than there was at that commit
            then = self.script.steps[found.state.generation].ahead
            found = Checkpoint(found.state, {index: item for index, item in found.ahead.items() if index in then})
        Life(case, case.scripts(), files, NOTHING).go_on(ledger, found)
        require(case.output is None or files.world.read(case.output) == self.script.end, "the output is wrong")

    def _is_new(self, ledger: FileLedger, files: MemoryFiles) -> bool:
        """Whether no other damage has led to the same ledger and files, but for what the journal holds."""
        others = tuple((path, data) for path, data in sorted(_all(files).items()) if path != self.case.journal)
        key = hash((facts_of(ledger), others))
        is_new = key not in self._lived
        self._lived.add(key)
        return is_new

    def _audited(self, ledger: FileLedger, files: MemoryFiles) -> None:
        """The comparison beside the work finds it; after that nothing is written."""
        before = _all(files)
        for step in (ledger.audit, functools.partial(ledger.commit, self.script.steps[-1].commit)):
            try:
                now(step())
            except OutputChanged:
                continue
            raise Violation("the audit has found nothing")
        now(ledger.close())
        require(_all(files) == before, "something was written after the audit")

    def _moved_aside(self, ledger: FileLedger, files: SealedFiles, damage: Damage, before: dict[str, bytes]) -> None:
        """The job starts anew with all the old bytes under other names; it can also be refused."""
        require(_all(files) == before, "something has changed before the first commit")
        old = {path: data for path, data in before.items() if path != self.case.output}
        self._goes_on(ledger, files, Checkpoint(), replace(self.case, old_bytes=old))
        require({path: files.world.read(f"{path}.damaged-1") for path in old} == old, "old bytes are gone")
        files, _ = self._files(damage)
        ledger = self._ledger(files, on_damage="refuse")
        try:
            now(ledger.open(Job("t", "w", None, ledger.form)))
        except CheckpointUnusable:
            now(ledger.close())
            require(_all(files) == before, "it is refused, and something has changed")
            return
        raise Violation("it is not refused")

    def _files(self, damage: Damage) -> tuple[SealedFiles, dict[str, bytes]]:
        left = {**self.scene.files, self.case.journal: damage.journal}
        if self.scene.output is not None:
            left[self.scene.output] = damage.output
        there = {path: data for path, data in left.items() if data is not None}
        return SealedFiles(settled(there), "posix"), there

    def _ledger(self, files: MemoryFiles, on_damage: Literal["restart", "refuse"] = "restart") -> FileLedger:
        case = self.case
        return FileLedger(case.output, case.checkpoint, keep_checkpoint=case.keep, on_damage=on_damage, files=files)


def require(holds: bool, otherwise: str) -> None:
    """:raises Violation: if it does not hold."""
    if not holds:
        raise Violation(otherwise)


def _all(files: MemoryFiles) -> dict[str, bytes]:
    return {path: files.world.read(path) or b"" for path in files.world.names}


def inspected(every_value: bool, share: tuple[str, int, int]) -> Tally:
    """One scene's damages, or the one in so many of them that is said."""
    name, first, of = share
    return Inspector(name).inspect(itertools.islice(damages(SCENES[name], every_value=every_value), first, None, of))


def replay(state: str) -> None:
    """Tell of one damage what lay there, and what came of it."""
    name, _, words = state.partition("/")
    damage = next(d for d in damages(SCENES[name], every_value=True) if d.words == words)
    inspector = Inspector(name)
    print(f"journal: {damage.journal!r}\noutput: {damage.output!r}\nwhole lines say: {damage.found}")
    print(f"must be: {inspector.must(damage)}")
    print("\n".join(inspector.inspect([damage]).wrong) or "and is")


if __name__ == "__main__":
    replay(sys.argv[1])
