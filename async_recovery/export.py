"""A finished run in a database as a file: JSON Lines, or an array, exactly as the file ledger would have written it."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from zlib import crc32

import anyio.to_thread

from .database import Snapshot, slices
from .errors import IncompleteRun, OutputChanged, UsageError, describe
from .files import DISK
from .ledgers import is_address, look_at
from .lock import Lock
from .output_file import OutputFile, framing_of

logger = logging.getLogger("async_recovery")


async def export(address: str, path: str) -> int:
    """Write the records of a complete run to a file, which has its own name when all of it is there and durable.

    :param address: of the database, with the name of the run.
    :param path: of the file; what is there is replaced. ``.json``: an array, else JSON Lines.
    :returns: how many records it has.
    :raises UsageError: if there is no such run, or an argument can not be used.
    :raises IncompleteRun: if the run has never been complete.
    :raises OutputChanged: if the records are not those that were written; there is no file then.
    :raises AlreadyRunning: if a job is writing that file.
    """
    if not is_address(address):
        raise UsageError(f"{address} is no address of a database: only what lies in a database has to be exported")
    lock = await anyio.to_thread.run_sync(_claim, path)
    target = lock.path.removesuffix(".lock")
    try:
        return await look_at(address, lambda snapshot: _write(snapshot, address, path, target))
    finally:
        lock.release()


def _claim(path: str) -> Lock:
    """The lock that a job with that output would have."""
    target = os.path.realpath(path)
    if is_address(path) or not os.path.isdir(os.path.dirname(target)) or os.path.isdir(target):
        raise UsageError(f"{path} can not be written: name a file in a folder that is there")
    lock = Lock(f"{target}.lock")
    try:
        lock.acquire()
    except OSError as error:
        raise UsageError(f"the folder of {path} can not be written to: {describe(error)}") from error
    return lock


async def _write(snapshot: Snapshot, address: str, name: str, target: str) -> int:
    complete = snapshot.left.complete
    if complete is None:
        state = snapshot.left.state
        mark = state.mark if state is not None else 0
        raise IncompleteRun(f"{address} is not complete, its mark is {mark}: run its own line again first")
    if snapshot.left.line is not None:
        logger.warning("%s is being done anew: what is written is the last complete run of it", address)
    total, size = complete.summary["total_items"], complete.size or 0
    framing = framing_of(name)
    file = OutputFile(target, framing, DISK, partial=f"{target}.export.tmp")
    run_sync = anyio.to_thread.run_sync
    with contextlib.closing(file):
        await run_sync(file.begin)
        try:
            length = crc = 0
            for first, end in slices(total, size):
                lines = await snapshot.joined(first, end, complete=True)
                length, crc = length + len(lines), crc32(lines, crc)
                records = lines.split(b"\n")[:-1]
                await run_sync(file.add, framing.join(records, file.state.offset))
            if (length, crc) != (size, complete.crc):
                raise OutputChanged(
                    f"the records of {address} are not those that were written: restore them, or start the job anew "
                    "with --fresh (fresh=True)"
                )
            await run_sync(file.add, framing.closing(file.state.offset))
            await run_sync(file.sync, _mode(file))
            await run_sync(file.verify)
            await run_sync(file.publish)
        except BaseException:
            with contextlib.suppress(OSError):
                file.remove()
            raise
    return int(total)


def _mode(file: OutputFile) -> int:
    """The mode of the file that is replaced, or of any new one."""
    return stat.S_IMODE(os.stat(file.path if os.path.exists(file.path) else file.partial).st_mode)
