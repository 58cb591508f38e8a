"""The content of a ``.gz`` or ``.zst`` file, read as if it lay there plain; several streams in a row are one content.

It is read in one direction, from the beginning. Its end is the end of a whole stream: one that is cut short or damaged
is an error, and everything before that place is given first.
"""

from __future__ import annotations

import io
import os
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from .errors import UsageError

SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # neither is the start of a text
SKIPPED_BYTES = 1 << 20


class DamagedStream(Exception):
    """The content can not be read any further; the message says why, and where."""


def suffix_of(path: str) -> str | None:
    """The suffix that says that the file is compressed, as it is written in `path`; else None."""
    suffix = os.path.splitext(path)[1]
    return suffix if suffix.lower() in SUFFIXES else None


def check_plain(path: str | None, start: bytes) -> None:
    """:raises UsageError: if what is at `path`, or on standard input (None), begins as what is compressed does."""
    for magic, suffix in MAGIC.items():
        if start.startswith(magic):
            kind = SUFFIXES[suffix]
            if path is None:
                raise UsageError(f"standard input is compressed with {kind}: pipe it through `{kind} -dc` first")
            raise UsageError(
                f"the input {path} is compressed with {kind}, and its name does not say so: add {suffix} to it"
            )


def check_extra(path: str) -> None:
    """:raises UsageError: if what reads the file at `path` is not installed."""
    suffix = suffix_of(path)
    if suffix is None or SUFFIXES[suffix.lower()] != "zstd":
        return
    try:
        zstd()
    except ImportError as error:
        raise UsageError(
            f"{path} is compressed with zstd, which needs the extra zstd: `pip install 'async-recovery[zstd]'`"
        ) from error


class Decompressed:
    """An open compressed file. All methods run on a thread.

    :param path: the file.
    :param opener: as for the built-in ``open``.
    :raises OSError: if it can not be opened.
    """

    def __init__(self, path: str, opener: Callable[[str, int], int]) -> None:
        self._kind = SUFFIXES[(suffix_of(path) or "").lower()]
        self._raw: BinaryIO = open(path, "rb", opener=opener)  # noqa: SIM115  closed in close()
        self._offset = 0
        self._damage: DamagedStream | None = None
        self._errors: tuple[type[Exception], ...] = (EOFError, zlib.error)
        if self._kind == "gzip":
            from gzip import BadGzipFile, GzipFile

            self._content: Any = GzipFile(fileobj=self._raw)
            self._errors += (BadGzipFile,)
        else:
            self._content = zstd().ZstdFile(self._raw)
            self._errors += (zstd().ZstdError,)

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer before the end and before damage, none at the end.

        :raises DamagedStream: if nothing more can be read, although this is not the end.
        """
        parts: list[bytes] = []
        while size and self._damage is None:
            try:
                part = self._content.read1(size)
                if not part and not self._offset and not os.fstat(self._raw.fileno()).st_size:
                    raise EOFError  # the gzip reader takes a file of no bytes for one with nothing in it
            except self._errors as error:
                self._damage = self._why(error)
                break
            if not part:
                break
            parts.append(part)
            size -= len(part)
            self._offset += len(part)
        if self._damage is not None and not parts:
            raise self._damage
        return b"".join(parts)

    def seek(self, offset: int) -> int:
        """Read on to `offset`, or to the end if that comes before."""
        if offset < self._offset:
            raise io.UnsupportedOperation("a compressed file is read in one direction")
        while self._offset < offset and self.read(min(SKIPPED_BYTES, offset - self._offset)):
            pass
        return self._offset

    def fileno(self) -> int:
        """The descriptor of the compressed file."""
        return self._raw.fileno()

    def close(self) -> None:
        """Close the file."""
        self._content.close()
        self._raw.close()

    def _why(self, error: Exception) -> DamagedStream:
        place = f"after {self._offset} bytes of its content"
        if isinstance(error, EOFError):
            return DamagedStream(f"its {self._kind} stream is cut short {place}")
        return DamagedStream(f"its {self._kind} stream is damaged {place} ({' '.join(str(error).split())})")


def zstd() -> Any:
    """The module of the standard library, or its backport.

    :raises ImportError: if that is not installed.
    """
    if sys.version_info >= (3, 14):
        from compression import zstd as found
    else:
        from backports import zstd as found
    return found
