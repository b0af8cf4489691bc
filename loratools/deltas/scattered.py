"""Single numbers at places of a matrix, as rows of ΔW."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loratools.deltas.base import Dense

if TYPE_CHECKING:
    from torch import Tensor


class Entries(NamedTuple):
    """Places (n) in the order of a matrix's elements, each once, and their values (n) in float64."""

    places: Tensor
    values: Tensor


def entries(places: Tensor, values: Tensor) -> Entries:
    """The values by their places; those of one place are added in the order given.

    >>> import torch
    >>> found = entries(torch.tensor([5, 2, 5]), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    >>> found.places.tolist(), found.values.tolist()
    ([2, 5], [2.0, 4.0])
    """
    import numpy as np
    import torch

    unique, where = torch.unique(places, return_inverse=True)
    if len(unique) == len(places):
        order = torch.argsort(places)
        return Entries(places[order], values[order])
    sums = np.zeros(len(unique))
    np.add.at(sums, where.cpu().numpy(), values.cpu().numpy())  # one after the other, where a tensor's own scatter promises no order
    return Entries(unique, torch.from_numpy(sums).to(values.device))


def scattered(found: Entries, columns: int, scale: float = 1.0) -> Dense:
    """The map rows → scale·ΔW[rows] of a matrix that is zero but for these entries."""
    import torch

    places, values = found.places, found.values * scale

    def rows(part: slice) -> Tensor:
        edges = torch.tensor([part.start * columns, part.stop * columns], device=places.device)
        low, high = torch.searchsorted(places, edges).tolist()
        out = torch.zeros((part.stop - part.start) * columns, dtype=torch.float64, device=places.device)
        out[places[low:high] - part.start * columns] = values[low:high]
        return out.reshape(-1, columns)

    return rows
