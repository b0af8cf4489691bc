"""Factors told from one another number: (IA)³'s l as itself or as what is added to 1, moved only where nothing is rounded."""

from __future__ import annotations

from loratools.errors import NotExpressible
from loratools.refs import Ref


def told_from(ref: Ref, offset: float, other: float, widest: str = "F64") -> Ref:
    """The vector v with other + v = offset + ref, to the last bit, in ref's own dtype or the narrowest wider one up to `widest`.

    Raises NotExpressible where none holds it.

    >>> from loratools.tensors import read_tensor, to_ref
    >>> import torch
    >>> read_tensor(told_from(to_ref(torch.tensor([1.5, 0.75])), 0.0, 1.0)).tolist()
    [0.5, -0.25]
    """
    import torch

    from loratools.tensors import read_tensor, to_ref, torch_dtype

    if offset == other:
        return ref
    factors = offset + read_tensor(ref, torch.float64)
    moved = factors - other
    for code in dict.fromkeys((ref.spec.dtype, *("F32", "F64")[: 1 if widest == "F32" else 2])):
        narrow = moved.to(torch_dtype(code))
        if torch.equal(other + narrow.to(torch.float64), factors):
            return to_ref(narrow)
    fact = f"factors told from {offset:g}, which told from {other:g} no {widest} holds exactly"
    raise NotExpressible(fact, remedy="convert it first: --kind lora")
