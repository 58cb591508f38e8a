"""The failed items of a finished output, run again alone; each result goes to its own index."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import msgspec

from .contracts import RunSummary
from .engine import Run, to_its_end
from .errors import UsageError
from .executors import Executor
from .failures import FailuresSource
from .ledgers import is_address, public, retry_ends
from .options import Limits, Options
from .policies import RateLimit, Record, Retry
from .progress import Progress
from .retry_ledger import RetryLedger
from .workers import Worker


async def retry_failed(
    worker: Worker,
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    concurrency: int = 16,
    retry: Retry | int | None = None,
    timeout: float | None = None,
    on_error: Literal["record"] | Record = "record",
    rate_limit: RateLimit | float | None = None,
    limits: Limits = Limits(),  # noqa: B008  frozen
    checkpoint_interval: float = 1.0,
    batch_size: int | None = None,
    version: str | None = None,
    fresh: bool = False,
    on_damage: Literal["restart", "refuse"] = "restart",
    drain_timeout: float = 10.0,
    on_progress: Callable[[Progress], object] | None = None,
    executor: Executor | None = None,
) -> RunSummary:
    """Run `worker` once for each recorded failure of a finished output, and carry on after any crash when called again.

    A new output takes the old one's place when all of them have an outcome: each new record at the index of its item,
    all other bytes as they were. An item that fails again stays a recorded failure. Until then the old output is
    untouched; what is done lies in ``<output>.retry.partial`` and ``<output>.retry.checkpoint``.

    The worker gets each item as JSON gives it back: a tuple as a list, a dataclass as a dict.

    :param worker: as for `run_resumable`.
    :param output: path of the finished output, or the address of a run in a database. Its job may be kept
        (`keep_checkpoint`), but not unfinished.
    :param checkpoint: path of the job's own journal, if it was given to the job.
    :param fresh: start the retry anew, whatever an earlier one has left.
    :returns: what was done: ``total_items`` and ``processed`` count the failures that were to be run again, ``failed``
        those of them that remain. Without any, the output is not touched.
    :raises UsageError: if an argument can not be used, or `output` is missing or not an output of this package.
    :raises Mismatch: if the job is not finished, the output has changed since the retry began, or the retry that was
        begun is another.
    :raises ItemFailed, StorageFailed, AlreadyRunning: as for `run_resumable`, where all other parameters are explained.
    """
    options = Options(
        concurrency=concurrency,
        retry=retry,
        timeout=timeout,
        on_error=on_error,
        rate_limit=rate_limit,
        limits=limits,
        checkpoint_interval=checkpoint_interval,
        batch_size=batch_size,
        version=version,
        drain_timeout=drain_timeout,
        on_progress=on_progress,
        executor=executor,
    )
    options.check()
    return await to_its_end(retry_run(worker, output, checkpoint, options, fresh=fresh, on_damage=on_damage))


def retry_run(
    worker: Worker,
    output: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None,
    options: Options,
    *,
    fresh: bool,
    on_damage: Literal["restart", "refuse"],
) -> Run:
    """The run of a retry; see `retry_failed`. Nothing is begun yet."""
    if options.recording is None:
        options = msgspec.structs.replace(options, on_error="record")
    if is_address(output):
        address = os.fsdecode(output)
        if checkpoint is not None:
            raise UsageError(f"checkpoint with {public(address)}: its progress lies in the database; leave it out")
        return Run(worker, *retry_ends(address, fresh=fresh, on_damage=on_damage), options)
    ledger = RetryLedger(output, checkpoint, fresh=fresh, on_damage=on_damage)
    return Run(worker, FailuresSource(os.fsdecode(output)), ledger, options)
