"""A job whose output is a run in a database, killed and started again; what each kill left is checked.

Nothing here knows which database it is: its address is all, and what it holds is read as `status` and `export` do.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio

from async_recovery.database import Snapshot
from async_recovery.errors import UsageError
from async_recovery.ledgers import look_at
from tests.proof.forks import Fork, Inside, Prepare, nothing
from tests.support.commands import Committed, Ended, Folder, wait_until
from tests.support.jobs import LOG, MODULE, count_of_runs, runs_in

SIGKILLED = -9


def run_fork(folder: Path, words: Sequence[str], prepare: Prepare = nothing) -> Ended:
    """One run of the command line to its end."""
    with Fork(folder, words, prepare) as fork:
        return fork.end()


def read_database(address: str) -> tuple[Committed, bytes | None]:
    """What is committed of the run that is being worked on, and the records of the last complete one."""

    async def look(snapshot: Snapshot) -> tuple[Committed, bytes | None]:
        left, state, complete = snapshot.left, snapshot.left.state, snapshot.left.complete
        published = None
        if complete is not None:
            published = await snapshot.joined(0, 1 << 30, complete=True)
        if state is None:
            return Committed(), published
        return Committed(begun=True, mark=state.mark, ahead=frozenset(left.whole_ahead)), published

    try:
        return anyio.run(look_at, address, look)
    except UsageError:  # there is no such run, or database
        return Committed(), None


class DatabaseKiller:
    """One job, again and again.

    :param address: of the database, with the name of the run.
    :param options: of the command line.
    :param mutant: puts a defect into each process.

    :ivar expected: the records of an undisturbed run, as a file has them.
    :ivar kills: how many processes were killed.
    """

    def __init__(
        self,
        folder: Folder,
        address: str,
        items: int,
        *options: str,
        worker: str = "random_latency",
        mutant: Prepare = nothing,
    ) -> None:
        self.folder, self.address, self.items = folder, address, items
        self.kills = 0
        self.log = folder / LOG
        self._mutant = mutant
        self._words = ["run", "--input", "items.txt", "--worker", f"jobs:{worker}", *options, "--output"]
        self._before: bytes | None = None
        folder.write("jobs.py", MODULE)
        folder.write_items(items)
        undisturbed = run_fork(folder.path, [*self._words, "expected.jsonl"])
        assert undisturbed.code == 0, undisturbed.err
        self.expected = (folder / "expected.jsonl").read_bytes()
        self.forget()

    def forget(self) -> None:
        """A new job begins: what lies in the database is what a reader has to see until that is complete."""
        self._committed, self._before = read_database(self.address)
        self._seen = 0
        self.log.unlink(missing_ok=True)

    def run(self, prepare: Prepare = nothing) -> Ended:
        """One process to its end, which `prepare` may be the cause of; what it leaves is checked."""
        with self._fork(self.address, prepare) as fork:
            return self._ended(fork)

    def run_and_kill(self, dice: random.Random) -> Ended:
        """One process, killed at a random moment."""
        return self.run_and_lose(dice, lambda fork: fork.send(signal.SIGKILL))

    def another(self) -> Fork:
        """One more process of the same job, of which nothing is checked."""
        return self._fork(self.address)

    def run_and_lose(self, dice: random.Random, lose: Callable[[Fork], object], *codes: int) -> Ended:
        """One process, to which `lose` does something at a random moment; it may end with these codes, too."""
        with self._fork(self.address) as fork:
            if dice.random() < 0.8:
                aim = self._seen + dice.randrange(1, max(2, self.items // 3))
                wait_until(lambda: count_of_runs(self.log) >= aim or self._all_begun() or fork.ends_within(0))
            time.sleep(dice.uniform(0, 0.05))  # the moment of the kill, not synchronisation
            lose(fork)
            return self._ended(fork, *codes)

    def check_records(self) -> None:
        """The run is complete: its records are those of an undisturbed one."""
        assert read_database(self.address)[1] == self.expected, "the records differ from those of an undisturbed run"
        assert set(runs_in(self.log)) == set(range(self.items)), "an item was skipped"

    def check_published(self) -> None:
        """The same, and an export of it has the same bytes."""
        self.check_records()
        exported = run_fork(self.folder.path, ["export", self.address, "exported.jsonl"])
        assert exported.code == 0, exported.err
        assert (self.folder / "exported.jsonl").read_bytes() == self.expected

    def _fork(self, output: str, prepare: Prepare = nothing) -> Fork:
        def both(inside: Inside) -> None:
            self._mutant(inside)
            prepare(inside)

        return Fork(self.folder.path, [*self._words, output], both)

    def _all_begun(self) -> bool:
        return count_of_runs(self.log) >= self.items and len(set(runs_in(self.log))) == self.items

    def _ended(self, fork: Fork, *codes: int) -> Ended:
        ended = fork.end()
        assert ended.code in (0, SIGKILLED, *codes), ended.err
        self.kills += ended.code == SIGKILLED
        before, (now, published) = self._committed, read_database(self.address)
        runs = runs_in(self.log)
        mine = Counter(runs[self._seen :])
        assert not [index for index in mine if before.has(index)], "a committed item ran again"
        assert set(mine.values()) <= {1}, "an item ran twice in one process"
        if published != self._before:
            assert published == self.expected, "a reader sees a run that is not whole"
            assert len(set(runs)) == self.items, "it is complete, and not all of its items ran"
        if now.begun or ended.code == 0:
            assert ended.code == 0 or now.mark >= before.mark, "the mark went back"
            assert ended.code == 0 or all(map(now.has, before.ahead)), "what was committed ahead of the mark is lost"
            assert set(range(now.mark)) | now.ahead <= set(runs), "an item is committed that never ran"
        self._committed, self._seen = now, len(runs)
        return ended
