"""What the kernel was told: strace's account of a run, as operations in the words of the seam.

Everything is traced but calls that can not touch a file's bytes or names; a call on one of the job's own files that is
not known here is an operation of its own name, and so a difference to any record.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .seam_record import Entry

HARMLESS = (
    "read,readv,lseek,futex,brk,munmap,mprotect,madvise,mremap,rt_sigaction,rt_sigprocmask,rt_sigreturn,sigaltstack,"
    "newfstatat,fstat,stat,lstat,statx,getdents64,readlink,readlinkat,access,faccessat2,getcwd,epoll_create1,epoll_ctl,"
    "epoll_wait,poll,select,pselect6,clock_gettime,clock_nanosleep,gettimeofday,getpid,gettid,getuid,geteuid,getgid,"
    "getegid,getrandom,sched_yield,sched_getaffinity,set_robust_list,rseq,arch_prctl,prlimit64,uname,sysinfo"
)
SEAM_WORDS = {
    "openat": "open",
    "pread64": "pread",
    "pwrite64": "pwrite",
    "fchmod": "chmod",
    "ftruncate": "truncate",
    "fadvise64": "drop_cache",
    "renameat": "rename",
    "renameat2": "rename",
    "unlinkat": "unlink",
    "mkdirat": "mkdir",
}
UNSEEN = ("io_uring", "fork", "vfork", "clone")  # work without calls, or by another process; but for threads
DESCRIPTORS_AT = {"mmap": (4,), "copy_file_range": (0, 2), "sendfile": (0, 1), "splice": (0, 2)}

LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+|\?)(?: (E[A-Z0-9]+))?(?: .*)?$")
UNFINISHED = re.compile(r"^(\d+) +(.*) <unfinished \.\.\.>$")
OPENS = re.compile(r"^\d+ +openat\(")
RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
ARGUMENT = re.compile(r'"(?:\\x[0-9a-f]{2})*"|[^",]+')


class Operation(NamedTuple):
    """One operation on one of the job's own files.

    :ivar file: its path; of a call on a descriptor the path that it was opened under, and which opening of it that was.
    :ivar details: what else was given: flags and mode, bytes and offset, size, the new name.
    :ivar result: bytes read, a count of bytes, 0, or minus errno.
    """

    name: str
    file: str
    details: tuple[Any, ...] = ()
    result: int | bytes = 0
    thread: int = 0

    @property
    def path(self) -> str:
        return self.file.partition("#")[0]


class Call(NamedTuple):
    """A line of strace's."""

    thread: int
    name: str
    arguments: list[str]
    result: int


def tracer() -> str | None:
    """What traces a run; None if the machine lacks it."""
    return shutil.which("strace")


def traced(account: Path, *command: str, env: Iterable[str] = ()) -> list[str]:
    """The command, traced into the file `account`; `env`: what its environment has besides."""
    words = [tracer() or "strace", "-f", "-qq", "--seccomp-bpf", "-xx", "-s", "10000000", "-o", str(account)]
    words += ["-e", f"trace=!{HARMLESS}", "-e", "signal=none"]
    return [*words, *(word for pair in env for word in ("-E", pair)), *command]


def calls_of(account: Path) -> Iterator[Call]:
    """The calls in the order in which they began; one that opens a file, in which it ended.

    A descriptor that another thread closes can be given out again before that thread is told that it is closed.
    """
    lines = account.read_text().splitlines()
    rest = dict(enumerate(lines))
    begun: dict[str, int] = {}
    for number, line in enumerate(lines):
        if match := UNFINISHED.match(line):
            begun[match[1]] = number
            rest[number] = line.removesuffix("<unfinished ...>")
        elif match := RESUMED.match(line):
            del rest[number]
            began = begun.pop(match[1])
            whole = rest.pop(began) + match[2].lstrip()
            rest[number if OPENS.match(whole) else began] = whole
    for _, line in sorted(rest.items()):
        if match := LINE.match(line):
            result = -getattr(errno, match[5]) if match[5] else int(match[4].replace("?", "0"), 0)
            yield Call(int(match[1]), match[2], [a.strip() for a in ARGUMENT.findall(match[3]) if a.strip()], result)
        elif "exit" not in line:
            raise ValueError(f"not understood: {line[:200]}")


