"""Named arrays in files of other programs: .npz, .safetensors and .pt."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from asgd.arrays import Array
from asgd.errors import InputError

_METADATA = "__metadata__"  # key of the metadata in an .npz file


def packed(arrays: Mapping[str, Array], metadata: dict[str, str], path: Path, where: str) -> bytes:
    """Return the content of a file of named arrays, in the format of its suffix.

    Raises
    ------
    InputError
        The suffix is unknown, or the library of the format is missing.
    """
    formats = {".npz": _npz, ".safetensors": _safetensors, ".pt": _pt}
    content: bytes = _of_suffix(path, where, formats)(arrays, metadata)
    return content


def read_arrays(path: Path, where: str) -> dict[str, Array]:
    """Return the named arrays of a file.

    No object is unpickled: .npz without pickles, .pt by the loader of PyTorch for weights only.

    Raises
    ------
    InputError
        The suffix is unknown, the library of the format is missing, or the file cannot be read.
    """
    formats = {".npz": _from_npz, ".safetensors": _from_safetensors, ".pt": _from_pt}
    read = _of_suffix(path, where, formats)
    try:
        arrays: dict[str, Array] = read(path)
    except InputError:  # is a ValueError too; its message is complete
        raise
    except (OSError, ValueError, BadZipFile, EOFError, RuntimeError) as error:
        raise InputError(f"{where}: cannot be read ({' '.join(str(error).split())})") from None
    return arrays


def _of_suffix(
    path: Path, where: str, formats: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    if path.suffix not in formats:
        raise InputError(f"{where}: expected a file ending in .npz, .safetensors or .pt")
    return formats[path.suffix]


def _npz(arrays: Mapping[str, Array], metadata: dict[str, str]) -> bytes:
    content = io.BytesIO()
    named = {**arrays, _METADATA: np.array(json.dumps(metadata))}
    np.savez(content, **named)  # type: ignore[arg-type]
    return content.getvalue()


def _from_npz(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files if name != _METADATA}


def _safetensors(arrays: Mapping[str, Array], metadata: dict[str, str]) -> bytes:
    save: Callable[..., bytes] = _library("safetensors.numpy", ".[export]").save
    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)


def _from_safetensors(path: Path) -> dict[str, Array]:
    load: Callable[..., dict[str, Array]] = _library("safetensors.numpy", ".[export]").load
    try:
        return load(path.read_bytes())
    except Exception as error:  # SafetensorError derives from Exception alone
        raise ValueError(str(error)) from error


def _pt(arrays: Mapping[str, Array], metadata: dict[str, str]) -> bytes:
    torch = _library("torch", ".[torch]")
    state: Any = OrderedDict((n, torch.from_numpy(np.array(a))) for n, a in arrays.items())
    state._metadata = {"asgd": metadata}  # where PyTorch keeps everything that is not a tensor
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def _from_pt(path: Path) -> dict[str, Array]:
    torch = _library("torch", ".[torch]")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(
            "no state dictionary that torch.load reads with weights_only=True"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError("no state dictionary: its values are not all tensors")
    short = (torch.float16, torch.bfloat16)  # NumPy has no bfloat16
    values = {name: value.detach() for name, value in state.items()}
    return {n: (v.float() if v.dtype in short else v).numpy() for n, v in values.items()}


def _library(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"{error}; pip install '{extra}' brings it") from None
