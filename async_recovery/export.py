"""A finished run in a database as a file: JSON Lines, or an array, exactly as the file ledger would have written it."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from zlib import crc32

import anyio.to_thread

from .checkpoint import Complete
from .database import Snapshot, slices
from .errors import IncompleteRun, OutputChanged, UsageError, describe
from .files import DISK
from .ledgers import files_of, is_address, look_at, public
from .lock import Lock
from .output_file import Framing, OutputFile, framing_of

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
    lock = await anyio.to_thread.run_sync(_claim, path, address)
    target = lock.path.removesuffix(".lock")
    try:
        return await look_at(address, lambda snapshot: _write(snapshot, address, path, target))
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lock.release)


def _claim(path: str, address: str) -> Lock:
    """The lock that a job with that output would have."""
    if path == "-":
        raise UsageError("export to -: it writes a file, which appears when all of it is there; name one")
    target = os.path.realpath(path)
    if target in files_of(address):
        raise UsageError(f"{path} belongs to the database itself: name another file")
    if is_address(path) or not os.path.isdir(os.path.dirname(target)) or os.path.isdir(target):
        raise UsageError(f"{public(path)} can not be written: name a file in a folder that is there")
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
        raise IncompleteRun(f"{public(address)} is not complete, its mark is {mark}: run its own line again first")
    if snapshot.left.line is not None:
        logger.warning("%s is being done anew: what is written is the last complete run of it", public(address))
    file = OutputFile(target, framing_of(name), DISK, partial=f"{target}.export.tmp")
    try:
        await anyio.to_thread.run_sync(file.begin)
        await _add_records(file, framing_of(name), snapshot, complete)
        await anyio.to_thread.run_sync(_publish, file)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_drop, file)
        raise
    file.close()
    return int(complete.summary["total_items"])


async def _add_records(file: OutputFile, framing: Framing, snapshot: Snapshot, complete: Complete) -> None:
    length = crc = 0
    for first, end in slices(complete.summary["total_items"], complete.size or 0):
        lines = await snapshot.joined(first, end, complete=True)
        length, crc = length + len(lines), crc32(lines, crc)
        records = lines.split(b"\n")[:-1]
        await anyio.to_thread.run_sync(file.add, framing.join(records, file.state.offset))
    if (length, crc) != (complete.size, complete.crc):
        raise OutputChanged(
            "the records of the run are not those that were written: restore them, or start the job anew with --fresh "
            "(fresh=True); nothing was exported"
        )
    await anyio.to_thread.run_sync(file.add, framing.closing(file.state.offset))


def _publish(file: OutputFile) -> None:
    file.sync(_mode(file))
    file.verify()
    file.publish()


def _drop(file: OutputFile) -> None:
    with contextlib.suppress(OSError):
        file.remove()
    file.close()


def _mode(file: OutputFile) -> int:
    """The mode of the file that is replaced, or of any new one."""
    return stat.S_IMODE(os.stat(file.path if os.path.exists(file.path) else file.partial).st_mode)
