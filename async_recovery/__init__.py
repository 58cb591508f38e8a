"""Run a long list of I/O-bound items once, all of it, whatever happens to the machine.

``await run_resumable(worker, items, output=…)`` processes items concurrently, keeps a durable high-water mark, and
carries on after any crash when it is called again with the same arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .calls import resumable, run_resumable
    from .checkpoint import Ahead, Bookmark, Checkpoint, Commit, Complete, Job, Spent, State
    from .command_worker import command, shell
    from .contracts import Ledger, Page, RunSummary, Source
    from .dask_executor import DaskExecutor
    from .errors import (
        AlreadyRunning,
        AsyncRecoveryError,
        CheckpointUnusable,
        CommandFailed,
        IncompleteRun,
        InputChanged,
        InvalidItem,
        ItemFailed,
        JobMismatch,
        Mismatch,
        NoWorkers,
        OutputChanged,
        ResultRefused,
        SlowDown,
        Stopped,
        StorageFailed,
        TooManyFailures,
        UsageError,
    )
    from .executors import Executor
    from .file_ledger import FileLedger
    from .options import Limits
    from .policies import RateLimit, Record, Retry
    from .postgres import PostgresLedger
    from .progress import Progress, Seen
    from .retrying import retry_failed
    from .sources import CsvSource, IterableSource, JsonLinesSource, LinesSource, TextSource
    from .sqlite import SqliteLedger
else:

    def __getattr__(name):
        """Everything public, at its first use: `--help` needs nothing of it."""
        from importlib import import_module

        for part in (_OPTIONAL[name],) if name in _OPTIONAL else _PARTS if name in __all__ else ():
            found = getattr(import_module(f".{part}", __name__), name, None)
            if found is not None:
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_OPTIONAL = {"PostgresLedger": "postgres", "DaskExecutor": "dask_executor"}
_PARTS = (
    *("errors", "progress", "executors", "policies", "contracts", "checkpoint", "options", "sources", "file_ledger"),
    *("calls", "command_worker", "retrying", "sqlite"),
)
__version__ = "0.1.0"

__all__ = [
    "Ahead",
    "AlreadyRunning",
    "AsyncRecoveryError",
    "Bookmark",
    "Checkpoint",
    "CheckpointUnusable",
    "CommandFailed",
    "Commit",
    "Complete",
    "CsvSource",
    "DaskExecutor",
    "Executor",
    "FileLedger",
    "IncompleteRun",
    "InputChanged",
    "InvalidItem",
    "ItemFailed",
    "IterableSource",
    "Job",
    "JobMismatch",
    "JsonLinesSource",
    "Ledger",
    "Limits",
    "LinesSource",
    "Mismatch",
    "NoWorkers",
    "OutputChanged",
    "Page",
    "PostgresLedger",
    "Progress",
    "RateLimit",
    "Record",
    "ResultRefused",
    "Retry",
    "RunSummary",
    "Seen",
    "SlowDown",
    "Source",
    "Spent",
    "SqliteLedger",
    "State",
    "Stopped",
    "StorageFailed",
    "TextSource",
    "TooManyFailures",
    "UsageError",
    "command",
    "resumable",
    "retry_failed",
    "run_resumable",
    "shell",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
