"""Trained parameters as a file for other programs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from asgd.errors import written
from asgd.parameter_files import packed
from asgd.problems.make import make_problem
from asgd.rundir.files import replace_file
from asgd.rundir.reader import Run


def export(run: Run, output: str | Path) -> Path:
    """Write the parameters of a run's newest saved state, and return the file.

    A network's arrays are named as its framework names them: as in `state_dict` of a module,
    buffers included, or by paths such as "hidden/w" of a pytree. Those of any other problem are
    one array, "parameters". The metadata name the run, its updates, its last loss and its
    configuration.

    Parameters
    ----------
    run
        A run, finished or not.
    output
        The file. Its suffix is the format: .npz (NumPy), .safetensors, or .pt (PyTorch, a state
        dictionary for `load_state_dict`).

    Raises
    ------
    InputError
        No parameters are saved, the problem cannot be made, the suffix is unknown, its library is
        missing, or the file cannot be written.
    """
    path = Path(output)
    arrays = make_problem(run.config).named_arrays(run.parameters)
    content = packed(arrays, _metadata(run), path, f"-o {str(path)!r}")
    with written(path):
        replace_file(path, content)
    return path


def _metadata(run: Run) -> dict[str, str]:
    losses = run.loss["loss"]
    return {
        "run": str(run.path),
        "updates": str(run.parameters_update),
        "last_loss": repr(float(losses.iloc[-1])) if len(losses) else "",
        "asgd": version("asgd"),
        "config": run.config.to_json(),
    }
