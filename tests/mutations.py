"""Put faults into the code one at a time: each must make a test fail.

.venv/bin/python tests/mutations.py              all faults, several minutes
.venv/bin/python tests/mutations.py flush proof  faults with one of these words in their name

Each fault is put into a copy of the tree, and its tests run there until one fails. The exit status
is 1 if no test of a fault fails, or if the code does not contain the text to replace exactly once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREE = ("asgd", "cluster", "analysis", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Attributes
    ----------
    name
        The wrong behaviour.
    file
        The changed file, relative to the root of the tree.
    before, after
        A text that occurs once in the file, and its replacement.
    tests
        Arguments of pytest that select the tests of this fault.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


SOCKETS = "tests/cluster/test_sockets.py"
HANDSHAKE = (SOCKETS, "-k", "secret or proof or handshake")
STRANGERS = (SOCKETS, "-k", "stranger or flood or crowd")
QUESTIONS = (
    SOCKETS,
    "-k",
    "question or overwritten or refused or none_of or dial",
)
RESTARTS = ("tests/cluster/test_restarts.py",)
DIRECTORY = ("tests/cluster/test_launch.py", "-k", "nobody_else")
PAGE = ("tests/cluster/test_launch.py", "-k", "interruption[2]")
RECORDS = ("tests/asgd/test_records.py", "-k", "unknown")
LINKS = ("tests/asgd/test_rundir.py", "-k", "link or elsewhere")
CELLS = ("tests/analysis/test_report.py", "-k", "spreadsheet")
POWER = ("tests/cluster/test_power.py", "-k", "checkpoint")
CHECKPOINT = ("tests/cluster/test_checkpoint.py", "-k", "checkpoint or disk")
PRECISION = "tests/cluster/test_precision.py"
RULES = "tests/cluster/test_rules_restored.py"
LOCAL = "tests/asgd/test_local_steps.py"
STATES = ("tests/cluster/test_local_steps.py", "-k", "(state or restored) and not server")
COMPRESSION, SENT = "tests/asgd/test_compression.py", "tests/cluster/test_compression.py"
LOG = ("tests/cluster/test_write_ahead.py", "-k", "killed_server or disk or counted")
EPOCHS = "tests/cluster/test_epochs.py"

POLICIES = "tests/cluster/test_policies.py"
TOGETHER = "tests/cluster/test_workers_per_process.py"

MUTATIONS = [
    Mutation(
        "workers of a process compute at the same time",
        "cluster/core/worker.py",
        "        with self._turn:\n",
        "        with nullcontext():\n",
        (TOGETHER, "-k", "turns"),
    ),
    Mutation(
        "a gradient stays in the problem's memory while others of its process compute",
        "cluster/core/worker.py",
        "gradient.copy() if self._shares else gradient",
        "gradient",
        (TOGETHER, "-k", "turns"),
    ),
    Mutation(
        "workers of a process wait one after another",
        "cluster/core/worker.py",
        "        if added > 0.0:\n",
        "        with self._turn:\n",
        (TOGETHER, "-k", "by_itself"),
    ),
    Mutation(
        "a process that hangs loses one worker",
        "cluster/fleet.py",
        "if other in together:",
        "if other == worker:",
        (TOGETHER, "-k", "hangs"),
    ),
    Mutation(
        "a worker whose code raises takes its process with it",
        "cluster/fleet.py",
        "if process not in self._workers.values():",
        "if True:",
        (TOGETHER, "-k", "raises"),
    ),
    Mutation(
        "every worker starts a process",
        "cluster/fleet.py",
        "if sharing[process] < most:",
        "if False:",
        (TOGETHER, "-k", "room or records"),
    ),
    Mutation(
        "memory counts a process for each worker",
        "cluster/memory.py",
        "return -(-config.cluster.workers // config.cluster.workers_per_process)",
        "return config.cluster.workers",
        (PRECISION, "-k", "memory"),
    ),
    Mutation(
        "a discarded gradient is not on record",
        "cluster/core/server.py",
        "if turn.fate is Fate.DISCARDED:",
        "if False:",
        (POLICIES, "-k", "killed or interrupted"),
    ),
    Mutation(
        "a counted gradient stays in the memory of its message",
        "cluster/core/turns.py",
        "arrival if policy.waits else arrival.kept()",
        "arrival",
        (POLICIES, "-k", "outlives"),
    ),
    Mutation(
        "a state has the numbers of gradients whose update was not made",
        "cluster/core/server.py",
        "self._unsettled.get(w, seat.sequence)",
        "seat.sequence",
        (POLICIES, "-k", "interrupted"),
    ),
    Mutation(
        "the log forgets what was discarded",
        "cluster/storage/write_ahead.py",
        "_AFTER_DISCARDED if entry.discarded else _UPDATE",
        "_UPDATE",
        (POLICIES, "-k", "killed and log"),
    ),
    Mutation(
        "discarded gradients stay on record when a server goes back",
        "asgd/rundir/repair.py",
        "dict.fromkeys((TRACE, MEMBERS, DISCARDED, POSITIONS), updates)",
        "dict.fromkeys((TRACE, MEMBERS, POSITIONS), updates), DISCARDED: 10**9",
        (POLICIES, "-k", "killed"),
    ),
    Mutation(
        "worker does not verify the server's proof",
        "cluster/sockets/connection.py",
        'if not hmac.compare_digest(shown, wire.proof(endpoint.secret, b"server", hello, nonce)):',
        "if not shown:",
        HANDSHAKE,
    ),
    Mutation(
        "the server keeps float64 whatever the problem says",
        "cluster/core/server.py",
        "self.parameters = np.array(parameters)",
        "self.parameters = np.array(parameters, dtype=float)",
        (PRECISION, "-k", "last_bit and not killed"),
    ),
    Mutation(
        "a state saved while the log is applied lacks what workers have read",
        "cluster/core/server.py",
        "self.log is not None or self._replays",
        "self.log is not None",
        (RULES, "-k", "made_from_the_log"),
    ),
    Mutation(
        "own rules may keep state outside of checkpoints",
        "asgd/rules/own.py",
        "self._after_updates(slice(None), disturbed=True)",
        "self._after_updates(slice(None))",
        ("tests/asgd/test_own_rules.py", "-k", "hidden or refers"),
    ),
    Mutation(
        "local state goes on after a worker has joined again",
        "cluster/core/server.py",
        "seat.present, seat.continues = True, False",
        "seat.present = True",
        STATES,
    ),
    Mutation(
        "local state goes on after a difference was refused or discarded",
        "cluster/core/server.py",
        "        seat.continues = seat.continues and counted\n",
        "",
        (*STATES[:2], "state_after and (refused or discarded)"),
    ),
    Mutation(
        "local state goes on in a new process whose last difference counts later",
        "cluster/core/server.py",
        "seat.continues = seat.continues and counted",
        "seat.continues = counted",
        STATES,
    ),
    Mutation(
        "in virtual time local state goes on after a difference was discarded",
        "asgd/simulation/run_order.py",
        "keeps=PushRule.of(config).keeps,",
        "keeps=False,",
        ("tests/cluster/test_policies.py", "-k", "virtual_time_is and kept-steps"),
    ),
    Mutation(
        "local state goes on over a missing number",
        "asgd/local_steps.py",
        "if state is None or state.following != sequence:",
        "if state is None:",
        STATES,
    ),
    Mutation(
        "local steps are rounded to the parameters",
        "asgd/rules/sgd.py",
        "    additive = True\n",
        "",
        (LOCAL, "-k", "one_step_by_sgd"),
    ),
    Mutation(
        "local steps of AdamW decay the difference",
        "asgd/rules/adam.py",
        "    additive = False\n",
        "",
        (LOCAL, "-k", "several_starts"),
    ),
    Mutation(
        "the last of the local steps is not made",
        "asgd/local_steps.py",
        "for j in range(self.steps):",
        "for j in range(max(1, self.steps - 1)):",
        (LOCAL, "-k", "quadratic_have"),
    ),
    Mutation(
        "local steps all draw the first batch",
        "asgd/local_steps.py",
        "lambda j, x: self._gradient(worker, first + j, x, size, position)",
        "lambda j, x: self._gradient(worker, first, x, size, position)",
        (LOCAL, "-k", "by_hand"),
    ),
    Mutation(
        "local steps take the time of one gradient",
        "asgd/draws.py",
        "self._gradients = config.optimizer.gradients_per_push",
        "self._gradients = 1",
        (LOCAL, "-k", "times or seconds"),
    ),
    Mutation(
        "local steps count the samples of one batch",
        "cluster/core/server.py",
        "seat.batch_size = int(self._batch_size(self.version)) * self._gradients",
        "seat.batch_size = int(self._batch_size(self.version))",
        STATES,
    ),
    Mutation(
        "the prediction of local steps leaves out the noise between them",
        "analysis/models/push_replay.py",
        "return self.sampled_gradient(x, row)",
        "return np.asarray(self.problem.gradient(x), x.dtype)",
        ("tests/analysis/test_modes_and_rules.py", "-k", "scatter and local"),
    ),
    Mutation(
        "limits of the learning rate are told for local steps",
        "analysis/prediction/run_stability.py",
        "unknown = setting.replay_only or setting.pushes is not None",
        "unknown = setting.replay_only",
        ("tests/analysis/test_modes_and_rules.py", "-k", "scatter and local"),
    ),
    Mutation(
        "what a compression leaves is forgotten",
        "asgd/compression.py",
        "self._residuals[worker] = sequence + 1, whole - sent",
        "self._residuals[worker] = sequence + 1, 0.0 * sent",
        (COMPRESSION, "-k", "minimum or was_to_be_sent"),
    ),
    Mutation(
        "the rest outlives a lost gradient",
        "asgd/compression.py",
        "whole = vector + residual if following == sequence else vector",
        "whole = vector + residual if following is not None else vector",
        (COMPRESSION, "-k", "missing_number or by_hand"),
    ),
    Mutation(
        "the rest leaves out what the message rounds",
        "asgd/compression.py",
        "sent = self._rounded(self._compression.compressed(whole))",
        "sent = self._compression.compressed(whole)",
        (COMPRESSION, "-k", "was_to_be_sent"),
    ),
    Mutation(
        "of equal entries all are kept",
        "asgd/compression.py",
        "chosen |= equal & (np.cumsum(equal, axis=-1, dtype=np.uint32) <= room)",
        "chosen |= equal",
        (COMPRESSION, "-k", "equal_ones"),
    ),
    Mutation(
        "a compression hides what is not finite",
        "asgd/compression.py",
        "        size[np.isnan(size)] = np.inf  # the server must see it\n",
        "",
        (COMPRESSION, "-k", "finite"),
    ),
    Mutation(
        "a worker goes on with the rest of a gradient that was lost",
        "cluster/core/server.py",
        "self._workers_keep = PushRule.of(config).keeps",
        "self._workers_keep = False",
        (SENT, "-k", "died"),
    ),
    Mutation(
        "indices of a gradient may be beyond its length",
        "cluster/sockets/compressed.py",
        "indices[-1] < self._dimension and ",
        "",
        (SENT, "-k", "impossible"),
    ),
    Mutation(
        "indices of a gradient may occur twice",
        "cluster/sockets/compressed.py",
        "(indices[1:] > indices[:-1]).all()",
        "(indices[1:] >= indices[:-1]).all()",
        (SENT, "-k", "impossible"),
    ),
    Mutation(
        "a compressed gradient keeps numbers of the one before",
        "cluster/sockets/compressed.py",
        "        out.fill(0.0)\n",
        "",
        (SENT, "-k", "last_bit and not killed"),
    ),
    Mutation(
        "a number that is not finite arrives as a finite one",
        "cluster/sockets/compressed.py",
        "        if multiples.min() == _NAN:\n",
        "        if False:\n",
        (SENT, "-k", "finite"),
    ),
    Mutation(
        "compressed gradients take the bytes of whole ones",
        "cluster/sockets/wire.py",
        "return cls(dimension, sent, precision.name, compression_of(cluster))",
        "return cls(dimension, sent, precision.name)",
        (SENT, "-k", "smaller"),
    ),
    Mutation(
        "the prediction sends whole gradients",
        "asgd/local_steps.py",
        "if self._feedback is None or found.shape != start.shape:",
        "if self._feedback is None or found.ndim == 2 or found.shape != start.shape:",
        ("tests/analysis/test_modes_and_rules.py", "-k", "scatter and (top_k or int8)"),
    ),
    Mutation(
        "a discarded gradient keeps its range of the epoch",
        "cluster/core/server.py",
        "                if self._handout:\n"
        "                    self._handout.give_back(*arrival.address)\n",
        "",
        (EPOCHS, "-k", "discarded"),
    ),
    Mutation(
        "a lost or refused gradient keeps its range of the epoch",
        "cluster/core/server.py",
        "            self._handout.give_back(worker, seat.sequence)\n",
        "            pass\n",
        (EPOCHS, "-k", "no_position and async"),
    ),
    Mutation(
        "a restored server forgets what was used of the epoch",
        "cluster/core/server.py",
        "            self._handout.restore(counts.parts)\n",
        "            pass\n",
        (EPOCHS, "-k", "restarted_server and checkpoint"),
    ),
    Mutation(
        "a worker draws from the part of another",
        "asgd/shards.py",
        "return 0 if self.parts is None else worker % len(self.parts)",
        "return 0 if self.parts is None else (worker + 1) % len(self.parts)",
        ("tests/asgd/test_shards.py", "-k", "part_alone"),
    ),
    Mutation(
        "the prediction draws from all samples what a worker drew from its part",
        "analysis/models/recorded_batches.py",
        "return recorded.shards.choose(worker, (paths, size), self._rng)",
        "return self._rng.integers(recorded.shards.n_samples, size=(paths, size))",
        ("tests/analysis/test_modes_and_rules.py", "-k", "slow_worker"),
    ),
    Mutation(
        "the memory of a held gradient is given to another connection",
        "cluster/sockets/long_vectors.py",
        "if peer.asked:  # the parameter server may hold the gradient",
        "if False:",
        (PRECISION, "-k", "outlives"),
    ),
    Mutation(
        "a snapshot is overwritten while others send it",
        "cluster/sockets/server.py",
        "        peer.buffer.users += 1\n",
        "",
        (PRECISION, "-k", "share_two_buffers"),
    ),
    Mutation(
        "long vectors have no bound",
        "cluster/sockets/server.py",
        "bounded=not server.collects",
        "bounded=False",
        (PRECISION, "-k", "share_two_buffers or waits_for_memory"),
    ),
    Mutation(
        "workers wait for the memory of a gradient that waits for theirs",
        "cluster/sockets/server.py",
        "bounded=not server.collects",
        "bounded=True",
        (PRECISION, "-k", "in_turn"),
    ),
    Mutation(
        "a worker that waits for memory is taken for silent",
        "cluster/sockets/server.py",
        "self._server.note_arriving(peer.worker, now)",
        "pass",
        (PRECISION, "-k", "waits_for_memory"),
    ),
    Mutation(
        "a lease is taken without waiting for claims on it",
        "cluster/storage/lease.py",
        "settle(self._path, wait=True)",
        "pass",
        ("tests/cluster/test_checkpoint.py", "-k", "lease_is_taken"),
    ),
    Mutation(
        "the loser of a claim gets no error",
        "asgd/rundir/claims.py",
        "    if _read(own) is None:",
        "    if False:",
        ("tests/asgd/test_claims.py", "-k", "lost_its_claim"),
    ),
    Mutation(
        "float32 is sent as float64",
        "cluster/sockets/wire.py",
        "sent = sent_as(cluster.wire_dtype, precision)",
        'sent = "float64"',
        (PRECISION, "-k", "halve"),
    ),
    Mutation(
        "the memory asked for is that of float64",
        "cluster/memory.py",
        "problem.dtype.itemsize",
        "8",
        (PRECISION, "-k", "asked_for"),
    ),
    Mutation(
        "a simulation keeps float64 whatever the problem says",
        "asgd/problems/base.py",
        "return np.array(converted(np.asarray(start), problem.dtype))",
        "return np.array(start, dtype=float)",
        ("tests/asgd/test_precision.py", "-k", "last_bit"),
    ),
    Mutation(
        "steps in one dimension are float64",
        "asgd/simulation/simulate.py",
        "self._learning_rates[part].astype(gradients.dtype)",
        "self._learning_rates[part]",
        ("tests/asgd/test_precision.py", "-k", "last_bit"),
    ),
    Mutation(
        "an overflow in float32 is not named",
        "asgd/divergence.py",
        "if gradient.dtype == np.float32 and np.isinf(gradient).any():",
        "if False:",
        ("tests/asgd/test_precision.py", "-k", "overflow"),
    ),
    Mutation(
        "server does not verify the worker's proof",
        "cluster/sockets/server.py",
        'if not hmac.compare_digest(shown, wire.proof(secret, b"worker", peer.hello, peer.nonce)):',
        "if not shown:",
        HANDSHAKE,
    ),
    Mutation(
        "the server's nonce is constant: a worker's handshake can be replayed",
        "cluster/sockets/server.py",
        "peer.nonce = secrets.token_bytes(wire.NONCE_BYTES)",
        "peer.nonce = bytes(wire.NONCE_BYTES)",
        HANDSHAKE,
    ),
    Mutation(
        "the worker's nonce is constant: the server's handshake can be replayed",
        "cluster/sockets/connection.py",
        "nonce = secrets.token_bytes(wire.NONCE_BYTES)",
        "nonce = bytes(wire.NONCE_BYTES)",
        HANDSHAKE,
    ),
    Mutation(
        "both sides show the same proof: a stranger sends it back",
        "cluster/sockets/wire.py",
        "hmac.digest(secret, side + hello + nonce,",
        "hmac.digest(secret, hello + nonce,",
        HANDSHAKE,
    ),
    Mutation(
        "no limit on strangers",
        "cluster/sockets/server.py",
        "if len(self._unauthenticated) >= _MOST_UNAUTHENTICATED:",
        "if False:",
        STRANGERS,
    ),
    Mutation(
        "the newest stranger is dropped instead of the oldest",
        "cluster/sockets/server.py",
        "oldest = next(iter(self._unauthenticated.values()))",
        "oldest = peer",
        STRANGERS,
    ),
    Mutation(
        "a worker that has proved itself still counts as a stranger",
        "cluster/sockets/server.py",
        "        self._unauthenticated.pop(peer.socket.fileno(), None)\n        self._workers",
        "        self._workers",
        STRANGERS,
    ),
    Mutation(
        "our own user on the local socket counts as a stranger",
        "cluster/sockets/peer.py",
        "return bool(user == os.getuid())",
        "return False",
        STRANGERS,
    ),
    Mutation(
        "every user on the local socket counts as our own",
        "cluster/sockets/peer.py",
        "return bool(user == os.getuid())",
        "return True",
        STRANGERS,
    ),
    Mutation(
        "an answer is sent before the question",
        "cluster/sockets/server.py",
        "if peer is None or not peer.asked:",
        "if peer is None:",
        QUESTIONS,
    ),
    Mutation(
        "a question is taken before the answer to the last one",
        "cluster/sockets/peer.py",
        "        if self.asked or self.unsent:\n            raise",
        "        if False:\n            raise",
        QUESTIONS,
    ),
    Mutation(
        "workers that do not belong to the run are accepted",
        "cluster/core/server.py",
        "return worker in self._seats",
        "return self._seats.setdefault(worker, Seat()) is not None",
        QUESTIONS,
    ),
    Mutation(
        "impossible compute times are recorded",
        "cluster/core/update.py",
        "if not 0.0 <= gradient.compute_seconds < math.inf:",
        "if False:",
        QUESTIONS,
    ),
    Mutation(
        "a dial is not repeated",
        "cluster/transport.py",
        "            time.sleep(delay)\n",
        "            raise\n",
        QUESTIONS,
    ),
    Mutation(
        "a worker whose process is killed is given up within seconds",
        "cluster/restarts.py",
        "lasting = streak.failures >= _FAILURES and now - streak.since >= _PATIENCE",
        "lasting = streak.failures >= _FAILURES",
        RESTARTS,
    ),
    Mutation(
        "the directory of an embedded Ray is open to everybody",
        "cluster/local_ray/session.py",
        "os.mkdir(inner)",
        "os.mkdir(inner), os.chmod(directory, 0o777)",
        DIRECTORY,
    ),
    Mutation(
        "Ray's page of metrics is open where nobody asked for it",
        "cluster/local_ray/session.py",
        "RAY_enable_metrics_collection=str(int(metrics_port is not None)),",
        "",
        PAGE,
    ),
    Mutation(
        "a link deep in a run directory is followed",
        "asgd/rundir/files.py",
        "places.append(entry.path)",
        "pass",
        LINKS,
    ),
    Mutation(
        "names are formulas in CSV files",
        "analysis/report/pictures.py",
        'return f"\'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell',
        "return cell",
        CELLS,
    ),
    Mutation(
        "the configuration is not flushed",
        "asgd/rundir/writer.py",
        "replace_file(path / name, content, flush=True)",
        "replace_file(path / name, content)",
        POWER,
    ),
    Mutation(
        "a checkpoint is not flushed",
        "asgd/rundir/checkpoint.py",
        "            os.fsync(file.fileno())\n            # What",
        "            # What",
        POWER,
    ),
    Mutation(
        "the name of a checkpoint is not flushed",
        "asgd/rundir/checkpoint.py",
        "    sync_directory(directory)\n    for older",
        "    for older",
        POWER,
    ),
    Mutation(
        "the trace is not flushed before the checkpoint",
        "cluster/storage/recorder.py",
        "        self._writer.sync()\n",
        "",
        POWER,
    ),
    Mutation(
        "paths of all repeats start where the first does",
        "analysis/prediction/setting.py",
        "return points[0] if np.all(points == points[0]) else points",
        "return points[0]",
        ("tests/analysis/test_repeats.py", "-k", "apart"),
    ),
    Mutation(
        "a start is replayed with the staleness of another run",
        "analysis/models/replay.py",
        "parts = zip(chosen, ",
        "parts = zip(chosen[::-1], ",
        ("tests/analysis/test_sme_law.py", "-k", "several_runs"),
    ),
    Mutation(
        "the trace is flushed after the checkpoint",
        "cluster/storage/recorder.py",
        "        self._writer.sync()\n        try:\n            save(self._checkpoints, state)\n",
        "        try:\n            save(self._checkpoints, state), self._writer.sync()\n",
        POWER,
    ),
    Mutation(
        "a table that is cut is not flushed before it takes the old one's name",
        "asgd/rundir/repair.py",
        "write_part(kept, pieces, flush=True)",
        "write_part(kept, pieces)",
        POWER,
    ),
    Mutation(
        "a checkpoint is not read back",
        "asgd/rundir/checkpoint.py",
        "if temporary.read_bytes() != data:",
        "if False:",
        CHECKPOINT,
    ),
    Mutation(
        "a checkpoint beyond the trace is believed",
        "cluster/storage/recovery.py",
        "if state.version > recorded:",
        "if False:",
        CHECKPOINT,
    ),
    Mutation(
        "a short write of the log goes unnoticed",
        "cluster/storage/write_ahead.py",
        "if written < length:",
        "if False:",
        LOG,
    ),
    Mutation(
        "an update is made before it is logged",
        "cluster/core/server.py",
        "        if self._write_ahead(update):\n            self._commit(update)\n",
        "        self._commit(update)\n        self._write_ahead(update)\n",
        LOG,
    ),
    Mutation(
        "the count of refused gradients is not restored from the log",
        "cluster/core/server.py",
        '        self._rejected += event["event"] == "gradient_rejected"\n',
        "",
        LOG,
    ),
    Mutation(
        "the count of refused gradients is not restored from the checkpoint",
        "cluster/core/server.py",
        "        self._rejected = counts.rejected\n",
        "",
        LOG,
    ),
    Mutation(
        "a log's unknown version counts as 0",
        "asgd/records/checks.py",
        "        kept = ~unknown\n",
        "        staleness, unknown = np.nan_to_num(staleness), unknown & False\n"
        "        kept = ~unknown\n",
        RECORDS,
    ),
    Mutation(
        "the items of one step count as independent",
        "analysis/records/fit.py",
        "step=update if shared else None",
        "step=None",
        ("tests/analysis/test_records.py", "-k", "one_cluster"),
    ),
    Mutation(
        "a closed log takes items that nobody reads",
        "asgd/records/log.py",
        "                self._version[0] = _CLOSED\n",
        "                pass\n",
        ("tests/asgd/test_staleness_log.py", "-k", "closed"),
    ),
]


def outcome(mutation: Mutation | None, tests: tuple[str, ...]) -> str | None:
    """Return the first test that fails in a copy of the tree with a fault; None if all pass."""
    with tempfile.TemporaryDirectory(prefix="m-") as directory:
        tree = Path(directory)
        for name in TREE:
            source, ignore = ROOT / name, shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=ignore)
            else:
                shutil.copy(source, tree)
        if mutation is not None:
            file = tree / mutation.file
            text = file.read_text()
            if text.count(mutation.before) != 1:
                raise LookupError(f"{mutation.file}: {mutation.before!r}: expected it once")
            file.write_text(text.replace(mutation.before, mutation.after))
        options = ("-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--no-header")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"pytest ended with {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Put faults into the code and run its tests.")
    parser.add_argument("words", nargs="*", help="only faults with one of these in their name")
    words = parser.parse_args().words
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    good = True
    for tests in dict.fromkeys(mutation.tests for mutation in chosen):
        if (failed := outcome(None, tests)) is not None:
            sys.exit(f"{failed} fails without any fault")
    print("| fault | test that failed |\n| --- | --- |")
    for mutation in chosen:
        try:
            failed = outcome(mutation, mutation.tests)
        except LookupError as error:
            failed, good = f"none: {error}", False
        good = good and failed is not None
        print(f"| {mutation.name} | {failed or 'NONE: it survives'} |", flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
