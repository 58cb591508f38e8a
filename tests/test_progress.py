"""Progress: the rate and the time left that follow from one snapshot."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from async_recovery import ItemFailed, Stopped, resumable, run_resumable
from async_recovery.progress import Progress, Recent
from async_recovery.status import brought_up_to

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


def seen(rate: float, seconds: int, then: float = 0.0, later: int = 0) -> list[Progress]:
    """A snapshot each half second: so many items a second for so long, then others for `later` seconds."""
    moments = [(half / 2, rate * half / 2) for half in range(2 * seconds)]
    moments += [(seconds + half / 2, rate * seconds + then * half / 2) for half in range(2 * later + 1)]
    return [msgspec.structs.replace(START, elapsed_s=elapsed_s, executed=int(done)) for elapsed_s, done in moments]


def recent_rate(snapshots: list[Progress]) -> float:
    """Items a second between the first of the recent ones and the last."""
    recent = Recent()
    for progress in snapshots:
        recent.add(progress)
    first, last = recent.first, snapshots[-1]
    assert first is not None
    return (last.executed - first.executed) / (last.elapsed_s - first.elapsed_s)


def test_the_recent_rate_follows_a_change_in_seconds() -> None:
    """A fast run that becomes slower, or stands still, shows that six seconds later."""
    assert recent_rate(seen(100.0, 60)) == pytest.approx(100.0)
    assert recent_rate(seen(100.0, 60, then=10.0, later=6)) == pytest.approx(10.0)
    assert recent_rate(seen(100.0, 60, then=0.0, later=6)) == 0.0


def test_the_recent_rate_of_a_slow_run_reaches_back_further() -> None:
    """An item in 20 seconds is about three a minute at any moment, and not none at most of them."""
    for seconds in range(400, 440):
        assert recent_rate(seen(0.05, seconds)) == pytest.approx(0.05, rel=0.15)


def test_what_a_run_said_is_brought_up_to_what_it_has_committed_since() -> None:
    """It says where it stands every 2 s, and commits each second: `status` shows no mark and no count twice."""
    told = msgspec.structs.replace(START, mark=16, finished=40, executed=40, ahead=24, in_flight=4, held_by=16)
    same = {"pid": 1, "progress": msgspec.to_builtins(told)}
    assert brought_up_to(16, 40, same) == brought_up_to(10, 30, same) == same
    assert brought_up_to(0, 0, {"pid": 1, "progress": None}) == {"pid": 1, "progress": None}
    now = brought_up_to(20, 48, same)["progress"]
    assert (now["mark"], now["durable_mark"], now["finished"], now["executed"]) == (20, 20, 48, 48)
    assert (now["ahead"], now["held_by"], now["in_flight"]) == (28, None, 4)
    assert brought_up_to(16, 41, same)["progress"]["held_by"] == 16
    assert brought_up_to(17, 30, same)["progress"]["ahead"] == 23


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
