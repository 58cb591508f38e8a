"""Layer 5: schedules of the real engine and the real file ledger, crashes of them, and the resume of what is left.

A seed is one job: its first process lives through one schedule to its end. Some moments of that life are taken, and
some of the states that a kill or a power cut leaves there; from each, the job is resumed on a schedule of its own by
the whole pipeline (source, its check, cursor, engine, ledger), and that life may be crashed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, TypeVar
from unittest import mock

from async_recovery import checkpoint as checkpoint_module
from async_recovery import file_ledger
from async_recovery.checkpoint import Checkpoint, Job
from async_recovery.file_ledger import FileLedger
from async_recovery.output_file import framing_of

from .crash_model import MemoryFiles, Rules, World, power_cuts, settled
from .engine_mutants import mutated
from .explorer import Case, Violation, in_memory
from .scheduled_loop import Choices, ScheduledLoop, running
from .scheduled_run import CANCELLATIONS, ScheduledRun, small_and_silent
from .schedules import SEEDS_OF_MUTANTS, Seeds, drawn_plan
from .witness import Past, items_of

T = TypeVar("T")

OUTPUTS = ("/async-recovery-model.jsonl", "/async-recovery-model.json")
MOST_CRASHES = 3
FEW_STATES = 4


class _Writer:
    """The writer thread's place: a job begins and ends when the explorer says so, and workers go on meanwhile."""

    async def run(self, job: Callable[..., T], *args: object) -> T:
        loop = running()
        if getattr(job, "__name__", "") == "_show":
            await loop.job("show")
            return job(*args)
        await loop.job("the writer begins")
        try:
            return job(*args)
        finally:
            await loop.job("the writer ends")

    def stop(self) -> None:
        pass


async def _in_thread(job: Callable[..., T], *args: object) -> T:
    await running().moment("audit")
    return job(*args)


@contextlib.contextmanager
def scheduled_ledger() -> Iterator[None]:
    """The file ledger on a `ScheduledLoop` and a file system in memory."""
    with in_memory(Case("schedules", [])), small_and_silent():
        writer = mock.patch.object(file_ledger, "WriterThread", _Writer)
        with writer, mock.patch("anyio.to_thread.run_sync", _in_thread):
            yield


class Moment(NamedTuple):
    """A moment at which a process can die, and what has been done then.

    :ivar half: only a kill can leave it, in the middle of a write.
    """

    words: str
    world: World
    past: Past
    half: bool = False


class CheckedLedger(FileLedger):
    """The file ledger; what lies there when it has been opened is compared with what it says."""

    def __init__(self, output: str, files: MemoryFiles, loop: ScheduledLoop, records: list[bytes]) -> None:
        super().__init__(output, files=files)
        self._memory = files
        self._loop = loop
        self._records = records

    async def open(self, job: Job) -> Checkpoint:
        found = await super().open(job)
        if found.state is not None:
            expected = framing_of(self.output or "").join(self._records[: found.state.mark], 0)
            there = self._memory.world.read(f"{self.output}.partial")
            if there != expected:
                self._loop.fail(f"I4: the partial output holds {there!r} at the mark {found.state.mark}")
        return found


@dataclass
class Tally:
    """What was done.

    :ivar cycles: crashes that were followed by a resume; `again`: those of them that were crashes of a resume.
    :ivar finished: crashes that left a finished job, and nothing to do.
    """

    schedules: int = 0
    cycles: int = 0
    again: int = 0
    finished: int = 0
    violations: list[str] = field(default_factory=list)

    def __iadd__(self, other: Tally) -> Tally:
        self.schedules += other.schedules
        self.cycles += other.cycles
        self.again += other.again
        self.finished += other.finished
        self.violations += other.violations
        return self


