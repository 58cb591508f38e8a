"""The real command where it can not write: no room, no inodes, no permission, a limit on files.

Each case runs in a mount namespace of its own (see `disks`), in a `Place`. What a process says, and which items it ran,
goes through pipes, which no limit holds for. After each run that failed, `check_failed` says whether it failed as it
should. A case with its job (and a mutant) is run by::

    .venv/bin/python -m tests.proof.full_disks few_pages lines
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NoReturn
from unittest import mock

from async_recovery import FileLedger, checkpoint
from async_recovery.files import Files
from tests.support.commands import Committed, Ended, Folder, read_committed, wait_until
from tests.support.file_jobs import names_in
from tests.support.fork_server import become, preload
from tests.support.jobs import LOG, MODULE

from .disks import (
    BIND,
    READ_ONLY,
    REMOUNT,
    Disk,
    die_with_parent,
    enter_own_namespace,
    mount,
    release,
    unmount,
)

PAGE = 4096
NOBODY = 65534
ITEMS = 120
COMPACTS_ABOVE = 1000
LOG_DESCRIPTOR = 200
Compacts = Literal["never", "often", "always"]
JOBS = {
    "lines": ("out.jsonl",),
    "array": ("out.json",),
    "keep": ("out.jsonl", "--keep-checkpoint"),
}


@contextlib.contextmanager
def write_errors_swallowed() -> Iterator[None]:
    """A broken seam: what could not be written counts as written."""
    real = Files.pwrite

    def pwrite(files: Files, descriptor: int, data: memoryview, offset: int) -> int:
        try:
            return real(files, descriptor, data, offset)
        except OSError:
            return len(data)

    with mock.patch.object(Files, "pwrite", pwrite):
        yield


@contextlib.contextmanager
def goes_on_after_errors() -> Iterator[None]:
    """A broken ledger: a commit that failed counts as done (but for the very first), and the next one is tried."""
    real = FileLedger._commit

    def commit(ledger: FileLedger, given: Any) -> None:
        with contextlib.suppress(OSError) if ledger._begun else contextlib.nullcontext():
            real(ledger, given)

    with mock.patch.object(FileLedger, "_commit", commit):
        yield


MUTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "write errors swallowed": write_errors_swallowed,
    "goes on after errors": goes_on_after_errors,
}


class Running:
    """A process that was started; `end` waits for it.

    :param run: does not return; called in the fork.
    """

    def __init__(self, run: Callable[[], NoReturn]) -> None:
        pipes = [os.pipe() for _ in (1, 2, LOG_DESCRIPTOR)]
        self._read_ends = [read_end for read_end, _ in pipes]
        self._ended: tuple[Ended, list[int]] | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for (_, write_end), number in zip(pipes, (1, 2, LOG_DESCRIPTOR), strict=True):
                os.fchmod(write_end, 0o666)
                os.dup2(write_end, number)
            run()
        for _, write_end in pipes:
            os.close(write_end)

    def end(self) -> tuple[Ended, list[int]]:
        """How it ended, and the items that it ran."""
        if self._ended is None:
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            out, err, ran = (Path(f"/proc/self/fd/{read_end}").read_bytes() for read_end in self._read_ends)
            self._ended = Ended(code, out.decode(), err.decode()), [int(line) for line in ran.split()]
            for read_end in self._read_ends:
                os.close(read_end)
        return self._ended

    def kill(self) -> None:
        """Unless it has ended."""
        if self._ended is None:
            os.kill(self.pid, signal.SIGKILL)
            self.end()


class Place:
    """A folder with a job, its log of runs, and the mount point that the output lies on.

    :ivar runs: how many processes ran in it.
    :ivar ran: the items that they ran.
    """

    def __init__(self, path: Path, job: str, mutant: str, worker: str, compacts: Compacts) -> None:
        self.folder, self.disk = Folder(path), path / "disk"
        output, *more = JOBS[job]
        self.output, self.journal = self.disk / output, self.disk / f"{output}.checkpoint"
        self.keeps = "--keep-checkpoint" in more
        self.expected = b""
        self.runs = 0
        self.ran: list[int] = []
        self._before = Committed()
        self._mutant = MUTANTS[mutant]
        self._compacts = compacts
        self._words = ["run", "--input", "items.txt", "--output", f"disk/{output}", "--worker", f"jobs:{worker}", *more]
        self._words += ["--concurrency", "8", "--batch-size", "5"]
        self._stack = contextlib.ExitStack()
        path.chmod(0o755)
        self.disk.mkdir()
        self.folder.write("jobs.py", MODULE)
        self.folder.write_items(ITEMS)
        (path / LOG).symlink_to(f"/proc/self/fd/{LOG_DESCRIPTOR}")

    def close(self) -> None:
        self._stack.close()

    def expect(self) -> None:
        """Learn the right output from a run that nothing disturbs; then everything is as before."""
        (self.folder / "go").touch()
        ended = self.run()
        assert ended.code == 0, ended.err
        self.expected = self.output.read_bytes()
        for path in (self.output, self.journal, self.folder / "go"):
            path.unlink(missing_ok=True)
        self.ran.clear()

    def start(self, *, user: int = 0, file_bytes: int | None = None) -> Running:
        """The command in a fork: as another user, or unable to write files beyond a size."""

        def run() -> NoReturn:
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            if user:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            die_with_parent()
            os.environ["SLOWNESS"] = "0.1"
            if self._compacts == "often":
                checkpoint.COMPACT_ABOVE_DEAD_BYTES = COMPACTS_ABOVE
            elif self._compacts == "always":
                mock.patch("async_recovery.journal.worth_compacting", return_value=True).start()
            with self._mutant():
                become(str(self.folder.path), self._words)

        self.runs += 1
        self._before = self.committed()
        running = Running(run)
        self._stack.callback(running.kill)
        return running

    def end(self, running: Running) -> Ended:
        """Wait for its end; it must have run nothing that was committed, and nothing twice."""
        ended, ran = running.end()
        assert not [index for index in ran if self._before.has(index)], "what was committed ran again"
        assert len(set(ran)) == len(ran)
        self.ran += ran
        return ended

    def run(self, *, user: int = 0, file_bytes: int | None = None) -> Ended:
        return self.end(self.start(user=user, file_bytes=file_bytes))

    def committed(self) -> Committed:
        return read_committed(self.journal)

    def check_failed(self, ended: Ended, *codes: int, said: str = "", lock_may_stay: bool = False) -> None:
        """One clear line, the right code, nothing stray, nothing published but the whole, the committed is right."""
        assert ended.code in codes, ended
        assert ended.out == "", ended
        lines = [line for line in ended.err.splitlines() if " INFO " not in line]
        assert len(lines) == 1, ended
        assert lines[0].startswith("Error: "), ended
        assert said in lines[0], ended
        ends = ["", ".partial", ".checkpoint", ".checkpoint.tmp"] + [".lock"] * lock_may_stay
        assert names_in(self.disk) <= {self.output.name + end for end in ends} | {"lost+found"}
        now, written = self.committed(), Path(f"{self.output}.partial")
        if self.output.exists():  # what failed is putting the journal away
            assert now.complete
            written = self.output
        content = written.read_bytes()[: now.offset] if written.exists() else b""
        assert len(content) == now.offset
        assert self.expected.startswith(content)
        assert set(range(now.mark)) | now.ahead <= set(self.ran)

    def check_finishes(self, **how: Any) -> Ended:
        """The same line finishes: every item ran, the right bytes, nothing stray."""
        ended = self.run(**how)
        assert ended.code == 0, ended
        assert self.output.read_bytes() == self.expected
        assert set(self.ran) == set(range(ITEMS))
        left = names_in(self.disk) - {self.output.name, f"{self.journal.name}.tmp", "lost+found"}
        assert left == ({self.journal.name} if self.keeps else set())
        return ended

    def until_held(self, running: Running) -> None:
        """Wait until the three items before those that wait for "go" are committed."""

        def held() -> bool:
            assert os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, running.end()
            return self.committed().mark == 3

        wait_until(held)

    def go(self) -> None:
        (self.folder / "go").touch()


@contextlib.contextmanager
def place(
    job: str, mutant: str = "", *, worker: str = "random_latency", compacts: Compacts = "often"
) -> Iterator[Place]:
    """A new place in a namespace of this process's own; nothing is mounted yet."""
    preload()
    enter_own_namespace()
    with tempfile.TemporaryDirectory(prefix="full-disks-") as path:
        there = Place(Path(path), job, mutant, worker, compacts)
        try:
            there.expect()
            yield there
        finally:
            there.close()


