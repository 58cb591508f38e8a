"""Jobs of the real command line for the faults of layer 6, and the folder in memory that each runs in.

A job may begin where faults have left it: ``lines+middle.5`` is ``lines`` after a kill in the middle of its write 5.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from async_recovery import checkpoint
from async_recovery.output_file import framing_of
from tests.support.commands import Committed, read_committed
from tests.support.fork_server import ForkServer, Preparation, Reply
from tests.support.jobs import LOG

from . import turns
from .shim import Fault, calls_in, compiled, planned

MEMORY = "/dev/shm"
INPUT, OLD_INPUT = "items.txt", "old.txt"
FEW = [[0, 1, 4], [6], [2, 7], [3, 5]]
MANY = [[0, 9], [1], [2, 8], [3], [4], [5], [6], [7]]
FOLDERS = ("there", "elsewhere")
GARBAGE = {"there/out.jsonl.checkpoint": b"no line of this\ncan be read\n", "there/out.jsonl.partial": b'{"ind'}


@dataclasses.dataclass(frozen=True)
class Job:
    """A line, and what lies there before.

    :ivar turns: all its items, see `turns`: each is the number of its index, but for the one that fails.
    :ivar start: makes what lies there before the job.
    :ivar old_bytes: files that may never vanish, under whatever name.
    :ivar code: the exit code of an undisturbed run.
    """

    name: str
    turns: list[list[int]]
    output: str = "there/out.jsonl"
    checkpoint: str | None = None
    options: tuple[str, ...] = ()
    compacts: bool = False
    start: Callable[[Place], None] = lambda place: None
    old_bytes: dict[str, bytes] = dataclasses.field(default_factory=dict)
    code: int = 0

    @property
    def items(self) -> list[int]:
        return sorted(itertools.chain(*self.turns))

    @property
    def keeps(self) -> bool:
        return "--keep-checkpoint" in self.options

    @property
    def fresh(self) -> bool:
        return "--fresh" in self.options

    def record(self, index: int) -> bytes:
        """One line of the output, without its framing."""
        record = {"index": index, **turns.result(self.items[index])}
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()

    def prefix(self, mark: int) -> bytes:
        """The output of the first `mark` records."""
        return framing_of(self.output).join([self.record(index) for index in range(mark)], 0)

    @property
    def expected(self) -> bytes | None:
        """The output of an undisturbed run."""
        whole = self.prefix(len(self.items))
        return whole + framing_of(self.output).closing(len(whole)) if self.code == 0 else None

    def words(self, *, input: str = INPUT, fresh: bool = False, keep: bool = False) -> list[str]:
        words = ["run", "--input", input, "--output", self.output, "--worker", turns.WORKER, "--batch-size", "1"]
        words += ["--checkpoint-interval", "60", "--concurrency", "16"]
        words += ["--fresh"] * fresh + ["--keep-checkpoint"] * (keep or self.keeps)
        return words + (["--checkpoint", self.checkpoint] if self.checkpoint else [])

    def resumes(self, found: Committed, *, fresh: bool) -> bool:
        """Whether a run goes on with what is found, instead of starting anew."""
        return found.begun and found.input == INPUT and not (found.kept and not self.keeps) and not fresh


class Server(Protocol):
    """Who runs the command line: `ForkServer`, or one that looks on as well."""

    def run(self, folder: Path, *words: str, preparations: Sequence[Preparation]) -> Reply: ...


class Place:
    """A folder to run a job in.

    :param mutant: what breaks the durable path in each run.
    :ivar own: the job's own files, and the folders that they lie in.
    :ivar at_start: the files that lie there before the job.
    """

    def __init__(self, server: Server, path: Path, job: Job, mutant: Preparation | None = None) -> None:
        assert job.items in (list(range(len(job.items))), [turns.FAILS])
        self.server, self.path, self.job, self.mutant = server, path, job, mutant
        self.log, self.output = path / LOG, path / job.output
        self.journal = path / (job.checkpoint or f"{job.output}.checkpoint")
        self.own = [*self._folders(self.output), *self._folders(self.journal), self.output, self.journal]
        for name in FOLDERS:
            (path / name).mkdir()
        (path / INPUT).write_text("".join(f"{item}\n" for item in job.items))
        (path / OLD_INPUT).write_text("".join(f"{1000 + item}\n" for item in range(len(job.items) + 2)))
        job.start(self)
        self.at_start = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def _folders(self, file: Path) -> list[Path]:
        return [folder for folder in file.parents if self.path in folder.parents]

    def clear(self) -> None:
        """Nothing lies where outputs and checkpoints do."""
        for name in FOLDERS:
            shutil.rmtree(self.path / name)
            (self.path / name).mkdir()

    def reset(self) -> None:
        """All as it was before the job."""
        self.clear()
        self.log.unlink(missing_ok=True)
        for file, content in self.at_start.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def run(self, words: Sequence[str], fault: Fault | None = None) -> Reply:
        preparations: list[Preparation] = [(f"{turns.__name__}:take", [json.dumps(self.job.turns)])]
        if self.job.compacts:
            preparations.append((f"{__name__}:compact_always", []))
        if self.mutant is not None:
            preparations.append(self.mutant)
        return self.server.run(self.path, *words, preparations=[*preparations, planned(self.own, fault)])

    def committed(self) -> Committed:
        return read_committed(self.journal)

    def left(self) -> dict[str, bytes]:
        """All files that runs have made, but for the log."""
        files = (file for name in FOLDERS for file in (self.path / name).rglob("*") if file.is_file())
        return {str(file.relative_to(self.path)): file.read_bytes() for file in files}


@contextmanager
def place_for(
    job: Job,
    mutant: Preparation | None = None,
    serve: Callable[[Mapping[str, str]], AbstractContextManager[Server]] = ForkServer,
) -> Iterator[Place]:
    """In memory where the machine has room there: it is the process that dies here, and not the machine."""
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="async-recovery-", dir=memory) as name,
        serve({"LD_PRELOAD": str(compiled(Path(name)))}) as server,
    ):
        path = Path(name, "place").resolve()
        path.mkdir()
        yield Place(server, path, job, mutant)


def compact_always(report: int) -> None:
    """In a fork: a journal is worth compacting however small it is."""
    checkpoint.COMPACT_ABOVE_DEAD_BYTES = 0


def after(job: Job, faults: Sequence[Fault]) -> Job:
    """The job where these faults have left it, each in a run of its line."""

    def start(place: Place) -> None:
        job.start(place)
        for fault in faults:
            reply = place.run(job.words(fresh=job.fresh), fault)
            assert reply.code != job.code, f"{job.name} goes on after {fault}"
            assert any(call.done for call in calls_in(reply.steps)), f"{job.name} does not come to {fault}"

    return dataclasses.replace(job, name="+".join([job.name, *map(str, faults)]), start=start)


def named(name: str) -> Job:
    """The job of that name."""
    base, *faults = name.split("+")
    job = next(job for job in JOBS if job.name == base)
    return after(job, [Fault(kind, int(at)) for kind, at in (fault.split(".") for fault in faults)])


def interrupted_old(place: Place) -> None:
    """Another input was worked on, with more items than there are now, and that was killed in its last commit."""
    reply = place.run(place.job.words(input=OLD_INPUT), Fault("middle", 9))
    assert reply.code < 0
    assert place.committed().input == OLD_INPUT
    assert place.committed().offset > 0


def done_and_kept(place: Place) -> None:
    """The job was done, and its checkpoint kept."""
    assert place.run(place.job.words(keep=True)).code == 0
    assert place.committed().kept
    place.log.unlink()


def damaged(place: Place) -> None:
    """A journal that can not be read, and a partial output."""
    for path, content in place.job.old_bytes.items():
        (place.path / path).write_bytes(content)


JOBS = [
    Job("compaction", MANY, compacts=True),
    Job("elsewhere", FEW, checkpoint="elsewhere/journal"),
    Job("keep", FEW, output="there/out.json", options=("--keep-checkpoint",)),
    Job("array", FEW, output="there/out.json"),
    Job("lines", FEW),
    Job("fresh", FEW, options=("--fresh",), start=interrupted_old),
    Job("over-kept", FEW, start=done_and_kept),
    Job("damaged", [[0, 2], [1]], start=damaged, old_bytes=GARBAGE),
    Job("folders", [[0, 1, 2]], output="there/made/deep/out.jsonl"),
    Job("empty", [], output="there/out.json"),
    Job("fails", [[turns.FAILS]], code=1),
    Job("kept", FEW, options=("--keep-checkpoint",), start=done_and_kept),
]

LEFT_BY_A_KILL = [
    "lines+after.14",  # a journal, and no partial output
    "lines+middle.5",  # half of the records of a commit
    "lines+middle.6",  # its records, and half of its ahead and state lines
    "lines+middle.4",  # half of a commit that is ahead alone
    "array+middle.8",  # half of the last commit's lines
    "lines+middle.9",  # half of the complete line
    "lines+after.37",  # complete, and not renamed
    "elsewhere+after.44",  # renamed, and the journal is still there
    "keep+middle.11",  # half of the journal that is to be kept
    "compaction+middle.11",  # half of a compacted journal
    "compaction+before.43",  # all of it, not renamed
    "compaction+after.43",  # renamed, not durable
    "lines+middle.5+middle.2",  # killed, resumed, and killed again
]
