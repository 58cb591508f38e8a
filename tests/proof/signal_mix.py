"""Jobs that are stopped by random signals at random moments, again and again, until they are complete.

The moment of a signal is a number of steps (a round of the loop, or an operation on files), at which the process sends
it to itself, or a time, at which another process does. One job again::

    .venv/bin/python -m tests.proof.signal_mix 4711
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from async_recovery import sources
from async_recovery.files import Files
from tests.support.commands import Committed, Folder, read_committed
from tests.support.faulty_files import OPERATIONS
from tests.support.file_jobs import names_in
from tests.support.jobs import LOG, runs_in

from . import staged_worker
from .forks import Fork, Inside, quick_folder
from .signal_scenarios import LOG_LINES, tell_of_signals
from .staged_worker import DONE

ITEMS = 40
OUTPUT = "out.json"
EXPECTED = b"[\n" + b",\n".join(b'{"index":%d,"number":%d}' % (n, n) for n in range(ITEMS)) + b"\n]\n"
STALE = {f"{OUTPUT}.lock", f"{OUTPUT}.checkpoint.tmp"}  # what a third signal may leave
ERROR_LINE = re.compile(r"\d{4}-\S+ \S+ ERROR \d+ items go on|stopped at the mark|  .* -m async_recovery run --input ")


class Mix:
    """One job, and all the processes that it takes.

    :ivar lives: how they ended, by exit code and signals taken.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.dice, self.folder = random.Random(seed), folder
        self.lives: Counter[tuple[int, int]] = Counter()
        self.steps, self.seconds = 100, 0.1
        Folder(folder).write_items(ITEMS)

    def run(self) -> None:
        """:raises AssertionError: if something does not hold."""
        while not (self.folder / OUTPUT).exists() or (self.folder / f"{OUTPUT}.checkpoint").exists():
            self._live()
        assert (self.folder / OUTPUT).read_bytes() == EXPECTED, "the output differs"
        left = names_in(self.folder) - {"items.txt", LOG, DONE, OUTPUT, *STALE}
        assert not left, f"in the end there are {left}"

    def _words(self) -> list[str]:
        choose, words = self.dice.choice, ["run", "--input", "items.txt", "--output", OUTPUT]
        words += ["--worker", f"{staged_worker.__name__}:work", "--concurrency", choose("1248")]
        words += [
            "--checkpoint-interval",
            choose(["0", "0.003", "600"]),
            "--drain-timeout",
            choose(["0", "0.004", "9"]),
        ]
        return [*words, "--batch-size", choose("137"), "--window", choose(["3", "12", "900"])]

    def _live(self) -> None:
        """One process, from its start to its end."""
        dice, before = self.dice, self._committed
        seen = len(runs_in(self.folder / LOG))
        signals: list[int] = dice.choices([signal.SIGINT, signal.SIGTERM], k=dice.choice([1, 1, 1, 2, 2, 3, 4]))
        at_steps = dice.random() < 0.5
        moments = sorted(dice.random() for _ in signals)
        steps = {int(moment * self.steps): number for moment, number in zip(moments, signals, strict=True)}
        slowness, page_bytes = dice.choice([0, 0.5, 1]), dice.choice([12, 64 << 10])

        def prepare(inside: Inside) -> None:
            staged_worker.latencies_s = {n: random.Random(n).expovariate(1 / 0.002) * slowness for n in range(ITEMS)}
            sources.PAGE_BYTES = page_bytes
            tell_of_signals(inside)
            inside.gates["handler"].open()
            count_steps(inside, steps if at_steps else {})

        with Fork(self.folder, self._words(), prepare) as fork:
            fork.hears("listening")
            last = 0.0
            for moment, number in zip(moments, signals, strict=True) if not at_steps else ():
                if not fork.ends_within((moment - last) * self.seconds):
                    fork.send(number)
                last = moment
            ended = fork.end()
        self._check(before, ended.code, ended.err, fork.heard, seen)

    @property
    def _committed(self) -> Committed:
        return read_committed(self.folder / f"{OUTPUT}.checkpoint")

    def _check(self, before: Committed, code: int, err: str, heard: list[str], seen: int) -> None:
        after, ran = self._committed, runs_in(self.folder / LOG)[seen:]
        taken = heard.count("taken") + (code >= 128 and "decided" not in heard)  # the one that ended it says nothing
        stopped_at = [int(word.removeprefix("stop ")) for word in heard if word.startswith("stop ")]
        told = [line for line in err.splitlines() if not LOG_LINES.match(line) and not ERROR_LINE.match(line)]
        done, published = set(runs_in(self.folder / DONE)), (self.folder / OUTPUT).exists()
        assert code in (0, 130, 143), err
        assert not told, f"it said {told}"
        assert not any(map(before.has, ran)), "a committed item ran again"
        assert len(set(ran)) == len(ran), "an item ran twice in one process"
        if published:
            assert (self.folder / OUTPUT).read_bytes() == EXPECTED, "the output is short or torn"
        else:
            kept = {index for index in range(ITEMS) if after.has(index)}
            assert all(map(after.has, filter(before.has, range(ITEMS)))), "what was committed is lost"
            stopped = "stopped at the mark" in err
            assert code, "it was not complete, and says so"
            assert not stopped or kept == done, f"{done} had finished, {kept} are committed"
            if not stopped:  # a third signal ends at once: what finished since the last commit is done again
                assert kept <= done, f"{kept} are committed, {done} had finished"
                note_all(self.folder / DONE, kept)
            assert stopped or taken >= 3 or not ran, f"it did not stop as it should: {code}, {heard}, {ran}, {err!r}"
        assert not stopped_at or code == 0 or stopped_at[0] == len(ran), "a stop handed out further items"
        self.lives[code, min(taken, 3)] += 1


def note_all(path: Path, numbers: Iterable[int]) -> None:
    """As the worker does, one by one."""
    path.write_bytes(b"".join(b"%7d\n" % number for number in sorted(numbers)))


def count_steps(inside: Inside, signals: dict[int, int]) -> None:
    """In a fork: send itself these signals at these steps."""
    steps = itertools.count()

    def step() -> None:
        number = signals.get(next(steps))
        if number is not None:
            os.kill(os.getpid(), number)

    for name in OPERATIONS:
        whole = getattr(Files, name)

        def operation(*args: Any, _whole: Any = whole) -> Any:
            step()
            return _whole(*args)

        setattr(Files, name, operation)
    run_once = asyncio.BaseEventLoop._run_once  # type: ignore[attr-defined]

    def round_of_the_loop(self: Any) -> None:
        step()
        run_once(self)

    asyncio.BaseEventLoop._run_once = round_of_the_loop  # type: ignore[attr-defined]


def play(seeds: Iterable[int]) -> tuple[Counter[tuple[int, int]], list[str]]:
    """How the processes of these jobs ended, and the violations."""
    lives: Counter[tuple[int, int]] = Counter()
    violations = []
    for seed in seeds:
        with quick_folder() as path:
            mix = Mix(seed, path)
            try:
                mix.run()
            except AssertionError as error:
                violations.append(f"python -m tests.proof.signal_mix {seed}: {error}")
            lives += mix.lives
    return lives, violations


if __name__ == "__main__":
    print(*play([int(sys.argv[1])]))