class CrashedJob:
    """The job of one seed.

    :param story: what happens is told there.
    :param trusting: what a commit holds is not checked when it begins, so that only a crash and a resume can show it.
    """

    def __init__(self, seed: int, story: list[str], *, trusting: bool = False) -> None:
        self._trusting = trusting
        self._dice = dice = Random(seed)
        self._items = dice.choice([1, 2, *range(3, 10)])
        self._source = dice.choice(["list", "async", "text", "text"])
        self._output = dice.choice(OUTPUTS)
        self._records = items_of(self._items, self._source).records
        framing = framing_of(self._output)
        whole = framing.join(self._records, 0)
        self._expected = whole + framing.closing(len(whole))
        self._rules: Rules = dice.choice(("posix", "ext4"))
        self._compacts = dice.random() < 0.3
        self._story = story
        story.append(f"{self._rules}, {self._output}, a journal that is written anew: {self._compacts}")
        self.tally = Tally()

    def live(self) -> Tally:
        """The first life, its crashes, and all that follows."""
        dead_bytes = 0 if self._compacts else checkpoint_module.COMPACT_ABOVE_DEAD_BYTES
        with mock.patch.object(checkpoint_module, "COMPACT_ABOVE_DEAD_BYTES", dead_bytes):
            cancelled = self._dice.sample(CANCELLATIONS, self._dice.random() < 0.3)
            moments = self._run(settled({}), Past(), kinds=tuple(cancelled))
            self.tally.schedules += 1
            for moment in self._dice.sample(moments, min(3, len(moments))):
                self._crash(moment, 1)
        return self.tally

    def _crash(self, moment: Moment, crashes: int) -> None:
        dice = self._dice
        for words, world in self._left(moment):
            self._story.append(f"crash {crashes} after {moment.words}: {words}; until then {moment.past}")
            if self._is_finished(world, moment.past):
                self.tally.finished += 1
                continue
            self.tally.cycles += 1
            self.tally.again += crashes > 1
            moments = self._run(world, moment.past)
            if crashes < MOST_CRASHES and dice.random() < 0.3:
                self._crash(dice.choice(moments), crashes + 1)

    def _left(self, moment: Moment) -> list[tuple[str, World]]:
        """What a kill leaves, or some of what a power cut can leave: all, where it is little."""
        if moment.half or self._dice.random() < 0.3:
            return [("a kill", moment.world)]
        cuts = power_cuts(moment.world, self._rules, self._dice.choice(("bytes", "sectors")))
        worlds = list({world.key(): world for world in cuts}.values())
        chosen = worlds if len(worlds) <= FEW_STATES else self._dice.sample(worlds, 2)
        return [(f"a power cut, one of {len(worlds)} states", world) for world in chosen]

    def _is_finished(self, world: World, past: Past) -> bool:
        """Whether the output is published and nothing else is there.

        :raises Violation: if it is not, although the finish was acknowledged; or if it is not the right one.
        """
        there = world.read(self._output)
        if there is not None and there != self._expected:
            raise Violation(f"I2: under the output's name lies {there!r}")
        if there is None and past.published:
            raise Violation("I1: the finish was acknowledged, and there is no output")
        return there is not None and f"{self._output}.checkpoint" not in world.names

    def _run(self, world: World, past: Past, kinds: tuple[str, ...] = ()) -> list[Moment]:
        """One life, to its end; only one with a cancellation may end early. Every moment at which it can die."""
        dice = self._dice
        files = MemoryFiles(world, self._rules)
        loop = ScheduledLoop(Choices((), dice), together=dice.random() < 0.2, haste=dice.choice([0, 0, 0.1, 0.3]))
        loop.lapses = dice.choice([0, 0, 1, 3])
        plan = drawn_plan(dice, self._items, self._source)
        ledger = CheckedLedger(self._output, files, loop, self._records)
        run = ScheduledRun(plan, past, loop, ledger, kinds=kinds, trusting=self._trusting)
        witness, moments = run.witness, []

        def watch(operation: int, words: str, world: World, half: bool) -> None:
            loop.story.append(words)
            moments.append(Moment(words, world, witness.past, half))

        files._watch = watch
        witness.told = lambda: moments.append(Moment("acknowledged", files.world, witness.past))
        self._story.append(f"a process begins: {plan}")
        loop.story = self._story
        run.live(lambda: files.world.read(self._output) == self._expected)
        if files.world.read(self._output) is not None:
            strays = set(files.world.names) - {self._output, f"{self._output}.checkpoint.tmp"}
            if strays:
                raise Violation(f"I6: left behind are {sorted(strays)}")
        elif not kinds:
            raise Violation("I1: not cancelled, and not done")
        return moments


def crash_by_seeds(seeds: Seeds) -> Tally:
    """Each seed's job; stops at the first violation."""
    tally = Tally()
    with scheduled_ledger(), mutated(seeds.mutant):
        for seed in range(seeds.first, seeds.first + seeds.jobs):
            job = CrashedJob(seed, [], trusting=seeds.mutant is not None)
            try:
                job.live()
            except Violation as violation:
                job.tally.violations.append(f"5/seed/{seed}: {violation}")
            tally += job.tally
            if tally.violations:
                break
    return tally


def first_violation(name: str) -> str:
    """The first violation that the mutant of that name causes; empty if there is none."""
    return "".join(crash_by_seeds(Seeds(0, SEEDS_OF_MUTANTS, name)).violations)