@contextlib.contextmanager
def tmpfs(there: Place, options: str) -> Iterator[Callable[[str], None]]:
    """A tmpfs on the place's disk; gives a function that changes its options."""
    mount("tmpfs", there.disk, "tmpfs", options)
    try:
        yield lambda options: mount("tmpfs", there.disk, "tmpfs", options, REMOUNT)
    finally:
        release(there.disk)


def few_pages(job: str, mutant: str = "") -> int:
    """From 1 to 16 pages: it fails with 74 or finishes; with room it finishes. Returns the number of runs."""
    codes = set()
    with place(job, mutant) as there:
        for pages in range(1, 17):
            with tmpfs(there, f"size={pages * PAGE}") as change:
                ended = there.run()
                codes.add(ended.code)
                if ended.code != 0:
                    there.check_failed(ended, 74, said="No space left on device")
                    change("size=1m")
                    there.check_finishes()
                else:
                    assert there.output.read_bytes() == there.expected
            there.ran.clear()
        assert codes == {0, 74}, "the sizes do not reach from too small to large enough"
        return there.runs


def growing_page_by_page(job: str, mutant: str = "") -> int:
    """Each time the disk is full it gets one page more, until the job is done."""
    with place(job, mutant) as there, tmpfs(there, f"size={PAGE}") as change:
        for pages in range(2, 65):
            ended = there.run()
            if ended.code == 0:
                assert there.output.read_bytes() == there.expected
                assert pages > 5, "the disk was never full in the middle"
                return there.runs
            there.check_failed(ended, 74, said="No space left on device")
            change(f"size={pages * PAGE}")
        raise AssertionError(f"not done on {pages} pages")


