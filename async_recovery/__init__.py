"""Run a long list of I/O-bound items once, all of it, whatever happens to the machine.

``await run_resumable(worker, items, output=…)`` processes items concurrently, keeps a durable high-water mark, and
carries on after any crash when it is called again with the same arguments.
"""

from __future__ import annotations

from .checkpoint import Ahead, Bookmark, Checkpoint, Commit, Complete, Job, Spent, State
from .command_worker import command, shell
from .contracts import Ledger, Page, RunSummary, Source
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
    OutputChanged,
    ResultRefused,
    SlowDown,
    Stopped,
    StorageFailed,
    TooManyFailures,
    UsageError,
)
from .file_ledger import FileLedger
from .options import Limits
from .policies import RateLimit, Record, Retry
from .progress import Progress
from .resumable import resumable, run_resumable
from .retry_failed import retry_failed
from .sources import CsvSource, IterableSource, JsonLinesSource, TextSource

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
    "Mismatch",
    "OutputChanged",
    "Page",
    "Progress",
    "RateLimit",
    "Record",
    "ResultRefused",
    "Retry",
    "RunSummary",
    "SlowDown",
    "Source",
    "Spent",
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
