"""One fault in one call of a job's run, then the same line again; what must hold after each.

Replay one, with each call that the run makes (the job, the kind of the fault, the number of the call)::

    .venv/bin/python -m tests.proof.faults lines+middle.5 EIO 17
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from tests.support.commands import Committed
from tests.support.fork_server import Preparation, Reply
from tests.support.jobs import runs_in

from .explorer import Violation
from .fault_jobs import Job, Place, named, place_for
from .shim import ERRORS, KINDS, Call, Fault, calls_in

SIGKILLED = -9
STORAGE_FAILED = 74


class Trial:
    """One fault, and the same line again.

    :ivar hit: whether the run came to the call that the fault is for.
    """

    def __init__(self, place: Place, fault: Fault) -> None:
        self.place, self.job, self.fault = place, place.job, fault
        self.calls: list[Call] = []
        self.hit = False

    def run(self) -> None:
        """:raises Violation: if an invariant does not hold."""
        place, job = self.place, self.job
        place.reset()
        before = place.committed()
        reply, _ = self._life(before, fresh=job.fresh)
        self.calls = calls_in(reply.steps)
        broken = next((call for call in self.calls if call.done), None)
        self.hit = broken is not None
        if broken is None:
            self._check_finished(reply)
            return
        self._check_left(Committed() if not job.resumes(before, fresh=job.fresh) else before)
        self._check_end(reply, broken)
        self._again()

    def _life(self, before: Committed, *, fresh: bool, fault: bool = True) -> tuple[Reply, list[int]]:
        """One run, and the items that it began."""
        began = len(runs_in(self.place.log))
        reply = self.place.run(self.job.words(fresh=fresh), self.fault if fault else None)
        ran = runs_in(self.place.log)[began:]
        if len(set(ran)) < len(ran):
            raise Violation(f"I5: an item ran twice in one process: {ran}")
        again = [item for item in ran if before.has(self.job.items.index(item))]
        if again and self.job.resumes(before, fresh=fresh):
            raise Violation(f"I5: {again} were committed and ran again")
        return reply, ran

    def _again(self) -> None:
        """The line that the command prints when it stops: undisturbed, it does what is missing, and nothing else."""
        job, left = self.job, self.place.committed()
        temporary = {name for name in self.place.left() if name.endswith(".tmp")}
        fresh = job.fresh and not job.resumes(left, fresh=False)
        reply, ran = self._life(left, fresh=fresh, fault=False)
        resumed = job.resumes(left, fresh=fresh)
        missing = [item for index, item in enumerate(job.items) if not (resumed and left.has(index))]
        if reply.code == job.code and sorted(ran) != missing:
            raise Violation(f"I5: {sorted(ran)} ran again, {missing} were not committed")
        self._check_finished(reply, may_stay=temporary)

    def _check_left(self, before: Committed) -> None:
        """What the fault has left; `before`: what the run went on with."""
        place, job, left = self.place, self.job, self.place.left()
        for path, content in job.old_bytes.items():
            if content not in (there for name, there in left.items() if name.startswith(path)):
                raise Violation(f"I7: the old bytes of {path} are gone")
        found, published = place.committed(), left.get(job.output)
        if published not in (None, job.expected):
            raise Violation(f"I2: under the output's name lies {published!r}")
        acknowledged = commits_in(self.calls, str(place.journal))
        if not job.resumes(found, fresh=False):
            if acknowledged and published is None and job.code == 0:
                raise Violation(f"I3: {acknowledged} commits were acknowledged, the journal has {found}")
        elif found.complete:
            if job.expected not in (published, left.get(f"{job.output}.partial")):
                raise Violation("I2: the journal says complete, and the output is not")
        else:
            if found.commits < before.commits + acknowledged:
                raise Violation(f"I3: {acknowledged} commits were acknowledged after {before}, found is {found}")
            lost = [index for index in self._committed(before, acknowledged) if not found.has(index)]
            if lost:
                raise Violation(f"I3: {lost} were committed, found is {found}")
            there = left.get(f"{job.output}.partial", b"")
            if there[: found.offset] != job.prefix(found.mark):
                raise Violation(f"I4: {found}, and the output is {there!r}")

    def _committed(self, before: Committed, commits: int) -> set[int]:
        """The items that are committed after so many commits, each of them of one turn."""
        done = {index for index in range(len(self.job.items)) if before.has(index)}
        missing = [set(turn) for turn in self.job.turns if not set(turn) <= done]
        return done.union(*missing[: commits if before.begun else max(0, commits - 1)])  # the first has the mark 0

    def _check_end(self, reply: Reply, broken: Call) -> None:
        """How the process has ended, and what it did after the fault."""
        if self.fault.kind == "short":
            self._check_finished(reply)
        elif self.fault.kind not in ERRORS:
            if reply.code != SIGKILLED:
                raise Violation(f"exit {reply.code} after {broken}: {reply.err}")
        elif reply.code == self.job.code and self._may_go_on(broken):
            own = {str(path.relative_to(self.place.path)) for path in (self.place.output, self.place.journal)}
            nothing_done = {f"{self.job.output}.partial"} | own if self.job.code else set()
            self._check_finished(reply, may_stay=nothing_done | {f"{name}.lock" for name in own if broken.of_lock})
        else:
            durable = [call for call in self.calls if not call.of_lock]
            failed = [n for n, call in enumerate(durable) if call.done and call.result < 0 and not call.only_looks]
            after = [call for call in durable[failed[0] + 1 :] if call.changes] if failed else []
            if after:
                raise Violation(f"I9: after {durable[failed[0]]} came {after}")
            said = [line for line in reply.err.splitlines() if line.startswith("Error: ")]
            words = (f"errno {ERRORS[self.fault.kind]}", "" if broken.of_lock else str(self.place.path))
            clear = len(said) == 1 and all(word in said[0] for word in words) and "Traceback" not in reply.err
            if reply.code != STORAGE_FAILED or not clear:
                raise Violation(
                    f"exit {reply.code} after {broken}, not 74 and one line with file and error: {reply.err}"
                )
            locks = [name for name in self.place.left() if name.endswith(".lock")]
            if locks and not broken.of_lock:
                raise Violation(f"I6: left behind are {locks} after {broken}")

    def _may_go_on(self, broken: Call) -> bool:
        """Whether nothing hangs on the call that fails: the lock's note, closing, a look that is taken again."""
        return broken.of_lock or broken.name in {"close", "lstat", "rmdir"} or self.job.code != 0

    def _check_finished(self, reply: Reply, may_stay: Set[str] = frozenset()) -> None:
        """The end of a whole run: the output, and nothing besides."""
        place, job, left = self.place, self.job, self.place.left()
        if reply.code != job.code:
            raise Violation(f"I3: exit {reply.code}: {reply.err}")
        if left.pop(job.output, None) != job.expected:
            raise Violation("I1: the output is not that of an undisturbed run")
        moved = {name: left.pop(name) for name in list(left) if ".damaged-" in name}
        if sorted(moved.values()) != sorted(job.old_bytes.values()):
            raise Violation(f"I7: moved aside are {moved}")
        journal = str(place.journal.relative_to(place.path))
        if job.keeps and (left.pop(journal, None) is None or not place.committed().kept):
            raise Violation("I6: the checkpoint was to be kept")
        if not left.keys() <= may_stay:
            raise Violation(f"I6: left behind are {sorted(left.keys() - may_stay)}")


