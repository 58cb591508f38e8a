"""Runs of the real command line that meet at one output: what becomes of the second, and of the first.

One scenario again, or pairs of runs that start at once (the machine decides who wins)::

    .venv/bin/python -m tests.proof.lock_scenarios "a forked child"
    .venv/bin/python -m tests.proof.lock_scenarios starts 3
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from async_recovery import lock
from async_recovery.lock import Lock
from tests.support.commands import DEADLINE_S, Folder, wait_until
from tests.support.file_jobs import committed, names_in
from tests.support.jobs import LOG, runs_in

from . import staged_worker
from .forks import Fork, Gate, Inside, Prepare, nothing, quick_folder
from .lock_mutants import MUTANTS
from .signal_phases import ITEMS, at, at_flock
from .signal_scenarios import OUTPUT, words
from .staged_worker import DONE

HELD = 3
EXPECTED = b"[\n" + b",\n".join(b'{"index":%d,"number":%d}' % (n, n) for n in range(ITEMS)) + b"\n]\n"
OF_THE_JOB = {"items.txt", LOG, DONE}


class Place:
    """A folder with a job, all of whose runs wait at one item until they are let go."""

    def __init__(self, folder: Path, patience_s: float) -> None:
        self.folder, self._patience_s = folder, patience_s
        if not folder.exists():
            folder.mkdir()
            Folder(folder).write_items(ITEMS)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def start(self, *more: str, prepare: Prepare = nothing) -> Fork:
        """A run, to be left with `with`."""

        def prepared(inside: Inside) -> None:
            staged_worker.hold(inside, HELD)
            prepare(inside)

        return Fork(self.folder, words(*more), prepared, patience_s=self._patience_s)

    @contextlib.contextmanager
    def holder(self, *more: str, prepare: Prepare = nothing) -> Iterator[Fork]:
        """A run that holds its output; all of its items but one are committed."""
        with self.start(*more, prepare=prepare) as fork:
            self.holds(fork)
            yield fork

    def holds(self, fork: Fork) -> None:
        """A run proceeds, until all of its items but one are committed."""
        assert fork.hears("item"), fork.end().err
        wait_until(lambda: any(len(committed(path)) == ITEMS - 1 for path in self.folder.glob("*checkpoint")))

    def contents(self) -> dict[str, Any]:
        """All files but the locks', which the holder writes to."""
        files = self.folder.iterdir()
        return {path.name: path.read_bytes() for path in files if path.is_file() and path.suffix != ".lock"}

    def refuses(self, holder: Fork, what: str, *more: str) -> None:
        """A second run is told that `what` is held, and by whom; it touches nothing."""
        before = self.contents()
        with self.start(*more) as second:
            self.is_refused(second, holder, what)
        assert self.contents() == before, "the second run has changed something"

    @staticmethod
    def is_refused(second: Fork, holder: Fork, what: str) -> None:
        assert not second.hears("item"), "both proceed"
        ended = second.end()
        assert (ended.code, ended.out) == (75, ""), f"it ended with {ended}"
        said = ended.err.splitlines()
        assert len(said) == 1, ended.err
        assert f"{what} is held by process {holder.pid} on " in said[0], f"not {holder.pid}: {said[0]}"

    def finishes(self, holder: Fork, *also: str, output: str = OUTPUT, ran: Iterable[int] = range(ITEMS)) -> None:
        """The holder is let go, and does its job as if it had been alone."""
        holder.gates["item"].open()
        ended = holder.end()
        assert ended.code == 0, ended
        assert (self / output).read_bytes() == EXPECTED, "the output differs"
        assert sorted(runs_in(self / LOG)) == sorted(ran), f"items ran: {runs_in(self / LOG)}"
        left = names_in(self.folder) - OF_THE_JOB
        assert left == {output, *also}, f"in the end there are {left}"


# Where a second run meets the first


def same_output(place: Place) -> None:
    with place.holder() as first:
        for more in ([], ["--fresh"], ["--checkpoint", "other.checkpoint"], ["--output", f"./../here/{OUTPUT}"]):
            place.refuses(first, f"/{OUTPUT}.lock", *more)
        place.finishes(first)


def symlink(place: Place) -> None:
    (place / "link.json").symlink_to(OUTPUT)
    with place.holder("--output", "link.json") as first:
        place.refuses(first, f"/{OUTPUT}.lock")
        place.finishes(first, "link.json")
    (place / "sub").symlink_to(".")
    for name in (LOG, DONE, OUTPUT):
        (place / name).unlink()
    with place.holder() as first:
        place.refuses(first, f"/{OUTPUT}.lock", "--output", "link.json")
        place.refuses(first, f"/{OUTPUT}.lock", "--output", f"sub/{OUTPUT}")
        place.finishes(first, "link.json", "sub")


