"""What one, two or three signals in a phase of a run must leave.

One scenario again::

    .venv/bin/python -m tests.proof.signal_scenarios "work/INT INT/at once"
"""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from async_recovery import pool
from async_recovery.output_file import OutputFile
from async_recovery.signals import Signals
from tests.support.commands import DEADLINE_S, Ended, Folder, read_committed
from tests.support.file_jobs import names_in
from tests.support.jobs import LOG, runs_in

from . import staged_worker
from .forks import Fork, Inside, quick_folder
from .signal_mutants import MUTANTS
from .signal_phases import ITEMS, PHASES, Phase, at
from .staged_worker import DONE

OUTPUT = "out.json"
SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM}


class Scenario(NamedTuple):
    """Signals in a phase: all of them before the loop goes on, or each when the one before has been obeyed."""

    phase: str
    signals: tuple[str, ...]
    how: str

    def __str__(self) -> str:
        return f"{self.phase}/{' '.join(self.signals)}/{self.how}"


MIXED = [("INT", "TERM"), ("TERM", "INT"), ("INT", "TERM", "INT"), ("TERM", "TERM", "INT")]


def scenario_of(text: str) -> Scenario:
    """The scenario that is written so."""
    phase, signals, how = text.rsplit("/", 2)
    return Scenario(phase, tuple(signals.split()), how)


def scenarios() -> list[Scenario]:
    """Every phase x 1, 2, 3 signals x SIGINT, SIGTERM, and some mixed."""
    found = []
    for phase in PHASES.values():
        mixed = MIXED if phase.name in ("work", "commit, journal: fdatasync") else []
        for signals in [(name,) * count for count in (1, 2, 3) for name in SIGNALS] + mixed:
            if not phase.stopped_before:
                found.append(Scenario(phase.name, signals, "at once"))
            if phase.stopped_before or (1 < len(signals) <= phase.ends_after and not phase.blocks):
                found.append(Scenario(phase.name, signals, "one by one"))
    return found


