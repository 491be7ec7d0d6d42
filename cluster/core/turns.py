"""The gradients that have arrived, and which of them make the next update."""

from __future__ import annotations

from collections.abc import Mapping

from asgd.config import RunConfig
from asgd.streams import stream
from cluster.core.messages import Gradient
from cluster.core.seat import Seat
from cluster.core.state import OrderState


class Turns:
    """Holds gradients until their update.

    `schedule = "free"` takes them in the order of arrival; `"uniform"` draws the next worker
    uniformly among those present and holds the other gradients until their turn.

    With a bound on staleness, a gradient read at version v is due at update v + bound. That update
    takes all gradients due at it, for which it waits; other gradients are taken one by one as they
    arrive. With bound 0, all gradients are due at once: the synchronous mode.

    Parameters
    ----------
    config
        The run.
    seats
        The server's seats by worker.
    """

    def __init__(self, config: RunConfig, seats: Mapping[int, Seat]) -> None:
        modes = {"async": None, "bounded": config.cluster.max_staleness, "sync": 0}
        self._bound = modes[config.cluster.mode]
        self.drawn = config.cluster.schedule == "uniform"
        self._seats = seats
        self._held: dict[int, Gradient] = {}
        self._stream = stream(config.run.seed, "schedule")
        self._turn: int | None = None

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, worker: int) -> bool:
        return worker in self._held

    @property
    def wait_for_others(self) -> bool:
        """Whether a gradient may have to wait for those of other workers."""
        return self.drawn or self._bound is not None

    @property
    def order(self) -> OrderState:
        """The position of the stream that draws the next worker."""
        return OrderState.of(self._stream, self._turn)

    @order.setter
    def order(self, order: OrderState) -> None:
        order.set(self._stream)
        self._turn = order.turn

    def add(self, gradient: Gradient) -> None:
        """Hold a gradient that has arrived."""
        self._held[gradient.worker] = gradient

    def take(self, version: int) -> list[Gradient]:
        """Take the gradients of the next update; none if one of them has not arrived."""
        if self.drawn:
            return self._take_drawn()
        if not self._held:
            return []
        if self._bound is not None:
            due = [w for w, s in self._seats.items() if self._is_due(w, s, version - self._bound)]
            if due:
                ready = all(worker in self._held for worker in due)
                return [self._held.pop(worker) for worker in sorted(due)] if ready else []
        return [self._held.pop(next(iter(self._held)))]

    def _is_due(self, worker: int, seat: Seat, oldest: int) -> bool:
        awaited = seat.owes or worker in self._held
        return awaited and seat.read_version <= oldest

    def _take_drawn(self) -> list[Gradient]:
        if self._turn is None or not self._may_have_turn(self._turn):
            able = [worker for worker in self._seats if self._may_have_turn(worker)]
            if not able:
                return []
            self._turn = able[int(self._stream.integers(len(able)))]
        gradient = self._held.pop(self._turn, None)
        if gradient is None:
            return []
        self._turn = None
        return [gradient]

    def _may_have_turn(self, worker: int) -> bool:
        return self._seats[worker].present or worker in self._held
