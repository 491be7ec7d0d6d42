"""Array types, and what depends on the precision of their numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]  # of parameters and gradients: in the precision of their problem
Integers = npt.NDArray[np.int64]
Columns = dict[str, npt.NDArray[Any]]  # of a table, by name, all of the same length


def converted(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> Array:
    """Return an array as `dtype`: itself, or a copy in which overflows are infinite."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def number_type(name: str) -> np.dtype[Any]:
    """Return the floating-point type of this name; NumPy itself does not know bfloat16."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # few runs need it

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def sent_as(wire_dtype: str, precision: np.dtype[Any]) -> str:
    """Return the type name of vectors in messages: `cluster.wire_dtype`, if it is narrower.

    Parameters
    ----------
    wire_dtype
        "auto" or the name of a type.
    precision
        Type of the parameters.
    """
    if wire_dtype == "auto" or number_type(wire_dtype).itemsize >= precision.itemsize:
        return precision.name
    return wire_dtype


def euclidean_norm(vector: Array) -> float:
    """Return |vector|; infinite, without a warning, if its square overflows in float64."""
    norm = math.sqrt(np.vdot(vector, vector))  # unlike dot, vdot overflows without a warning
    if norm < math.inf or vector.dtype == np.float64:
        return norm
    return euclidean_norm(vector.astype(np.float64))
