"""peft's methods that turn, scale or otherwise change a weight by what it is: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.deltas.base import Additive, Delta
from loratools.deltas.coupled import Coupled
from loratools.deltas.full import Full
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.deltas.modulated import Modulated, Spread
from loratools.deltas.paired import Paired
from loratools.deltas.scaled import Scaled
from loratools.errors import FormatError, ShapeError
from loratools.formats.peft_method import Method
from loratools.formats.peft_multiplicative_encode import GLORA, HIRA, ROAD
from loratools.formats.peft_part import Part
from loratools.formats.peft_turned_encode import IA3
from loratools.refs import Ref


def _ia3(part: Part) -> Mapping[str, Delta]:
    """l (1, in, 1…) before a feedforward layer's product, else (out, 1) or a convolution's (1, out, 1…) after it, bias included."""
    l, before = part["ia3_l"], part.listed("feedforward_modules")  # noqa: E741
    shape = l.spec.shape
    side = 1 if before or len(shape) > 2 else 0
    if len(shape) < 2 or shape[side] != l.spec.numel:
        raise ShapeError("ia3_l is no vector along its axis", found=list(shape), expected="[1, in, ...]" if side else "[out, 1]")
    weight = Scaled(l=l, axis=1 if before else 0)
    return {"weight": weight} if before else {"weight": weight, "bias": WherePresent(delta=Scaled(l=l))}


def _road(part: Part) -> Mapping[str, Delta]:
    """The layer's output is turned, and its bias with it."""
    variant = int(part.word("variant", "road_1", "road_2", "road_4")[-1])
    delta = Paired(theta=part["road_theta"], alpha=part["road_alpha"], variant=variant, group=part.whole("group_size"))
    return {"weight": delta, "bias": WherePresent(delta=delta)}


def _hira(part: Part) -> Delta:
    """W + W∘(B·A), and of an embedding W + W∘(B·A)ᵀ; there is no scaling."""
    A = part.get("hira_embedding_A")
    if A is None:
        A, B = part["hira_A"], part["hira_B"]
        a, b = A.spec.shape, B.spec.shape
        if len(b) != len(a) or any(size != 1 for size in b[2:]):
            raise ShapeError("A and B do not meet", found=f"A {list(a)}, B {list(b)}", expected="A [r, in, *kernel], B [out, r, 1…]")
        times = LowRank(A=A, B=B.reshape(*b[:2]), alpha=float(a[0]))
    else:
        B = part["hira_embedding_B"]
        a, b = A.spec.shape, B.spec.shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ShapeError("A and B do not meet", found=f"A {list(a)}, B {list(b)}", expected="A [r, vocabulary], B [dimension, r]")
        times = LowRank(A=B.T, B=A.T, alpha=float(a[0]), layer="embedding")
    if a[0] != part.config.get("r"):  # peft 0.21.2 makes all of rank r, whatever rank_pattern says
        part.rank("r", a[0])
    delta = Modulated(times=times)
    return Unsettled(delta=delta, transposed=False) if times.layer == "embedding" else delta


def _glora(part: Part) -> Mapping[str, Delta]:
    """W + W∘A + B and b + b∘D + E + W·C; what is off, or has no bias to work on, is saved as zeros."""
    kind = part.word("config_A_B", "lora", "vector", "constant", "none")
    weight = Modulated(times=_path(part, "glora_A", kind), plus=_path(part, "glora_B", kind))
    off = part.get("glora_E.zeros") is not None and part.get("glora_C.zeros") is not None
    kind = part.word("config_D_E", "vector", "constant", "none")
    own = Modulated(times=_path(part, "glora_D", kind, bias=True), plus=_path(part, "glora_E", kind, bias=True))
    left, right = _coupling(part, part.word("config_C", "lora", "vector", "none"))
    bias = Coupled(own=own, left=left, right=right)
    return {"weight": weight, "bias": WherePresent(delta=bias) if off else bias}


def _path(part: Part, name: str, kind: str, *, bias: bool = False) -> Additive:
    """One of A, B, D and E: a low-rank product, a number for each row or for all, or zeros."""
    zeros = part.get(f"{name}.zeros") if bias or kind == "none" else None
    if zeros is not None:
        return Full(diff=zeros)
    if kind == "lora":
        Xd, Xu = part[f"{name}.Xd"], part[f"{name}.Xu"]
        part.rank("r", Xu.spec.shape[0] if Xu.spec.shape else 0, pattern=None)
        return LowRank(A=Xu, B=Xd, alpha=float(Xu.spec.shape[0]), layer="linear")
    value = part[f"{name}.X" if kind != "none" else f"{name}.zeros"]
    one, rows = (1,), (value.spec.numel,) if bias else (value.spec.numel, 1)
    if value.spec.shape != (one if kind == "constant" else rows):
        expected = "[1]" if kind == "constant" else "[out]" if bias else "[out, 1]"
        raise ShapeError(f"{name} is no {kind}", found=list(value.spec.shape), expected=expected)
    return Spread(value=value, single=kind == "constant")


def _coupling(part: Part, kind: str) -> tuple[Ref, Ref | None]:
    """(left, right) of C = left·right."""
    zeros = part.get("glora_C.zeros")
    if zeros is not None:
        return zeros, None
    if kind == "none":
        raise FormatError("has no glora_C.zeros beside it", tensor=next(iter(part.module.keys.values())), remedy="the file is incomplete")
    if kind == "vector":
        return part["glora_C.X"], None
    Xd, Xu = part["glora_C.Xd"], part["glora_C.Xu"]
    part.rank("r", Xu.spec.shape[0] if Xu.spec.shape else 0, pattern=None)
    return Xd, Xu


MULTIPLICATIVE = (
    Method(
        peft_type="IA3",
        title="each row, or each column, times a number",
        slots=("ia3_l",),
        settings=("feedforward_modules",),
        training=("init_ia3_weights",),
        make=_ia3,
        writing=IA3,
    ),
    Method(
        peft_type="ROAD",
        title="rows turned and scaled in pairs, bias included",
        slots=("road_(?:theta|alpha)",),
        settings=("variant", "group_size"),
        training=("init_weights",),
        conv1d=False,
        make=_road,
        writing=ROAD,
    ),
    Method(
        peft_type="HIRA",
        title="the weight times a low-rank product, elementwise",
        slots=("hira_(?:embedding_)?[AB]",),
        settings=("r",),
        training=("rank_pattern", "hira_dropout", "init_weights"),
        make=_hira,
        writing=HIRA,
    ),
    Method(
        peft_type="GLORA",
        title="the weight times and plus low-rank products or vectors, the bias too, and by what the weight is",
        slots=(r"glora_[A-E]\.(?:Xd|Xu|X|zeros)",),
        settings=("r", "config_A_B", "config_C", "config_D_E"),
        training=("init_weights",),
        own_biases="glora_only",
        conv1d=False,
        make=_glora,
        writing=GLORA,
    ),
)
