"""File systems of our own: ext4 and XFS in memory behind a loop device, and tmpfs.

They are mounted in a mount namespace that this process has for itself. The kernel takes all of it away when the last
process of the namespace is gone: the mounts, then the loop devices (autoclear), then the memory. So nothing is left
behind by any test, whatever becomes of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

READ_ONLY, REMOUNT, BIND = 1, 32, 4096
_RECURSIVE_PRIVATE = 0x4000 | 0x40000
_NEW_NAMESPACE = 0x20000
_DIES_WITH_PARENT = 1
_DETACH = 2

_LOOP_GET_FREE, _LOOP_CONFIGURE, _LOOP_AUTOCLEAR = 0x4C82, 0x4C0A, 4
_SHUTDOWN = 0x8004587D
SHUTDOWNS = {"NOLOGFLUSH": 2, "LOGFLUSH": 1, "DEFAULT": 0}
"""What still reaches the disk: nothing, the log, or everything."""
SETTLES_WITHIN = 10_000  # attempts

_libc = ctypes.CDLL(None, use_errno=True)


class Kind(NamedTuple):
    """A kind of file system: its name in `mount`, its size, how it is made, and the options of its mounts."""

    file_system: str
    size_mb: int
    make: tuple[str, ...]
    options: str = ""


_MAKE_EXT4 = ("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0")
KINDS = {
    "xfs": Kind("xfs", 300, ("mkfs.xfs", "-q", "-f")),
    "ext4": Kind("ext4", 64, _MAKE_EXT4),
    "ext4-noauto_da_alloc": Kind("ext4", 64, _MAKE_EXT4, "noauto_da_alloc"),
}


def lacking(*kinds: str) -> str | None:
    """What this machine lacks for these kinds of disks (none given: for mounts at all), or None."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "mounts need root and unshare"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"no mount namespace can be made: {tried.stderr.strip()}"
    known = Path("/proc/filesystems").read_text().split()
    for kind in map(KINDS.__getitem__, kinds):
        if shutil.which(kind.make[0]) is None:
            return f"there is no {kind.make[0]} (packages e2fsprogs, xfsprogs)"
        if kind.file_system not in known or not os.access("/dev/loop-control", os.R_OK | os.W_OK):
            return f"the kernel has no {kind.file_system} or no loop devices"
    return None


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


def enter_own_namespace() -> None:
    """From now on the mounts of this process and its children are theirs alone."""
    _call("unshare", _NEW_NAMESPACE)
    _call("mount", b"none", b"/", None, _RECURSIVE_PRIVATE, None)


def die_with_parent() -> None:
    """In a child: a parent that is killed must not leave it behind, and with it the namespace."""
    _call("prctl", _DIES_WITH_PARENT, 9, 0, 0, 0)


def mount(source: str, point: Path, file_system: str = "none", options: str = "", flags: int = 0) -> None:
    """See mount(2)."""
    _call("mount", source.encode(), os.fsencode(point), file_system.encode(), flags, options.encode())


def unmount(point: Path) -> None:
    """See umount(2)."""
    _call("umount2", os.fsencode(point), 0)


def release(point: Path) -> None:
    """Take away all that is mounted at `point` and below, in use or not."""
    while os.path.ismount(point):
        _call("umount2", os.fsencode(point), _DETACH)


def _fsync_until_0(descriptor: int) -> None:
    for _ in range(SETTLES_WITHIN):
        with contextlib.suppress(OSError):
            return os.fsync(descriptor)
    raise RuntimeError(f"an fsync failed {SETTLES_WITHIN} times after the cut; expected: XFS lets it return 0")


class Disk:
    """A file system in memory, mounted at `point` while the `with` lasts.

    Each mount has a new loop device: nothing of what the kernel remembered of the disk outlives an unmount.
    """

    def __init__(self, kind: str, point: Path) -> None:
        self.point = point
        self._kind = KINDS[kind]

    def __enter__(self) -> Disk:
        self._image = os.memfd_create("disk")
        os.ftruncate(self._image, self._kind.size_mb << 20)
        image = f"/proc/self/fd/{self._image}"
        made = subprocess.run([*self._kind.make, image], pass_fds=[self._image], capture_output=True, check=False)
        assert made.returncode == 0, made.stderr
        self._mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            unmount(self.point)
        except OSError:
            if error is None:
                raise
        finally:
            os.close(self._image)

    def cut(self, mode: str, *, settles: bool = False) -> None:
        """From now on nothing reaches the disk any more: every use of the file system fails.

        :param settles: wait until XFS has given up, in a thread of the kernel, what it had not written: until then an
            fsync of the directory that was open before may fail or not; from then on it returns 0, for nothing.
        """
        root = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(root, _SHUTDOWN, struct.pack("I", SHUTDOWNS[mode]))
            if settles:
                _fsync_until_0(root)
        finally:
            os.close(root)

    def remount(self) -> None:
        """As after a start of the machine: the log is replayed."""
        unmount(self.point)
        self._mount()

    def _mount(self) -> None:
        device, loop = self._attached()
        try:
            mount(device, self.point, self._kind.file_system, self._kind.options)
        finally:
            os.close(loop)

    def _attached(self) -> tuple[str, int]:
        """A loop device for the image, free again when it is neither mounted nor open."""
        info = struct.pack("<5Q4I160s2Q", 0, 0, 0, 0, 0, 0, 0, 0, _LOOP_AUTOCLEAR, b"", 0, 0)
        while True:
            control = os.open("/dev/loop-control", os.O_RDWR)
            device = f"/dev/loop{fcntl.ioctl(control, _LOOP_GET_FREE)}"
            os.close(control)
            loop = os.open(device, os.O_RDWR)
            try:
                fcntl.ioctl(loop, _LOOP_CONFIGURE, struct.pack("<2I", self._image, 0) + info + bytes(64))
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:  # somebody else was faster
                    raise
            else:
                return device, loop
