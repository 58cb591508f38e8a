"""The ledger of a retry: the new records of the failed items of an output, until they take their places in it.

It is a file ledger of its own beside the output, `<output>.retry.partial` with `<output>.retry.checkpoint`, under the
output's lock: one record for each failure, in order. Only the finish differs, and only there is the output read:

1. The partial output is verified.
2. The old output is copied to `<output>.retry.tmp` with each failure's record replaced. What goes by is compared with
   what the output was when the retry began.
3. That file is durable, and verified; then a `complete` line with its size and CRC-32 is.
4. It is renamed over the output.
5. The partial output goes; a kept complete line of the job is brought up to date; the journal goes.

A crash before 3 leaves all new records, and the finish is done again; one after it is finished from that line alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from typing import Literal
from zlib import crc32

import msgspec

from .checkpoint import FORMAT, Bookmark, Checkpoint, Commit, Complete, Replay, printable
from .contracts import RunSummary
from .errors import Mismatch, OutputChanged, UsageError
from .failures import merged, whole_of
from .file_ledger import FileLedger, command_line, paths_of, retry_of
from .files import DISK, READ_BYTES, Files, read_blocks
from .journal import Journal
from .output_file import Framing, OutputFile

logger = logging.getLogger("async_recovery.ledger")


class RetryLedger(FileLedger):
    """New records for the failures of a finished output.

    :param output: the output of the job.
    :param checkpoint: the journal of the job; None: ``<output>.checkpoint``.
    :param fresh: start the retry anew, whatever is left of an earlier one.
    :param on_damage: as for `FileLedger`, for the journal of the retry.
    :param files: the file operations.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        fresh: bool = False,
        on_damage: Literal["restart", "refuse"] = "restart",
        files: Files = DISK,
    ) -> None:
        super().__init__(output, checkpoint, fresh=fresh, on_damage=on_damage, files=files)
        self._given = os.fsdecode(output)
        self._shown_input = printable(self._given)
        self._framing = Framing()  # of the new records; that of the output is copied with it
        self._kept: Complete | None = None

    def check_paths(self) -> tuple[str, str]:
        """See `FileLedger.check_paths`: those of the retry."""
        output, self._jobs_journal = paths_of(self._given, self._given_checkpoint)
        assert output is not None
        self._target = output
        retry = retry_of(output)
        journal = f"{retry}.checkpoint"
        there = self._files.lstat(output)
        if (there is None or not stat.S_ISREG(there.st_mode)) and self._files.lstat(journal) is None:
            if self._files.lstat(f"{output}.partial") is not None:
                raise UsageError(f"the job of {self._given} is not finished: run its own line again first")
            if there is not None and stat.S_ISDIR(there.st_mode):
                raise UsageError(f"{self._given} is a folder: name the finished output of a job in it")
            raise UsageError(f"there is no output {self._given}: name the finished output of a job")
        if output.endswith(".partial"):
            whole = output.removesuffix(".partial")
            raise UsageError(f"{self._given} is a partial output: finish its job first, then name {whole}")
        self._refuse_bad_paths(retry, journal)
        self._merged = OutputFile(output, Framing(), self._files, partial=f"{retry}.tmp")
        return retry, journal

    # What follows runs on the writer thread.

    def _lock_paths(self, output: str | None, journal: str) -> list[str]:
        return super()._lock_paths(self._target, self._jobs_journal)

    def _open(self) -> Checkpoint:
        found = super()._open()
        if found.complete is None:
            there = self._files.lstat(self._target)
            if there is None:
                raise OutputChanged(f"the output {self._target} is missing: restore it, its failed items are in it")
            if self._kept is not None and self._kept.size != there.st_size:
                raise self._not_the_kept(f"{there.st_size} bytes")
        return found

    def _look_around(self, output: str | None) -> None:
        """Only a finished job has an output to be retried; what its checkpoint keeps is to be brought up to date."""
        journal, replay = self._left_in(self._jobs_journal)
        if replay.kept:
            self._kept = replay.complete
        elif journal.exists:
            raise Mismatch(
                f"the job of {self._target} is not finished ({self._jobs_journal}): its failed items can be run again "
                f"when it is. To finish it: {self._line_of_the_job(replay)}"
            )
        if self._files.lstat(f"{self._target}.partial") is not None:
            raise Mismatch(
                f"there is a partial output {self._target}.partial: its job is not finished, and its checkpoint lies "
                "elsewhere, or is missing. Run that job to its end first"
            )
        if self._fresh:
            self._conclude_if_published()

    def _conclude_if_published(self) -> None:
        """An earlier retry whose output has its name already is done: nothing of it can be started anew."""
        complete = self._journal.load().complete
        if complete is not None and self._merged.is_published(complete):
            self._conclude(complete)
        self._journal.close()

    def _already_complete(self, complete: Complete, *, kept: bool) -> Checkpoint:
        self._merged.publish_complete(complete)
        self._conclude(complete)
        self._begun = True
        logger.info("the retry was complete already: its output is published now")
        return Checkpoint(complete=complete)

    def _begin(self, commit: Commit) -> None:
        super()._begin(commit)
        if self._files.lstat(self._merged.partial) is not None:  # of a retry that was given up
            self._merged.remove()

    def _finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        assert self._file is not None
        self._nothing_done = False
        if summary.total_items == 0:
            logger.info("there are no failed items in %s: nothing to do", self._target)
            self._file.remove()
            self._journal.remove()
            return
        self._file.verify()
        self._merge(whole_of(bookmark.position))
        size, crc = self._merged.state.offset, self._merged.state.crc
        complete = Complete(FORMAT, self._job, self._shown_input, bookmark, size, crc, msgspec.to_builtins(summary))
        self._journal.complete(complete)
        self._merged.publish()
        self._conclude(complete)

    def _merge(self, whole: tuple[int, int]) -> None:
        """Write the new output, durable, under its temporary name."""
        assert self._file is not None
        if self._kept is not None and (self._kept.size, self._kept.crc) != whole:
            raise self._not_the_kept("other bytes")
        with contextlib.closing(self._merged):
            old = self._files.open(self._target, os.O_RDONLY)
            try:
                mode = stat.S_IMODE(self._files.stat(old).st_mode)
                self._merged.begin()
                buffer = bytearray()
                for part in merged(self._compared(old, whole), self._file.blocks()):
                    buffer += part
                    if len(buffer) >= READ_BYTES:
                        self._merged.add(buffer)
                        buffer = bytearray()
                self._merged.add(buffer)
                self._merged.sync(mode)
                self._merged.verify()
            finally:
                self._files.close(old)

    def _compared(self, descriptor: int, whole: tuple[int, int]) -> Iterator[bytes]:
        """The blocks of the old output, which must be what it was."""
        size = self._files.stat(descriptor).st_size
        crc = 0
        try:
            for block in read_blocks(self._files, descriptor, 0, size):
                crc = crc32(block, crc)
                yield block
        except OSError as error:
            error.filename = error.filename or self._target
            raise
        if (size, crc) != whole:
            raise OutputChanged(
                f"the output {self._target} is not what it was when the retry began: it has {size} bytes, it had "
                f"{whole[0]}, or others. Restore it to go on, or start the retry anew with --fresh (fresh=True)"
            )

    def _conclude(self, complete: Complete) -> None:
        """The new output has its name: put away what the retry worked in."""
        assert self._file is not None
        if self._files.lstat(self._file.partial) is not None:
            self._file.remove()
        if self._kept is not None:
            summary = {**self._kept.summary, "failed": complete.summary["failed"]}
            self._kept = msgspec.structs.replace(self._kept, size=complete.size, crc=complete.crc, summary=summary)
            journal = Journal(self._jobs_journal, self._files)
            journal.keep(self._kept)
            journal.close()
        self._journal.remove()

    def _line_of_the_job(self, replay: Replay) -> str:
        """How the job that left this journal is finished."""
        found = replay.complete or replay.state
        if found is None or found.input is None:
            return "run it again as it was started"
        kept = found.input == printable(f"{self._target}.input")  # from standard input: it belongs to the job, and goes
        words = ["run", "--input", "-" if kept else found.input, "--output", self._given]
        words += [] if self._given_checkpoint is None else ["--checkpoint", self._given_checkpoint]
        return f"`{command_line(*words, job=found.job)}`"

    def _not_the_kept(self, found: str) -> OutputChanged:
        assert self._kept is not None
        return OutputChanged(
            f"the checkpoint {self._jobs_journal} remembers an output of {self._kept.size} bytes, but "
            f"{self._target} has {found}: restore it, or remove that checkpoint and run the same line again"
        )
