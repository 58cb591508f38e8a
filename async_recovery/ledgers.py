"""From what a user calls the output to the ledger behind it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

from .contracts import Ledger, Source
from .database import DEFAULT_RUN, Snapshot
from .errors import UsageError, shorten
from .file_ledger import FileLedger

T = TypeVar("T")

SQLITE = "sqlite:///FILE[?run=NAME]"
POSTGRES = "postgresql://USER@HOST/DATABASE[?run=NAME]"
POSTGRES_SCHEMES = ("postgresql", "postgres")
SECRETS = ("password", "sslpassword", "passwd", "pwd")


def ledger_of(
    output: str | os.PathLike[str] | Ledger | None,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    input: str | None = None,
    fresh: bool = False,
    keep_checkpoint: bool = False,
    on_damage: Literal["restart", "refuse"] = "restart",
    keep_records: bool = False,
) -> Ledger:
    """The ledger of an output: a database by its address, a `Ledger` as it is, all else a file.

    :param output: and all others: as for `FileLedger`.
    :raises UsageError: if an argument can not be used.
    """
    options: dict[str, Any] = {"fresh": fresh, "keep_checkpoint": keep_checkpoint, "on_damage": on_damage}
    if output is None or isinstance(output, os.PathLike) or not (is_address(output) or isinstance(output, Ledger)):
        return FileLedger(output, checkpoint, input=input, keep_records=keep_records, **options)
    if checkpoint is not None:
        shown = shorten(public(output) if isinstance(output, str) else output)
        raise UsageError(f"checkpoint with the output {shown}: it remembers the progress itself; leave it out")
    if isinstance(output, str):
        return _database(output, input=input, **options)
    if fresh or keep_checkpoint or on_damage != "restart":
        raise UsageError("fresh, keep_checkpoint and on_damage belong to the Ledger that is given: tell them to it")
    return output


def is_address(output: object) -> bool:
    """Whether an output is the address of a database, or was meant to be one: that is never a file."""
    return isinstance(output, str) and _ADDRESS.match(output) is not None


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|sqlite:|postgres(ql)?:", re.IGNORECASE)


def _scheme_of(address: str) -> str:
    return address.partition(":")[0].lower()


def public(address: str) -> str:
    """An address without what is secret in it: for messages, and for all that is kept. Other text stays as it is."""
    if not is_address(address):
        return address
    scheme = _scheme_of(address)
    if scheme == "dask":  # an executor, which has none
        return address
    hidden = f"{scheme}://…"
    try:
        parts = urlsplit(address)
    except ValueError:
        return hidden
    options = [part for part in parts.query.split("&") if not _is_secret(part)]
    user, at, host = parts.netloc.rpartition("@")
    if scheme == "sqlite":  # it has no secrets: where they are given all the same, it is no address
        return hidden if at or len(options) <= parts.query.count("&") else address
    if scheme not in POSTGRES_SCHEMES:
        return hidden  # nobody can tell what of it is secret
    if "@" in parts.path + parts.fragment or (not at and "@" in parts.query):
        return hidden  # a password with a character that ends one: nor here
    shown = parts._replace(netloc=f"{user.partition(':')[0]}{at}{host}", query="&".join(options)).geturl()
    is_host_empty = address.lower().startswith(f"{scheme}:///")  # which geturl takes for none
    return shown.replace(":/", ":///", 1) if is_host_empty else shown


def _is_secret(option: str) -> bool:
    return unquote_plus(option.partition("=")[0]).strip().lower() in SECRETS


def shown_word(word: str) -> str:
    """A word of a command line without what is secret in it."""
    option, is_joined, value = word.partition("=")
    return f"{option}={public(value)}" if is_joined and option.startswith("-") else public(word)


def split_address(address: str) -> tuple[str, str]:
    """The address of a database without the name of the run, and that name.

    :raises UsageError: if it is no address, or that no name.
    """
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise UsageError(f"the output {public(address)} is no address of a database: {error}") from None
    query = parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape")
    names = [value for name, value in query if name == "run"]
    if len(names) > 1:
        raise UsageError(f"{public(address)} names two runs: give one")
    run = names[0] if names else DEFAULT_RUN
    if not run.isprintable():
        raise UsageError(
            f"{public(address)} names the run {run!r}: give the run a name of printable characters, in UTF-8"
        )
    options = "&".join(part for part in parts.query.split("&") if part and part.split("=")[0] != "run")
    before, mark, fragment = address.partition("#")
    scheme, colon, path = before.partition("?")[0].partition(":")
    return scheme.lower() + colon + path + (options and f"?{options}") + mark + fragment, run


def sqlite_path(address: str) -> tuple[str, str]:
    """The path of the database and the name of the run in an address such as ``sqlite:///results.db?run=pages``.

    :raises UsageError: if it is no such address.
    """
    _, run = split_address(address)
    parts = urlsplit(address)
    path = unquote(parts.path[1:], errors="surrogateescape")
    others = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if name != "run"]
    good = address.lower().startswith("sqlite:///") and path and not (parts.netloc or parts.fragment or others)
    if not good or "\0" in path:
        raise UsageError(
            f"the output {public(address)} is no address of a database: write {SQLITE}, with four slashes for a path "
            "from the root, and %23, %25 and %3F for #, % and ? in a name"
        )
    if path == ":memory:":
        raise UsageError(f"the output {address} would be gone with the process: write {SQLITE}")
    return path, run


def files_of(address: str) -> list[str]:
    """The files that a database lies in, symlinks resolved; none if it lies on a server."""
    if _scheme_of(address) != "sqlite":
        return []
    path = os.path.realpath(sqlite_path(address)[0])
    return [path, f"{path}-wal", f"{path}-shm", f"{path}.lock"]


def place_of(ledger: Ledger) -> str | None:
    """What a run with that ledger holds, in a name that no other job has at the same time; None if it has none.

    :returns: for files, the journal on this machine; for a database, where it is, without what is secret, and the run.
    """
    if isinstance(ledger, FileLedger):
        return f"{socket.gethostname()}:{ledger.check_paths()[1]}"
    address = getattr(ledger, "address", None)
    if not isinstance(address, str):
        return None
    if files := files_of(address):
        return f"{socket.gethostname()}:{files[0]}?run={split_address(address)[1]}"
    is_here = urlsplit(address).hostname in (None, "localhost", "127.0.0.1", "::1")
    return f"{socket.gethostname()}:{public(address)}" if is_here else public(address)


class NoSuchRun(UsageError):
    """There is a database, or could be, but no run of that name in it."""


async def look_at(address: str, look: Callable[[Snapshot], Awaitable[T]], *, whole: bool = False) -> T:
    """Let `look` see a run in a database, as it stood at one moment; it may be called again, and counts once.

    :param address: of the database, with the name of the run.
    :param whole: see that all of the database is whole first, where that can be told.
    :raises UsageError: if there is no such run.
    """

    async def look_at_run(snapshot: Snapshot) -> T:
        left = snapshot.left
        if left.line is None and left.complete_line is None:
            others = f"it has {', '.join(map(repr, snapshot.runs))}" if snapshot.runs else "it has none"
            raise NoSuchRun(f"there is no run {split_address(address)[1]!r} in {public(address)}: {others} (?run=NAME)")
        return await look(snapshot)

    if _scheme_of(address) == "sqlite":
        from . import sqlite_reader

        path, run = sqlite_path(address)
        return await sqlite_reader.look_at(path, run, look_at_run, whole=whole)
    if _scheme_of(address) in POSTGRES_SCHEMES:
        from . import postgres_reader

        return await postgres_reader.look_at(address, look_at_run)
    raise _unknown(address)


def retry_ends(address: str, **options: Any) -> tuple[Source, Ledger]:
    """The failed items of a complete run in a database, and the ledger that puts the new records in their places.

    :param options: as for `RetryLedger`.
    :raises UsageError: if it is no address of a database that is known.
    """
    if _scheme_of(address) == "sqlite":
        from .sqlite_retry import DatabaseFailures, SqliteRetryLedger

        return DatabaseFailures(address), SqliteRetryLedger(address, **options)
    if _scheme_of(address) in POSTGRES_SCHEMES:
        from .postgres_retry import PostgresRetryLedger
        from .sqlite_retry import DatabaseFailures

        return DatabaseFailures(address), PostgresRetryLedger(address, **options)
    raise _unknown(address)


def _database(address: str, **options: Any) -> Ledger:
    scheme = _scheme_of(address)
    if scheme == "sqlite":
        from .sqlite import SqliteLedger

        path, run = sqlite_path(address)
        return SqliteLedger(path, run, **options)
    if scheme in POSTGRES_SCHEMES:
        from .postgres import PostgresLedger

        return PostgresLedger(address, **options)
    raise _unknown(address)


def _unknown(address: str) -> UsageError:
    return UsageError(
        f"the output {public(address)} is neither a file nor a database that is known: write {SQLITE} or {POSTGRES}"
    )