def commits_in(calls: Sequence[Call], journal: str) -> int:
    """How many commits the ledger can have acknowledged: each ends with the journal made durable."""
    count, replaced = 0, False
    for call in calls:
        if call.result < 0 or call.done in {"before", "middle"}:
            continue
        if call.name == "rename" and call.other == journal:
            replaced = True
        elif call.path == journal and (call.name == "fdatasync" or (call.name == "fsync" and replaced)):
            count, replaced = count + 1, False
    return count


@dataclass
class Tally:
    """What a sweep did.

    :ivar cycles: faults that hit, each followed by the same line again, by their kind.
    """

    cycles: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __iadd__(self, other: Tally) -> Tally:
        self.cycles += other.cycles
        self.violations += other.violations
        return self


def sweep(job: Job, kinds: Sequence[str] = KINDS, mutant: Preparation | None = None) -> Tally:
    """Each kind of fault at each call that it applies to, until a run does not come so far, or a violation."""
    tally = Tally()
    with place_for(job, mutant) as place:
        for kind in kinds:
            for at in itertools.count():
                trial = Trial(place, Fault(kind, at))
                try:
                    trial.run()
                except Violation as violation:
                    replay = f".venv/bin/python -m tests.proof.faults {job.name} {kind} {at}"
                    tally.violations.append(f"{replay}: {violation}")
                if trial.hit:
                    tally.cycles[kind] += 1
                if tally.violations:
                    return tally
                if not trial.hit:
                    break
    return tally


def replay(name: str, kind: str, at: str) -> None:
    """Live one trial again, and print what happens."""
    with place_for(named(name)) as place:
        trial = Trial(place, Fault(kind, int(at)))
        try:
            trial.run()
            print("no violation" if trial.hit else "the run does not come so far")
        except Violation as violation:
            print(f"violation: {violation}")
        for call in trial.calls:
            print(" ", *call)


if __name__ == "__main__":
    replay(*sys.argv[1:])
