"""Ways to break the lock, each of which layer 15 has to notice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

from async_recovery import lock
from async_recovery.lock import Lock


class Mutant(NamedTuple):
    """A defect.

    :ivar patch: makes it.
    :ivar shows: the scenario in which it shows; None: among the orders of system calls. `says`: what is said of it.
    """

    patch: Callable[[], AbstractContextManager[Any]]
    shows: str | None
    says: str


class _Nothing(set[Any]):
    def add(self, element: Any) -> None:
        pass


def _gives_up_first(self: Lock) -> None:
    held = self._descriptor is not None
    self.forget()
    if held:
        with contextlib.suppress(FileNotFoundError):
            vars(lock)["os"].unlink(self.path)


def _locks_output_only(descriptor: int, path: str) -> None:
    if not path.endswith(".lock"):
        _lock(descriptor, path)


def _instead(owner: Any, name: str, broken: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, broken)


_lock = lock._lock
_no_lock = _instead(lock, "_lock", lambda descriptor, path: None)
_no_lock_on_its_file = _instead(lock, "_lock", _locks_output_only)
_no_comparison = _instead(lock, "_is_at", lambda descriptor, path: True)

MUTANTS = {
    "no flock": Mutant(_no_lock, None, "begins beside"),
    "no comparison of inodes": Mutant(_no_comparison, None, "begins beside"),
    "unlinked without the lock": Mutant(_instead(Lock, "release", _gives_up_first), None, "begins beside"),
    "never unlinked": Mutant(_instead(Lock, "release", Lock.forget), None, "the lock's file is left"),
    "no flock, two starts": Mutant(_no_lock, "starts", "2 proceed"),
    "no flock, a stopped holder": Mutant(_no_lock_on_its_file, "a stopped holder", "out.json.partial is held"),
    "no comparison of inodes, an old one": Mutant(_no_comparison, "an old inode", "out.json.partial is held"),
    "only the file is asked who holds it": Mutant(
        _instead(lock, "_flocks", lambda: None), "a holder that is not named yet", "is held by another process"
    ),
    "a child keeps the lock": Mutant(_instead(lock, "_held", _Nothing()), "a forked child", "is held by process"),
}
