"""Many short lives of one job: what a start reads again does not grow with them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

import async_recovery.sources as sources
from async_recovery import ItemFailed, output_file, run_resumable
from async_recovery.checkpoint import Replay, State
from async_recovery.status import read_status

SECONDS_OF_LIFE = 3


def last_state(output: Path) -> State:
    """What the journal says now."""
    replay = Replay()
    replay.feed(Path(f"{output}.checkpoint").read_bytes())
    assert replay.state is not None
    return replay.state


def test_what_a_start_compares_stays_near_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each life does less than a grain of work; the kept points of input and output move on all the same."""
    monkeypatch.setattr(output_file, "COMPARED_BYTES", 100)
    monkeypatch.setattr(sources, "COMPARED_BYTES", 60)
    monkeypatch.setattr(sources, "PAGE_BYTES", 20)
    path, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    path.write_text("".join(f"item {index:04}\n" for index in range(60)))
    alive = 0

    async def worker(item: str) -> str:
        nonlocal alive
        if alive == SECONDS_OF_LIFE:
            raise RuntimeError("enough")
        alive += 1
        return item

    for life in range(1, 20):
        alive = 0
        with pytest.raises(ItemFailed):
            asyncio.run(run_resumable(worker, path, output=output, concurrency=1))
        state = last_state(output)
        assert state.mark == life * SECONDS_OF_LIFE
        assert state.output is not None
        assert state.output.offset - state.output.tail[0] < 300
        assert state.source.position["offset"] - state.source.position.get("tail", [0])[0] < 200
    alive = -100
    asyncio.run(run_resumable(worker, path, output=output, concurrency=1))
    assert output.read_text() == "".join(f'{{"index":{i},"result":"item {i:04}"}}\n' for i in range(60))


def test_paths_that_are_not_utf_8_are_paths_all_the_same(tmp_path: Path) -> None:
    """Input, output and checkpoint may lie in a folder of any name; a crash and a resume included."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    path, output = folder / "in.txt", folder / "out.jsonl"
    path.write_text("a\nb\nc\n")
    broken = True

    async def worker(item: str) -> str:
        if item == "c" and broken:
            raise RuntimeError("not yet")
        return item

    with pytest.raises(ItemFailed):
        asyncio.run(run_resumable(worker, path, output=output, concurrency=1))
    broken = False
    summary = asyncio.run(run_resumable(worker, path, output=output, concurrency=1))
    assert summary.executed == 1
    assert summary.output is not None
    assert summary.output.endswith("\\udce9/out.jsonl")
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.parametrize("dangling", [False, True])
def test_status_follows_the_symlink_that_the_run_follows(tmp_path: Path, *, dangling: bool) -> None:
    """The state of a job is found by the name that it was started with."""
    (tmp_path / "real").mkdir()
    if not dangling:
        (tmp_path / "real" / "out.jsonl").write_text("old\n")
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "real" / "out.jsonl")

    async def worker(item: int) -> int:
        if item == 2:
            raise RuntimeError("not yet")
        return item

    with pytest.raises(ItemFailed):
        asyncio.run(run_resumable(worker, range(3), output=link, concurrency=1))
    assert (read_status(str(link)).state, read_status(str(link)).mark) == ("interrupted", 2)
