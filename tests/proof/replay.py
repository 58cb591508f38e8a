"""Lives through one state of the crash model again, with every operation told::

.venv/bin/python -m tests.proof.replay fresh-start/posix/4.k/2.1
.venv/bin/python -m tests.proof.replay fresh-start/ext4/9!3s+9.k/4.0
"""

from __future__ import annotations

import sys

from .cases import case_named
from .crash_model import MemoryFiles, Rules, Tearing, World, contents, power_cuts
from .disturbances import disturbed
from .explorer import NOTHING, Case, Level, Life, Point, Stopped, Violation, in_memory, tearing_at, watched


def replay(state: str) -> None:
    """Print what lies there at the start of each life of that state, and what it does."""
    name, rules_word, *steps = state.split("/")
    case = case_named(name)
    rules: Rules = "posix" if rules_word == "posix" else "ext4"
    world, level = case.start(case), NOTHING
    with in_memory(case):
        for depth, step in enumerate([*steps, ""]):
            disturbance, _, crash = step.rpartition("+")
            print(f"life {depth} begins with level {level} and:")
            for path in sorted(world.names):
                print(f"  {path}: {world.read(path)!r}")
            points = _lived(
                case, _files(case, rules, world, level, disturbance, first=not depth), level, first=not depth
            )
            for point in points:
                print(f"  {point.operation:3} {point.words}, level {point.level}")
            if crash:
                operation, number = crash.split(".")
                tearing = "sectors" if disturbance else tearing_at(depth + 1)
                world, level = _left(points, int(operation), number, rules, tearing)
                print(f"crash after operation {operation}, state {number}")


def _files(case: Case, rules: Rules, world: World, level: Level, disturbance: str, *, first: bool) -> MemoryFiles:
    if not disturbance:
        return MemoryFiles(world, rules)
    at, how = disturbance.split("!")
    print(f"operation {at} is disturbed: {how}")
    if how == "down":
        return disturbed(world, rules, int(at), None, None)
    tearing: Tearing = "bytes" if how[-1] == "b" else "sectors"
    files = disturbed(world, rules, int(at), tearing, None)
    if int(how[:-1]):
        _lived(case, files, level, first=first)
        assert files.at_failure is not None
        states = contents(files.at_failure, tearing, None, 0)
        files = disturbed(world, rules, int(at), tearing, states[int(how[:-1])])
    return files


def _lived(case: Case, files: MemoryFiles, level: Level, *, first: bool) -> list[Point]:
    life = Life(case, case.scripts(), files, level)
    points = watched(life)
    try:
        life.live(first=first)
    except Violation as violation:
        print(f"violation: {violation}")
    except Stopped as stopped:
        print(f"stopped: {stopped.__cause__}")
    if files.forbidden:
        print(f"after the failed fsync: {files.forbidden}")
    return points


def _left(points: list[Point], operation: int, number: str, rules: Rules, tearing: Tearing) -> tuple[World, Level]:
    point = [p for p in points if p.operation == operation and p.kill_only == (number == "h")][-1]
    if number in "kh":
        return point.world, point.level
    return list(power_cuts(point.world, rules, tearing))[int(number)], point.level


if __name__ == "__main__":
    replay(sys.argv[1])
