"""Adapters in memory for the operations on factors, and the dense float64 algebra they must equal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import torch
from hypothesis import strategies as st
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.tensors import read_tensor, to_ref

SCHEMA = json.loads((Path(__file__).parents[2] / "spec" / "receipt.schema.json").read_text())
# name: (shape of the weight, layer); two squares, a convolution, an embedding, and sides below the ranks drawn
SHAPES = {
    "h.0.q_proj.weight": ((12, 12), "unknown"),
    "h.1.q_proj.weight": ((12, 12), "unknown"),
    "h.0.up.weight": ((20, 7), "unknown"),
    "h.0.down.weight": ((3, 20), "unknown"),
    "conv.weight": ((8, 4, 3, 3), "conv"),
    "wte.weight": ((30, 9), "embedding"),
}
SPECTRA = ("random", "degenerate", "zero", "badly scaled", "steep")


def low(shape: tuple[int, ...], rank: int, seed: int, *, layer: str = "unknown", spectrum: str = "random",
        dtype: torch.dtype = torch.float32, alpha: float = 8.0, rslora: bool = False) -> LowRank:  # fmt: skip
    """A LoRA of a weight of that shape whose factors are what `spectrum` says."""
    generator = torch.Generator().manual_seed(seed)
    columns = math.prod(shape[1:])
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    if spectrum == "degenerate":  # equal singular values, and half of the components are copies of others
        B = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64))[0]
        B = B.repeat(1, rank // shape[0] + 1)[:, :rank]
        A[rank // 2 + rank % 2 :] = A[: rank // 2]
    elif spectrum == "zero":
        B.zero_()
    elif spectrum == "badly scaled":  # A ~ 1e-2, B ~ 1e-6, condition 1e6
        B *= 1e-6 * torch.logspace(0, -3, rank, dtype=torch.float64)
        A *= 1e-2 * torch.logspace(0, -3, rank, dtype=torch.float64).unsqueeze(1)
    elif spectrum == "steep":
        B *= 0.3 ** torch.arange(rank, dtype=torch.float64)
    return LowRank(A=to_ref(A.to(dtype).reshape(rank, *shape[1:])), B=to_ref(B.to(dtype)), alpha=alpha, rslora=rslora, layer=layer)


@st.composite
def adapters(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = (torch.float32,), max_rank: int = 12) -> Adapter:
    """One to three modules of any shape, rank, alpha and spectrum, one rsLoRA flag as in a file; the dtypes given."""
    flag = draw(st.booleans())
    names = draw(st.lists(st.sampled_from(list(SHAPES)), min_size=1, max_size=3, unique=True))
    deltas: dict[str, Delta] = {}
    for name in names:
        shape, layer = SHAPES[name]
        deltas[name] = low(
            shape, draw(st.integers(1, max_rank)), draw(st.integers(0, 2**16)), layer=layer, spectrum=draw(st.sampled_from(SPECTRA)),
            dtype=draw(st.sampled_from(dtypes)), alpha=draw(st.sampled_from([1.0, 8.0, 0.3, -2.5])), rslora=flag,
        )  # fmt: skip
    return Adapter(deltas=deltas)


def dense(delta: Delta) -> Tensor:
    """ΔW of a LoRA (of a DoRA's direction, of what follows a saved tensor), or a difference, in float64, by the papers' formulas."""
    if isinstance(delta, DoRA | Chain):
        return dense(delta.direction if isinstance(delta, DoRA) else delta.then)
    if isinstance(delta, Full):
        return delta.scale * read_tensor(delta.diff, torch.float64)
    assert isinstance(delta, LowRank)
    A, B = (read_tensor(ref, torch.float64).flatten(1) for ref in (delta.A, delta.B))
    scaling = delta.alpha / math.sqrt(len(A)) if delta.rslora else delta.alpha / len(A)
    return scaling * torch.einsum("or,ri->oi", B, A)


def size(delta: LowRank) -> float:
    """|scaling| · Σ‖bₖ‖‖aₖ‖: what rounding is relative to where components cancel."""
    A, B = (read_tensor(ref, torch.float64).flatten(1) for ref in (delta.A, delta.B))
    return abs(delta.scaling) * float(B.norm(dim=0) @ A.norm(dim=1))


def checked(receipt: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The receipt, which fits its schema and is the one on disk."""
    jsonschema.Draft202012Validator(SCHEMA).validate(receipt)
    place = out / "loratools.json" if out.is_dir() else out.parent / f"{out.name}.loratools.json"
    assert json.loads(place.read_text()) == receipt
    return dict(receipt)


def rows_of(receipt: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in receipt["tensors"]}