class Stage:
    """The folders that runs begin in, each made once.

    *fresh*: the input alone; *interrupted*: some items committed, some of them ahead of the mark; *torn*: that, with
    half a commit more; *complete*: killed before the output was renamed; *kept*: finished, the checkpoint kept.

    :ivar expected: the finished output.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._make_fresh()
        with Fork(self._copy("fresh", "kept"), words(keep=True)) as fork:
            assert fork.end().code == 0
        self.expected = (path / "kept" / OUTPUT).read_bytes()
        interrupted = self._copy("fresh", "interrupted")
        with Fork(interrupted, words(), functools.partial(_listen, PHASES["work"], 2)) as fork:
            fork.gates["handler"].open()
            fork.hears("item", 2)
            for told in ("stop", "cancel"):
                fork.send(signal.SIGINT)
                fork.until(functools.partial(_said, told))
            assert fork.end().code == 130
        torn = self._copy("interrupted", "torn")
        for name in (f"{OUTPUT}.partial", f"{OUTPUT}.checkpoint"):
            with (torn / name).open("ab") as file:
                file.write(b'{"crc":"0000')
        with Fork(self._copy("fresh", "complete"), words(), at(OutputFile, "publish", "rename")) as fork:
            assert fork.hears("seam")

    def _make_fresh(self) -> None:
        (self.path / "fresh").mkdir()
        Folder(self.path / "fresh").write_items(ITEMS)

    def _copy(self, source: str, target: str) -> Path:
        return Path(shutil.copytree(self.path / source, self.path / target))


def words(*more: str, worker: str = "work", keep: bool = False) -> list[str]:
    """The command: nothing in it happens because time passes."""
    line = ["run", "--input", "items.txt", "--output", OUTPUT, "--worker", f"{staged_worker.__name__}:{worker}"]
    line += ["--concurrency", "2", "--batch-size", "1", "--checkpoint-interval", "600", "--drain-timeout", "600"]
    return [*line, *(["--keep-checkpoint"] if keep else []), *more]


def _said(word: str, heard: Sequence[str]) -> bool:
    return any(line.split()[0] == word for line in heard)


def _listen(phase: Phase, count: int, inside: Inside) -> None:
    """In a fork: wait where the phase says, and tell what becomes of each signal."""
    blocking = phase.worker != "work" or (phase.blocks and not phase.stopped_before)
    refuses = phase.refuses or (count == 3 and not phase.stopped_before)
    staged_worker.hold(inside, *phase.holds, stubborn=refuses, blocking=blocking)
    if refuses:
        pool.CANCEL_AGAIN_S = 600 if count == 3 else 0.01
    tell_of_signals(inside)
    for prepare in phase.prepare:
        prepare(inside)


def tell_of_signals(inside: Inside) -> None:
    """In a fork: say when signals are listened to, when one is taken (and wait at the gate for handlers), when it is
    obeyed, and when they mean nothing any more.
    """
    signals, receive, stop, cancel = Signals, Signals._receive, Signals._stop, Signals._cancel
    install, ignore = signals.install, signals.ignore

    def installed(self: Signals) -> None:
        install(self)
        inside.report("listening")

    def received(self: Signals, number: int, frame: Any) -> None:
        receive(self, number, frame)
        inside.report("taken")
        inside.gates["handler"].wait()

    def stopped(self: Signals) -> None:
        stop(self)
        inside.report(f"stop {len(staged_worker.begun)}")

    def cancelled(self: Signals) -> None:
        cancel(self)
        inside.report("cancel")

    def ignored(self: Signals) -> None:
        ignore(self)
        inside.report("decided")

    told = {"install": installed, "_receive": received, "_stop": stopped, "_cancel": cancelled, "ignore": ignored}
    for name, method in told.items():
        setattr(signals, name, method)


OBEYED = ("stop", "cancel")  # what the loop says of the first signal, and of the second
LOG_LINES = re.compile(
    r"\d{4}-\d\d-\d\d [\d:,]+ (ERROR 2 items go on although they were cancelled|"
    r"INFO (stopping: waiting|cancelling the items|resuming at index|the job (is|was) complete))"
)


class Play:
    """One scenario, from its folder to the finished job.

    :ivar violations: what did not hold.
    """

    def __init__(self, scenario: Scenario, stage: Stage, folder: Path, patience_s: float) -> None:
        self.scenario, self.stage, self.folder, self.patience_s = scenario, stage, folder, patience_s
        self.phase = PHASES[scenario.phase]
        self.count = len(scenario.signals)
        self.killed = self.count == 3 and not self.phase.deaf
        self.violations: list[str] = []
        keep = "--keep-checkpoint" in self.phase.words
        soon = ("--drain-timeout", "0") if self.phase.refuses and self.count == 1 else ()
        self.words = words(*self.phase.words, *soon, worker=self.phase.worker)
        self.kept = {f"{OUTPUT}.checkpoint"} if keep else set()

    def run(self) -> list[str]:
        shutil.copytree(self.stage.path / self.phase.before, self.folder)
        self.seen = len(runs_in(self.folder / LOG))
        try:
            listen = functools.partial(_listen, self.phase, self.count)
            with Fork(self.folder, self.words, listen, patience_s=self.patience_s) as fork:
                self._deliver(fork)
                ended = fork.end()
            self._check_end(ended, fork.heard)
            self._check_left()
            self._check_again()
        except AssertionError as error:
            self._violated(str(error))
        shutil.rmtree(self.folder)
        return self.violations

    def _expect(self, holds: object, what: str) -> None:
        if not holds:
            self._violated(what)

    def _violated(self, what: str) -> None:
        self.violations.append(f"{self.scenario}: {what}")

    # The signals

    def _deliver(self, fork: Fork) -> None:
        phase, signals = self.phase, self.scenario.signals
        obeyed = not phase.blocks and self.scenario.how == "one by one"
        if phase.blocks or obeyed:
            fork.gates["handler"].open()
        first = 0
        if phase.stopped_before:
            self._listen_for(fork, {"item": 2})
            self._send(fork, first, obeyed=True)
            first = 1
        self._listen_for(fork, phase.reached)
        self.committed = read_committed(self.folder / f"{OUTPUT}.checkpoint")
        for number in range(first, self.count):
            if phase.deaf:
                fork.send(SIGNALS[signals[number]])
            else:
                self._send(fork, number, obeyed=obeyed)
        if not self.killed and phase.ends != "at once":
            self._let_go(fork)

    def _listen_for(self, fork: Fork, reached: dict[str, int]) -> None:
        for word, times in reached.items():
            if not fork.hears(word, times):
                raise AssertionError(f"it ended before the phase: {fork.end()}")

    def _send(self, fork: Fork, number: int, *, obeyed: bool) -> None:
        """Send one signal, and wait until its handler has run; `obeyed`: and the loop has done what it says."""
        fork.send(SIGNALS[self.scenario.signals[number]])
        went_on = fork.until(lambda heard: heard.count("taken") > number or "decided" in heard)
        if went_on and (number == 2 or self.phase.ends == "at once"):
            raise AssertionError(f"the {('first', 'second', 'third')[number]} signal did not end it at once")
        if went_on and obeyed:
            fork.until(functools.partial(_obeyed, OBEYED[number]))

    def _let_go(self, fork: Fork) -> None:
        """Once the signals are obeyed: only then can it be told what ends by itself, and what is cancelled."""
        fork.gates["handler"].open()
        if not self.phase.blocks:
            for word in OBEYED[: self.count]:
                fork.until(functools.partial(_obeyed, word))
        fork.gates["seam"].open()
        for word, times in self.phase.then.items():
            fork.hears(word, times)
        if self.phase.blocks or (self.count == 1 and not self.phase.refuses):
            fork.gates["item"].open()

    # What must hold

    @property
    def _code(self) -> int:
        signals, phase = [128 + SIGNALS[name] for name in self.scenario.signals], self.phase
        if phase.ends == "at once" or (phase.deaf and phase.ends == "stopped"):
            return signals[0]
        return 0 if phase.ends == "complete" and not self.killed else signals[-1]

    def _check_end(self, ended: Ended, heard: Sequence[str]) -> None:
        """Its code, and what it said."""
        self._expect(ended.code == self._code, f"exit code {ended.code}, not {self._code}: {ended.err}")
        lines = ended.err.splitlines()
        self._expect("Traceback" not in ended.err, f"it said {ended.err}")
        if self._code == 0:
            self._expect(ended.out and ended.summary["total_items"] == ITEMS, f"no summary: {ended.out!r}")
        else:
            self._expect(ended.out == "", f"standard output has {ended.out!r}")
        if self._code and self.phase.ends == "stopped" and not self.killed:
            said = re.match(r"stopped (at the mark \d+, with \d|while the input)", lines[-2]) if lines[1:] else None
            self._expect(said, f"it does not say that it was stopped: {ended.err}")
            line = shlex.split(lines[-1]) if lines else []
            self._expect(line == [sys.orig_argv[0], "-m", "async_recovery", *self.words], f"it is resumed by {line}")
            del lines[-2:]
        strange = [line for line in lines if not LOG_LINES.match(line)]
        self._expect(not strange, f"it said {strange}")
        begun = len(runs_in(self.folder / LOG)) - self.seen
        at_stop = [int(word.removeprefix("stop ")) for word in heard if word.startswith("stop ")]
        self._expect(at_stop in ([], [begun]), f"items begun when it was stopped: {at_stop}, in the end: {begun}")

    def _check_left(self) -> None:
        """What is committed, and what lies in the folder."""
        folder, phase, after = self.folder, self.phase, read_committed(self.folder / f"{OUTPUT}.checkpoint")
        output, partial = folder / OUTPUT, folder / f"{OUTPUT}.partial"
        done = {index for index in range(ITEMS) if after.has(index)}
        names = names_in(folder) - {"items.txt", LOG, DONE}
        if output.exists():
            self._expect(output.read_bytes() == self.stage.expected, "the output is short or torn")
        if partial.exists():
            written = partial.read_bytes()[: after.offset]
            self._expect(written == self.stage.expected[: after.offset], "the partial output is not what is committed")
        self._expect(done <= set(runs_in(folder / LOG)), "an item is committed that never ran")
        if phase.ends == "at once":
            self._expect(names == set(), f"nothing had begun, and left are {names}")
        elif self.killed:
            may_be = {f"{OUTPUT}{end}" for end in ("", ".partial", ".checkpoint", ".checkpoint.tmp", ".lock")}
            self._expect(names <= may_be, f"strange files are left: {names - may_be}")
            lost = {index for index in range(ITEMS) if self.committed.has(index)} - done
            self._expect(not lost or output.exists(), f"what was committed is lost: {lost}")
        elif phase.ends == "complete":
            self._expect(names == {OUTPUT} | self.kept, f"the job is complete, and left are {names}")
        else:
            expected = phase.drained if self.count == 1 else phase.cancelled
            finished = set(runs_in(folder / DONE))
            self._expect(finished == expected, f"finished are {finished}, not {set(expected)}")
            self._expect(done == expected, f"committed are {done}, finished were {set(expected)}")
            left = {f"{OUTPUT}.partial", f"{OUTPUT}.checkpoint"} if expected else set()
            if phase.before == "kept":
                left = {OUTPUT, f"{OUTPUT}.checkpoint"}
            self._expect(names == left, f"left are {names}")
        self.left = after

    def _check_again(self) -> None:
        """The same line ends the job, and runs nothing that is committed."""
        folder, before = self.folder, len(runs_in(self.folder / LOG))
        anew = (folder / OUTPUT).exists() and not self.left.begun
        with Fork(folder, self.words) as fork:
            again = fork.end()
        self._expect(again.code == 0, f"the same line again ends with {again.code}: {again.err}")
        self._expect((folder / OUTPUT).read_bytes() == self.stage.expected, "the same line again gives other bytes")
        ran = sorted(runs_in(folder / LOG)[before:])
        missing = [index for index in range(ITEMS) if anew or not self.left.has(index)]
        self._expect(ran == missing, f"the same line again ran {ran}, missing was {missing}")
        stale = {f"{OUTPUT}.checkpoint.tmp"} if self.killed else set()  # overwritten by the next one
        names = names_in(folder) - {"items.txt", LOG, DONE} - stale
        self._expect(names == {OUTPUT} | self.kept, f"in the end there are {names}")


def _obeyed(word: str, heard: Sequence[str]) -> bool:
    return _said(word, heard) or "decided" in heard


def play(scenarios: Sequence[Scenario], mutant: str | None = None) -> list[str]:
    """The violations of these scenarios, in runs with that defect."""
    with quick_folder() as path:
        stage = Stage(path)
        patience_s = 5.0 if mutant else DEADLINE_S
        with MUTANTS[mutant].patch() if mutant else contextlib.nullcontext():
            return [line for scenario in scenarios for line in Play(scenario, stage, path / "here", patience_s).run()]


if __name__ == "__main__":
    print("\n".join(play([scenario_of(sys.argv[1])])) or "every invariant holds")