class Account:
    """Operations in the making: follows what the descriptors of one process lead to."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._open: dict[int, str] = {}
        self._times: dict[str, int] = {}

    def opened(self, path: str, flags: int, mode: int, descriptor: int, thread: int) -> None:
        details = (flags, mode if flags & os.O_CREAT else 0)
        if descriptor >= 0:
            self._times[path] = self._times.get(path, 0) + 1
            self._open[descriptor] = f"{path}#{self._times[path]}"
        self.add("open", path, details, min(descriptor, 0), thread)

    def file_of(self, descriptor: int) -> str | None:
        return self._open.get(descriptor)

    def closed(self, descriptor: int, result: int, thread: int) -> None:
        self.add("close", self._open.pop(descriptor), (), result, thread)

    def add(self, name: str, file: str, details: tuple[Any, ...], result: int | bytes, thread: int) -> None:
        self.operations.append(Operation(name, file, details, result, thread))


def is_own(path: str, own: Iterable[Path]) -> bool:
    """Whether it is one of the job's own files: one of these, or one of them with anything after a dot."""
    return any(path == str(file) or path.startswith(f"{file}.") for file in own)


def from_kernel(calls: Iterable[Call], own: Sequence[Path], folder: Path) -> list[Operation]:
    """The operations on the job's own files; `folder`: what relative paths begin at."""
    account = Account()
    for call in calls:
        if call.name.startswith(UNSEEN) and "CLONE_FILES" not in " ".join(call.arguments):
            raise ValueError(f"who does this, does what can not be followed here: {call}")
        texts = [string_in(argument) for argument in call.arguments]
        paths = [str(folder / os.fsdecode(text)) for text in texts if text is not None]
        at = [call.arguments[i] for i in DESCRIPTORS_AT.get(call.name, (0,)) if i < len(call.arguments)]
        files = [file for file in (account.file_of(int(word)) for word in at if word.isdigit()) if file]
        if call.name == "openat" and is_own(paths[0], own):
            assert call.arguments[0] == "AT_FDCWD"
            mode = int(call.arguments[3], 8) if len(call.arguments) > 3 else 0
            account.opened(paths[0], flags_in(call.arguments[2]), mode, call.result, call.thread)
        elif call.name == "close" and files:
            account.closed(int(call.arguments[0]), call.result, call.thread)
        elif files:
            account.add(SEAM_WORDS.get(call.name, call.name), files[0], *_given(call, texts), call.thread)
        elif call.name not in {"write", "execve", "openat"} and any(is_own(path, own) for path in paths):
            name = "rmdir" if "AT_REMOVEDIR" in call.arguments else SEAM_WORDS.get(call.name, call.name)
            account.add(name, paths[0], tuple(paths[1:]), call.result, call.thread)
    return account.operations


def _given(call: Call, texts: list[bytes | None]) -> tuple[tuple[Any, ...], int | bytes]:
    """Details and result of a call on a descriptor."""
    words = call.arguments[1:]
    if call.name == "pwrite64":
        return (texts[1], int(words[2])), call.result
    if call.name == "pread64" and call.result >= 0:
        return (int(words[1]), int(words[2])), texts[1] or b""
    if call.name == "fchmod":
        return (int(words[0], 8),), call.result
    if call.name == "ftruncate":
        return (int(words[0]),), call.result
    if call.name == "fadvise64":
        return ((), call.result) if words == ["0", "0", "POSIX_FADV_DONTNEED"] else (tuple(words), call.result)
    return tuple(words), call.result


def from_seam(entries: Iterable[Entry]) -> list[Operation]:
    """The operations of a record, but for `stat` and `lstat`, which are harmless."""
    account = Account()
    for name, given, result in entries:
        if name == "open":
            path, flags, *mode = given
            account.opened(path, flags | os.O_CLOEXEC, mode[0] if mode else 0o666, result, 0)
        elif name == "close":
            account.closed(given[0], result or 0, 0)
        elif name in {"rename", "unlink"}:
            account.add(name, given[0], given[1:], result or 0, 0)
        elif name not in {"stat", "lstat"}:
            account.add(name, account.file_of(given[0]) or "?", given[1:], result or (b"" if name == "pread" else 0), 0)
    return account.operations


def string_in(argument: str) -> bytes | None:
    """The bytes of a string as strace writes it; None if it is something else."""
    return bytes.fromhex(argument[1:-1].replace("\\x", "")) if argument.startswith('"') else None


def flags_in(words: str) -> int:
    """O_RDWR|O_CREAT as a number."""
    return sum(getattr(os, word) for word in words.split("|"))
