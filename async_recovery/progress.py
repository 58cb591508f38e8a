"""One frozen snapshot of a run, and the rate and the time left that follow from it."""

from __future__ import annotations

from collections import deque

import msgspec

SHORTEST_S, LONGEST_S, ENOUGH_ITEMS = 5.0, 600.0, 10
APART_S = 1.0


class Seen(msgspec.Struct, frozen=True):
    """A process elsewhere that runs the worker, as it was last heard of.

    :ivar name: for people.
    :ivar state: ``"works"``, or why it gets nothing new: ``"is tested"``, ``"is silent"``.
    :ivar chunks: how many it was given.
    :ivar items: how many it has finished.
    :ivar items_per_s: how many a second, lately.
    :ivar in_flight: items that it has and that are not finished.
    :ivar last_seen_s: seconds since it last said something.
    """

    name: str
    state: str
    chunks: int
    items: int
    items_per_s: float
    in_flight: int
    last_seen_s: float


class Progress(msgspec.Struct, frozen=True):
    """Where a run stands at one moment. Counts of this run and of all runs are kept apart.

    :ivar elapsed_s: seconds since this run began.
    :ivar resumed_from: the mark at which this run began.
    :ivar executed: items that this run has finished.
    :ivar finished: items finished by all runs: those below the mark and those ahead of it.
    :ivar failed: recorded failures among `finished`.
    :ivar mark: index of the first item that is not finished.
    :ivar durable_mark: the mark of the last commit.
    :ivar frontier: index of the next item to hand out.
    :ivar ahead: items finished ahead of the mark.
    :ivar in_flight: items handed out and not finished.
    :ivar commits: commits of this run.
    :ivar held_by: index of the item that holds the mark, or None if nothing is in flight.
    :ivar held_s: seconds since the mark last moved.
    :ivar share: share of the input that is finished, 0 to 1, where the source knows how much of it has been read: the
        share read × finished items / items read.
    :ivar share_at_start: `share` when this run began, as far as that is known now.
    :ivar retries: attempts of this run that failed and are followed by another one.
    :ivar waiting: items that wait for their next attempt; they hold no worker.
    :ivar paused: why nothing begins at this moment, for people; None if that is not so.
    :ivar held_attempt: which attempt of the item at the mark runs, or comes next; 1 is the first.
    :ivar commit_s: seconds that the last commit of this run took.
    :ivar workers: the processes of a cluster that run the worker; none where the run's own does.
    """

    elapsed_s: float
    resumed_from: int
    executed: int
    finished: int
    failed: int
    mark: int
    durable_mark: int
    frontier: int
    ahead: int
    in_flight: int
    commits: int
    held_by: int | None
    held_s: float
    share: float | None
    share_at_start: float | None
    retries: int = 0
    waiting: int = 0
    paused: str | None = None
    held_attempt: int = 1
    commit_s: float = 0.0
    workers: tuple[Seen, ...] = ()

    @property
    def items_per_s(self) -> float:
        """Items finished a second in this run, over its whole time; 0 before any time has passed."""
        return self.executed / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at the speed of this run: elapsed × share left / share covered by this run.

        None while the source does not know its share, or this run has not moved it yet.
        """
        if self.share is None or self.share_at_start is None or self.share <= self.share_at_start:
            return None
        return self.elapsed_s * (1.0 - self.share) / (self.share - self.share_at_start)

    def since(self, earlier: Progress | None) -> Progress:
        """The run as if it had begun with that snapshot of it: its rate and its time left are those since then.

        Where no time has passed since, or there is none: as it is.
        """
        if earlier is None or self.elapsed_s <= earlier.elapsed_s:
            return self
        return msgspec.structs.replace(
            self,
            elapsed_s=self.elapsed_s - earlier.elapsed_s,
            executed=max(0, self.executed - earlier.executed),
            share_at_start=earlier.share,
        )


NOT_BEGUN = Progress(0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, None, 0.0, None, None)
"""Where a run stands before it has read its checkpoint."""


class Recent:
    """The snapshots of the last seconds: 5, or in a slow run as many as ten items take there, 600 at most."""

    def __init__(self) -> None:
        self._kept: deque[Progress] = deque()

    @property
    def first(self) -> Progress | None:
        """The oldest of them: what has happened since is what the run is doing now."""
        return self._kept[0] if self._kept else None

    def add(self, progress: Progress) -> None:
        """The newest one; those too old go."""
        kept, rate = self._kept, progress.items_per_s
        reach_s = max(SHORTEST_S, min(LONGEST_S, ENOUGH_ITEMS / rate)) if rate else LONGEST_S
        if not kept or progress.elapsed_s - kept[-1].elapsed_s >= APART_S:
            kept.append(progress)
        while len(kept) > 1 and progress.elapsed_s - kept[1].elapsed_s >= reach_s:
            kept.popleft()
