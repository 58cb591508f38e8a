"""A file system in memory, behind the seam, that knows what a crash can leave of it.

Each inode and the directory have three faces: what is durable, the changes that are not, and what the cache shows. An
fsync makes changes durable; a kill of the process leaves all three as they are; a power cut leaves one of many states:

* A write may be lost, whole, cut at any byte, whole in some sectors only (the others as before, or zeros beyond the
  end), or its length may be there without its bytes. Each write on its own, in any combination.
* The bytes of a lost write can lie beyond the end of its file. Another write that goes there, and of which a second
  power cut leaves the length alone, brings them back (seen on ext4). A truncation that makes the file shorter clears
  them.
* ``posix``: every unsynced operation on names (create, rename, unlink) and every truncation is kept or lost on its
  own. A file's fsync says nothing of its name.
* ``ext4``: those operations are in one journal, and a prefix of it is kept. Any fsync commits all of the journal.

No caps: more states than `MOST_STATES` at one point raise `TooManyStates`, they are never left out.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from async_recovery.files import Files

Rules = Literal["posix", "ext4"]
RULES: tuple[Rules, ...] = ("posix", "ext4")
Tearing = Literal["bytes", "sectors"]

SECTOR_BYTES = 256
MOST_STATES = 2_000_000


class TooManyStates(Exception):
    """A limit of the enumeration was hit: the test fails, no state is left out in silence."""


class Change(NamedTuple):
    """A change of a file's bytes: `data` written at `offset`, or (None) a truncation to it."""

    number: int
    offset: int
    data: bytes | None


class Naming(NamedTuple):
    """A change of names: `old` goes (if it leads to `inode`), `new` leads to `inode`; either may be absent."""

    number: int
    old: str | None
    new: str | None
    inode: int


class Inode(NamedTuple):
    """A file: what is durable, what is not yet, what a reader sees, and what lies on the disk beyond its end."""

    durable: bytes = b""
    pending: tuple[Change, ...] = ()
    cached: bytes = b""
    beyond: bytes = b""


class World(NamedTuple):
    """Everything at one moment; never changed in place.

    :ivar durable: the names that are durable; `names`: those that a process sees.
    :ivar committed: (ext4) truncations up to this number are in the committed journal.
    """

    inodes: dict[int, Inode]
    durable: dict[str, int]
    namings: tuple[Naming, ...]
    names: dict[str, int]
    number: int = 0
    committed: int = 0

    @property
    def is_settled(self) -> bool:
        """Whether everything is durable, and the cache shows what is."""
        if self.namings or self.names != self.durable:
            return False
        return all(not inode.pending and inode.durable == inode.cached for inode in self.inodes.values())

    def key(self) -> object:
        """Equal for worlds that no process and no crash can tell apart."""
        if self.is_settled:
            return tuple((path, self.inodes[number]) for path, number in sorted(self.names.items()))
        names = (tuple(sorted(self.names.items())), tuple(sorted(self.durable.items())))
        reachable = {*self.names.values(), *self.durable.values()}
        return names, self.namings, self.committed, tuple((n, self.inodes[n]) for n in sorted(reachable))

    def read(self, path: str) -> bytes | None:
        """What a reader sees at `path`; None if there is nothing."""
        number = self.names.get(path)
        return None if number is None else self.inodes[number].cached


def settled(files: dict[str, bytes], beyond: dict[str, bytes] | None = None) -> World:
    """A world in which `files` are durable and nothing else is; `beyond`: what lies beyond their ends."""
    more = beyond or {}
    inodes = {
        number: Inode(files[path], (), files[path], more.get(path, b"")) for number, path in enumerate(sorted(files), 1)
    }
    names = {path: number for number, path in enumerate(sorted(files), 1)}
    return World(inodes, names, (), names)


def overlay(content: bytes, offset: int, data: bytes) -> bytes:
    """`content` after `data` was written at `offset`."""
    return content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]


def applied(content: bytes, change: Change) -> bytes:
    """`content` after all of `change`."""
    if change.data is None:
        return content[: change.offset].ljust(change.offset, b"\0")
    return overlay(content, change.offset, change.data)


