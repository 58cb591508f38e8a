"""The command line under strace: what the kernel was told, what the seam was, and what a crash can leave of it.

Repeat a job, with what the kernel was told::

    .venv/bin/python -m tests.proof.conformance lines+middle.6
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from async_recovery import checkpoint
from async_recovery.checkpoint import Checkpoint, Replay
from async_recovery.errors import AsyncRecoveryError
from async_recovery.file_ledger import FileLedger
from tests.support import commands
from tests.support.commands import Committed, committed_in
from tests.support.fork_server import Preparation, Reply

from . import seam_record
from .crash_model import MemoryFiles, Rules, Tearing, World, power_cuts, settled
from .explorer import Violation
from .fault_jobs import Place, named, place_for
from .seam_record import entries_in
from .shim import Call, calls_in
from .system_calls import Operation, calls_of, from_kernel, from_seam, is_own, traced

OF_A_LOCK = {"open", "flock", "pwrite", "truncate", "unlink", "close"}
FOLDERS = {"mkdir", "rmdir"}


class Traced:
    """Runs the command line under strace, over a seam that writes down its operations.

    :param env: what its environment has besides.
    :ivar plain: run the command as a user does: nothing is prepared, and the seam writes nothing down.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self.plain = False
        self._env = env

    def __enter__(self) -> Traced:
        self._folder = tempfile.TemporaryDirectory()
        self.account, self.record = (Path(self._folder.name, name) for name in ("account", "record"))
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def run(self, folder: Path, *words: str, preparations: Sequence[Preparation]) -> Reply:
        report = Path(f"{self.record}.report")
        for file in (self.account, self.record, report):
            file.unlink(missing_ok=True)
            file.touch()
        command, env = list(commands.COMMAND), list[str]()
        if not self.plain:
            command[-1] = seam_record.MODULE
            command += [str(self.record), json.dumps(preparations)]
            env = [f"{name}={value}" for name, value in self._env.items()]
        with commands.Folder(folder) as place:
            ended = place.run(*words, command=traced(self.account, *command, env=env))
        return Reply(ended.code, ended.out, ended.err, report.read_text().splitlines())


class Accounts(NamedTuple):
    """Three accounts of one run: the kernel's, the seam's, and the shim's."""

    kernel: list[Operation]
    seam: list[Operation]
    shim: list[Call]


def accounts_of(place: Place) -> Accounts:
    """Run the job, and see that it does what it should."""
    server = place.server
    assert isinstance(server, Traced)
    place.reset()
    reply = place.run(place.job.words(fresh=place.job.fresh))
    assert reply.code == place.job.code, reply.err
    kernel = from_kernel(calls_of(server.account), place.own, place.path)
    return Accounts(kernel, from_seam(entries_in(server.record)), calls_in(reply.steps))


def outside_the_locks(kernel: Sequence[Operation]) -> list[Operation]:
    """The operations, less those that locks consist of, and folders that are made.

    A lock's file takes its note and goes; a lock on the output itself opens it, and does nothing with it.
    """
    on_file: dict[str, set[str]] = {}
    for operation in kernel:
        on_file.setdefault(operation.file, set()).add(operation.name)
    is_lock = {file for file, names in on_file.items() if {"flock"} <= names <= {"flock", "close"}}
    found: list[Operation] = []
    locks: dict[str, int] = {}  # opens of each path that were left out: the others are numbered without them
    numbers: dict[str, str] = {}
    for number, operation in enumerate(kernel):
        path, times = operation.file, _times_opened(kernel, number)
        opens_lock = operation.name == "open" and _opens(kernel, number, is_lock)
        of_lock = operation.path.endswith(".lock") and operation.name in OF_A_LOCK
        locks[path] = locks.get(path, 0) + opens_lock
        if operation.name == "open" and operation.result == 0 and not opens_lock:
            numbers[f"{path}#{times}"] = f"{path}#{times - locks[path]}"
        if not (of_lock or opens_lock or operation.file in is_lock or operation.name in FOLDERS):
            found.append(operation._replace(file=numbers.get(path, path)))
    return found


def _times_opened(kernel: Sequence[Operation], number: int) -> int:
    """How often the path of an operation has been opened by then."""
    path = kernel[number].file
    return sum(op.name == "open" and op.file == path and op.result == 0 for op in kernel[: number + 1])


def _opens(kernel: Sequence[Operation], number: int, is_lock: set[str]) -> bool:
    """Whether the open of that number gives a descriptor that only locks, and changes nothing itself."""
    path, (flags, _) = kernel[number].file, kernel[number].details
    return f"{path}#{_times_opened(kernel, number)}" in is_lock and not flags & (os.O_CREAT | os.O_TRUNC)


