#!/usr/bin/env python3
"""Measures the effect of rounded and compressed messages on the loss and on the prediction.

.venv/bin/python -m scripts.bench_wire [--seeds 12] [--updates 3000] [--kinds int8 ...]

Softmax regression on the digits data in float64, four workers in virtual time with exponential
compute times. For each kind of message, over the seeds: the mean and largest difference of a final
loss from that of the same seed with whole messages, beside the standard deviation between seeds;
and the relative error of a replay of the staleness, whose paths are compressed but not rounded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import asgd
from analysis.study import Study

KINDS: dict[str, dict[str, Any]] = {
    "auto": {},
    "float32": {"wire_dtype": "float32"},
    "bfloat16": {"wire_dtype": "bfloat16"},
    "int8": {"compression": "int8"},
    "top_k 0.1": {"compression": "top_k", "compression_share": 0.1},
    "top_k 0.01": {"compression": "top_k", "compression_share": 0.01},
}


def losses(kind: str, seeds: int, updates: int, directory: Path) -> tuple[list[float], float]:
    """Return the final losses, and the relative error of the prediction."""
    tables = {
        "problem": {"kind": "softmax"},
        "optimizer": {"learning_rate": 0.3},
        "cluster": {
            "workers": 4,
            **KINDS[kind],
            "compute_time": {"law": "exponential", "mean": 0.01},
        },
        "run": {"updates": updates, "repeats": seeds},
    }
    study = Study.open(asgd.simulate(asgd.make_config(tables), directory / kind))
    _, score = study.predict(paths=64, models=["replay"])
    final = [float(run.loss["loss"].iloc[-1]) for run in study.runs]
    return final, score.models["replay"].relative_error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for kind in dict.fromkeys(("auto", *options.kinds)):
            found, error = losses(kind, options.seeds, options.updates, Path(directory))
            if kind == "auto":
                plain = np.array(found)
            difference = np.array(found) - plain
            print(
                f"{kind}: final loss {np.mean(found):.5f}, differs by {np.mean(difference):.2g}, "
                f"at most {np.abs(difference).max():.2g} "
                f"(seeds by {np.std(plain, ddof=1):.2g}); error {error:.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
