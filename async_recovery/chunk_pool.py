"""The pool of a run whose items are worked on by processes of a cluster. It knows nothing of who gets bytes to them.

* Items go to a seat (a process) in chunks of about a second of work; outcomes come back one by one, by index. What an
  outcome means is decided where it always is.
* A seat has as many items as may run there, and a second of work more. What has not begun comes back when the run
  pauses, when the seat does not get to it, or when another seat has nothing to do.
* What was in a seat that died, or was silent for the length of a lease, is given out again. The first result of an item
  counts.
* Items that were there when a seat died, twice, are run apart from others, half of them at a time: the one that kills
  its process is found, and fails. A seat that leaves in order has not died.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import anyio

from . import carried
from .errors import NoWorkers, Quarantined, describe, shorten
from .executors import SIGN_OF_LIFE_S, Assignment, Chunk, Cluster, Here, Recall, Share, Stop, Told, Work
from .loops import clock_of
from .progress import Seen

logger = logging.getLogger("async_recovery")

CHUNK_S, MOST_ITEMS, MOST_BYTES = 1.0, 1_000, 4 << 20
SEAT_BYTES = 64 << 20  # of items that are in one process at once
RATE_OVER_S = 2.0  # the speed of a seat is that of its last seconds
LOOK_INTERVAL_S, ENOUGH_ITEMS = 0.25, 50
NOT_BEGUN_S = 2.0  # what has waited for so long in a seat where nothing begins is given to another
LATE_S = 2.0  # a look around that comes so much too late: we stood still, and have heard nobody
DEATHS_APART, DEATHS_ALONE = 2, 2  # so many deaths until items run apart; and alone, until one is given up
ENDS_WITHIN_S = 8.0

Taken = tuple[int, Any]


class Seat:
    """A process of the cluster, as the coordinator sees it.

    :ivar given: items that are there, by index, in the order in which they begin.
    :ivar share: how many may run there at once.
    :ivar running: how many ran there when it last told, under the share `in_force`.
    :ivar sent: shares that have been sent since, and may come into force there.
    :ivar group: items that are to run apart there; those `given` do already, and nothing else does. None: all may.
    :ivar is_reserved: it gets nothing until such a group can begin.
    :ivar is_silent: its lease is over, or it has not answered since.
    """

    def __init__(self, key: str, name: str, now: float) -> None:
        self.key, self.name = key, name
        self.given: dict[int, Any] = {}
        self.sent: deque[int] = deque()
        self._shares_told = 0
        self.share = self.chunks = self.items = self.running = self.in_force = 0
        self.heard = self.moved = self.told_at = self._counted_at = now
        self.items_per_s = 0.0
        self._counted = 0
        self.group: list[Taken] | None = None
        self.is_reserved = self.is_silent = self.is_recalled = self.is_stopping = False

    @property
    def waiting(self) -> int:
        """How many items there have not begun, as far as that is known here."""
        return max(0, len(self.given) - self.share)

    @property
    def may_run(self) -> int:
        """How many may run there at this moment, whatever has been sent in the meantime."""
        return min(len(self.given), max(self.running, self.in_force, *self.sent, self.share))

    def told(self, running: int, in_force: int, shares: int) -> None:
        """What it has told of that."""
        self.running, self.in_force = running, in_force
        for _ in range(shares - self._shares_told):
            self.sent.popleft()
        self._shares_told = shares

    @property
    def is_open(self) -> bool:
        """Whether it may be given what there is."""
        return not (self.is_reserved or self.is_silent or self.is_stopping) and self.group is None

    @property
    def ahead(self) -> int:
        """How many items it has beyond those that may run: a second of work; none, where each takes longer."""
        return min(MOST_ITEMS, int(self.items_per_s * CHUNK_S))

    def finished(self, count: int, now: float) -> None:
        """So many items have come to an end there."""
        self.items += count
        self._counted += count
        self.moved = now
        self.measure(now)

    def measure(self, now: float) -> None:
        """Follow the speed: at once upwards, within seconds downwards. A few items that end together are no speed."""
        span = now - self._counted_at
        if span >= CHUNK_S or (span >= LOOK_INTERVAL_S and self._counted >= ENOUGH_ITEMS):
            rate, weight = self._counted / span, min(1.0, span / RATE_OVER_S)
            slower = self.items_per_s + (rate - self.items_per_s) * weight
            self.items_per_s = max(rate, slower)
            self._counted, self._counted_at = 0, now

    def seen(self, now: float) -> Seen:
        """What is shown of it."""
        is_tested = self.is_reserved or self.group is not None
        state = "is silent" if self.is_silent else "is tested" if is_tested else "works"
        rate = round(self.items_per_s, 1)
        return Seen(self.name, state, self.chunks, self.items, rate, len(self.given), round(now - self.heard, 1))


class ChunkPool:
    """Runs the worker of a run on the seats of a cluster.

    :param cluster: gets bytes to them.
    :param work: the run.
    :param worker: what they are to load: its name, or a worker of ours.
    :param lease_s: seconds that a seat may be silent before what it has is given out again.
    :param patience_s: seconds without any seat until the run ends, resumable.
    """

    def __init__(self, cluster: Cluster, work: Work, worker: Any, *, lease_s: float, patience_s: float) -> None:
        self._cluster = cluster
        self._work = work
        self._worker = worker
        self._lease_s, self._patience_s = lease_s, patience_s
        self._loop = asyncio.get_running_loop()
        self._now = clock_of(self._loop)
        self._seats: dict[str, Seat] = {}
        self._holders: dict[int, Seat] = {}
        self._unsettled: set[int] = set()  # what was handed out under a rate limit, and has not begun yet
        self._deaths: dict[int, int] = {}
        self._deaths_alone: dict[int, int] = {}
        self._groups: deque[list[Taken]] = deque()
        self._tested: Seat | None = None  # which has one of them
        self._item_bytes = 1.0
        self._concurrency = 0
        self._empty_since = self._looked = self._now()
        self._is_draining = self._is_paused = self._is_uneven = self._is_rated = False
        self._scope = anyio.CancelScope()
        self._changed = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self.ended = False
        self.let_go: set[int] = set()

    # What the engine asks

    async def run(self, concurrency: int) -> None:
        """Until there is nothing left to do, or it is cancelled."""
        self._concurrency = concurrency
        try:
            with self._scope:
                await self._cluster.begin(self._assignment(), self)
                self._looked = self._now()
                self._look_around()
                while not self._is_done:
                    self._give_out()
                    if not self._is_done:
                        await self._work.cursor.changed()
        except Exception as error:
            self._work.broken(error)
        finally:
            try:
                if self._look is not None:
                    self._look.cancel()
                with anyio.CancelScope(shield=True):
                    await self._end()
            finally:
                self.ended = True
                self._work.commit_due()

    def set_concurrency(self, concurrency: int) -> None:
        """So many items at once, over all seats."""
        self._concurrency = concurrency
        self._work.admission.set_concurrency(concurrency, concurrency)
        self._share_out()
        self._wake()

    def drain(self, timeout: float) -> None:
        """Nothing more begins, and what has not ended in `timeout` seconds is cancelled."""
        self._is_draining = True
        self._scope.deadline = self._loop.time() + timeout
        self._recall_all()
        self._wake()

    def cancel(self) -> None:
        """Cancel what is in flight."""
        self._scope.cancel()

    def why_paused(self) -> str | None:
        """No seat, and for how long yet."""
        if any(not seat.is_silent for seat in self._seats.values()):
            return None
        left = max(0.0, self._empty_since + self._patience_s - self._now())
        return f"no worker of the cluster is there: the run ends in {left:.0f} s, resumable, if none comes"

    def seen(self) -> tuple[Seen, ...]:
        """Each seat."""
        now = self._now()
        return tuple(seat.seen(now) for seat in self._seats.values())

    # What the cluster tells

    def joined(self, key: str, name: str) -> None:
        """A process is ready to work."""
        self._seats[key] = Seat(key, name, self._now())
        self._share_out()
        self._wake()

    def left(self, key: str, *, died: bool) -> None:
        """A process is gone, and all that ran in it."""
        seat = self._seats.pop(key, None)
        if seat is not None:
            if seat.given or seat.group:
                logger.warning("the worker %s is gone: its %d items are given out again", seat.name, len(seat.given))
            if died:
                self._lose(seat)
            else:
                self._take_back(seat)
            self._share_out()
            self._wake()

    def heard(self, key: str, told: bytes) -> None:
        """A pickled `Told`."""
        seat = self._seats.get(key)
        if seat is None or self.ended:
            return
        now = seat.heard = self._now()
        try:
            message: Told = pickle.loads(told)
            self._hand_in(seat, message, now)
        except Exception as error:  # a defect of ours: never a short output
            self._work.broken(error)
        self._wake()

    # Outcomes

    def _hand_in(self, seat: Seat, told: Told, now: float) -> None:
        seat.told(told.running, told.share, told.shares)
        if seat.is_silent:  # for too long: what it has is no longer its own
            self._stop(seat)
        elif told.stood_still:
            seat.is_recalled = True
            self._send(seat, Recall())
        if self._is_uneven:
            self._share_out()
        for index in told.begun:
            if self._holders.get(index) is seat:
                self._settle(index)
        if told.records:
            self._complete(seat, told.records)
        for failure in told.failures:
            if (taken := self._taken_from(seat, failure.index)) is not None:
                began = None if failure.took is None else now - failure.took
                self._work.failed(*taken, carried.unpack(failure.error, seat.name), began)
        for index in (*told.returned, *told.cancelled):
            if (taken := self._taken_from(seat, index)) is not None:
                self._give_back(taken)
        if told.recalled:
            seat.is_recalled = False
        if told.stopped:
            self._stopped(seat)
        if ended := len(told.records) + len(told.failures):
            seat.finished(ended, now)
        if seat.group == [] and not seat.given:
            self._end_test(seat)
        self._recall_if_paused(now)

    def _complete(self, seat: Seat, records: list[tuple[int, bytes]]) -> None:
        admission, holders = self._work.admission, self._holders
        complete, due = self._work.collector.complete, False
        for index, record in records:
            if holders.get(index) is seat:
                self._let_go(seat, index)
            elif not self._is_first(seat, index):
                continue
            if index in admission.heeded:
                admission.succeeded(index)
            due = complete(index, record) or due
        if due or (self._work.cursor.gated and self._work.commit_helps()):
            self._work.commit_due()

    def _is_first(self, seat: Seat, index: int) -> bool:
        """A result of an item that was given out again since: it counts if it is the first, and the other does not."""
        if self._is_finished(index) or index >= self._work.collector.watermark.frontier:
            return False
        if (other := self._holders.get(index)) is not None:
            logger.info("item %d: the result of %s came first, that of %s is dropped", index, seat.name, other.name)
            self._let_go(other, index)
        tested = [self._tested.group] if self._tested is not None and self._tested.group else []
        for group in (*self._groups, *tested):
            group[:] = [taken for taken in group if taken[0] != index]
        return True

    def _taken_from(self, seat: Seat, index: int) -> Taken | None:
        """The item at `index`, which that seat has no more; None if it is not the one that has it."""
        return (index, self._let_go(seat, index)) if self._holders.get(index) is seat else None

    def _let_go(self, seat: Seat, index: int) -> Any:
        """The item at `index`, which leaves that seat: the only way on which one does."""
        del self._holders[index]
        if self._unsettled:
            self._settle(index)
        return seat.given.pop(index)

    def _is_finished(self, index: int) -> bool:
        watermark = self._work.collector.watermark
        return index < watermark.mark or index in watermark.ahead

    def _settle(self, index: int) -> None:
        """What was handed out under a rate limit has begun, or never will."""
        if index in self._unsettled:
            self._unsettled.discard(index)
            self._work.admission.settle()

    def _give_back(self, taken: Taken) -> None:
        if self._is_draining:
            self.let_go.add(taken[0])
        else:
            self._work.admission.give_back(*taken)

    # Seats that are lost

    def _take_back(self, seat: Seat) -> None:
        """What was in a seat that has left in order is given out again, and suspected no more than before."""
        group = self._end_test(seat)
        taken = [(index, self._let_go(seat, index)) for index in list(seat.given)]
        if group is not None and not self._is_draining:
            self._groups.appendleft(taken + group)
        else:
            for one in taken:
                self._give_back(one)

    def _lose(self, seat: Seat) -> None:
        """What was there is given out again; what was there too often when a process ended, apart from others."""
        group = self._end_test(seat)
        suspects: list[Taken] = []
        for index in list(seat.given):
            item = self._let_go(seat, index)
            self._deaths[index] = self._deaths.get(index, 0) + 1
            is_suspect = group is not None or self._deaths[index] >= DEATHS_APART
            if is_suspect and not self._is_draining:
                suspects.append((index, item))
            else:
                self._give_back((index, item))
        if group:  # what had not been sent yet
            self._groups.appendleft(group)
        if group is not None and len(suspects) == 1:
            self._died_alone(*suspects[0])
        elif suspects:
            half = (len(suspects) + 1) // 2
            self._groups.extend(part for part in (suspects[:half], suspects[half:]) if part)

    def _end_test(self, seat: Seat) -> list[Taken] | None:
        """That seat tests nothing any more; returns what it had not been sent yet, None if it tested nothing."""
        group, seat.group, seat.is_reserved = seat.group, None, False
        if self._tested is seat:
            self._tested = None
        return group

    def _died_alone(self, index: int, item: Any) -> None:
        deaths = self._deaths_alone[index] = self._deaths_alone.get(index, 0) + 1
        if deaths < DEATHS_ALONE:
            self._groups.appendleft([(index, item)])
        else:
            why = "the worker process died, or hung, each time this item ran"
            self._work.give_up(index, item, Quarantined(why))

    def _stop(self, seat: Seat) -> None:
        """Let it cancel all that it has, and say when that is done."""
        if not seat.is_stopping:
            seat.is_stopping = True
            self._send(seat, Stop(for_good=False))

    def _stopped(self, seat: Seat) -> None:
        """It has cancelled all that it had, and begins anew."""
        seat.is_silent = seat.is_stopping = seat.is_recalled = False
        for index in list(seat.given):
            self._give_back((index, self._let_go(seat, index)))
        if not self._scope.cancel_called:
            self._share_out()
        self._changed.set()

    # Items

    @property
    def _is_done(self) -> bool:
        in_flight = self._holders or ((any(self._groups) or self._tested) and not self._is_draining)
        return not in_flight and (self._is_draining or self._work.admission.finished)

    def _give_out(self) -> None:
        """To each seat what it has room for."""
        if self._is_draining:
            return
        if self._groups or self._tested:
            self._test_apart()
        is_ordinary, is_rated = self._work.admission.is_ordinary, self._work.admission.is_rated
        if is_rated and not self._is_rated:
            self._recall_all()
        self._is_rated = is_rated
        for seat in sorted(self._seats.values(), key=lambda seat: len(seat.given) - seat.share):
            while seat.is_open and (room := self._room(seat, is_ordinary)):
                if not self._submit(seat, self._take, room):
                    return

    def _room(self, seat: Seat, is_ordinary: bool) -> int:
        """How many items it may be given now; not one by one while it has enough to do."""
        if seat.is_recalled:
            return 0
        ahead = seat.ahead if is_ordinary and seat.share else 0
        room = seat.share + ahead - len(seat.given)
        if room <= 0 or (seat.waiting and room < ahead // 4):
            return 0
        fit = int(SEAT_BYTES / self._item_bytes) - len(seat.given)
        return min(room, MOST_ITEMS, max(fit, 0 if seat.given else 1))

    def _take(self) -> Taken | None:
        admission = self._work.admission
        while (taken := admission.take()) is not None:
            if taken[0] not in self._deaths or not self._is_finished(taken[0]):
                return taken
            admission.settle()  # its first result came in the meantime
        return None

    def _submit(self, seat: Seat, take: Callable[[], Taken | None], most: int) -> bool:
        """Send a chunk of at most so many items; whether there was any. One that can not be sent fails, alone."""
        indices, items, size = list[int](), list[bytes](), 0
        while len(items) < most and size < MOST_BYTES and (taken := take()) is not None:
            index, item = taken
            try:
                data = pickle.dumps(item, 5)
            except Exception as error:
                self._work.admission.settle()
                why = TypeError(f"the item can not be sent to another process: {describe(error)}")
                self._work.failed(index, item, why, None)
                continue
            size += len(data)
            indices.append(index)
            items.append(data)
            if not seat.given:
                seat.moved = self._now()
            seat.given[index] = item
            self._holders[index] = seat
        if items:
            self._item_bytes += (size / len(items) - self._item_bytes) * 0.5
            if is_rated := self._work.admission.is_rated:
                self._unsettled.update(indices)
            bounds: list[float] = []
            if self._work.has_deadline:
                now = self._now()
                bounds = [self._work.admission.bound(index, now) for index in indices]
            seat.chunks += 1
            self._send(seat, Chunk(indices, items, bounds, seat.share, is_rated))
        return bool(items)

    def _test_apart(self) -> None:
        """Let a group of suspects begin in a seat that has nothing else, once there is one, as fast as any may."""
        if self._tested is None:
            self._begin_test()
        seat, admission = self._tested, self._work.admission
        if seat is None or seat.is_recalled:
            return
        group = seat.group or []

        def take() -> Taken | None:
            return group.pop() if group and admission.begin_again(group[-1][0]) else None

        while group and self._submit(seat, take, MOST_ITEMS):
            pass
        if not group and not seat.given:
            self._end_test(seat)

    def _begin_test(self) -> None:
        seat = next((seat for seat in self._seats.values() if seat.is_reserved), None)
        if seat is None:
            seat = min(
                (seat for seat in self._seats.values() if seat.is_open), key=lambda s: len(s.given), default=None
            )
            if seat is None:
                return
            seat.is_reserved = True
            self._recall(seat)
            self._share_out()
        while self._groups and not self._groups[0]:
            self._groups.popleft()
        if seat.given or not seat.share:
            return
        seat.is_reserved = False
        if self._groups:
            seat.group, self._tested = self._groups.popleft(), seat
            logger.warning(
                "%d items run apart on %s: processes died, or were silent, with them twice", len(seat.group), seat.name
            )

    # Now and then

    def _look_around(self) -> None:
        now = self._now()
        if now - self._looked > LOOK_INTERVAL_S + LATE_S:
            self._begin_anew(now)
        self._looked = now
        for seat in list(self._seats.values()):
            seat.measure(now)
            if now - seat.heard > self._lease_s and not seat.is_silent:
                logger.warning(
                    "the worker %s has been silent for %.0f s: its %d items are given out again",
                    *(seat.name, now - seat.heard, len(seat.given)),
                )
                self._lose(seat)
                seat.is_silent = True
                self._share_out()
            if now - seat.told_at >= SIGN_OF_LIFE_S:
                self._send(seat, Here())
        self._spread(now)
        self._recall_if_paused(now)
        self._be_patient(now)
        self._wake()
        self._look = self._loop.call_later(LOOK_INTERVAL_S, self._look_around)

    def _begin_anew(self, now: float) -> None:
        """Our own silence is not theirs: all have the whole of their lease, and of our patience, from now on."""
        logger.warning("this process stood still for %.0f s: leases and patience begin anew", now - self._looked)
        for seat in self._seats.values():
            if not seat.is_silent:
                seat.heard = seat.moved = now
        self._empty_since = now

    def _spread(self, now: float) -> None:
        """What waits where nothing begins, or while another seat has nothing to do, goes to others."""
        seats = [seat for seat in self._seats.values() if seat.is_open]
        is_idle = any(seat.share > len(seat.given) for seat in seats) and len(seats) > 1
        for seat in seats:
            if seat.waiting and (is_idle or now - seat.moved > NOT_BEGUN_S):
                if now - seat.moved > NOT_BEGUN_S:
                    seat.items_per_s = 0.0
                self._recall(seat)

    def _be_patient(self, now: float) -> None:
        if any(not seat.is_silent for seat in self._seats.values()):
            self._empty_since = now
        elif now - self._empty_since > self._patience_s and not self._is_draining:
            self._work.broken(
                NoWorkers(
                    f"no worker of the cluster was there for {self._patience_s:g} s. Everything that finished is "
                    "saved: start workers (and the scheduler, if it is gone), and run the same line again"
                )
            )

    def _recall_if_paused(self, now: float) -> None:
        is_paused = self._work.admission.why_paused(now) is not None
        if is_paused and not self._is_paused:
            self._recall_all()
        self._is_paused = is_paused

    def _recall_all(self) -> None:
        for seat in self._seats.values():
            self._recall(seat)

    def _recall(self, seat: Seat) -> None:
        if seat.given and not seat.is_recalled:
            seat.is_recalled = True
            self._send(seat, Recall())

    def _share_out(self) -> None:
        """Each seat runs its part of all that run at once; one that still runs more than that holds up the others.

        Where there are fewer places than seats, one that tests suspects has one.
        """
        seats = [seat for seat in self._seats.values() if not seat.is_silent]
        seats.sort(key=lambda seat: not (seat.is_reserved or seat.group is not None))
        shares = [self._concurrency // len(seats) + (n < self._concurrency % len(seats)) for n in range(len(seats))]
        surplus = sum(max(0, seat.may_run - share) for seat, share in zip(seats, shares, strict=True))
        self._is_uneven = surplus > 0
        for seat, share in zip(seats, shares, strict=True):
            cut = min(surplus, max(0, share - seat.may_run))
            surplus -= cut
            if share - cut != seat.share:
                seat.share = share - cut
                self._send(seat, Share(seat.share))

    def _wake(self) -> None:
        self._work.cursor.wake(1)

    def _send(self, seat: Seat, message: Any) -> None:
        seat.told_at = self._now()
        if isinstance(message, Chunk | Share):
            seat.sent.append(message.share)
        self._cluster.send(seat.key, pickle.dumps(message, 5))

    def _assignment(self) -> Assignment:
        work = self._work
        return Assignment(
            run=uuid4().hex,
            place=work.place,
            worker=self._worker,
            timeout=work.timeout,
            has_deadline=work.has_deadline,
            keeps_records=work.keeps_records,
            lease_s=self._lease_s,
        )

    async def _end(self) -> None:
        """Cancel what still runs, and wait until each seat has told what it finished: stopping has a bound."""
        self._is_draining = True
        busy = [seat for seat in self._seats.values() if seat.given and not seat.is_silent]
        for seat in busy:
            self._stop(seat)
        with anyio.move_on_after(ENDS_WITHIN_S):
            while any(seat.is_stopping for seat in busy if seat.key in self._seats):
                self._changed.clear()
                await self._changed.wait()
        left = sorted(self._holders)
        if left:
            logger.error("%d items did not end on the cluster, and are left alone: %s", len(left), shorten(left))
            self.let_go.update(left)