def few_inodes(job: str, mutant: str = "") -> int:
    """From 1 to 6 inodes, the first for the folder: it fails with 74, and finishes with more."""
    codes = []
    with place(job, mutant) as there:
        for inodes in range(1, 7):
            with tmpfs(there, f"nr_inodes={inodes}") as change:
                ended = there.run()
                codes.append(ended.code)
                if ended.code != 0:
                    there.check_failed(ended, 74, said="No space left on device")
                    change("nr_inodes=100")
                    there.check_finishes()
            there.ran.clear()
        assert codes[:3] == [74, 74, 74]
        assert codes[-1] == 0
        return there.runs


def limited_files(job: str, mutant: str = "") -> int:
    """No file may be larger than a limit, from 0 bytes to more than enough: short writes, then EFBIG."""
    codes = set()
    with place(job, mutant) as there:
        for limit in [0, 1, 54, *range(100, 16_000, 379), 1 << 20]:
            with tmpfs(there, "size=1m"):
                ended = there.run(file_bytes=limit)
                codes.add(ended.code)
                if ended.code != 0:
                    there.check_failed(ended, 74, said="File too large")
                    there.check_finishes()
                else:
                    assert there.output.read_bytes() == there.expected
            there.ran.clear()
        assert codes == {0, 74}
        return there.runs


def half_do(there: Place, change: Callable[[str], None]) -> None:
    """Leave a job that ran out of room in the middle, and then room for it."""
    change(f"size={4 * PAGE}")
    there.check_failed(there.run(), 74)
    change("size=1m")
    assert there.committed().mark > 0
    Path(f"{there.journal}.tmp").unlink(missing_ok=True)  # of a compaction


def full_in_the_middle(kind: str, mutant: str = "") -> int:
    """Somebody else fills the disk while the job runs; the same line fails again, and finishes when there is room."""
    with place("lines", mutant, worker="held_from_3") as there:
        disk: AbstractContextManager[object] = tmpfs(there, "size=1m") if kind == "tmpfs" else Disk(kind, there.disk)
        with disk:
            running = there.start()
            there.until_held(running)
            committed = there.committed()
            filler = there.folder.path / "disk" / "filler"
            fill(filler)
            there.go()
            ended = [there.end(running), there.run()]
            filler_bytes = filler.stat().st_size
            filler.unlink()
            for one in ended:
                there.check_failed(one, 74, said="No space left on device")
            assert there.committed().mark >= committed.mark == 3
            assert filler_bytes > 0
            there.check_finishes()
        return there.runs