def hard_link(place: Place) -> None:
    with place.holder() as first:
        os.link(place / f"{OUTPUT}.partial", place / "other.json.partial")
        shutil.copy(place / f"{OUTPUT}.checkpoint", place / "other.json.checkpoint")
        place.refuses(first, "/other.json.partial", "--output", "other.json")
        for name in ("other.json.partial", "other.json.checkpoint"):
            (place / name).unlink()
        place.finishes(first)


def same_checkpoint(place: Place) -> None:
    shared = ("--checkpoint", "job.checkpoint")
    with place.holder(*shared) as first:
        place.refuses(first, "/job.checkpoint.lock", *shared, "--output", "other.json")
        place.refuses(first, "/job.checkpoint.lock", *shared, "--output", "other.json", "--fresh")
        place.finishes(first)


def default_checkpoint(place: Place) -> None:
    """One has it by default, the other by name."""
    with place.holder() as first:
        place.refuses(first, f"/{OUTPUT}.lock", "--output", "other.json", "--checkpoint", f"{OUTPUT}.checkpoint")
        place.finishes(first)


def lock_file_removed(place: Place) -> None:
    with place.holder() as first:
        (place / f"{OUTPUT}.lock").unlink()
        place.refuses(first, f"/{OUTPUT}.partial")
        place.refuses(first, f"/{OUTPUT}.partial", "--fresh")
        place.finishes(first)


# What becomes of a holder


def forked_child(place: Place) -> None:
    """A child of the worker's, and a command that it started, have all of its descriptors, and outlive it."""
    gate = Gate()

    def prepare(inside: Inside) -> None:
        work = staged_worker.work

        def fork() -> None:
            started = subprocess.Popen(["cat"], stdin=gate.exit, stdout=subprocess.DEVNULL, close_fds=False)
            if os.fork() == 0:
                os.close(gate.entrance)
                inside.report(f"{os.getpid()} {started.pid}")
                gate.wait()
                os._exit(0)

        async def forks(item: str) -> dict[str, int]:
            if int(item) == HELD:
                fork()
            return await work(item)

        forks.__module__, forks.__qualname__ = work.__module__, work.__qualname__
        staged_worker.work = forks

    try:
        with place.holder(prepare=prepare) as first:
            first.until(lambda heard: any(" " in word for word in heard))
            place.refuses(first, f"/{OUTPUT}.lock")
            first.send(signal.SIGKILL)
            assert first.end().code == -signal.SIGKILL
            children = [int(pid) for word in first.heard if " " in word for pid in word.split()]
            with place.start() as second:
                place.holds(second)
                for child in children:
                    os.kill(child, 0)
                place.finishes(second, ran=[*range(ITEMS), HELD])
    finally:
        gate.open()
        gate.close()


def stopped_holder(place: Place) -> None:
    with place.holder() as first:
        first.send(signal.SIGSTOP)
        os.waitpid(first.pid, os.WUNTRACED)
        place.refuses(first, f"/{OUTPUT}.lock")
        place.refuses(first, f"/{OUTPUT}.lock", "--fresh")
        first.send(signal.SIGCONT)
        place.finishes(first)


def killed_holder(place: Place) -> None:
    kill_one(place)
    assert (place / f"{OUTPUT}.lock").exists()
    with place.holder() as second:
        place.refuses(second, f"/{OUTPUT}.lock")
        place.finishes(second, ran=[*range(ITEMS), HELD])


def not_yet_named(place: Place) -> None:
    """It has the lock, and in the lock's file there still stands a dead run, or nothing."""
    for _ in range(2):
        with place.start(prepare=at_flock) as first:
            assert first.hears("seam")
            place.refuses(first, f"/{OUTPUT}.lock")
            first.gates["seam"].open()
            place.holds(first)
            first.send(signal.SIGKILL)
            first.end()
    with place.holder() as last:
        place.finishes(last, ran=[*range(ITEMS), HELD, HELD])


def old_inode(place: Place) -> None:
    """One has opened the lock's file when its holder removes it, and locks it when there is another holder."""
    with place.holder() as first, place.start(prepare=at(lock, "_lock")) as late:
        assert late.hears("seam")
        place.finishes(first)
        for name in (LOG, DONE, OUTPUT):
            (place / name).unlink()
        with place.holder() as second:
            late.gates["seam"].open()
            place.is_refused(late, second, f"/{OUTPUT}.lock")
            place.finishes(second)