def remains(content: bytes, change: Change, tearing: Tearing, beyond: bytes) -> Iterator[bytes]:
    """What a power cut can leave of `content` if `change` was not durable; duplicates are possible."""
    yield content
    yield applied(content, change)
    if change.data is None:
        return
    start, data = change.offset, change.data
    end = start + len(data)
    if end > len(content):
        yield content.ljust(end, b"\0")
        yield (content + beyond)[:end].ljust(end, b"\0")
    first = SECTOR_BYTES - start % SECTOR_BYTES
    edges = [0, *range(first, len(data), SECTOR_BYTES), len(data)]
    cuts = range(1, len(data)) if tearing == "bytes" else sorted({1, len(data) // 2, len(data) - 1, *edges[1:-1]})
    for cut in cuts:
        yield overlay(content, start, data[:cut])
    pieces = list(itertools.pairwise(edges))
    if 2 ** len(pieces) > MOST_STATES:
        raise TooManyStates(f"one write touches {len(pieces)} sectors")
    for kept in itertools.product((False, True), repeat=len(pieces)):
        torn = content
        for (low, high), keep in zip(pieces, kept, strict=True):
            torn = overlay(torn, start + low, data[low:high]) if keep else torn
        yield torn


def contents(inode: Inode, tearing: Tearing, kept: int | None, committed: int) -> list[bytes]:
    """Every content that a power cut can leave; `kept` (ext4): truncations up to that number are kept, others lost."""
    found = {inode.durable: None}
    for change in inode.pending:
        if change.data is None and change.number <= max(kept or 0, committed):
            found = {applied(content, change): None for content in found}
        elif change.data is not None or kept is None:
            beyond = inode.beyond if change is inode.pending[0] else b""  # the first change clears it
            found = {left: None for content in found for left in remains(content, change, tearing, beyond)}
        if len(found) > MOST_STATES:
            raise TooManyStates(f"one file alone has more than {MOST_STATES} states")
    return list(found)


def on_the_disk(inode: Inode) -> tuple[bytes, bytes]:
    """The content when all that is pending is durable, and what then lies beyond its end."""
    content, beyond = inode.durable, inode.beyond
    for change in inode.pending:
        before, content = content, applied(content, change)
        beyond = b"" if len(content) < len(before) else beyond[len(content) - len(before) :]
    return content, beyond


def beyond_the_end(inode: Inode) -> Iterator[bytes]:
    """What a power cut that leaves the file as it was can leave beyond its end: as it was, or the bytes of a write."""
    yield inode.beyond
    whole = inode.durable
    for change in inode.pending:
        whole = applied(whole, change)
    if whole[len(inode.durable) :]:
        yield whole[len(inode.durable) :]


def renamed(names: dict[str, int], naming: Naming) -> None:
    """Carry out `naming` in `names`."""
    if naming.old is not None and names.get(naming.old) == naming.inode:
        del names[naming.old]
    if naming.new is not None:
        names[naming.new] = naming.inode


def power_cuts(world: World, rules: Rules, tearing: Tearing) -> Iterator[World]:
    """Every state that a power cut at this moment can leave, always in the same order; duplicates are possible."""
    for namings, kept in _names_kept(world, rules):
        names = dict(world.durable)
        for naming in namings:
            renamed(names, naming)
        paths = sorted(names)
        choices = [_left_of(world.inodes[names[path]], tearing, kept, world.committed) for path in paths]
        if math.prod(map(len, choices)) > MOST_STATES:
            raise TooManyStates(f"more than {MOST_STATES} states at one point")
        for chosen in itertools.product(*choices):
            files = {path: content for path, (content, _) in zip(paths, chosen, strict=True)}
            yield settled(files, {path: beyond for path, (_, beyond) in zip(paths, chosen, strict=True)})


def _left_of(inode: Inode, tearing: Tearing, kept: int | None, committed: int) -> list[tuple[bytes, bytes]]:
    """Every content, and what lies beyond its end."""
    left = contents(inode, tearing, kept, committed)
    if left[0] != inode.durable:
        return [(content, b"") for content in left]
    return [(left[0], beyond) for beyond in beyond_the_end(inode)] + [(content, b"") for content in left[1:]]


def _names_kept(world: World, rules: Rules) -> Iterator[tuple[list[Naming], int | None]]:
    if rules == "posix":
        if 2 ** len(world.namings) > MOST_STATES:
            raise TooManyStates(f"{len(world.namings)} unsynced operations on names")
        for kept in itertools.product((False, True), repeat=len(world.namings)):
            yield list(itertools.compress(world.namings, kept)), None
        return
    cuts = {naming.number for naming in world.namings}
    cuts |= {c.number for inode in world.inodes.values() for c in inode.pending if c.data is None}
    for last in sorted({world.committed, *cuts}):
        yield [naming for naming in world.namings if naming.number <= last], last


class MemoryFiles(Files):
    """The seam over a `World`.

    :param watch: called with the number of the operation just done, its words, the world then, and whether only a
        kill of the process (and no power cut) is new in it.
    :ivar dies_at: from this operation on the file system is shut down: nothing reaches the disk, every change and every
        read is EIO. But an fsync of a directory (on XFS), and whatever fsync is under way when it happens (on ext4 and
        XFS, in one of ten), return 0 without effect.
    :ivar fails_at: the fsync of this number gives EIO once, and `failed` says that it did. Of a file, `fails_with` is
        what then is on the disk (None: as it was before); the cache goes on showing everything, and no later fsync
        will write it. Of a directory, its names are as they were: shown, and not durable yet.
    """

    def __init__(
        self, world: World, rules: Rules, watch: Callable[[int, str, World, bool], None] | None = None
    ) -> None:
        self.world = world
        self.operation = 0
        self.words: list[str] = []
        self.dies_at: int | None = None
        self.fails_at: int | None = None
        self.fails_with: bytes | None = None
        self.at_failure: Inode | None = None
        self.forbidden: list[str] = []
        self._rules = rules
        self._watch = watch
        self._descriptors: dict[int, int] = {}
        self._next = 100
        self.failed = False
        self._met_death = False

    @property
    def dead(self) -> bool:
        """Whether the file system is shut down."""
        return self.dies_at is not None and self.operation >= self.dies_at

    def _begin(self, words: str) -> None:
        """A changing operation starts."""
        if self.failed:
            self.forbidden.append(words)
        if self.dead:
            self._met_death = True
            raise OSError(errno.EIO, os.strerror(errno.EIO), words)

    def _done(self, words: str, world: World) -> None:
        inodes, durable, namings, names, number, committed = world
        self.world = World(inodes, durable, namings, names, number + 1, committed)
        self.operation += 1
        if self._watch is not None:
            self.words.append(words)
            self._watch(self.operation, words, self.world, False)  # noqa: FBT003

    def _change(self, number: int, change: Change) -> World:
        inode = self.world.inodes[number]
        grown = inode._replace(pending=(*inode.pending, change), cached=applied(inode.cached, change))
        return self.world._replace(inodes={**self.world.inodes, number: grown})

    def _rename(self, naming: Naming) -> World:
        names = dict(self.world.names)
        renamed(names, naming)
        return self.world._replace(names=names, namings=(*self.world.namings, naming))

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        number = self.world.names.get(path)
        if number is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            self._begin(f"create {path}")
            number = max(self.world.inodes, default=0) + 1
            self.world = self.world._replace(inodes={**self.world.inodes, number: Inode()})
            self._done(f"create {path}", self._rename(Naming(self.world.number + 1, None, path, number)))
        elif flags & os.O_TRUNC and self.world.inodes[number].cached:
            self._begin(f"truncate {path}")
            self._done(f"truncate {path}", self._change(number, Change(self.world.number + 1, 0, None)))
        self._next += 1
        self._descriptors[self._next] = number
        return self._next

    def close(self, descriptor: int) -> None:
        del self._descriptors[descriptor]

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        if self.dead:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "read")
        return self.world.inodes[self._descriptors[descriptor]].cached[offset : offset + size]

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        number, words = self._descriptors[descriptor], f"write {len(data)} bytes at {offset}"
        self._begin(words)
        half = bytes(data[: len(data) // 2])
        if half and self._watch is not None:
            world = self._change(number, Change(self.world.number + 1, offset, half))
            self._watch(self.operation + 1, f"half of: {words}", world, True)  # noqa: FBT003
        self._done(words, self._change(number, Change(self.world.number + 1, offset, bytes(data))))
        return len(data)

    def chmod(self, descriptor: int, mode: int) -> None:
        self._begin("chmod")

    def truncate(self, descriptor: int, size: int) -> None:
        self._begin("truncate")
        change = Change(self.world.number + 1, size, None)
        self._done(f"truncate to {size}", self._change(self._descriptors[descriptor], change))

    def fdatasync(self, descriptor: int) -> None:
        self._sync(descriptor, "fdatasync")

    def fsync(self, descriptor: int) -> None:
        self._sync(descriptor, "fsync")

    def _sync(self, descriptor: int, words: str) -> None:
        if self.dead and not self._met_death:
            self._met_death = True
            return
        self._begin(words)
        number = self._descriptors[descriptor]
        inode = self.world.inodes[number]
        if self.operation + 1 == self.fails_at:
            self.failed, self.at_failure = True, inode
            on_disk = inode.durable if self.fails_with is None else self.fails_with
            failed = Inode(on_disk, (), inode.cached)
            self._done(f"{words} fails", self.world._replace(inodes={**self.world.inodes, number: failed}))
            raise OSError(errno.EIO, os.strerror(errno.EIO), words)
        world = self.world
        if inode.pending:  # without, a cache that shows what is not on the disk stays so
            on_disk, beyond = on_the_disk(inode)
            world = world._replace(inodes={**world.inodes, number: Inode(on_disk, (), inode.cached, beyond)})
        if self._rules == "ext4":
            world = _journal_committed(world)
        self._done(words, world)

    def stat(self, descriptor: int) -> os.stat_result:
        return self._stat(self._descriptors[descriptor])

    def lstat(self, path: str) -> os.stat_result | None:
        number = self.world.names.get(path)
        return None if number is None else self._stat(number)

    def _stat(self, number: int) -> os.stat_result:
        links = sum(1 for there in self.world.names.values() if there == number)
        size = len(self.world.inodes[number].cached)
        return os.stat_result((stat.S_IFREG | 0o644, number, 1, links, 0, 0, size, 0, 0, 0))

    def rename(self, source: str, target: str) -> None:
        words = f"rename {source} to {target}"
        self._begin(words)
        inode = self.world.names[source]
        self._done(words, self._rename(Naming(self.world.number + 1, source, target, inode)))

    def unlink(self, path: str) -> None:
        self._begin(f"unlink {path}")
        inode = self.world.names.get(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._done(f"unlink {path}", self._rename(Naming(self.world.number + 1, path, None, inode)))

    def drop_cache(self, descriptor: int) -> None:
        number = self._descriptors[descriptor]
        inode = self.world.inodes[number]
        if not inode.pending and inode.cached != inode.durable:  # dirty pages are never dropped
            shown = inode._replace(cached=inode.durable)
            self.world = self.world._replace(inodes={**self.world.inodes, number: shown})

    def fsync_directory(self, path: str) -> None:
        if self.dead:
            self._met_death = True
            return
        words = f"fsync directory {path}"
        self._begin(words)
        if self.operation + 1 == self.fails_at:
            self.failed = True
            self._done(f"{words} fails", self.world)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if self._rules == "ext4":
            self._done(words, _journal_committed(self.world))
            return
        durable, rest = dict(self.world.durable), []
        for naming in self.world.namings:
            if str(PurePosixPath(naming.new or naming.old or "").parent) == path:
                renamed(durable, naming)
            else:
                rest.append(naming)
        self._done(words, self.world._replace(durable=durable, namings=tuple(rest)))


def _journal_committed(world: World) -> World:
    durable = dict(world.durable)
    for naming in world.namings:
        renamed(durable, naming)
    return world._replace(durable=durable, namings=(), committed=world.number)