def differences(kernel: Sequence[Operation], seam: Sequence[Operation]) -> list[str]:
    """Where the two part: the reads, which another thread may do, in any order; all else in the same one."""
    found = []
    for reads in (False, True):
        told, recorded = (
            [op._replace(thread=0) for op in account if (op.name == "pread") == reads] for account in (kernel, seam)
        )
        if reads:
            told, recorded = sorted(told, key=repr), sorted(recorded, key=repr)
        both = itertools.zip_longest(told, recorded)
        at = next((number for number, (one, other) in enumerate(both) if one != other), None)
        if at is not None:
            found.append(f"operation {at}: the kernel was told {told[at:][:1]}, the seam {recorded[at:][:1]}")
    return found


def unseen(kernel: Sequence[Operation], shim: Sequence[Call]) -> list[str]:
    """Where the shim's account parts from the kernel's, the locks and folders included."""
    names = {"truncate": "ftruncate", "chmod": "fchmod"}
    told = [_numbers(names.get(op.name, op.name), op) for op in kernel if op.name not in {"flock", "drop_cache"}]
    seen = [call for call in shim if call.name == "pread" or not call.only_looks]
    found = [(c.name, 0 if c.name == "mkdir" else c.size, c.offset, min(c.result, 0)) for c in seen]
    reads = [sorted(call for call in account if call[0] == "pread") for account in (told, found)]
    others = [[call for call in account if call[0] != "pread"] for account in (told, found)]
    return [f"the kernel was told {one}, the shim saw {other}" for one, other in (reads, others) if one != other]


def _numbers(name: str, operation: Operation) -> tuple[str, int, int, int]:
    """A call as the shim tells it."""
    details, result = operation.details, operation.result
    failed = min(result, 0) if isinstance(result, int) else 0
    if name == "pwrite":
        return name, len(details[0]), details[1], failed
    if name == "pread":
        return name, details[0], details[1], failed
    size = details[0] if details and isinstance(details[0], int) else 0
    return name, size, -1, failed


class State(NamedTuple):
    """What a crash can leave of a run, and what had been acknowledged by then."""

    files: frozenset[tuple[str, bytes]]
    acknowledged: Committed


