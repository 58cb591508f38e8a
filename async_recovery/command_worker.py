"""Any command as a worker: `command` runs one for each item, without a shell; `shell` runs a script of the shell.

No item is ever interpreted. For a command each item lands inside one argument, for a script it is a positional
parameter, never a part of the script's text.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from errno import EFBIG
from pathlib import Path
from typing import Any, cast

import msgspec

from .checkpoint import printable
from .errors import CommandFailed, UsageError, check_number, shorten
from .keeper import Frames, frame
from .workers import Session, SessionWorker

logger = logging.getLogger("async_recovery")

KEEPER = str(Path(__file__).with_name("keeper.py"))
KEEPER_ENDS_WITHIN_S = 5.0
MAX_OUTPUT_BYTES = 10 << 20
PLACEHOLDER = re.compile(r"\{(?:\.([^{}]+))?\}")
_PARAMETER = re.compile(r"\$\{?[1@*]")


def command(words: str | Sequence[str], *, max_output_bytes: int = MAX_OUTPUT_BYTES) -> CommandWorker:
    """A worker that runs a command for each item, without a shell.

    ``{}`` inside a word is the item: a string as it is, anything else as its JSON text. ``{.name}`` is a field of an
    item that is an object. A command with neither gets the item as its last argument. Whatever an item holds, it stays
    inside one argument. There is nothing to read on standard input, and what the command leaves in the background is
    killed when it ends.

    :param words: the command; a string is split once, as a shell would split it, and nothing else a shell does is done.
    :param max_output_bytes: a command that writes more to standard output is killed, and its item has failed.
    :returns: a worker whose result is ``{"stdout": …, "exit_status": 0}``; bytes that are not UTF-8 are written as
        ``\\xff``. Any other exit status and death by a signal raise `CommandFailed`.
    :raises UsageError: if the words can not be split, are none, or would run a program that the item names.
    """
    if isinstance(words, str):
        try:
            words = shlex.split(words)
        except ValueError as error:
            raise UsageError(f"the command {words!r} can not be split into words: {error}") from None
    given: Any = words
    if not isinstance(given, Sequence) or not given or not all(isinstance(word, str) for word in given):
        raise UsageError(f"the command is {shorten(given)}: give a program and its arguments")
    program = words[0]
    if PLACEHOLDER.search(program):
        raise UsageError(f"the program {program!r} would depend on the item: name one, such as sh or env, that runs it")
    if not any(PLACEHOLDER.search(word) for word in words):
        words = [*words, "{}"]
    return CommandWorker("exec", words, 1, max_output_bytes)


def shell(script: str, *, max_output_bytes: int = MAX_OUTPUT_BYTES) -> CommandWorker:
    """A worker that runs a script of ``/bin/sh`` for each item.

    ``{}`` outside of quotes is the item, and ``{.name}`` a field of it, as for `command`. The item never becomes a part
    of the script: it is its first parameter, and ``{}`` is written for ``"$1"``, which can be used as well.

    :param script: what ``sh -c`` runs.
    :param max_output_bytes: see `command`, as for all that is said there of results.
    :raises UsageError: if the script does not say where the item goes, or has ``{}`` in quotes.
    """
    if not isinstance(script, str):
        raise UsageError(f"the script is {shorten(script)}: it must be a string")
    fields: list[str] = []
    text, end, quotes = "", 0, _quotes(script)
    for found in PLACEHOLDER.finditer(script):
        if quotes[found.start()]:
            raise UsageError(
                f"{found[0]} is in quotes in the shell command {script!r}: write it outside of them, it is one word "
                'whatever the item holds (inside of "double quotes", $1 is the item)'
            )
        if found[1] is not None and found[1] not in fields:
            fields.append(found[1])
        parameter = 1 if found[1] is None else fields.index(found[1]) + 2
        text += script[end : found.start()] + f'"${{{parameter}}}"'
        end = found.end()
    text += script[end:]
    if not end and not _PARAMETER.search(script):
        raise UsageError(f"the shell command {script!r} does not say where the item goes: write {{}} there")
    parameters = ["{}", *(f"{{.{name}}}" for name in fields)]
    return CommandWorker("shell", ["/bin/sh", "-c", text, "sh", *parameters], 4, max_output_bytes)


def _quotes(script: str) -> list[bool]:
    """Whether each character of a script stands in quotes, or behind a backslash.

    Comments and here-documents are taken for text like any other: an apostrophe in one is taken for a quote.
    """
    found, quote, escaped = [], "", False
    for character in script:
        found.append(bool(quote) or escaped)
        if escaped:
            escaped = False
        elif character == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
    return found


class CommandWorker(SessionWorker):
    """Made by `command` and `shell`.

    :param kind: ``"exec"`` or ``"shell"``.
    :param words: with placeholders.
    :param literal: so many words at the start are taken as they are.
    :param max_output_bytes: see `command`.
    :ivar program: the first word.
    """

    def __init__(self, kind: str, words: Sequence[str], literal: int, max_output_bytes: int) -> None:
        from hashlib import sha256  # 5 ms that no other command line has to spend

        check_number("max_output_bytes (--max-output)", max_output_bytes, least=0, most=1 << 30)
        raw = [os.fsencode(word) for word in words]
        if b"\0" in b"".join(raw):
            raise UsageError(f"the command {shorten(list(words))} holds a NUL byte, which no argument can hold")
        self.name = f"{kind} sha256:{sha256(bytes(1).join(raw)).hexdigest()[:32]}"
        self.program = words[0]
        self._title = "the shell command" if kind == "shell" else printable(os.path.basename(self.program))
        self.max_output_bytes = max_output_bytes
        self._literal = raw[:literal]
        self._patterns = [_pattern(word) for word in words[literal:]]

    def begin(self) -> Session:
        return _Commands(self)

    def words(self, item: Any) -> list[bytes]:
        """The command for an item.

        :raises ValueError: if there is none: it wants a field that is not there, or an argument would hold a NUL byte.
        """
        words = list(self._literal)
        for word, rest in self._patterns:
            for field, after in rest:
                word += _text(item if field is None else _field(item, field)) + after
            if b"\0" in word:
                raise ValueError("the item holds a NUL byte, which no argument of a command can hold")
            words.append(word)
        return words

    def result(self, item: Any, code: int, trouble: int, out: bytes, err: bytes) -> dict[str, Any]:
        """What came of a command.

        :raises CommandFailed: if it failed.
        """
        if not code and not trouble:
            return {"stdout": out.decode("utf-8", "backslashreplace"), "exit_status": 0}
        if trouble == EFBIG:
            message = f"{self._title} wrote more than {self.max_output_bytes} bytes to standard output (--max-output)"
        elif trouble:
            message = f"{self._title} can not be started: {os.strerror(trouble)}"
        elif code < 0:
            message = f"{self._title} was killed by {_signal_name(-code)}"
        else:
            message = f"{self._title} ended with exit status {code}"
        if err.strip():
            # For people alone: it may differ from run to run, and the record of a failure must not.
            said = err.decode("utf-8", "backslashreplace").strip()
            logger.info("%s (item %s) said: %s", message, shorten(item), ascii(said)[1:-1])
        raise CommandFailed(message, code if not trouble else None)


def _pattern(word: str) -> tuple[bytes, list[tuple[str | None, bytes]]]:
    """What stands before the first placeholder; for each its field, None for the item itself, and what follows it."""
    first, *rest = PLACEHOLDER.split(word)
    return os.fsencode(first), [(field, os.fsencode(after)) for field, after in zip(rest[::2], rest[1::2], strict=True)]


def _text(value: Any) -> bytes:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else msgspec.json.encode(value)


def _field(item: Any, name: str) -> Any:
    if not isinstance(item, Mapping):
        raise ValueError(f"the command has {{.{name}}}, but the item is no object with fields")
    if name not in item:
        raise ValueError(f"the command has {{.{name}}}, but the item has no field of that name")
    return item[name]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


class _Commands(Session):
    """The commands of one run: they belong to a keeper of their own, which starts with the first of them."""

    def __init__(self, worker: CommandWorker) -> None:
        self._worker = worker
        self._link: asyncio.Future[_Link] | None = None

    async def __call__(self, item: Any) -> dict[str, Any]:
        words = self._worker.words(item)
        if self._link is None or (self._link.done() and (self._link.exception() or self._link.result().is_lost)):
            self._link = asyncio.ensure_future(self._begin(self._link))
        link = self._link.result() if self._link.done() else await asyncio.shield(self._link)
        return self._worker.result(item, *await link.run(words, self._worker.max_output_bytes))

    async def aclose(self) -> None:
        link, self._link = self._link, None
        await self._end(link)

    async def _begin(self, lost: asyncio.Future[_Link] | None) -> _Link:
        await self._end(lost)
        return await _Link.begin()

    async def _end(self, link: asyncio.Future[_Link] | None) -> None:
        if link is not None:
            await asyncio.wait({link})
            if link.exception() is None:
                await link.result().aclose()


Ended = tuple[int, int, bytes, bytes]


class _Link(asyncio.Protocol):
    """Our end of the socket to a keeper.

    :ivar is_lost: the keeper is gone.
    """

    @classmethod
    async def begin(cls) -> _Link:
        """Start a keeper."""
        ours, theirs = socket.socketpair()
        with theirs:
            keeper = await asyncio.to_thread(_start_keeper, theirs)
        _, link = await asyncio.get_running_loop().create_connection(lambda: cls(keeper), sock=ours)
        return link

    def __init__(self, keeper: subprocess.Popen[bytes]) -> None:
        self._keeper = keeper
        self._frames = Frames()
        self._waiting: dict[int, asyncio.Future[Ended]] = {}
        self._number = 0
        self._transport: asyncio.WriteTransport
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's are none by type

    def data_received(self, data: bytes) -> None:
        for number, *ended in self._frames.feed(data):
            waiting = self._waiting.pop(number)
            if not waiting.done():
                waiting.set_result(tuple(ended))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(CommandFailed("the process that runs the commands was killed", None))
        self._waiting.clear()

    async def run(self, words: list[bytes], most: int) -> Ended:
        """Run a command to its end. Cancelled, it kills it with its whole group, and waits for that."""
        if self.is_lost:
            raise CommandFailed("the process that runs the commands was killed", None)
        number = self._number = self._number + 1
        ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._waiting[number] = ended
        self._transport.write(frame((number, words, most)))
        try:
            await asyncio.wait({ended})
        except asyncio.CancelledError:
            if not ended.done():
                self._transport.write(frame((number,)))
                await asyncio.wait({ended})
            ended.exception()  # looked at, so that nobody is told of it
            raise
        return ended.result()

    async def aclose(self) -> None:
        """End the keeper, and with it all that still runs."""
        self._transport.close()
        await asyncio.to_thread(_await_keeper, self._keeper)


def _start_keeper(theirs: socket.socket) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-I", "-S", KEEPER, str(os.getpid())]
    return subprocess.Popen(words, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True)


def _await_keeper(keeper: subprocess.Popen[bytes]) -> None:
    try:
        keeper.wait(KEEPER_ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()