def old_inode_alone(place: Place) -> None:
    """The same, and there is no other holder: it proceeds."""
    with place.holder() as first, place.start(prepare=at(lock, "_lock")) as late:
        assert late.hears("seam")
        place.finishes(first)
        for name in (LOG, DONE, OUTPUT):
            (place / name).unlink()
        late.gates["seam"].open()
        place.holds(late)
        place.refuses(late, f"/{OUTPUT}.lock")
        place.finishes(late)


def kill_one(place: Place) -> None:
    with place.holder() as fork:
        fork.send(signal.SIGKILL)
        assert fork.end().code == -signal.SIGKILL


SCENARIOS: dict[str, Callable[[Place], None]] = {
    "the same output": same_output,
    "a symlink": symlink,
    "a hard link of the partial output": hard_link,
    "the same checkpoint": same_checkpoint,
    "the default checkpoint by name": default_checkpoint,
    "the lock's file removed": lock_file_removed,
    "a forked child": forked_child,
    "a stopped holder": stopped_holder,
    "a killed holder": killed_holder,
    "a holder that is not named yet": not_yet_named,
    "an old inode": old_inode,
    "an old inode, and nobody else": old_inode_alone,
}


# Two at once


class Starts(NamedTuple):
    """Pairs that were started: `met` of them took the lock at the same time."""

    pairs: int
    met: int
    violations: list[str]


def start_two(place: Place, number: int) -> bool:
    """A new job or (odd) that of a killed run; let go together before they are the command, or before they lock."""
    at_the_lock = bool(number & 2)
    gate = Gate()

    def prepare(inside: Inside) -> None:
        acquire = Lock.acquire

        def timed(self: Lock) -> None:
            if at_the_lock:
                inside.report("ready")
                gate.wait()
            inside.report(f"from {time.monotonic_ns()}")
            try:
                acquire(self)
            finally:
                inside.report(f"to {time.monotonic_ns()}")

        Lock.acquire = timed  # type: ignore[method-assign]
        if not at_the_lock:
            inside.report("ready")
            gate.wait()

    try:
        with place.start(prepare=prepare) as one, place.start(prepare=prepare) as two:
            assert one.hears("ready"), one.end().err
            assert two.hears("ready"), two.end().err
            gate.open()
            proceeded = [fork for fork in (one, two) if fork.hears("item")]
            assert len(proceeded) == 1, f"{len(proceeded)} proceed"
            (first,), (second,) = proceeded, {one, two} - set(proceeded)
            place.is_refused(second, first, f"/{OUTPUT}.lock")
            place.finishes(first, ran=[*range(ITEMS), *([HELD] if number & 1 else [])])
            return _overlap(one.heard, two.heard)
    finally:
        gate.close()


def _overlap(*heard: list[str]) -> bool:
    times = [[int(word.split()[1]) for word in words if word.startswith(("from ", "to "))] for words in heard]
    return max(first for first, _ in times) < min(last for _, last in times)


def starts(numbers: Iterable[int], mutant: str | None = None) -> Starts:
    """Pairs of these numbers; with a defect until one breaks what it is known to break."""
    met, pairs, violations = 0, 0, list[str]()
    with quick_folder() as folder, _broken(mutant) as patience_s:
        kill_one(Place(folder / "killed", patience_s))
        for number in numbers:
            if number & 1:
                shutil.copytree(folder / "killed", folder / "here")
            try:
                met += start_two(Place(folder / "here", patience_s), number)
            except AssertionError as error:
                violations.append(f"python -m tests.proof.lock_scenarios starts {number}: {error}")
            shutil.rmtree(folder / "here")
            pairs += 1
            if mutant and violations and MUTANTS[mutant].says in violations[-1]:
                break
    return Starts(pairs, met, violations)


@contextlib.contextmanager
def _broken(mutant: str | None) -> Iterator[float]:
    with MUTANTS[mutant].patch() if mutant else contextlib.nullcontext():
        yield 5.0 if mutant else DEADLINE_S


def play(name: str, mutant: str | None = None) -> list[str]:
    """The violations of a scenario."""
    with quick_folder() as folder, _broken(mutant) as patience_s:
        try:
            SCENARIOS[name](Place(folder / "here", patience_s))
        except AssertionError as error:
            return [f'python -m tests.proof.lock_scenarios "{name}": {error}']
    return []


if __name__ == "__main__":
    if sys.argv[1] == "starts":
        print(starts(100 * [int(sys.argv[2])]))
    else:
        print("\n".join(play(sys.argv[1])) or "every invariant holds")
