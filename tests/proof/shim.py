"""The shim between the process and the kernel (`shim.c`): how it is built, told what to do, and read."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.support.fork_server import Preparation

SOURCE = Path(__file__).with_name("shim.c")
KINDS = ("before", "after", "middle", "short", "ENOSPC", "full", "EIO")
ERRORS = {"ENOSPC": errno.ENOSPC, "full": errno.ENOSPC, "EIO": errno.EIO}
CHANGING = frozenset({"write", "pwrite", "ftruncate", "fchmod", "fsync", "fdatasync", "rename", "unlink", "mkdir"})
LOOKING = frozenset({"read", "pread", "fstat", "lstat"})


class Fault(NamedTuple):
    """What is done to one call.

    :ivar kind: the process is killed ``"before"`` a call, ``"after"`` it, or in the ``"middle"`` of a write; a write is
        ``"short"``; a call that needs room gives ``"ENOSPC"`` once; a disk is ``"full"``: half of a write is taken, and
        from then on nothing; a call gives ``"EIO"`` once.
    :ivar at: which one of the calls that the kind applies to, counted from 0.
    """

    kind: str
    at: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.at}"


class Call(NamedTuple):
    """One call on one of the job's own files, as the shim wrote it down.

    :ivar size: bytes; of an open, its flags.
    :ivar offset: -1 where a call has none.
    :ivar result: what it returned, or minus its errno.
    :ivar done: the kind of the fault that was done to it; else empty.
    """

    name: str
    path: str
    other: str
    size: int
    offset: int
    result: int
    done: str

    @property
    def changes(self) -> bool:
        """Whether it writes, makes durable, or changes a name."""
        return self.name in CHANGING or (self.name == "open" and bool(self.size & (os.O_CREAT | os.O_TRUNC)))

    @property
    def only_looks(self) -> bool:
        return self.name in LOOKING

    @property
    def of_lock(self) -> bool:
        return self.path.removesuffix(" (deleted)").endswith(".lock")


def compiler() -> str | None:
    """What builds the shim; None if the machine lacks it."""
    return shutil.which("gcc")


def compiled(folder: Path) -> Path:
    """The shim as a shared object in `folder`."""
    shim = folder / "shim.so"
    flags = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run([compiler() or "gcc", *flags, "-o", str(shim), str(SOURCE)], check=True)
    return shim


def planned(own: Iterable[Path], fault: Fault | None) -> Preparation:
    """What a fork is prepared with."""
    kind, at = ("", 0) if fault is None else fault
    return f"{__name__}:plan", ["\n".join(map(str, own)), kind, str(at)]


def plan(report: int, own: str, kind: str, at: str) -> None:
    """In the process that has the shim loaded: from now on it writes down the calls, and does what it is to do."""
    shim_plan = ctypes.CDLL(None).shim_plan
    shim_plan.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    if shim_plan(own.encode(), kind.encode(), int(at), report) != 0:
        raise ValueError(f"the shim does not understand {kind!r} on {own!r}")


def calls_in(report: Iterable[str]) -> list[Call]:
    """The calls that the shim wrote down, in the order in which they returned."""
    found = []
    for line in (lines := list(report)):
        if line.count("\t") != 6:
            raise ValueError(f"the shim has written {line!r}, which is no call, among {lines}")
        name, path, other, size, offset, result, done = line.split("\t")
        found.append(Call(name, path, other, int(size), int(offset), int(result), done))
    return found
