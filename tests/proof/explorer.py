"""Scripted jobs on the file ledger, every crash of them, every recovery, and the invariants after each.

A state's id is a path: ``job/rules/12.45/3.k`` is the job's crash after its 12th operation with the 45th state that a
power cut can leave, then a crash of its recovery after 3 operations, by a kill (the cache survives; ``h``: in
the middle of that operation's write). Replay it::

    .venv/bin/python -m tests.proof.replay job/rules/12.45/3.k
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast
from unittest import mock

import msgspec

from async_recovery import checkpoint as checkpoint_module
from async_recovery import file_ledger, output_file
from async_recovery import journal as journal_module
from async_recovery.checkpoint import Ahead, Bookmark, Checkpoint, Commit, Job
from async_recovery.contracts import RunSummary
from async_recovery.errors import AsyncRecoveryError
from async_recovery.file_ledger import FileLedger
from async_recovery.output_file import framing_of

from .crash_model import MemoryFiles, Rules, Tearing, World, power_cuts, settled

T = TypeVar("T")
Level = tuple[int, int]
"""What must not be lost: (variant of the script, generation acknowledged).

Only a commit or a finish that returned acknowledges; an open that found more than that does not. A torn append can keep
its state line and lose an ahead line: that commit was not acknowledged, and its items are then done again.
"""

OUT = "/async-recovery-model.jsonl"
NOTHING: Level = (-1, -1)
FINISHED = 1_000_000


class Violation(AssertionError):
    """An invariant does not hold; the message names it."""


class Stopped(Exception):
    """The ledger refused or failed, and the run ended as it should."""


class Step(NamedTuple):
    """What one commit leaves behind: its checkpoint's mark and ahead records, and the output's bytes."""

    commit: Commit
    mark: int
    ahead: dict[int, Ahead]
    output: bytes


class Script:
    """The commits of a job, from the sets of items that each has newly finished.

    :param rank: of two scripts over the same files, the later one is the larger.
    :param of: what its records say of it: scripts that differ in the order alone say the same.
    """

    def __init__(self, rank: int, finished: list[list[int]], output: str | None, of: int | None = None) -> None:
        self.rank = rank
        self._of = rank if of is None else of
        self.steps: list[Step] = []
        framing = framing_of(output or "")
        done: set[int] = set()
        mark = 0
        for generation, newly in enumerate([[], *finished]):
            done |= set(newly)
            start = mark
            while mark in done:
                mark += 1
            whole = framing.join([self.record(i) for i in range(mark)], 0)
            kept = output is not None
            ahead = {i: Ahead(i, i + 7, self.record(i) if kept else None) for i in sorted(done) if i >= mark}
            given = [Ahead(i, i + 7, self.record(i)) for i in newly if i >= mark]
            records = [self.record(i) for i in range(start, mark)]
            commit = Commit(generation, mark, 9, Bookmark(rank, 0, mark), records, given, 0)
            self.steps.append(Step(commit, mark, ahead, whole if kept else b""))
        self.end = self.steps[-1].output
        self.end += framing.closing(len(self.end)) if output is not None else b""

    def record(self, index: int) -> bytes:
        return b'{"index":%d,"of":%d,"x":"%s"}' % (index, self._of, b"x" * (index % 3))


@dataclass(frozen=True)
class Case:
    """A job with its files, and what lies there before it begins.

    :ivar fresh: what the first life is given; `fresh_again`: lives with nothing acknowledged yet are given it too.
    :ivar abandoned: it closes after its first commit, with nothing done.
    :ivar compacts: a journal is worth compacting however small it is.
    :ivar in_lines: each line of the journal is written by itself, as large ones are.
    :ivar otherwise: the order in which a life that resumes the job finishes its items, where it is still free to.
    :ivar old_bytes: bytes that may never vanish (under whatever name) before the first commit is acknowledged.
    """

    name: str
    finished: list[list[int]]
    output: str | None = OUT
    checkpoint: str | None = None
    keep: bool = False
    fresh: bool = False
    fresh_again: bool = False
    abandoned: bool = False
    compacts: bool = False
    in_lines: bool = False
    old: list[list[int]] | None = None
    otherwise: list[list[int]] | None = None
    start: Callable[[Case], World] = lambda case: settled({})
    old_bytes: dict[str, bytes] = field(default_factory=dict)

    @property
    def journal(self) -> str:
        return self.checkpoint or f"{self.output}.checkpoint"

    def scripts(self) -> list[Script]:
        scripts = [Script(rank, f, self.output) for rank, f in enumerate([self.old or [], self.finished])]
        return scripts if self.otherwise is None else [*scripts, Script(2, self.otherwise, self.output, of=1)]


class _NoLock:
    """In the model one process runs at a time; the locks are layer 15's."""

    def __init__(self, path: str) -> None:
        pass

    def acquire(self) -> None:
        pass

    def show(self, progress: object) -> None:
        pass

    def release(self) -> None:
        pass

    def forget(self) -> None:
        pass


