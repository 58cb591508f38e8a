"""Progress: the rate and the time left that follow from one snapshot."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from async_recovery import ItemFailed, Stopped, resumable, run_resumable
from async_recovery.progress import Progress

from .support.virtual_loop import run_virtual

START = Progress(
    elapsed_s=0.0,
    resumed_from=0,
    executed=0,
    finished=0,
    failed=0,
    mark=0,
    durable_mark=0,
    frontier=0,
    ahead=0,
    in_flight=0,
    commits=0,
    held_by=None,
    held_s=0.0,
    share=None,
    share_at_start=None,
)


@pytest.mark.parametrize(
    ("executed", "elapsed_s", "items_per_s"),
    [(0, 0.0, 0.0), (5, 0.0, 0.0), (0, 3.0, 0.0), (10, 4.0, 2.5), (1, 0.001, 1_000.0), (3_000_000, 60.0, 50_000.0)],
)
def test_the_rate_is_of_this_run_alone(executed: int, elapsed_s: float, items_per_s: float) -> None:
    """Items of this run by the seconds of this run; what other runs finished does not count, nor does no time."""
    progress = msgspec.structs.replace(
        START, executed=executed, elapsed_s=elapsed_s, finished=1_000_000 + executed, resumed_from=900_000
    )
    assert progress.items_per_s == pytest.approx(items_per_s)


@pytest.mark.parametrize(
    ("elapsed_s", "share_at_start", "share", "remaining_s"),
    [
        (10.0, None, None, None),
        (10.0, None, 0.5, None),
        (10.0, 0.5, None, None),
        (10.0, 0.0, 0.0, None),
        (10.0, 0.5, 0.5, None),
        (10.0, 0.5, 0.4, None),
        (10.0, 0.0, 0.5, 10.0),
        (10.0, 0.0, 0.25, 30.0),
        (10.0, 0.5, 0.6, 40.0),
        (10.0, 0.0, 1.0, 0.0),
        (10.0, 0.9, 1.0, 0.0),
        (0.0, 0.0, 0.5, 0.0),
        (3_600.0, 0.25, 0.375, 18_000.0),
    ],
)
def test_the_time_left_follows_from_what_this_run_covered(
    elapsed_s: float, share_at_start: float | None, share: float | None, remaining_s: float | None
) -> None:
    """Elapsed time by the share that this run has covered, for the share that is left; none while that is not known."""
    progress = msgspec.structs.replace(START, elapsed_s=elapsed_s, share_at_start=share_at_start, share=share)
    if remaining_s is None:
        assert progress.remaining_s is None
    else:
        assert progress.remaining_s == pytest.approx(remaining_s)


def test_a_snapshot_never_changes() -> None:
    """Whoever is shown a snapshot may keep it: it is frozen."""
    with pytest.raises(AttributeError, match="immutable"):
        START.mark = 1  # type: ignore[misc]
    assert START.mark == 0


async def test_a_resume_starts_from_the_share_that_was_done(tmp_path: Path) -> None:
    """What earlier runs did, within a page of the source as well, does not count as the speed of this one."""
    items, output, seen = tmp_path / "items.txt", tmp_path / "out.jsonl", list[Progress]()
    items.write_text("".join(f"{number:04}\n" for number in range(1_000)))

    async def worker(item: str) -> str:
        if item == "0500" and not resumed:
            raise ValueError(item)
        return item

    resumed = False
    with pytest.raises(ItemFailed):
        await run_resumable(worker, items, output=output, concurrency=1)
    resumed = True
    await run_resumable(worker, items, output=output, concurrency=1, on_progress=seen.append, checkpoint_interval=0)
    assert {progress.share_at_start for progress in seen} == {0.5}
    assert all(progress.share is not None and progress.share >= 0.5 for progress in seen)


def test_an_item_that_holds_the_mark_does_not_hold_the_share(tmp_path: Path) -> None:
    """Percent and time left follow from what has finished, ahead of the mark too; a resume goes on there."""
    items, output, seen = tmp_path / "items.txt", tmp_path / "out.jsonl", list[Progress]()
    items.write_text("".join(f"{number:05}\n" for number in range(20_000)))

    async def worker(item: str) -> str:
        await asyncio.sleep(100 if item == "00000" else 0.05)
        return item

    async def life(stop_after_s: float | None) -> None:
        arguments: dict[str, Any] = {"checkpoint_interval": 600.0, "concurrency": 11, "drain_timeout": 1.0}
        async with resumable(worker, items, output=output, on_progress=seen.append, **arguments) as run:
            if stop_after_s is not None:
                await asyncio.sleep(stop_after_s)
                run.stop()

    with pytest.raises(Stopped):
        run_virtual(life(60))
    (first, last), resumed = (seen[1], seen[-1]), len(seen)
    assert (last.mark, last.share_at_start) == (0, 0.0)
    run_virtual(life(None))
    for before, now in pairwise([progress for progress in seen[1:resumed] if progress.elapsed_s < 60]):
        assert now.share == pytest.approx(now.finished / 20_000)
        assert now.remaining_s is not None
        assert before.remaining_s is None or now.remaining_s < before.remaining_s + 1e-6
    assert first.remaining_s == pytest.approx(100, abs=1)
    known = [progress for progress in seen[resumed:] if progress.share is not None]
    assert {progress.share_at_start for progress in known} == {last.share}
    assert all(progress.share == progress.finished / 20_000 <= 1 for progress in known)
    assert known[-1].share == 1.0
