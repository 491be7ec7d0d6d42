"""The parameter server: applies every gradient exactly once and counts versions.

It is a state machine in plain Python without clock, transport or files, except for an optional
write-ahead log. Each call returns the replies to send now, possibly to other workers than the
caller; a worker whose gradient has to wait gets its reply later. The transport calls one method at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from asgd.arrays import Array
from asgd.config.tables import RunConfig
from asgd.divergence import NOT_FINITE, remedy
from asgd.epochs import Handout
from asgd.errors import message_of
from asgd.local_steps import PushRule
from asgd.rules.base import Optimizer
from asgd.rules.make import make_rule
from asgd.schedules import batch_schedule, learning_rate_schedule
from asgd.shards import all_part_sizes
from cluster.core.ledger import Ledger, Record
from cluster.core.messages import Gradient, Reply, Snapshot, Stop
from cluster.core.reads import Reads
from cluster.core.seat import Seat
from cluster.core.state import ServerCounts, State
from cluster.core.status import Status, WorkerStatus
from cluster.core.turns import Fate, Turn, Turns
from cluster.core.update import (
    Arrival,
    Discarded,
    Entry,
    Incident,
    Log,
    Update,
    find_defect,
    make_update,
)

Replies = list[tuple[int, Reply]]

FINISHED = "finished"  # reason for stopping: all updates are applied
REMOVED = "removed"  # reason for stopping a single worker


class ParameterServer:
    """The state of a run and all decisions about it.

    The first snapshots are sent when all configured workers have joined. `Turns` decides about the
    gradients that arrive: an update applies one, or the mean of several. Discarded gradients are
    recorded with the next update.

    Parameters
    ----------
    config
        The run.
    parameters
        x_0, shape (d,); copied. Its precision is that of the run.
    epoch
        Incarnation of the server; gradients for another incarnation are refused.
    state
        State of an earlier incarnation to continue from; default: the start.
    n_samples
        Number of samples of the problem; only for `data.sampling = "epoch"`.
    """

    def __init__(
        self,
        config: RunConfig,
        parameters: Array,
        epoch: int = 0,
        state: State | None = None,
        n_samples: int = 0,
    ) -> None:
        self.parameters = np.array(parameters)
        self.version = 0
        self.epoch = epoch
        self.ledger = Ledger(skips=config.run.evaluations == "skip")
        self.log: Log | None = None
        self._config = config
        self._learning_rate = learning_rate_schedule(config.optimizer)
        self._batch_size = batch_schedule(config.optimizer)
        self._gradients = config.optimizer.gradients_per_push
        self._optimizer = Optimizer(make_rule(config), self.parameters)
        self._workers_keep = PushRule.of(config).keeps
        self._reads = Reads(self.parameters.dtype) if self._optimizer.rule.reads else None
        self._handout = None
        if config.data.sampling == "epoch":
            self._handout = Handout(all_part_sizes(config, n_samples))
        self._seats = {worker: Seat() for worker in range(config.cluster.workers)}
        self._missing = set(self._seats)
        self._turns = Turns(config, self._seats)
        self._started = math.nan
        self._seconds = 0.0
        self._restored = state is not None
        self._replays = False
        self._staleness_sum = 0
        self._shared_updates = 0
        self._rejected = 0
        self._discarded: list[Discarded] = []  # since the last update
        self._unsettled: dict[int, int] = {}  # sequence at the last update, where it has changed
        self._stop: Stop | None = None
        if state is not None:
            self._restore(state)

    def admit(self, worker: int) -> None:
        """Allow a worker that is not in the configuration to join."""
        self._seats.setdefault(worker, Seat())

    def knows(self, worker: int) -> bool:
        """Whether a worker belongs to this run."""
        return worker in self._seats

    def join(self, worker: int, now: float) -> Replies:
        """Let a new or restarted worker join; it needs a snapshot.

        A gradient that it still owed is lost. `now` is in seconds on any steady clock. A worker of
        another run is told to stop.
        """
        if self._stop is not None:
            return [(worker, self._stop)]
        seat = self._seats.get(worker)
        if seat is None:
            return [(worker, Stop(f"worker {worker} does not belong to this run"))]
        if seat.retired:
            return [(worker, Stop(REMOVED)), *self.leave(worker, now)]
        if seat.owes:
            self._lose(worker, seat)
        seat.present, seat.continues = True, False
        if math.isnan(self._started):
            self._missing.discard(worker)
            return self._start(now)
        return [] if worker in self._turns else [self._grant(worker, seat, now)]

    def note_joined(self, worker: int, transport: str) -> None:
        """Write the event `worker_joined` with the transport and the version."""
        if self.knows(worker):
            update = self.version
            self.ledger.event("worker_joined", worker=worker, transport=transport, update=update)

    def leave(self, worker: int, now: float) -> Replies:
        """Remove a dead or retired worker, so that no update waits for it.

        A gradient that it owed is lost; a gradient that has arrived is applied in its turn.
        """
        seat = self._seats.get(worker)
        if self._stop is not None or seat is None:
            return []
        if seat.owes:
            self._lose(worker, seat)
        if seat.retired:
            self._dismiss(worker, seat)
        seat.present = False
        if math.isnan(self._started):
            self._missing.discard(worker)
            return self._start(now)
        return self._advance(now)

    def retire(self, worker: int, now: float) -> Replies:
        """Remove a worker after its pending or held gradient."""
        if self._stop is not None:
            return []
        seat = self._seats.setdefault(worker, Seat())
        seat.retired = True
        started = math.isfinite(self._started)
        if started and (seat.owes or worker in self._turns):
            return []
        told = [self._grant(worker, seat, now)] if seat.present else []
        return [*told, *self.leave(worker, now)]

    @property
    def collects(self) -> bool:
        """Whether an update may need the gradients of certain workers, and others must wait."""
        return self._turns.wait_for_others

    def note_arriving(self, worker: int, now: float) -> None:
        """Note that a worker's gradient is being received, so it computes no longer."""
        seat = self._seats.get(worker)
        if seat is not None and seat.owes:
            seat.granted = now

    def receive(self, gradient: Gradient, now: float) -> Replies:
        """Take a gradient; a duplicate is ignored and answered with the current snapshot."""
        worker = gradient.worker
        if self._stop is not None:
            return [(worker, self._stop)]
        seat = self._seats.get(worker)
        if seat is None or not seat.present:
            return self.join(worker, now)
        if not seat.owes:
            return []
        if gradient.epoch != self.epoch or gradient.sequence != seat.sequence:
            return [(worker, self._snapshot(worker, seat))]
        seat.granted = math.inf
        seat.received += 1
        seat.continues = True
        defect = find_defect(gradient, seat, self.parameters.shape, self.version)
        if defect is None and self._reads and self._reads.of(worker, gradient.read_version) is None:
            defect = f"read version {gradient.read_version}, which is no longer kept"
        if defect is not None:
            return self._reject(gradient, seat, defect, now)
        self._turns.add(Arrival(gradient, seat.batch_size, seat.norm, seat.position))
        return self._advance(now)

    def stop(self, reason: str) -> Replies:
        """End the run and tell every waiting worker to stop."""
        if self._stop is None:
            self._stop = Stop(reason)
            left_over = [one.discarded(self.version, self._seconds) for one in self._turns.clear()]
            self.ledger.discarded([*self._discarded, *left_over])
            if math.isfinite(self._started):
                self.ledger.checkpoint = self.state()
        waiting = [w for w, s in self._seats.items() if s.present and not s.owes]
        return [(worker, self._stop) for worker in waiting]

    def finish(self, reason: str) -> Replies:
        """End the run early, with success; its last loss is evaluated."""
        if self._stop is None and self.version % self._config.run.eval_every:
            self.ledger.evaluation(self.version, self._seconds, self.parameters, needed=True)
        return self.stop(reason)

    @property
    def stopping(self) -> bool:
        """Whether the server takes no more gradients."""
        return self._stop is not None

    def state(self) -> State:
        """Return a copy of everything that another server needs to continue from here."""
        logged = self.log is not None or self._replays
        rows, snapshots = self._reads.state() if self._reads and logged else ([], ())
        counts = ServerCounts(
            version=self.version,
            epoch=self.epoch,
            seconds=self._seconds,
            sequence={w: self._unsettled.get(w, seat.sequence) for w, seat in self._seats.items()},
            received={worker: seat.received for worker, seat in self._seats.items()},
            order=self._turns.order,
            staleness_sum=self._staleness_sum,
            shared_updates=self._shared_updates,
            rejected=self._rejected,
            rule=list(self._optimizer.rule.state),
            reads=rows,
            parts=self._handout.state() if self._handout else [],
        )
        parameters = self.ledger.copy_of(self.version)
        if parameters is None:
            parameters = self.parameters.copy()
        rule = tuple(array.copy() for array in self._optimizer.state)
        return State(counts, parameters, rule, snapshots)

    def _restore(self, state: State) -> None:
        counts = state.counts
        # The precision differs if the problem was changed.
        self.parameters = state.parameters.astype(self.parameters.dtype)
        self._optimizer.restore(state.rule, counts.rule)
        if self._reads:
            self._reads.restore(counts.reads, state.reads)
        if self._handout:
            self._handout.restore(counts.parts)
        self.version = counts.version
        self._seconds = counts.seconds
        for worker, sequence in counts.sequence.items():
            seat = self._seats.setdefault(worker, Seat())
            seat.sequence = sequence
            seat.received = counts.received.get(worker, 0)
        self._turns.order = counts.order
        self._staleness_sum = counts.staleness_sum
        self._shared_updates = counts.shared_updates
        self._rejected = counts.rejected

    @property
    def keeps_reads(self) -> bool:
        """Whether the rule needs the snapshots that were read."""
        return self._reads is not None

    def replay(
        self,
        entries: Iterable[Entry],
        recorded: Container[tuple[float, int, int]],
        readers: Mapping[int, Iterable[int]] = MappingProxyType({}),
    ) -> None:
        """Apply a log to the restored state, and record its updates again.

        Parameters
        ----------
        entries
            Log entries after the restored state.
        recorded
            (time, worker, sequence) of the incidents that are already on record.
        readers
            The workers that read each version, by the entries, if the server keeps reads.
        """
        self._replays = True
        for entry in entries:
            if not self._restored:
                self._record_start()
            if isinstance(entry, Incident):
                self._replay_incident(entry.event, recorded)
                continue
            for worker, _ in entry.numbers():
                self._seats.setdefault(worker, Seat()).received += 1
            for worker in readers.get(self.version, ()):
                self._keep_read(worker)
            if entry.order is not None:  # before a checkpoint that the update may make
                self._turns.order = entry.order
            self._commit(entry)
            if self._stop is not None:
                return
        self._replays = False

    def _replay_incident(
        self, event: dict[str, Any], recorded: Container[tuple[float, int, int]]
    ) -> None:
        worker, sequence = event["worker"], event["sequence"]
        seat = self._seats.setdefault(worker, Seat())
        if sequence < seat.sequence:
            return
        seat.sequence = sequence + 1
        self._rejected += event["event"] == "gradient_rejected"
        if (event["time"], worker, sequence) not in recorded:
            self.ledger.note(event)

    def drain(self) -> Record:
        """Return the record since the last call, for the recorder."""
        return self.ledger.drain()

    def go_on(self, now: float) -> Replies:
        """Make one of the updates that waited for space in the ledger.

        Several at once would need a copy of the parameters for each snapshot to send.
        """
        return [] if math.isnan(self._started) else self._advance(now, single=True)

    def status(self, now: float) -> Status:
        """Return the status of the run."""
        return Status(
            version=self.version,
            seconds=max(0.0, now - self._started) if math.isfinite(self._started) else 0.0,
            mean_staleness=self._staleness_sum / self.version if self.version else math.nan,
            workers={
                worker: WorkerStatus(s.present, s.received, now - s.granted if s.owes else 0.0)
                for worker, s in self._seats.items()
            },
            rejected=self._rejected,
            stopped=self._stop.reason if self._stop else None,
            waiting=self._stop is None and self.ledger.full,
            skipped=self.ledger.skipped,
        )

    def _start(self, now: float) -> Replies:
        present = [(worker, seat) for worker, seat in self._seats.items() if seat.present]
        if self._missing or not present:
            return []
        self._started = now - self._seconds
        if self.version >= self._config.run.updates:
            return self.stop(FINISHED)
        if not self._restored:
            self._record_start()
        return [self._grant(worker, seat, now) for worker, seat in present]

    def _record_start(self) -> None:
        self.ledger.evaluation(0, 0.0, self.parameters, needed=True)
        self.ledger.checkpoint = self.state()
        self._restored = True

    def _advance(self, now: float, single: bool = False) -> Replies:
        """Make every update that the waiting gradients allow, or a single one."""
        replies: Replies = []
        while not (self._stop or self.ledger.full) and (turn := self._turns.take(self.version)):
            if turn.fate is Fate.APPLIED:
                if replies:  # the snapshots granted so far keep their array
                    self.parameters = self.parameters.copy()
                self._apply(turn.group, now)
                if self._stop is not None or self.version == self._config.run.updates:
                    return [*replies, *self.stop(FINISHED)]
            else:
                self._set_aside(turn, now)
            for worker in turn.workers:
                seat = self._seats[worker]
                if seat.present:
                    replies.append(self._grant(worker, seat, now))
            if single and turn.fate is Fate.APPLIED:
                break
        return replies

    def _apply(self, group: list[Arrival], now: float) -> None:
        """Apply the mean of a group of gradients, usually of one, as one update."""
        order = self._turns.order if self.log is not None and self._turns.drawn else None
        shared, seconds = self._shared_updates, now - self._started
        discarded = tuple(self._discarded)
        placed = self._handout is not None
        update = make_update(group, self.version, shared, seconds, order, discarded, placed)
        if self._write_ahead(update):
            self._commit(update)

    def _set_aside(self, turn: Turn, now: float) -> None:
        """Note gradients that are discarded or counted; their workers move on to the next ones."""
        for arrival in turn.group:
            worker = arrival.gradient.worker
            if turn.fate is Fate.DISCARDED:
                self._discarded.append(arrival.discarded(self.version, now - self._started))
                if self._handout:
                    self._handout.give_back(*arrival.address)
            self._move_on(worker, self._seats[worker], counted=turn.fate is Fate.COUNTED)

    def _move_on(self, worker: int, seat: Seat, *, counted: bool = False) -> None:
        """Increase the sequence of a worker; a state saved before the next update has the old one.

        The worker's own state continues only from counted gradients, because a replay does not
        compute the others.
        """
        self._unsettled.setdefault(worker, seat.sequence)
        seat.sequence += 1
        seat.continues = seat.continues and counted

    def _write_ahead(self, entry: Entry) -> bool:
        """Log an entry and return True, or stop the run if it cannot be logged."""
        try:
            if self.log is not None:
                self.log.append(entry)
        except OSError as error:
            self.stop(f"the log cannot be written ({error.strerror or error})")
            return False
        return True

    def _commit(self, update: Update) -> None:
        number, worker, sequence, read_version, staleness, size, _, seconds, _ = update.row
        eta, read = self._learning_rate(number), None
        if self._reads:
            read = self._reads.of(worker, read_version)
        try:
            self._optimizer.apply(self.parameters, update.gradient, eta, number, staleness, read)
        except Exception as error:  # a user's own rule may raise anything
            # No checkpoint: the update may be half done.
            what = f"{type(error).__name__}: {message_of(error)}"
            self._stop = Stop(f"the rule raised at update {number}: {what}")
            return
        if self._reads:
            self._reads.release(worker)
        if self._handout:
            if update.members:
                for place in update.places():
                    self._handout.use(*place)
            else:
                self._handout.use(worker, sequence, update.positions[0], size)
        self.version += 1
        self._seconds = seconds
        self._staleness_sum += staleness
        self.ledger.update(update)
        self._shared_updates += bool(update.members)
        for worker, sequence in update.numbers():
            seat = self._seats[worker]
            seat.sequence = max(seat.sequence, sequence + 1)
        self._discarded.clear()
        self._unsettled.clear()
        run = self._config.run
        last = self.version == run.updates
        if self.version % run.eval_every == 0 or last:
            self.ledger.evaluation(self.version, seconds, self.parameters, needed=last)
        if self.version % run.checkpoint_every == 0:
            self.ledger.checkpoint = self.state()

    def _grant(self, worker: int, seat: Seat, now: float) -> tuple[int, Reply]:
        if seat.retired:
            self._dismiss(worker, seat)
            return worker, Stop(REMOVED)
        if self._workers_keep and seat.sequence and not seat.continues:
            # The gap in its sequence tells the worker and every replay to reset its own state.
            self._note("state_reset", worker, seat)
            self._move_on(worker, seat)
        seat.read_version = self.version
        seat.batch_size = int(self._batch_size(self.version)) * self._gradients
        if self._handout:
            taken = self._handout.take(worker, seat.sequence, seat.batch_size)
            seat.position, seat.batch_size = taken
        seat.granted = now
        if self._reads:
            self._reads.release(worker)
        return worker, self._snapshot(worker, seat)

    def _snapshot(self, worker: int, seat: Seat) -> Snapshot:
        self._keep_read(worker)
        return Snapshot(
            self.parameters,
            self.version,
            self.epoch,
            seat.sequence,
            seat.batch_size,
            seat.position,
        )

    def _keep_read(self, worker: int) -> None:
        if self._reads:
            self._reads.grant(worker, self.version, self.parameters)

    def _reject(self, gradient: Gradient, seat: Seat, defect: str, now: float) -> Replies:
        self._rejected += 1
        self._note("gradient_rejected", gradient.worker, seat, reason=defect)
        self._move_on(gradient.worker, seat)
        if self._rejected > self._config.run.max_bad_gradients:
            advice = f"; {remedy(self.version)}" if defect.startswith(NOT_FINITE) else ""
            if self.version % self._config.run.eval_every:
                # The launcher tells by the loss whether the run has diverged.
                self.ledger.evaluation(self.version, self._seconds, self.parameters, needed=True)
            return self.stop(
                f"{self._rejected} gradients were refused; the last one, of worker "
                f"{gradient.worker} before update {self.version}: {defect}{advice}"
            )
        return [self._grant(gradient.worker, seat, now)]

    def _dismiss(self, worker: int, seat: Seat) -> None:
        if seat.present:
            self.ledger.event("worker_removed", worker=worker, update=self.version)
        seat.present = False

    def _lose(self, worker: int, seat: Seat) -> None:
        self._note("gradient_lost", worker, seat)
        if self._reads:
            self._reads.release(worker)
        self._move_on(worker, seat)
        seat.granted = math.inf

    def _note(self, kind: str, worker: int, seat: Seat, **fields: str) -> None:
        """Write an event saying that no gradient with a worker's current number is applied."""
        event = self.ledger.event(
            kind, worker=worker, sequence=seat.sequence, update=self.version, **fields
        )
        if self._handout:
            self._handout.give_back(worker, seat.sequence)
        self._write_ahead(Incident(event))
