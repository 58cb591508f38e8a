"""Lives whose storage fails them on the way: each operation in turn, and what can follow.

In a state's id, a disturbance stands before the crash of that life: in ``job/ext4/9!3s+9.k/4.0`` the 9th operation is
an fsync that gives EIO with the 3rd state of its file on the disk (``s``: torn at sectors, ``b``: at bytes); the job is
started again in the same boot, and the power cut after the 4th operation of that start. ``9!down``: the file system
was shut down before the 9th operation.
"""

from __future__ import annotations

from collections.abc import Iterator

from .crash_model import MemoryFiles, Rules, Tearing, World, contents
from .explorer import (
    NOTHING,
    Explorer,
    Level,
    Life,
    Path,
    Point,
    Stopped,
    Tally,
    Violation,
    in_memory,
    path_id,
    watched,
)

Start = tuple[World, Level, Path]


class Disturber(Explorer):
    """Disturbs the first life of a job, or those that go on after each kill of it; stops at the first violation."""

    def shut_down(self) -> Tally:
        """The file system shuts down before each operation (see `MemoryFiles.dies_at`); then it is mounted again."""
        return self._disturb_all("", None)

    def fail_each_sync(self, tearing: Tearing, *, resumed: bool = False) -> Tally:
        """Each fsync gives EIO, with every state of the disk then; next a restart in the same boot, cut anywhere.

        :param tearing: how finely the writes are torn that the failed fsync did not bring to the disk.
        :param resumed: not the first life is disturbed, but each one that follows a kill of it.
        """
        return self._disturb_all("sync", tearing, resumed=resumed)

    def _disturb_all(self, kind: str, tearing: Tearing | None, *, resumed: bool = False) -> Tally:
        """Each operation with `kind` in its name is disturbed, in a life of its own."""
        first: Start = (self.case.start(self.case), NOTHING, ())
        with in_memory(self.case):
            try:
                for start in self._killed(first) if resumed else [first]:
                    for point in self._points_of(start):
                        if point.is_step and kind in point.words.split(" ")[0]:
                            self._disturb(start, point.operation, tearing)
            except Violation as violation:
                self.tally.violations.append(str(violation))
        return self.tally

    def _points_of(self, start: Start) -> list[Point]:
        world, level, path = start
        life = Life(self.case, self._scripts, MemoryFiles(world, self.rules), level)
        points = watched(life)
        life.live(first=not path)
        return points

    def _killed(self, first: Start) -> Iterator[Start]:
        for point in self._points_of(first):
            if point.is_step:
                yield from self._new(point.world, point, (), "k", kind="resumed")

    def _disturb(self, start: Start, at: int, tearing: Tearing | None) -> None:
        world, level, path = start
        on_disk: list[bytes | None] = [None]
        number = 0
        while number < len(on_disk):
            files = disturbed(world, self.rules, at, tearing, on_disk[number])
            life = Life(self.case, self._scripts, files, level)
            points = watched(life)
            name = f"{at}!down+" if tearing is None else f"{at}!{number}{tearing[0]}+"
            where = path_id(self.case, self.rules, (*path, name))
            try:
                life.live(first=not path)
            except Stopped:
                pass
            except Violation as violation:
                raise Violation(f"{where}: {violation}") from violation
            points.append(Point(at, "disturbed", files.world, life.level))
            self._then([p for p in points if p.operation >= at], path, name, same_boot=not files.dead)
            if files.forbidden:
                raise Violation(f"{where}: I9: after the failed fsync came {files.forbidden}")
            if tearing is not None and number == 0 and files.at_failure is not None:
                on_disk += contents(files.at_failure, tearing, None, 0)[1:]
            number += 1

    def _then(self, points: list[Point], path: Path, name: str, *, same_boot: bool) -> None:
        """What follows: a cut, or a restart in the same boot that is cut at any of its operations."""
        depth = len(path) + 2
        for point in points:
            if same_boot:
                for left, level, way in self._new(point.world, point, path, "k", name, kind="restart"):
                    restart = self._run(left, level, way, record=True)
                    for again, reached, on in self._crashes(restart, way, depth):
                        self._run(again, reached, on, record=False)
            if not point.kill_only:
                for left, level, way in self._cuts(point, path, depth, name):
                    self._run(left, level, way, record=False)


def disturbed(world: World, rules: Rules, at: int, tearing: Tearing | None, on_disk: bytes | None) -> MemoryFiles:
    """Files that fail at the operation of that number, 1 being the first; without `tearing`, all is shut down then."""
    files = MemoryFiles(world, rules)
    if tearing is None:
        files.dies_at = at - 1
    else:
        files.fails_at, files.fails_with = at, on_disk
    return files
