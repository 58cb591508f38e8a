"""The crash test of a job of one's own: run it undisturbed, then kill it again and again, and compare.

1. Two undisturbed runs, in different seconds of the clock: is the worker deterministic?
2. A kill (SIGKILL) at each boundary of a commit: before and after every operation of the durable path; in a ledger of
   somebody else's, before every line of it. The same line again, until the job is complete: is the output the same?
3. Kills at random moments, of a resume too.

Everything lies in a temporary folder, but what the worker does elsewhere: it really runs, each time. Each process is a
fork of this one, which for that must not be within an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import anyio._backends._asyncio  # noqa: F401  so that no fork has to

from .contracts import Ledger
from .engine import to_its_end
from .errors import AsyncRecoveryError, IncompleteRun, UsageError, check_number, describe
from .file_ledger import FileLedger
from .options import Options
from .sources import as_source
from .torture_life import Orders, Told, Watch, WatchedRun, read_diary
from .torture_report import Kill, RanTwice, Report, chosen, costs, effects_differ, first_difference, gaps, shown
from .workers import Worker, load

ITEMS, BOUNDARIES, RANDOM = 30, 100, 10
COMMITS = 6  # a run should have so many
MISSES = 10  # so many random moments more may come after the end of the process
DEATHS = 3  # kills of one job at random moments, at most
UNDISTURBED_S = 3_600.0  # longer than that, nobody kills it a hundred times
LONGEST_S, TIMES_LONGER = 60.0, 10  # one that was killed gets a minute, and so many times what it took undisturbed
COMPLETE = (0, 3)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOT_ENDED = "it did not end, and was killed"

Results = Callable[[Path], Sequence[bytes] | None]
"""The finished output in a folder, as its records in order, whole bytes; None if it is not there."""


def torture(
    worker: Worker | str,
    items: Any,
    *,
    ledger: Callable[[Path], Ledger] | None = None,
    results: Results | None = None,
    effects: Callable[[], object] | None = None,
    first: int = ITEMS,
    boundaries: int = BOUNDARIES,
    random: int = RANDOM,
    seed: int = 0,
    **options: Any,
) -> Report:
    """Kill a job at every boundary of a commit and at random moments, resume it each time, and compare::

        def test_the_job_survives_crashes() -> None:
            report = torture(fetch, ["a", "b", "c"])
            assert report.ok, report

    To be called from a plain function. The job runs in forks of this process: what is mocked here is mocked there, and
    what the worker leaves in memory is gone with each of them.

    :param worker: as for `run_resumable`; or ``"module:function"``, which each process then imports anew.
    :param items: as for `run_resumable`.
    :param ledger: makes your own ledger, of files in the folder that it is given. None: the default one.
    :param results: reads the finished output of that ledger in that folder: the records in order, or None if it is not
        complete. Required with `ledger`.
    :param effects: called when a job is complete: returns what its side effects were, and clears them away. They are
        compared, too, with ``==``.
    :param first: how many items of the input to take.
    :param boundaries: kill at so many boundaries at most: each kind once as far as that goes, then spread evenly.
    :param random: how many kills at random moments.
    :param seed: of these moments.
    :param options: `concurrency`, `retry` and all else that says how a run behaves, as for `run_resumable`.
    :returns: what was found; see `Report`.
    :raises UsageError: if an argument can not be used.
    :raises IncompleteRun: if the job fails although nobody kills it.
    """
    if (ledger is None) != (results is None):
        raise UsageError("ledger= and results= belong together: give the function that reads what the ledger writes")
    try:
        chosen_options = Options(**options)
    except TypeError as error:
        raise UsageError(f"torture does not know that option: {error}") from None
    chosen_options.check()
    make = ledger or (lambda folder: FileLedger(folder / "results.jsonl"))

    def live(folder: Path) -> int:
        function = load(worker) if isinstance(worker, str) else worker
        run = WatchedRun(function, as_source(items), make(folder), chosen_options)
        asyncio.run(to_its_end(run))
        return 0

    job = TorturedJob(live, results or (lambda folder: lines_of(folder / "results.jsonl")), effects)
    return torture_job(job, first=first, boundaries=boundaries, random_kills=random, seed=seed)


@dataclass(frozen=True)
class TorturedJob:
    """A job to be killed.

    :ivar live: in a process of its own: does the run that keeps everything in this folder; returns its exit code.
    :ivar results: reads its finished output there.
    :ivar effects: see `torture`.
    :ivar afresh: the command of a new interpreter that does the same, given orders and folder; None: a fork has to do.
    """

    live: Callable[[Path], int]
    results: Results
    effects: Callable[[], object] | None = None
    afresh: Callable[[Orders, Path], list[str]] | None = None


def lines_of(output: Path) -> list[bytes] | None:
    """The lines of a finished output: all its bytes; each record is one of them."""
    return output.read_bytes().splitlines(keepends=True) if output.exists() else None


@dataclass(frozen=True)
class Life:
    """A process that has ended.

    :ivar code: its exit code, or minus the signal that killed it.
    :ivar error: the last line that it said, if it ended by itself.
    """

    code: int
    seconds: float
    told: Told
    error: str

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def place(self) -> str:
        """The last step that it reached."""
        return self.told.steps[-1] if self.told.steps else "the start"


@dataclass
class Trial:
    """One job in its own folder, from its first process to its completion."""

    job: TorturedJob
    folder: Path
    items: int
    batch_size: int
    longest_s: float
    lives: list[Life] = field(default_factory=list)

    def live(
        self, *, kill_at: tuple[str, int] | None = None, kill_after_s: float | None = None, afresh: bool = False
    ) -> Life:
        """One process, from its start to its end."""
        here = self.folder / "job"
        here.mkdir(parents=True, exist_ok=True)
        name = f"life-{len(self.lives)}"
        orders = Orders(str(self.folder / f"{name}.diary"), self.items, self.batch_size, kill_at)
        said = self.folder / f"{name}.said"
        began = time.monotonic()
        code = _process(
            lambda: _be(self.job, here, orders, said, afresh=afresh),
            self.longest_s if kill_after_s is None else kill_after_s,
        )
        seconds = time.monotonic() - began
        hung = seconds >= self.longest_s and kill_after_s is None
        life = Life(code, seconds, read_diary(Path(orders.diary)), NOT_ENDED if hung else _error_in(said, code))
        self.lives.append(life)
        return life

    def results(self) -> list[bytes] | None:
        """The finished output, if it is there."""
        found = self.job.results(self.folder / "job")
        return None if found is None else list(found)


def torture_job(
    job: TorturedJob,
    *,
    first: int,
    boundaries: int,
    random_kills: int,
    seed: int,
    tell: Callable[[str], object] = lambda text: None,
) -> Report:
    """See `torture`.

    :param tell: is told what is about to happen.
    """
    check_number("the number of items", first, least=1)
    check_number("boundaries", boundaries, least=0)
    check_number("random", random_kills, least=0)
    check_number("seed", seed, least=0)
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise UsageError("torture was called within an event loop: call it from a plain function (a plain def test)")
    with TemporaryDirectory(prefix="async-recovery-torture-", ignore_cleanup_errors=True) as folder:
        return _Torturer(job, Path(folder), first, seed, tell).run(boundaries, random_kills)


class _Torturer:
    def __init__(self, job: TorturedJob, folder: Path, first: int, seed: int, tell: Callable[[str], object]) -> None:
        self._job, self._folder, self._first, self._seed, self._tell = job, folder, first, seed, tell
        self._dice = random.Random(seed)
        self._batch_size = max(1, first // COMMITS)
        self._longest_s = UNDISTURBED_S
        self._trials = 0
        self._kills: list[Kill] = []
        self._problems: list[str] = []
        self._runs: dict[int, list[int]] = {}  # in how many processes an item ran, for each job where it ran again
        self._not_met = 0

    def run(self, boundaries: int, random_kills: int) -> Report:
        self._tell("two undisturbed runs: is the worker deterministic?")
        self._undisturbed, self._expected, self._effects = self._run_undisturbed()
        self._items = self._undisturbed.told.began
        self._batch_size = max(1, len(self._items) // COMMITS)
        self._span_s = 1.1 * self._undisturbed.seconds  # of the random moments
        self._longest_s = LONGEST_S + TIMES_LONGER * self._undisturbed.seconds
        steps = self._compare_undisturbed()
        places = chosen(steps, boundaries)
        self._announce(len(places), len(steps), random_kills)
        for place in places:
            self._kill_at(steps[place], steps[:place].count(steps[place]))
        left, misses = random_kills, 0
        while left > 0 and misses < random_kills + MISSES:
            met = self._kill_at_random(min(left, DEATHS))
            left -= met
            misses += not met
        median_s, most_s = costs(self._kills)
        return Report(
            items=len(self._items),
            all_items=not self._undisturbed.told.was_cut,
            undisturbed_s=round(self._undisturbed.seconds, 3),
            boundaries=len(steps),
            boundaries_taken=len(places),
            not_met=self._not_met,
            random_wanted=random_kills,
            seed=self._seed,
            kills=self._kills,
            deterministic=self._difference is None,
            difference=self._difference,
            ran_twice=self._ran_twice(),
            lost_s_median=median_s,
            lost_s_most=most_s,
            problems=self._problems,
        )

    def _announce(self, places: int, steps: int, random_kills: int) -> None:
        jobs = places + random_kills
        self._tell(
            f"killing it at {places} of {steps} boundaries of commits and at {random_kills} random moments: the worker "
            f"runs about {jobs * len(self._items)} times, in about {jobs * (self._undisturbed.seconds + 0.1):.0f} s"
        )

    @contextlib.contextmanager
    def _trial(self) -> Iterator[Trial]:
        self._trials += 1
        folder = self._folder / f"job-{self._trials}"
        yield Trial(self._job, folder, self._first, self._batch_size, self._longest_s)
        shutil.rmtree(folder, ignore_errors=True)

    def _look_at_effects(self) -> object:
        return None if self._job.effects is None else self._job.effects()

    def _run_undisturbed(self, *, afresh: bool = False) -> tuple[Life, list[bytes], object]:
        with self._trial() as trial:
            life = trial.live(afresh=afresh)
            results = trial.results()
            if life.code == UsageError.exit_code:
                raise UsageError(life.error)
            if life.code not in COMPLETE or results is None:
                raise IncompleteRun(f"the job fails although nobody kills it, which comes first: {life.error}")
            return life, results, self._look_at_effects()

    def _compare_undisturbed(self) -> list[str]:
        """Another undisturbed run, in another second of the clock. Returns its steps."""
        second = int(time.time())
        while int(time.time()) == second:
            time.sleep(0.02)
        life, results, effects = self._run_undisturbed(afresh=self._job.afresh is not None)
        self._difference = first_difference(self._expected, results)
        if self._difference is not None:
            self._problems.append(f"the worker is not deterministic: two undisturbed runs differ, {self._difference}")
        self._compares_effects = effects == self._effects
        if not self._compares_effects:
            self._problems.append(
                "the side effects of two undisturbed runs differ, so none are compared: leave times out of them, and "
                f"sort them; {effects_differ(self._effects, effects)}"
            )
        return life.told.steps

    def _kill_at(self, step: str, times_before: int) -> None:
        with self._trial() as trial:
            killed = trial.live(kill_at=(step, times_before))
            self._not_met += not killed.was_killed
            self._complete("boundary", trial)

    def _kill_at_random(self, most: int) -> int:
        """Kill a job, and its resumes; returns how many kills there were."""
        with self._trial() as trial:
            for _ in range(most):
                life = trial.live(kill_after_s=self._dice.uniform(0, self._span_s))
                if not life.was_killed and len(trial.lives) == 1:
                    self._span_s = min(self._span_s, life.seconds)
                if not life.was_killed or self._is_whole(trial):
                    break
            self._complete("random", trial)
        return len(self._kills[-1].where)

    def _complete(self, kind: str, trial: Trial) -> None:
        """Resume what was killed until it is complete, and judge it."""
        killed = [life for life in trial.lives if life.was_killed]
        was_whole = self._is_whole(trial)
        last = trial.lives[-1]
        if last.was_killed:
            last = trial.live()
        counted = trial.lives[:-1] if was_whole and killed else trial.lives  # it was complete, and may start anew
        runs = Counter(index for life in counted for index in life.told.began)
        again = sorted(index for index, count in runs.items() if count > 1)
        for index in again:
            self._runs.setdefault(index, []).append(runs[index])
        anew = was_whole and bool(killed) and bool(last.told.began)
        problem = self._problem(trial, counted, last, again, anew=anew)
        where = [life.place for life in killed]
        if problem is not None:
            at = f"killed {', then '.join(where)}" if killed else "nobody having killed it"
            problem = f"{at}: {problem}"
            self._problems.append(problem)
        lost_s = sum(life.seconds for life in trial.lives) - self._undisturbed.seconds
        self._kills.append(Kill(kind, where, again, max(0.0, round(lost_s / max(1, len(killed)), 3)), problem))

    def _problem(self, trial: Trial, counted: list[Life], last: Life, again: list[int], *, anew: bool) -> str | None:
        results, effects = trial.results(), self._look_at_effects()
        if last.code not in COMPLETE:
            return f"it can not be resumed: {last.error}"
        if results is None:
            return "it was resumed and ended well, but there is no finished output"
        if not self._is_right(results):
            wrong = gaps(results, len(self._items))
            difference = "" if wrong and self._difference else f", {first_difference(self._expected, results)}"
            return f"the output is not that of an undisturbed run: {wrong or 'a record differs'}{difference}"
        paid: set[int] = set()
        for earlier, later in itertools.pairwise(counted):
            paid |= earlier.told.committed
            if twice := sorted(paid & later.told.began.keys()):
                return f"{shown(twice)} ran again although they had been committed"
        if self._compares_effects and effects != self._effects and not anew:
            return (
                f"the side effects are not those of an undisturbed run: {effects_differ(self._effects, effects)}; "
                f"run again were {shown(again)}"
            )
        return None

    def _is_whole(self, trial: Trial) -> bool:
        """Whether a job was complete already when it was killed. Nobody looks at an output before that can be."""
        committed = {index for life in trial.lives for index in life.told.committed}
        return len(committed) == len(self._items) and self._is_right(trial.results())

    def _is_right(self, results: list[bytes] | None) -> bool:
        """Whether that is the output it should be; of a worker that is not deterministic, as far as can be told."""
        if self._difference is None:
            return results == self._expected
        return results is not None and gaps(results, len(self._items)) is None

    def _ran_twice(self) -> list[RanTwice]:
        return [
            RanTwice(index, self._items.get(index, "?"), max(runs), len(runs))
            for index, runs in sorted(self._runs.items())
        ]


def _fork() -> int:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with warnings.catch_warnings():  # of threads of this process, which the fork does not have
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _process(main: Callable[[], NoReturn], within_s: float) -> int:
    """A fork from its start to its end; after that time, or if nobody waits any more, it is killed."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that ends this process must not come between
    pid = _fork()
    if pid == 0:
        main()
    deadline, ended, status = time.monotonic() + within_s, 0, 0
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while not ended and (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(0.001, left_s))
            ended, status = os.waitpid(pid, os.WNOHANG)
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _error_in(said: Path, code: int) -> str:
    """Why a process ended, in its own words."""
    text = said.read_text(errors="backslashreplace") if said.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    words = f"; the last that it said: {lines[-1]}" if lines else ""
    return errors[-1] if errors else f"the process ended by itself with {code}{words}"


def _be(job: TorturedJob, folder: Path, orders: Orders, said: Path, *, afresh: bool) -> NoReturn:
    """In a fork: be the process that does the run, and end as it does."""
    code = 70
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        if afresh and job.afresh is not None:
            os.execv(sys.executable, job.afresh(orders, folder))
        WatchedRun.watch = Watch(orders)
        code = job.live(folder)
    except AsyncRecoveryError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201  into the file
        code = error.exit_code
    except BaseException as error:
        print(f"Error: {describe(error)}", file=sys.stderr)  # noqa: T201
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)