class _Inline:
    """The writer thread's place: a job runs at once, so that a coroutine never waits."""

    async def run(self, job: Callable[..., T], *args: object) -> T:
        return job(*args)

    def stop(self) -> None:
        pass


async def _inline(job: Callable[..., T], *args: object) -> T:
    return job(*args)


def _ignored(*_: object) -> None:
    """A look at the real machine that is not taken."""


def _itself(path: str) -> str:
    """The model has no symlinks."""
    return path


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    raise RuntimeError("it waited")


@contextlib.contextmanager
def in_memory(case: Case) -> Iterator[None]:
    """The ledger without threads, locks and looks at the real machine."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    patches: list[contextlib.AbstractContextManager[Any]] = [
        mock.patch.object(file_ledger, "Lock", _NoLock),
        mock.patch.object(output_file, "InodeLock", _NoLock),
        mock.patch.object(file_ledger, "WriterThread", _Inline),
        mock.patch.object(file_ledger, "_warn_of_network", _ignored),
        mock.patch.object(FileLedger, "_refuse_bad_paths", _ignored),
        mock.patch.object(FileLedger, "_make_folder", _ignored),
        mock.patch("os.path.realpath", _itself),
        mock.patch("anyio.to_thread.run_sync", _inline),
    ]
    if case.compacts:
        patches.append(mock.patch.object(checkpoint_module, "COMPACT_ABOVE_DEAD_BYTES", 0))
    if case.in_lines:
        patches.append(mock.patch.object(journal_module, "AHEAD_LINE_BYTES", 0))
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield
    finally:
        logging.disable(disabled)


class Joined(Exception):
    """From here on this life is one that was lived before."""


class Life:
    """One process: opens the ledger on a world, goes on with the script, finishes; each invariant is checked."""

    def __init__(self, case: Case, scripts: list[Script], files: MemoryFiles, level: Level) -> None:
        self.case = case
        self.scripts = scripts
        self.files = files
        self.level = level
        self.lacking: tuple[int, ...] = ()
        self.acknowledged: Callable[[], None] = lambda: None
        self.opened: Callable[[FileLedger], None] = lambda ledger: None

    def check_left(self) -> None:
        """What has to hold in every state that a crash leaves, before anything is opened."""
        world, case = self.files.world, self.case
        if case.output is not None:
            there = world.read(case.output)
            rightful = [None, *(script.end for script in self.scripts)]
            if there not in rightful:
                raise Violation(f"I2: under the output's name lies {there!r}")
            if self.level[1] == FINISHED and there != self.scripts[self.level[0]].end:
                raise Violation(f"I1: finished, but the output is {there!r}")
        if self.level == NOTHING:
            for path, content in case.old_bytes.items():
                found = [world.read(name) for name in world.names if name == path or ".damaged-" in name]
                if content not in found:
                    raise Violation(f"I7: the old bytes of {path} are gone")

    def live(self, *, first: bool = False) -> None:
        """All of it, from the open to the close.

        :raises Violation: if an invariant does not hold.
        :raises Stopped: if the storage failed (it is made to in layer 3).
        """
        self.check_left()
        case = self.case
        fresh = case.fresh if first else case.fresh_again and self.level == NOTHING
        ledger = FileLedger(case.output, case.checkpoint, fresh=fresh, keep_checkpoint=case.keep, files=self.files)
        job = Job("t", "w", None, ledger.form)
        try:
            self.go_on(ledger, now(ledger.open(job)))
        except AsyncRecoveryError as error:
            with contextlib.suppress(AsyncRecoveryError):
                now(ledger.close())
            if self.files.dead or self.files.failed:
                raise Stopped from error
            raise Violation(f"I3: refused: {error}") from error

    def go_on(self, ledger: FileLedger, found: Checkpoint) -> None:
        """From what the open found to the close."""
        if found.complete is not None:
            script = self.scripts[found.complete.source.position]
            self._raise_level((script.rank, FINISHED))
        else:
            script, next_step = self._resumed(found)
            self.opened(ledger)
            for step in script.steps[next_step:]:
                again = [step.ahead[i] for i in self.lacking if i in step.ahead]
                now(ledger.commit(msgspec.structs.replace(step.commit, ahead=[*again, *step.commit.ahead])))
                self.lacking = ()
                self._raise_level((script.rank, step.commit.generation))
                if self.case.abandoned:
                    now(ledger.close())
                    return
            last = script.steps[-1].commit
            now(ledger.audit())
            self._raise_level((script.rank, last.generation))  # written or found, it is durable, and nothing is ahead
            summary = RunSummary(last.mark, last.mark, not self.case.keep, 0, 0, 0, 0.0, self.case.output)
            now(ledger.finish(last.bookmark, summary))
            self._raise_level((script.rank, FINISHED))
        now(ledger.close())
        self._check_end()

    def _raise_level(self, level: Level) -> None:
        if level < self.level:
            raise Violation(f"I3: {level} was reached after {self.level} had been")
        self.level = level
        self.acknowledged()

    def _resumed(self, found: Checkpoint) -> tuple[Script, int]:
        """The script that is resumed, and its next step."""
        if found.state is None:
            there = None if self.case.output is None else self.files.world.read(self.case.output)
            done = self.level[1] == FINISHED or (there is not None and there == self.scripts[self.level[0]].end)
            if self.level != NOTHING and not done and not self._may_be_gone():
                raise Violation(f"I3: {self.level} was acknowledged, and nothing is found")
            self.level = NOTHING
            return self.scripts[1], 0
        script = self.scripts[found.state.source.position]
        generation = found.state.generation
        if (script.rank, generation) < self.level:
            raise Violation(f"I3: generation {generation} of {script.rank} is found, acknowledged was {self.level}")
        step = script.steps[generation]
        if found.state.mark != step.mark or not found.ahead.items() <= step.ahead.items():
            raise Violation(f"I3: mark {found.state.mark} and ahead {sorted(found.ahead)} after {step.commit}")
        lacking = tuple(sorted(step.ahead.keys() - found.ahead.keys()))
        lost = self._acknowledged_ahead(script) & set(lacking)
        if lost:
            raise Violation(f"I3: ahead of the mark, {sorted(lost)} were acknowledged and are gone")
        if self.case.output is not None:
            there = self.files.world.read(f"{self.case.output}.partial")
            if there != step.output:
                raise Violation(f"I4: the partial output holds {there!r}, not {step.output!r}")
        self.lacking = lacking
        return self._turned(script, generation), generation + 1

    def _turned(self, script: Script, generation: int) -> Script:
        """The script that a resumed life follows: the other order, if up to here it is the same."""
        other = self.scripts[-1]
        ways = [[(step.mark, step.ahead) for step in way.steps[: generation + 1]] for way in (script, other)]
        return other if script.rank == 1 and ways[0] == ways[1] else script

    def _acknowledged_ahead(self, script: Script) -> set[int]:
        rank, generation = self.level
        return set() if rank != script.rank else set(script.steps[generation].ahead)

    def _may_be_gone(self) -> bool:
        """A job of which nothing is done may leave nothing; one without an output leaves nothing when it is done."""
        nothing_done = self.case.abandoned and self.level[1] == 0
        last = len(self.scripts[1].steps) - 1
        return nothing_done or (self.case.output is None and self.level == (1, last))

    def _check_end(self) -> None:
        world, case = self.files.world, self.case
        self.check_left()
        allowed = {case.journal + ".tmp"} | ({case.output} if case.output is not None else set())
        if case.keep:
            allowed.add(case.journal)
        strays = {name for name in world.names if name not in allowed and ".damaged-" not in name}
        moved = [name for name in world.names if ".damaged-" in name]
        if strays or len(moved) > len(case.old_bytes):
            raise Violation(f"I6: left behind are {sorted(strays)} and {sorted(moved)}")
        if case.keep and case.journal not in world.names:
            raise Violation("the kept checkpoint is gone")


Path = tuple[str, ...]
"""A state's way, a word for each crash."""


