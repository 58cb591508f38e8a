"""What a job's checkpoint says, read without touching it, also while the job runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from .checkpoint import Complete, Replay, State, printable
from .errors import UsageError
from .file_ledger import retry_of
from .files import READ_BYTES
from .ledgers import is_address, look_at, public
from .lock import Holder, read_holder
from .progress import Progress

if TYPE_CHECKING:
    from .database import Snapshot


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a job.

    :ivar state: ``"running"``, ``"interrupted"`` (the same line resumes it), ``"complete"`` or ``"damaged"``.
    :ivar mark: every item below it is finished and durable.
    :ivar ahead: items finished ahead of the mark, durable as well.
    :ivar finished: the sum of the two.
    :ivar failed: recorded failures below the mark.
    :ivar commits: commits of all runs of this job; None when it is complete.
    :ivar output_bytes: committed bytes of the output.
    :ivar damaged_lines: lines of the checkpoint, or rows ahead of the mark, that do not count.
    :ivar running: who holds the job at this moment, and where it last said it stood.

    None is what is not known: of a job whose checkpoint has been removed since, all counts.
    """

    state: str
    checkpoint: str
    input: str | None = None
    source: str | None = None
    worker: str | None = None
    version: str | None = None
    mark: int | None = 0
    ahead: int | None = 0
    finished: int | None = 0
    failed: int | None = 0
    commits: int | None = 0
    window: int | None = None
    output_bytes: int | None = None
    damaged_lines: int | None = 0
    running: dict[str, Any] | None = None


def read_status(path: str) -> Status:
    """The state of the job whose output or checkpoint is `path`; of a run in a database by its address.

    :raises UsageError: if there is no checkpoint there.
    """
    if is_address(path):
        return _read_database(path)
    try:
        checkpoint = _find_checkpoint(path)
        replay = replayed(checkpoint)
    except OSError as error:
        raise UsageError(f"{error.filename or path} can not be read: {error.strerror}") from error
    shown = printable(checkpoint)
    output = os.path.realpath(checkpoint).removesuffix(".checkpoint")
    holder = holder_of(output, os.path.realpath(checkpoint))
    running = None if holder is None else msgspec.to_builtins(holder)
    found = replay.complete or replay.state
    if found is None:
        return Status(state="damaged", checkpoint=shown, damaged_lines=replay.damaged_lines, running=running)
    return _status(shown, found, len(replay.ahead), replay.damaged_lines, replay.state, running)


def _read_database(address: str) -> Status:
    import anyio

    async def look(snapshot: Snapshot) -> Status:
        left = snapshot.left
        running = None if snapshot.holder is None else msgspec.to_builtins(snapshot.holder)
        found = left.complete if left.line is None else left.state
        if found is None:
            return Status(state="damaged", checkpoint=public(address), running=running)
        ahead = left.whole_ahead
        return _status(public(address), found, len(ahead), len(left.ahead) - len(ahead), left.state, running)

    return anyio.run(look_at, address, look)


def _status(
    checkpoint: str,
    found: State | Complete,
    ahead: int,
    damaged_lines: int,
    last: State | None,
    running: dict[str, Any] | None,
) -> Status:
    if isinstance(found, Complete):
        state, mark, ahead, failed = "complete", found.summary["total_items"], 0, found.summary["failed"]
        output_bytes = found.size  # a retry that holds it says where the retry stands
    else:
        state, mark, failed = "interrupted", found.mark, found.failed
        output_bytes = None if found.output is None else found.output.offset
        running = None if running is None else brought_up_to(mark, mark + ahead, running)
    return Status(
        state="running" if running else state,
        checkpoint=checkpoint,
        input=found.input,
        source=found.job.source,
        worker=found.job.worker,
        version=found.job.version,
        mark=mark,
        ahead=ahead,
        finished=mark + ahead,
        failed=failed,
        commits=last.generation if last else None,
        window=last.window if last else None,
        output_bytes=output_bytes,
        damaged_lines=damaged_lines,
        running=running,
    )


def brought_up_to(mark: int, finished: int, running: dict[str, Any]) -> dict[str, Any]:
    """What the run last said of itself, 2 s ago at the most, with what it has committed since."""
    if running.get("progress") is None:
        return running
    told = msgspec.convert(running["progress"], Progress)
    if mark <= told.mark and finished <= told.finished:
        return running
    now = msgspec.structs.replace(
        told,
        finished=max(finished, told.finished),
        executed=told.executed + max(0, finished - told.finished),
        mark=max(mark, told.mark),
        durable_mark=max(mark, told.durable_mark),
        ahead=max(finished, told.finished) - max(mark, told.mark),
        held_by=told.held_by if told.held_by is not None and told.held_by >= mark else None,
    )
    return {**running, "progress": msgspec.to_builtins(now)}


def replayed(journal: str) -> Replay:
    """What the journal at that path says, as it lies there. Touches nothing.

    :raises OSError: if it can not be read.
    """
    replay = Replay()
    with open(journal, "rb") as file:
        while block := file.read(READ_BYTES):
            replay.feed(block)
    return replay


def holder_of(output: str | None, journal: str) -> Holder | None:
    """Who works on that output or that journal now, or on a retry's; None if nobody does. Touches nothing."""
    paths = (output, journal, None if output is None else output.removesuffix(".retry"))
    return next((holder for path in paths if path and (holder := read_holder(f"{path}.lock"))), None)


def _find_checkpoint(path: str) -> str:
    beside = path + ".checkpoint"
    for name in (path, os.path.realpath(path)):  # a run works on what a symlink leads to
        for checkpoint in (f"{retry_of(name)}.checkpoint", f"{name}.checkpoint"):
            if os.path.isfile(checkpoint):
                return checkpoint
    if os.path.isfile(path) and not _is_output(path):
        return path
    if os.path.exists(path):
        raise UsageError(f"{path} has no checkpoint {beside}: the job is complete, or its checkpoint lies elsewhere")
    raise UsageError(f"there is neither {path} nor {beside}: name the output or the checkpoint of a job")


def _is_output(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(8) != b'{"crc":"' and not path.endswith(".checkpoint")
