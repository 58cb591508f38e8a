"""Every error that a caller may catch.

::

    AsyncRecoveryError
    ├── UsageError               a bad argument, a missing input, a folder that can not be written   exit 2
    ├── ItemFailed               a worker failed; the rest is committed and can be resumed           exit 1
    │   (its __cause__ is what the worker raised, or ResultRefused)
    ├── TooManyFailures          more recorded failures than max_failures allows; resumable          exit 1
    ├── ResultRefused            a worker's result has no faithful form as a line of the output      exit 1
    ├── InvalidItem              a line of the input can not be read as an item                      exit 1
    ├── IncompleteRun            the run ended early for a reason inside; never a short output       exit 1
    ├── Mismatch                 what is there is not what was left there; nothing was changed       exit 4
    │   ├── InputChanged
    │   ├── OutputChanged
    │   ├── JobMismatch          the checkpoint belongs to another job
    │   └── CheckpointUnusable   damaged (and on_damage="refuse"), too new, or missing beside a partial output
    ├── StorageFailed            a write, fsync or rename failed; resumable from the last commit     exit 74
    ├── AlreadyRunning           another run holds this output                                       exit 75
    ├── NoWorkers                a cluster has nobody to run the worker; resumable                   exit 75
    └── Stopped                  stopped on request before the end; resumable                        exit 130

Each message says what was found, what was expected, and what to do. ``exit_code`` is the exit status of the
command line for that error.

Three more are no errors of the run. A worker raises `SlowDown` to make all workers pause. `Quarantined` is the failure
of an item during which the process died too often, `CommandFailed` that of one whose command failed.
"""

from __future__ import annotations

from typing import Any, ClassVar

SHORT_ITEM_CHARACTERS = 120
# What would steer a terminal, and what no log can write (lone surrogates), in texts that are a worker's or an item's.
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPED |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}


class AsyncRecoveryError(Exception):
    """The base of every error of this package."""

    exit_code: ClassVar[int] = 1


class UsageError(AsyncRecoveryError, ValueError):
    """An argument, an input or a folder that can not be used. Raised before any work begins."""

    exit_code = 2


class ItemFailed(AsyncRecoveryError):
    """A worker failed on one item. Everything that finished is committed; a resume tries this item again.

    :ivar index: 0-based position of the item in the input.
    :ivar item: the item's ``repr``, shortened to 120 characters.
    :ivar reason: what the worker raised, in one line.
    :ivar in_short: what has failed, without what to do about it.
    """

    def __init__(self, index: int, item: object, cause: BaseException) -> None:
        self.index = index
        self.item = shorten(item)
        self.reason = describe(cause)
        self.in_short = f"item {index} ({self.item}) failed: {self.reason}"
        super().__init__(
            f"{self.in_short}. Everything that finished is saved: mend the cause and run the same line again"
        )
        self.__cause__ = cause


class TooManyFailures(AsyncRecoveryError):
    """More items have failed than the job bears. Everything that finished is committed."""


class SlowDown(Exception):
    """Raised by a worker: the system behind it wants a pause (a 429 or 503 with Retry-After). No attempt is spent.

    :param seconds: how long no worker begins an attempt.
    :raises ValueError: if that is not a number of 0 or more.
    """

    def __init__(self, seconds: Any) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
            raise ValueError(f"SlowDown({seconds!r}): give the seconds to pause as a number of 0 or more")
        super().__init__(f"slow down for {seconds:g} s")
        self.seconds = float(seconds)

    @staticmethod
    def within(error: BaseException) -> SlowDown | None:
        """The longest pause that an error asks for: itself, or a group of nothing else; else None."""
        if isinstance(error, SlowDown):
            return error
        if not isinstance(error, BaseExceptionGroup):
            return None
        asked = [found for part in error.exceptions if (found := SlowDown.within(part)) is not None]
        return max(asked, key=lambda found: found.seconds) if len(asked) == len(error.exceptions) else None


class Quarantined(Exception):
    """The process died each time this item ran; on a cluster, or hung."""


class CommandFailed(Exception):
    """The command that was run for an item failed. The message is the same in each run.

    :ivar exit_status: of the command, or minus the number of the signal that ended it; None if it could not be started,
        or was killed because it wrote too much.
    """

    def __init__(self, message: str, exit_status: int | None) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class ResultRefused(AsyncRecoveryError, ValueError):
    """A result that has no faithful, repeatable form as a line of JSON."""


class InvalidItem(AsyncRecoveryError, ValueError):
    """A line of the input that can not be read: names the file, the line and the byte."""


class IncompleteRun(AsyncRecoveryError):
    """The run ended before every item was finished, and nothing else explains it. Nothing was published."""


class Mismatch(AsyncRecoveryError):
    """What was found is not what the checkpoint remembers. Nothing was changed."""

    exit_code = 4


class InputChanged(Mismatch):
    """The input is not the one that the committed items came from."""


class OutputChanged(Mismatch):
    """The output is not what this job wrote."""


class JobMismatch(Mismatch):
    """The checkpoint was left by another job."""


class CheckpointUnusable(Mismatch):
    """The checkpoint can not be read, or is missing although a partial output is there."""


class StorageFailed(AsyncRecoveryError):
    """A step of the durable path failed. Not one more byte is written; a restart resumes from the last commit."""

    exit_code = 74


class AlreadyRunning(AsyncRecoveryError):
    """Another run holds the output or the checkpoint."""

    exit_code = 75


class NoWorkers(AsyncRecoveryError):
    """A cluster can not be reached, or has no process that runs the worker. Everything that finished is committed."""

    exit_code = 75


class Stopped(AsyncRecoveryError):
    """The run was asked to stop. What had finished is committed; the same line resumes."""

    exit_code = 130


def storage_failed(what: str, mark: int | None) -> StorageFailed:
    """The error of a ledger whose storage failed.

    :param what: what failed, and where.
    :param mark: the durable mark, if there was a commit.
    """
    upto = "" if mark is None else f", up to the mark {mark} and ahead of it,"
    return StorageFailed(
        f"the storage failed: {what}. Nothing is written any more; all that was committed{upto} is safe. Mend the "
        "cause (room on the disk? permission?), then run the same line again"
    )


def shorten(item: object) -> str:
    """The ``repr`` of `item` in at most 120 characters."""
    try:
        text = repr(item)
    except Exception:  # a repr that fails must not hide the error that is being reported
        text = f"<{type(item).__name__}>"
    text = text.translate(_ESCAPED)
    return text if len(text) <= SHORT_ITEM_CHARACTERS else text[: SHORT_ITEM_CHARACTERS - 1] + "…"


def describe(error: BaseException) -> str:
    """``Type: message`` on one line, or the type alone where there is no message."""
    message = " ".join(message_of(error).split()).translate(_ESCAPED)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def message_of(error: BaseException) -> str:
    """What the error says of itself; nothing if it fails at that."""
    try:
        return str(error)
    except Exception:
        return ""


def check_number(
    name: str,
    value: Any,
    *,
    least: float,
    most: float = float("inf"),
    optional: bool = False,
    kind: type | tuple[type, ...] = int,
) -> None:
    """:raises UsageError: if `value` is not a number of that `kind` from `least` to `most` (None, where `optional`)."""
    if value is None and optional:
        return
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        allowed = f"of {least} or more" if most == float("inf") else f"from {least} to {most}"
        whole = "whole " if kind is int else ""
        raise UsageError(f"{name} is {value!r}: it must be a {whole}number {allowed}")
