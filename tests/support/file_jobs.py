"""Jobs over real files on the virtual clock: a worker that does what the test says, and a look at the folder."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from async_recovery.checkpoint import Replay


class Worker:
    """Takes one second an item; items are told by their name (a string, or the field ``name`` of a mapping).

    :param fails: these items fail, half a second after the others that began with them have finished.
    :param hangs: these never finish.
    :param slow: seconds that these take.
    :param during: what to do, on a thread, while an item is worked on.

    :ivar calls: the names of the items, in the order in which they began.
    """

    def __init__(
        self,
        *,
        fails: Collection[str] = (),
        hangs: Collection[str] = (),
        slow: Mapping[str, float] | None = None,
        during: Mapping[str, Callable[[], object]] | None = None,
    ) -> None:
        self.calls: list[str] = []
        self._fails = fails
        self._hangs = hangs
        self._slow = slow or {}
        self._during = during or {}

    async def __call__(self, item: Any) -> dict[str, Any]:
        name = item if isinstance(item, str) else item["name"]
        self.calls.append(name)
        if name in self._during:
            await asyncio.to_thread(self._during[name])
        await asyncio.sleep(self._slow.get(name, 1.5 if name in self._fails else 1.0))
        if name in self._fails:
            raise RuntimeError("as the test says")
        if name in self._hangs:
            await asyncio.Event().wait()
        return {"did": name}


class OtherWorker(Worker):
    """Another worker, as far as the identity of a job goes."""


def records(names: Iterable[str]) -> list[dict[str, Any]]:
    return [{"index": index, "did": name} for index, name in enumerate(names)]


def json_lines(names: Iterable[str]) -> bytes:
    """The finished output of `Worker` over these items."""
    return b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records(names))


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in the folder: each path with its mode, and its bytes or where it leads to."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        there = path.lstat()
        content: Any = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (stat.filemode(there.st_mode), there.st_nlink, content)
    return found


def names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder))  # noqa: PTH208


def replay_of(journal: Path) -> Replay:
    """What a start would read from the journal."""
    replay = Replay()
    replay.feed(journal.read_bytes())
    return replay


def committed(journal: Path) -> set[int]:
    """The indices that are durable according to the journal."""
    if not journal.exists():
        return set()
    replay = replay_of(journal)
    if replay.complete is not None:
        return set(range(replay.complete.summary["total_items"]))
    return set() if replay.state is None else set(range(replay.state.mark)) | replay.ahead.keys()
