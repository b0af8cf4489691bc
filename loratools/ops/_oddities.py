"""What is odd about an adapter: told by its headers, and, where its data is looked at, by its values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.facts import low_rank
from loratools.refs import FLOATS, Ref, Spec

LARGE = 64  # a scaling beyond the habits of any trainer (alpha 256 at rank 8 is 32): most often an alpha read as a scale
_LOCAL = re.compile(r"[/~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")


def settings(adapter: Adapter) -> Mapping[str, Any]:
    """What its format's config says, if it has one."""
    found = adapter.metadata.get(adapter.format or "", {})
    return found if isinstance(found, Mapping) else {}


def as_a_whole(adapter: Adapter) -> list[str]:
    """Its base, its bytes and its passengers."""
    warnings = []
    stated = settings(adapter).get("base_model_name_or_path")
    if isinstance(stated, str) and _LOCAL.match(stated) and not Path(stated).exists():
        warnings.append("its base is named by a path on another machine")
    whole = {name: delta.nbytes for name, delta in adapter.items() if isinstance(delta, Replacement)}
    share = sum(whole.values()) / (sum(delta.nbytes for delta in adapter.values()) or 1)
    if share > 0.5 and len(whole) < len(adapter):
        warnings.append(f"{share:.0%} of its bytes are tensors saved whole, most of them {max(whole, key=whole.__getitem__)}")
    if adapter.passengers:
        warnings.append(f"{len(adapter.passengers)} tensors change no weight: {', '.join(list(adapter.passengers)[:3])}")
    return warnings


def unfetched(adapter: Adapter) -> list[str]:
    """Scalings that the header alone does not tell."""
    lacking = [name for name, delta in adapter.items() if math.isnan(delta.facts().get("alpha") or 0)]
    told = "lie beyond the header that was fetched, so they and the scaling are unknown: --values reads them"
    return [f"the alphas of {len(lacking)} of {len(adapter)} modules {told}"] if lacking else []


def odd_scaling(delta: Delta) -> Iterator[str]:
    """Alphas and ranks that no trainer gives."""
    low = low_rank(delta)
    if low is None:
        return
    if low.alpha == 0:
        yield "alpha is 0, so it changes nothing" if delta is low else "alpha is 0, so its factors change nothing"
    elif low.scaling < 0:
        yield f"the scaling is negative ({low.scaling:g}): what was trained is subtracted"
    elif low.scaling > LARGE:
        yield f"the scaling is very large ({low.scaling:g}): is its alpha a scale that was not divided by the rank?"
    rows, columns = Spec("F32", low.shape()).matrix
    if low.rank > min(rows, columns):
        yield f"rank {low.rank} is more than a {rows} × {columns} weight can have"


def faulty_values(delta: Delta) -> Iterator[str]:
    """Tensors that are zero or not finite."""
    for place, ref in delta.refs().items():
        wrong, zero = scan(ref)
        if wrong:
            yield f"{place} has {wrong} non-finite value{'s' if wrong > 1 else ''}"
        elif zero and place.rpartition(".")[2] in ("A", "B", "magnitude"):
            yield f"{place} is zero, so it changes nothing: was it trained?" if place in "AB" else f"{place} is zero"


def scan(ref: Ref) -> tuple[int, bool]:
    """How many values of a tensor are inf or nan, and whether all are zero; a block at a time."""
    import torch

    from loratools.tensors import as_tensor, torch_dtype

    wrong, zero, width = 0, True, torch_dtype(ref.spec.dtype).itemsize
    for block in ref.blocks():
        data = bytearray(block)
        found = as_tensor(data, Spec(ref.spec.dtype, (len(data) // width,)))
        found = found if ref.spec.dtype in FLOATS else found.to(torch.float32)
        wrong += int((~torch.isfinite(found)).sum())
        zero = zero and not found.any()
    return wrong, zero
