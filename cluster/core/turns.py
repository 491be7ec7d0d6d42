"""The gradients that have arrived: the next update, and the workers to answer."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

import msgspec

from asgd.config.tables import RunConfig
from asgd.policy import Policy
from asgd.streams import stream
from cluster.core.seat import Seat
from cluster.core.state import OrderState
from cluster.core.update import Arrival


class Fate(Enum):
    """The fate of gradients: applied, counted towards the next update, or discarded."""

    APPLIED = auto()
    COUNTED = auto()
    DISCARDED = auto()


class Turn(msgspec.Struct, frozen=True, eq=False):
    """A decision on gradients that have arrived.

    Attributes
    ----------
    fate
        Their fate.
    group
        The gradients: all of an update, or one that is counted or discarded.
    workers
        The workers that get an answer now.
    """

    fate: Fate
    group: list[Arrival]
    workers: list[int]


class Turns:
    """Holds gradients until their update.

    `schedule = "free"` takes them in the order of arrival, as the `Policy` of the mode says;
    `"uniform"` draws the next worker uniformly among those present and holds the other gradients
    until their turn.

    With a bound on staleness, a gradient read at version v is due at update v + bound. That update
    waits for all gradients due at it and takes them together; other gradients are taken one by one
    as they arrive.

    Parameters
    ----------
    config
        The run.
    seats
        The server's seats by worker.
    """

    def __init__(self, config: RunConfig, seats: Mapping[int, Seat]) -> None:
        cluster = config.cluster
        self._bound = cluster.max_staleness if cluster.mode == "bounded" else None
        self.drawn = cluster.schedule == "uniform"
        self._policy = Policy.of(cluster)
        self._seats = seats
        self._held: dict[int, Arrival] = {}
        self._counted: list[Arrival] = []
        self._stream = stream(config.run.seed, "schedule")
        self._turn: int | None = None

    def __len__(self) -> int:
        """Return the number of gradients that have not had their turn."""
        return len(self._held)

    def __contains__(self, worker: int) -> bool:
        """Whether a worker waits for an answer to a gradient."""
        return worker in self._held or worker in self._waiting()

    @property
    def wait_for_others(self) -> bool:
        """Whether a gradient may have to wait for those of other workers."""
        return self.drawn or self._bound is not None or self._policy.waits

    @property
    def order(self) -> OrderState:
        """The position of the stream that draws the next worker."""
        return OrderState.of(self._stream, self._turn)

    @order.setter
    def order(self, order: OrderState) -> None:
        order.set(self._stream)
        self._turn = order.turn

    def add(self, arrival: Arrival) -> None:
        """Hold a gradient that has arrived."""
        self._held[arrival.gradient.worker] = arrival

    def clear(self) -> list[Arrival]:
        """Forget the counted gradients; return them if their workers have moved on."""
        counted, self._counted = self._counted, []
        return [] if self._policy.waits else counted

    def take(self, version: int) -> Turn | None:
        """Decide on gradients that have arrived; None if there is nothing to decide yet."""
        if self.drawn:
            return self._take_drawn()
        if self._bound is not None:
            return self._take_due(version - self._bound)
        return self._take_next(version)

    def _take_next(self, version: int) -> Turn | None:
        policy = self._policy
        while self._held:
            arrival = self._held.pop(worker := next(iter(self._held)))
            if version - arrival.gradient.read_version > policy.oldest:
                return Turn(Fate.DISCARDED, [arrival], [worker])
            if policy.gradients == len(self._counted) + 1:
                return self._update(arrival)
            self._counted.append(arrival if policy.waits else arrival.kept())
            if not policy.waits:
                return Turn(Fate.COUNTED, [arrival], [worker])
        if policy.waits and self._counted and not any(s.owes for s in self._seats.values()):
            return self._update()
        return None

    def _update(self, *last: Arrival) -> Turn:
        waiting = [*self._waiting(), *(arrival.gradient.worker for arrival in last)]
        group, self._counted = [*self._counted, *last], []
        group.sort(key=lambda arrival: arrival.address)
        return Turn(Fate.APPLIED, group, sorted(waiting))

    def _waiting(self) -> list[int]:
        """Return the workers whose counted gradients wait for the next update."""
        return [arrival.gradient.worker for arrival in self._counted] if self._policy.waits else []

    def _take_due(self, oldest: int) -> Turn | None:
        if not self._held:
            return None
        due = [worker for worker, seat in self._seats.items() if self._is_due(worker, seat, oldest)]
        if not due:
            due = [next(iter(self._held))]
        elif not all(worker in self._held for worker in due):
            return None
        return self._applied(sorted(due))

    def _is_due(self, worker: int, seat: Seat, oldest: int) -> bool:
        awaited = seat.owes or worker in self._held
        return awaited and seat.read_version <= oldest

    def _take_drawn(self) -> Turn | None:
        if self._turn is None or not self._may_have_turn(self._turn):
            able = [worker for worker in self._seats if self._may_have_turn(worker)]
            if not able:
                return None
            self._turn = able[int(self._stream.integers(len(able)))]
        worker = self._turn
        if worker not in self._held:
            return None
        self._turn = None
        return self._applied([worker])

    def _may_have_turn(self, worker: int) -> bool:
        return self._seats[worker].present or worker in self._held

    def _applied(self, workers: list[int]) -> Turn:
        return Turn(Fate.APPLIED, [self._held.pop(worker) for worker in workers], workers)