class Point(NamedTuple):
    """A moment at which a life can end."""

    operation: int
    words: str
    world: World
    level: Level
    kill_only: bool = False

    @property
    def is_step(self) -> bool:
        """Whether an operation has just been done, all of it."""
        return self.words not in ("start", "acknowledged") and not self.kill_only


def path_id(case: Case, rules: Rules, path: Path) -> str:
    """The words that replay a state."""
    return "/".join([case.name, rules, *path])


def tearing_at(depth: int) -> Tearing:
    """How finely writes are torn by the crash of that number (1: the first)."""
    return "bytes" if depth == 1 else "sectors"


@dataclass
class Tally:
    """What an exploration did.

    :ivar enumerated: states left by crashes, duplicates included; `distinct`: those that were opened and checked.
    :ivar lives: how many of them went on to the end; the others joined a life that had been lived before.
    """

    enumerated: int = 0
    distinct: int = 0
    lives: int = 0
    points: int = 0
    violations: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.enumerated + other.enumerated,
            self.distinct + other.distinct,
            self.lives + other.lives,
            self.points + other.points,
            self.violations + other.violations,
        )


class Explorer:
    """Breadth first: all lives that follow one crash, then all that follow two, and so on.

    :param depth: how many crashes, at most, before a life that is left in peace.
    :param in_peace: what was lived to its end in peace, shared with explorers of the case under other rules: where
        everything is durable, such a life is the same under all of them.
    """

    def __init__(self, case: Case, rules: Rules, depth: int, in_peace: set[object] | None = None) -> None:
        self.case = case
        self.rules: Rules = rules
        self.depth = depth
        self.tally = Tally()
        self._scripts = case.scripts()
        self._seen: set[object] = set()
        self._in_peace: set[object] = set() if in_peace is None else in_peace
        self._counted: dict[object, int] = {}
        self._lived: dict[object, bool] = {}

    def explore(self) -> Tally:
        """Explore everything; stops at the first violation, which is in the tally with its state's id."""
        with in_memory(self.case):
            try:
                self._explore()
            except Violation as violation:
                self.tally.violations.append(str(violation))
        return self.tally

    def _explore(self) -> None:
        frontier: list[tuple[World, Level, Path]] = [(self.case.start(self.case), NOTHING, ())]
        for depth in range(self.depth):
            following: list[tuple[World, Level, Path]] = []
            for world, level, path in frontier:
                points = self._run(world, level, path, record=True)
                for left, reached, way in self._crashes(points, path, depth + 1):
                    if depth + 1 < self.depth:
                        following.append((left, reached, way))
                    elif self._is_new_in_peace(left, reached):
                        self._run(left, reached, way, record=False)
            frontier = following

    def _is_new_in_peace(self, world: World, level: Level) -> bool:
        key = hash((world.key(), level, world.is_settled))
        is_new = key not in self._in_peace
        self._in_peace.add(key)
        return is_new or not world.is_settled

    def _crashes(self, points: list[Point], path: Path, depth: int) -> Iterator[tuple[World, Level, Path]]:
        self.tally.points += len(points)
        for point in points:
            key = hash((point.world.key(), point.level, point.kill_only, tearing_at(depth)))
            if key in self._counted:  # another life came by here: what it can leave has been seen
                self.tally.enumerated += self._counted[key]
                continue
            before = self.tally.enumerated
            yield from self._new(point.world, point, path, "h" if point.kill_only else "k")
            if not point.kill_only:
                yield from self._cuts(point, path, depth)
            self._counted[key] = self.tally.enumerated - before

    def _cuts(self, point: Point, path: Path, depth: int, before: str = "") -> Iterator[tuple[World, Level, Path]]:
        for number, left in enumerate(power_cuts(point.world, self.rules, tearing_at(depth))):
            yield from self._new(left, point, path, number, before)

    def _new(
        self, left: World, point: Point, path: Path, state: int | str, before: str = "", kind: str = ""
    ) -> Iterator[tuple[World, Level, Path]]:
        """The state, if it is new; `before` what is to be said before its number, `kind` keeps it apart from others."""
        self.tally.enumerated += 1
        key = hash((left.key(), point.level, kind))
        if key not in self._seen:
            self._seen.add(key)
            self.tally.distinct += 1
            yield left, point.level, (*path, f"{before}{point.operation}.{state}")

    def _run(self, world: World, level: Level, path: Path, *, record: bool) -> list[Point]:
        files = MemoryFiles(world, self.rules)
        life = Life(self.case, self._scripts, files, level)
        points = watched(life) if record else []
        life.opened = lambda ledger: self._join(ledger, life, record=record)
        try:
            life.live(first=not path)
            self.tally.lives += 1
        except Joined:
            pass
        except Exception as error:
            kind = "" if isinstance(error, Violation) else f"{type(error).__name__}: "
            raise Violation(f"{path_id(self.case, self.rules, path)}: {kind}{error}") from error
        return points

    def _join(self, ledger: FileLedger, life: Life, *, record: bool) -> None:
        """Leave off if the ledger is as one was before, on the same files: what follows would be the same.

        A life whose moments are recorded joins only one whose were, too: otherwise no crash would follow them.
        """
        key = hash((life.files.world.key(), life.level, life.lacking, facts_of(ledger)))
        if self._lived.get(key, False) or (key in self._lived and not record):
            raise Joined
        self._lived[key] = record


def facts_of(ledger: FileLedger) -> str:
    """All that a ledger has in mind when it has been opened: with the same files, two of them go on alike."""
    journal, output = ledger._opened_journal, ledger._file
    facts = (
        (ledger._begun, ledger._nothing_done, ledger._damaged, ledger._durable_mark),
        None if journal is None else (journal.exists, journal._size, journal._live_bytes, tuple(journal._live)),
        None if output is None else (output.state, output.resumed),
    )
    return repr(facts)


def watched(life: Life) -> list[Point]:
    """The moments of `life` at which it can end, filled in while it is lived."""
    files = life.files
    points = [Point(0, "start", files.world, life.level)]

    def watch(operation: int, words: str, world: World, kill_only: bool) -> None:
        points.append(Point(operation, words, world, life.level, kill_only))

    def acknowledged() -> None:
        points.append(Point(files.operation, "acknowledged", files.world, life.level))

    files._watch, life.acknowledged = watch, acknowledged
    return points
