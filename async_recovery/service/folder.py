"""The service's folder: what lies where in it, and that nothing of a request leads out of it.

::

    service.db       the jobs (store.py)
    service.lock     one service at a time
    uploads/         what was uploaded, for a day; with a ~ behind its name while it comes in
    jobs/JOB/        a job's own input, its output, checkpoint and lock

A job's folder is `JOB.new` until the job is remembered, and `JOB.gone` when it is to be deleted: a start after a crash
finishes what these names say, and deletes nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import AsyncIterable, Collection
from functools import partial
from pathlib import Path

import aiofiles
import anyio
import anyio.to_thread

from ..checkpoint import printable
from ..errors import UsageError
from ..files import DISK
from .jobs import Input, Job

JOB_ID = re.compile(r"job-[0-9a-f]{16}")
UPLOAD_ID = re.compile(r"up-[0-9a-f]{16}-[A-Za-z0-9._-]{1,100}")
DATABASE, LOCK, OUTPUT = "service.db", "service.lock", "output.jsonl"
NO_INPUT = "there is no such file below the service's folder that could be an input"
LONGEST_REASON = 2000  # characters
KEPT_S = 24 * 3600.0
PART = "~"  # which no id of an upload has in it
PRIVATE = 0o700  # items and results are nobody else's business


class OutsideOfFolder(UsageError):
    """A path that leads out of the service's folder, or to something in it that is no input."""