def fill(path: Path) -> None:
    """Write until not one byte more fits."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 20, PAGE, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(descriptor, bytes(size))
                    os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_only(job: str, mutant: str = "") -> int:
    """On a disk that is mounted read-only nothing begins and nothing changes, be it empty or with a job half done."""
    with place(job, mutant) as there, tmpfs(there, "size=1m") as change:
        mount(str(there.disk), there.disk, flags=BIND)
        for half_done in (False, True):
            if half_done:
                half_do(there, change)
            before = there.folder.snapshot()
            mount("none", there.disk, flags=REMOUNT | BIND | READ_ONLY)
            ended = there.run()
            mount("none", there.disk, flags=REMOUNT | BIND)
            there.check_failed(ended, 2, said=os.strerror(errno.EROFS))
            assert there.folder.snapshot() == before
        there.check_finishes()
        return there.runs


def mounted_output(job: str, mutant: str = "") -> int:
    """An output that is a mount point can not be replaced: one line says so; when it is none, nothing runs again."""
    with place(job, mutant) as there, tmpfs(there, "size=1m"):
        there.output.touch()
        mount(str(there.folder.write("mounted", "")), there.output, flags=BIND)
        ended = there.run()
        unmount(there.output)
        there.output.unlink()
        there.check_failed(ended, 74, said="mount point of its own")
        assert there.committed().complete
        assert b'"executed": 0' in there.check_finishes().out.encode()
        return there.runs


def forbidden_folder(job: str, mutant: str = "") -> int:
    """In a folder that another user may not write to, nothing begins and nothing changes; given leave, it finishes."""
    with place(job, mutant) as there, tmpfs(there, "size=1m,mode=755"):
        before = there.folder.snapshot()
        there.check_failed(there.run(user=NOBODY), 2, said=os.strerror(errno.EACCES))
        assert there.folder.snapshot() == before
        there.disk.chmod(0o777)
        there.check_finishes(user=NOBODY)
        return there.runs


def forbidden_files(job: str, mutant: str = "") -> int:
    """What another user left and this one may not write to is named, and not changed; given leave, it is resumed."""
    with place(job, mutant) as there, tmpfs(there, "mode=777") as change:
        half_do(there, change)
        committed = there.committed()
        files = (there.journal, Path(f"{there.output}.partial"))
        for path in files:
            for file in files:
                file.chmod(0o644 if file is path else 0o666)
            before = there.folder.snapshot()
            there.check_failed(there.run(user=NOBODY), 2, said=path.name)
            assert there.folder.snapshot() == before
            path.chmod(0o666)
        assert there.committed() == committed
        there.check_finishes(user=NOBODY)
        return there.runs


def forbidden_in_the_middle(job: str, mutant: str = "") -> int:
    """The leave to write to the folder is taken from a running job of another user than root, and given back.

    The next rename fails: first that of a compaction, then, where nothing is compacted, that of the finished output.
    """
    runs = 0
    for compacts in ("always", "never"):
        with place(job, mutant, worker="held_from_3", compacts=compacts) as there, tmpfs(there, "mode=777"):
            running = there.start(user=NOBODY)
            there.until_held(running)
            there.disk.chmod(0o555)
            there.go()
            denied = os.strerror(errno.EACCES)
            there.check_failed(there.end(running), 74, said=denied, lock_may_stay=True)
            assert there.committed().complete == (compacts == "never")
            there.check_failed(there.run(user=NOBODY), 74, 2, said=denied, lock_may_stay=True)  # 2: it began nothing
            there.disk.chmod(0o777)
            executed = there.check_finishes(user=NOBODY).summary["executed"]
            assert (executed == 0) == (compacts == "never")
            runs += there.runs
    return runs


if __name__ == "__main__":
    case: Callable[..., int] = globals()[sys.argv[1]]
    print(case(*sys.argv[2:]), "runs, and nothing was found")
