"""The data of a PyTorch problem: tensors, or a `Dataset`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate

from asgd.errors import InputError
from asgd.problems.base import Indices
from asgd.problems.networks.base import as_arrays, labels_of


class Tensors:
    """Data that are tensors: a batch is one selection of rows of each."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def batch(self, indices: Indices) -> tuple[torch.Tensor, ...]:
        """Return the samples `indices`, shape (..., sample's own shape), of each tensor."""
        rows = torch.from_numpy(np.array(indices)).to(self._tensors[0].device)
        return tuple(tensor[rows] for tensor in self._tensors)

    def labels(self) -> Any:
        """Return the last tensor, shape (n,), if it has a whole number per sample, else None."""
        return labels_of((self._tensors[-1].cpu(),))


class Items:
    """Data of a `Dataset`, whose samples are made one by one."""

    def __init__(self, dataset: Any, like: torch.Tensor) -> None:
        self._dataset, self._like = dataset, like

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Indices) -> tuple[torch.Tensor, ...]:
        """Return the samples `indices`, stacked as PyTorch's loader does."""
        items = default_collate([self._dataset[i] for i in np.ravel(indices).tolist()])
        parts = tuple(items) if isinstance(items, list | tuple) else (items,)
        parts = tuple(_like(part, self._like) for part in parts)
        return tuple(part.reshape(*indices.shape, *part.shape[1:]) for part in parts)

    def labels(self) -> Any:
        """Return `targets` of the data set, or the last entry of each sample; None if not numbers.

        The samples are read one by one, which may take as long as an epoch.
        """
        targets = getattr(self._dataset, "targets", None)
        if targets is None:
            items = (self._dataset[i] for i in range(len(self)))
            targets = [item[-1] if isinstance(item, list | tuple) else item for item in items]
            if any(np.ndim(target) for target in targets):
                return None
        return labels_of((targets,))


def as_data(data: Any, like: torch.Tensor) -> Tensors | Items:
    """Return the data of a problem, in the type and on the device of its parameters.

    Raises
    ------
    InputError
        A `Dataset` has no length or no samples, or `as_arrays` refuses the arrays.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset):
        if not hasattr(data, "__len__") or not len(data):
            raise InputError("data = Dataset without samples: expected one of known length >= 1")
        return Items(data, like)
    arrays = as_arrays(data)
    return Tensors(tuple(_like(torch.as_tensor(array), like) for array in arrays))


def _like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Move a tensor to the device, and floats to the type, of the parameters."""
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
