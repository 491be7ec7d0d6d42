"""Print a SHA-256 of the trace and the losses of three simulated runs, to see that no bit changes.

.venv/bin/python scripts/hash_runs.py
PYTHONPATH=OTHER_TREE .venv/bin/python scripts/hash_runs.py
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import asgd

RUNS: dict[str, dict[str, Any]] = {
    "softmax, free, exponential": {
        "problem": {"kind": "softmax"},
        "cluster": {"workers": 4, "compute_time": {"law": "exponential", "mean": 1.0}},
        "run": {"updates": 2000, "seed": 0},
    },
    "logistic, uniform, gamma": {
        "problem": {"kind": "logistic"},
        "cluster": {
            "workers": 8,
            "schedule": "uniform",
            "compute_time": {"law": "gamma", "mean": 1.0},
        },
        "run": {"updates": 2000, "seed": 1},
    },
    "double well, momentum, geometric": {
        "problem": {"kind": "double_well"},
        "optimizer": {"rule": "momentum", "learning_rate": 0.01},
        "simulation": {"staleness": "geometric", "mean_staleness": 3.0},
        "run": {"updates": 2000, "seed": 2},
    },
}
TRACE = (
    *("update", "worker", "sequence", "read_version", "staleness", "batch_size"),
    *("compute_seconds", "applied_seconds", "gradient_norm"),
)
LOSS = ("update", "seconds", "loss")


def main() -> None:
    """Print the hash of each run and of all."""
    total = hashlib.sha256()
    with tempfile.TemporaryDirectory() as base:
        for number, (name, config) in enumerate(RUNS.items()):
            run = asgd.read_run(asgd.simulate(asgd.make_config(config), Path(base) / str(number)))
            own = hashlib.sha256()
            for table, columns in ((run.trace, TRACE), (run.loss, LOSS)):
                for column in columns:
                    values = table[column].to_numpy()
                    kind = "<f8" if values.dtype.kind == "f" else "<i8"
                    own.update(values.astype(kind).tobytes())
            total.update(own.digest())
            print(own.hexdigest(), name)
    print(total.hexdigest(), f"all, NumPy {np.__version__}")


if __name__ == "__main__":
    main()
