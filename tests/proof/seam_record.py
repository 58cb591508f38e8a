"""The real command line over a seam that writes down each of its operations, with their bytes.

As a script it is a run: the file for the record, the preparations as JSON (see `fork_server`), the words of the line.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from async_recovery import cli
from async_recovery.file_ledger import FileLedger
from tests.support.faulty_files import FaultyFiles
from tests.support.fork_server import function_named

MODULE = "tests.proof.seam_record"


class Entry(NamedTuple):
    """One operation of the seam: what it was given, and what it returned, or minus its errno."""

    name: str
    arguments: tuple[Any, ...]
    result: Any


class RecordingFiles(FaultyFiles):
    """The operations of a real disk, written down as they return.

    :param record: the descriptor of a file.
    """

    def __init__(self, record: int) -> None:
        super().__init__()
        self._record = record

    def _call(self, name: str, operation: Callable[..., Any], *arguments: Any) -> Any:
        try:
            result = super()._call(name, operation, *arguments)
        except OSError as error:
            self._write(name, arguments, -(error.errno or 0))
            raise
        self._write(name, arguments, result)
        return result

    def _write(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        plain = [bytes(given) if isinstance(given, memoryview) else given for given in arguments]
        kept = result if isinstance(result, int | bytes) else None
        os.write(self._record, pickle.dumps((name, tuple(plain), kept)))


def entries_in(record: Path) -> list[Entry]:
    """What was written down, in the order in which the operations returned."""
    found = []
    with record.open("rb") as file:
        while file.peek():
            found.append(Entry(*pickle.load(file)))
    return found


def run(record: str, preparations: str, *words: str) -> None:
    """Prepare this process, and be the command line."""
    report = os.open(f"{record}.report", os.O_WRONLY | os.O_CREAT)
    for name, arguments in json.loads(preparations):
        function_named(name)(report, *arguments)
    files = RecordingFiles(os.open(record, os.O_WRONLY | os.O_CREAT))
    defaults = FileLedger.__init__.__kwdefaults__
    assert defaults is not None
    defaults["files"] = files
    sys.argv = ["async-recovery", *words]
    cli.main()


if __name__ == "__main__":
    run(*sys.argv[1:])