class Folder:
    """The folder at `path`; made by `prepare`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def database(self) -> str:
        """Path of the database."""
        return str(self.path / DATABASE)

    @property
    def lock(self) -> str:
        """Path of the service's lock."""
        return str(self.path / LOCK)

    @property
    def _jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def _uploads(self) -> Path:
        return self.path / "uploads"

    def prepare(self) -> None:
        """Make it, and find out where it really lies: to be called before anything else.

        :raises UsageError: if that can not be, or it can not be written to.
        """
        self.path = Path(os.path.realpath(self.path))
        try:
            for folder in (self.path, self._jobs, self._uploads):
                folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            for folder in (self.path.parent, self.path):
                DISK.fsync_directory(str(folder))
        except OSError as error:
            raise UsageError(
                f"{self.path} can not be the service's folder: {error.strerror}. Give --data another"
            ) from error

    def output(self, job: Job) -> str:
        """Where the output of a job lies when it is complete."""
        return str(self._jobs / job.id / OUTPUT)

    def input(self, job: Job) -> str:
        """Where the items of a job lie.

        :raises OutsideOfFolder: if that is no file in the folder any more.
        """
        found = self._find(job.input.path)
        if job.input.kind == "path" and self._is_own(found):
            raise OutsideOfFolder(NO_INPUT)
        return found

    def input_at(self, path: str, format: str | None) -> Input:
        """A file in the folder as the input of a job; see `_find`.

        :raises OutsideOfFolder: also if it is the service's own.
        """
        found = self._find(path)
        if self._is_own(found):
            raise OutsideOfFolder(NO_INPUT)
        return Input("path", os.path.relpath(found, self.path), path, os.stat(found).st_size, format)

    def _find(self, path: str) -> str:
        """The file at a path relative to the folder, symlinks resolved.

        :raises OutsideOfFolder: if there is none, it is no ordinary file, or lies elsewhere.
        """
        if not path or "\0" in path or os.path.isabs(path):
            raise OutsideOfFolder(
                "the path of the input must be relative to the service's folder, and name a file in it"
            )
        try:
            found = os.path.realpath(self.path / path, strict=True)
            is_inside = Path(found).is_relative_to(self.path)
            is_file = is_inside and stat.S_ISREG(os.stat(found).st_mode)
        except (OSError, ValueError):
            is_file, found = False, ""
        if not is_file:
            raise OutsideOfFolder(NO_INPUT)
        return found

    def _is_own(self, found: str) -> bool:
        """Whether a file is the service's own business. Of jobs only what is complete may be an input."""
        first, *others = os.path.relpath(found, self.path).split(os.sep)
        if first == "jobs":
            return not (len(others) == 2 and JOB_ID.fullmatch(others[0]) and others[1] == OUTPUT)
        return first == "uploads" or (not others and first.startswith((DATABASE, LOCK)))

    def told(self, error: BaseException) -> str:
        """What an error says, for whoever asks from outside: not where the folder lies, and not without an end."""
        text = str(error).replace(f"{self.path}{os.sep}", "").replace(str(self.path), "the service's folder")
        text = text.replace("run the same line again", "retry it")
        return printable(text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…")

    # Uploads

    async def receive(self, name: str, blocks: AsyncIterable[bytes]) -> tuple[str, int]:
        """Keep what comes as an upload, once all of it is there.

        :returns: its id, and how many bytes it has.
        :raises OSError: if it can not be written; nothing is kept.
        """
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(name)).strip("._")[-100:] or "input"
        upload = f"up-{secrets.token_hex(8)}-{plain}"
        part, size = self._uploads / f"{upload}{PART}", 0
        try:
            async with aiofiles.open(part, "xb") as file:
                async for block in blocks:
                    await file.write(block)
                    size += len(block)
                await file.flush()
                await anyio.to_thread.run_sync(DISK.fsync, file.fileno())
            await anyio.to_thread.run_sync(self._keep, part, upload)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(part.unlink, missing_ok=True))
            raise
        return upload, size

    def _keep(self, part: Path, upload: str) -> None:
        part.rename(self._uploads / upload)
        DISK.fsync_directory(str(self._uploads))

    def forget_uploads(self, now: float) -> int:
        """Those that are a day old go. The jobs that were made of them have links of their own.

        :returns: how many stay.
        """
        left = 0
        for entry in os.scandir(self._uploads):
            if UPLOAD_ID.fullmatch(entry.name.removesuffix(PART)) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    if now - entry.stat(follow_symlinks=False).st_mtime > KEPT_S:
                        Path(entry.path).unlink()
                    else:
                        left += 1
        return left

    # The folders of jobs

    def new_job(self) -> str:
        """The id of a job that begins, and its folder, `.new` as yet."""
        job = f"job-{secrets.token_hex(8)}"
        self._new(job).mkdir(mode=PRIVATE)
        return job

    def write_items(self, job: str, lines: bytes) -> Input:
        """The items of a job, which came with it: JSON Lines."""
        path = self._new(job) / "input.jsonl"
        with path.open("xb") as file:
            file.write(lines)
            file.flush()
            DISK.fsync(file.fileno())
        DISK.fsync_directory(str(path.parent))
        return Input("items", f"jobs/{job}/input.jsonl", "items", len(lines), "jsonl")

    def link_upload(self, job: str, upload: str, format: str | None) -> Input:
        """The items of a job in an upload.

        :raises OutsideOfFolder: if there is no such upload.
        """
        name = upload.split("-", 2)[-1]
        path = self._new(job) / f"input-{name}"
        try:
            if not UPLOAD_ID.fullmatch(upload):
                raise FileNotFoundError
            os.link(self._uploads / upload, path, follow_symlinks=False)
        except FileNotFoundError:
            raise OutsideOfFolder("there is no such upload: send it again; an upload is kept for a day") from None
        DISK.fsync_directory(str(path.parent))
        return Input("upload", f"jobs/{job}/input-{name}", name, path.stat().st_size, format)

    def settle(self, job: str) -> None:
        """The job is remembered: its folder gets its name, which a start after a crash does again if need be."""
        os.rename(self._new(job), self._jobs / job)

    def drop(self, job: str) -> None:
        """The job was not made after all."""
        shutil.rmtree(self._new(job), ignore_errors=True)

    def give_up(self, job: str) -> None:
        """The job is to be deleted, whatever happens now."""
        if (self._jobs / job).is_dir():
            os.rename(self._jobs / job, self._gone(job))
            DISK.fsync_directory(str(self._jobs))

    def delete(self, job: str) -> None:
        """What `give_up` has given up goes."""
        shutil.rmtree(self._gone(job), ignore_errors=True)

    def left_unsettled(self, known: Collection[str]) -> list[str]:
        """Finish what a killed service has begun.

        :param known: the ids of the jobs that are remembered.
        :returns: those that were about to be deleted: to be forgotten, and then `delete`d.
        :raises OSError: if that can not be done.
        """
        gone = []
        for name in sorted(os.listdir(self._jobs)):
            job, _, step = name.partition(".")
            if not JOB_ID.fullmatch(job):
                continue
            if step == "new" and job in known:
                self.settle(job)
            elif step == "new":
                self.drop(job)
            elif step == "gone":
                gone.append(job)
        return gone

    def _new(self, job: str) -> Path:
        return self._jobs / f"{job}.new"

    def _gone(self, job: str) -> Path:
        return self._jobs / f"{job}.gone"