class Replayed:
    """A run played again, from the operations, on the file system of the crash model."""

    def __init__(self, place: Place, rules: Rules, tearing: Tearing) -> None:
        own = {file: content for file, content in place.at_start.items() if is_own(str(file), place.own)}
        start = settled({str(file): content for file, content in own.items()})
        self._rules, self._tearing, self._journal = rules, tearing, str(place.journal)
        self._files = MemoryFiles(start, rules, self._watch)
        self._open: dict[str, int | str] = {}  # folders by their paths
        self._times: dict[str, int] = {}
        self._replaced = False
        self._acknowledged = committed_in(own.get(place.journal, b""))
        self._points = [(start, self._acknowledged, False)]

    def play(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            if not isinstance(operation.result, int) or operation.result >= 0:
                self._step(operation)
        self._points.append((self._files.world, self._acknowledged, False))

    def _watch(self, number: int, words: str, world: World, kill_only: bool) -> None:
        self._points.append((world, self._acknowledged, kill_only))

    def _step(self, operation: Operation) -> None:
        files, name, file, details = self._files, operation.name, operation.file, operation.details
        if name == "open":
            self._times[file] = self._times.get(file, 0) + 1
            is_folder = details[0] & os.O_DIRECTORY
            self._open[f"{file}#{self._times[file]}"] = file if is_folder else files.open(file, *details)
            return
        if name in {"rename", "unlink"}:
            getattr(files, name)(file, *details)
            self._replaced = self._replaced or details == (self._journal,)
            return
        descriptor = self._open[file]
        if isinstance(descriptor, str):
            if name == "fsync":
                files.fsync_directory(descriptor)
        elif name == "pwrite":
            files.pwrite(descriptor, memoryview(details[0])[: int(operation.result)], details[1])
        elif name in {"truncate", "fsync", "fdatasync"}:
            getattr(files, name)(descriptor, *details)
            self._acknowledge(name, operation.path)

    def _acknowledge(self, name: str, path: str) -> None:
        """A commit ends with the journal made durable: by its fdatasync, or the fsync after its rename."""
        names = (self._journal, f"{self._journal}.tmp")  # a descriptor goes by the name that it was opened under
        if path in names and (name == "fdatasync" or (name == "fsync" and self._replaced)):
            self._replaced = False
            self._acknowledged = committed_in(self._files.world.read(self._journal) or b"")

    def states(self) -> Iterator[State]:
        """Every state that a crash at any moment can leave; duplicates are possible."""
        for world, acknowledged, kill_only in self._points:
            cuts = [] if kill_only else power_cuts(world, self._rules, self._tearing)
            for left in (world, *cuts):
                yield State(frozenset((path, left.read(path) or b"") for path in left.names), acknowledged)


class Loader:
    """The real ledger, opened on real files that a crash has left."""

    def __init__(self, place: Place, job: checkpoint.Job) -> None:
        self.place, self._job = place, job
        self.loads = 0

    async def load(self, state: State) -> None:
        """:raises Violation: if what is found is not what was acknowledged."""
        self.place.clear()
        for path, content in state.files:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # a run that left nothing has removed what it made
            Path(path).write_bytes(content)
        self._check_output(state)
        job = self.place.job
        given = job.checkpoint and self.place.journal
        ledger = FileLedger(self.place.output, given, keep_checkpoint=job.keeps)
        try:
            found = await ledger.open(self._job)
            self._check(state, found)
        except AsyncRecoveryError as error:
            raise Violation(f"I3: refused: {error}") from error
        finally:
            await ledger.close()
        self.loads += 1

    def _check_output(self, state: State) -> None:
        output = dict(state.files).get(str(self.place.output))
        if output not in (None, self.place.job.expected):
            raise Violation(f"I2: under the output's name lies {output!r}")

    def _check(self, state: State, found: Checkpoint) -> None:
        place, acknowledged = self.place, state.acknowledged
        if found.complete is not None or (found.state is None and acknowledged.complete):
            if place.output.read_bytes() != place.job.expected:
                raise Violation("I2: complete, and the output is not")
            return
        if found.state is None:
            if acknowledged.begun:
                raise Violation(f"I3: {acknowledged} was acknowledged, and nothing is found")
            return
        mark, count = found.state.mark, len(place.job.items)
        lost = [i for i in range(count) if acknowledged.has(i) and i >= mark and i not in found.ahead]
        if lost or acknowledged.complete or found.state.generation < acknowledged.commits:
            raise Violation(f"I3: {acknowledged} was acknowledged, found is {found}")
        if any(item.record != place.job.record(index) for index, item in found.ahead.items()):
            raise Violation(f"I3: not the records that were written: {found.ahead}")
        partial = Path(f"{place.output}.partial").read_bytes()
        if partial != place.job.prefix(mark):
            raise Violation(f"I4: the mark is {mark}, and the output {partial!r}")


def job_in(states: Iterable[State], journal: Path) -> checkpoint.Job:
    """The job as the journal has it, in the first of the states that has one to read."""
    for state in states:
        replay = Replay()
        replay.feed(dict(state.files).get(str(journal), b""))
        if found := replay.state or replay.complete:
            return found.job
    raise ValueError(f"no state has a journal {journal} that can be read")


def load_all(place: Place, kernel: Sequence[Operation], tearing: Tearing = "bytes") -> tuple[int, list[str]]:
    """How many states were loaded, and the first violation."""
    states: dict[State, None] = {}
    for rules in ("posix", "ext4"):
        replayed = Replayed(place, "posix" if rules == "posix" else "ext4", tearing)
        replayed.play(kernel)
        states.update(dict.fromkeys(replayed.states()))
    loader = Loader(place, job_in(states, place.journal))

    async def load() -> None:
        for state in states:
            try:
                await loader.load(state)
            except Violation as violation:
                raise Violation(f"{violation}; it was opened on {dict(state.files)}") from violation

    logging.disable(logging.CRITICAL)
    try:
        asyncio.run(load())
    except Violation as violation:
        return loader.loads, [str(violation)]
    finally:
        logging.disable(logging.NOTSET)
    return loader.loads, []


class Outcome(NamedTuple):
    """What a job's accounts are worth.

    :ivar loads: states that were loaded.
    :ivar wrong: differences of the accounts, and violations of the loads.
    """

    kernel: list[Operation]
    loads: int
    wrong: list[str]


def outcome_of(name: str, *, loads: bool = True) -> Outcome:
    """Run it once under strace, and compare the accounts; then load what a crash can leave of it."""
    with place_for(named(name), serve=Traced) as place:
        accounts = accounts_of(place)
        kernel = outside_the_locks(accounts.kernel)
        wrong = [*differences(kernel, accounts.seam), *unseen(accounts.kernel, accounts.shim)]
        threads = {operation.thread for operation in kernel if operation.name != "pread"}
        wrong += [f"{len(threads)} threads write"] * (len(threads) > 1)
        count, violations = load_all(place, kernel) if loads and not wrong else (0, [])
    repeat = f".venv/bin/python -m tests.proof.conformance {name}"
    return Outcome(kernel, count, [f"{repeat}: {line}" for line in [*wrong, *violations]])


def swapped(operations: Sequence[Operation]) -> list[Operation]:
    """A broken account: each fdatasync before the write that it was for."""
    found = list(operations)
    for number in range(1, len(found)):
        if found[number].name == "fdatasync" and found[number - 1].name == "pwrite":
            found[number - 1], found[number] = found[number], found[number - 1]
    return found


def repeat(name: str) -> None:
    """Do it again, and print it."""
    outcome = outcome_of(name)
    for operation in outcome.kernel:
        print(*operation)
    print(f"{len(outcome.kernel)} operations, {outcome.loads} states loaded; wrong:", *outcome.wrong)


if __name__ == "__main__":
    repeat(sys.argv[1])
