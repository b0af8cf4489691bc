"""Kinds of change and kinds of layer with random numbers, the rows of the matrix in spec/formats/README.md; and what is the same change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from loratools.adapter import Adapter
from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.compose import Part, Stacked
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.deltas.padded import Padded
from loratools.deltas.rotated import Rotated
from loratools.deltas.scaled import Scaled
from loratools.deltas.tucker import Tucker
from loratools.formats.base import Container
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor, to_ref
from tests.strategies import randn

OUT, IN, RANK, MANY = 6, 4, 2, 10


@dataclass(frozen=True)
class Draw:
    """Random tensors of one dtype, each another; of LoRA the alpha, or the scaling where files have none but one."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    count: list[int] = field(default_factory=list)
    scaling: float | None = None

    def __call__(self, *shape: int, scale: float = 1.0, about: float = 0.0) -> Ref:
        self.count.append(1)
        return to_ref((about + scale * randn(*shape, seed=self.seed + len(self.count))).to(self.dtype))

    def alpha(self, rank: int, *, rslora: bool = False) -> float:
        return 3.0 if self.scaling is None else self.scaling * (math.sqrt(rank) if rslora else rank)


# -- layers: what follows a module's path, the weight's shape, and how a low-rank change of it lies

LAYERS: dict[str, tuple[str, str, tuple[int, ...], str]] = {
    "linear": ("q_proj", "weight", (OUT, IN), "linear"),
    "convolution 1×1": ("point", "weight", (OUT, IN, 1, 1), "conv"),
    "convolution 3×3": ("conv", "weight", (OUT, IN, 3, 3), "conv"),
    "embedding": ("embed_tokens", "weight", (MANY, IN), "embedding"),
    "Conv1D, stored (in, out)": ("c_attn", "weight", (IN, OUT), "transposed"),
    "norm": ("norm", "weight", (OUT,), ""),
    "bias": ("q_proj", "bias", (OUT,), ""),
    "stack of experts": ("experts", "weight", (3, OUT, IN), ""),
    "experts, one by one": ("experts.0.w1", "weight", (OUT, IN), "linear"),
    "output head": ("lm_head", "weight", (MANY, IN), "linear"),
    "fused q, k and v": ("qkv_proj", "weight", (3 * IN, IN), "linear"),
    "fused q, k, v and MLP": ("linear1", "weight", (3 * IN + OUT, IN), "linear"),
}


def low(draw: Draw, layer: str, alpha: float | None = None, rank: int = RANK, *, rslora: bool = False) -> LowRank:
    _, _, shape, lies = LAYERS[layer]
    alpha = draw.alpha(rank, rslora=rslora) if alpha is None else alpha
    return LowRank(A=draw(rank, *shape[1:]), B=draw(shape[0], rank), alpha=alpha, rslora=rslora, layer=lies)


def slots(draw: Draw, layer: str, held: str = "qkv") -> LowRank:
    """Of a fused weight the change of those slots, each with factors of its own: B's columns are theirs block by block."""
    rank, rows = RANK * len(held), LAYERS[layer][2][0] // 3
    B = torch.zeros(3 * rows, rank, dtype=draw.dtype)
    for place, slot in enumerate(held):
        start = rows * "qkv".index(slot)
        B[start : start + rows, RANK * place : RANK * (place + 1)] = read_tensor(draw(rows, RANK))
    return LowRank(A=draw(rank, IN), B=to_ref(B), alpha=draw.alpha(rank), layer="linear")


def part(draw: Draw, layer: str) -> Part:
    """q, k and v of a weight that has more rows below theirs."""
    return Part(delta=low(draw, "fused q, k and v"), start=0, stop=3 * IN)


def dora(draw: Draw, layer: str, axis: int) -> DoRA:
    shape = LAYERS[layer][2]
    sizes = [size if place == axis else 1 for place, size in enumerate(shape)]
    return DoRA(direction=low(draw, layer), magnitude=draw(*sizes, scale=0.1, about=2.0))


def loha(draw: Draw, layer: str) -> LoHa:
    out, width = LAYERS[layer][2][0], Spec("F32", LAYERS[layer][2]).matrix[1]
    return LoHa(w1_a=draw(out, 2), w1_b=draw(2, width), w2_a=draw(out, 2), w2_b=draw(2, width), scale=1.5, alpha=3.0)


def lokr(draw: Draw, layer: str) -> LoKr:
    """OUT·IN as (2·3)·(2·2), the second factor a product."""
    kernel = Spec("F32", LAYERS[layer][2]).matrix[1] // IN
    return LoKr(w1=draw(2, 2), w2_a=draw(3, 1), w2_b=draw(1, 2 * kernel), scale=3.0, alpha=3.0)


def whole_lokr(draw: Draw, layer: str) -> LoKr:
    return LoKr(w1=draw(2, 2), w2=draw(3, 2, *LAYERS[layer][2][2:]), scale=1.0, alpha=3.0)


def tucker(draw: Draw, layer: str) -> Tucker:
    return Tucker(up=draw(OUT, 2), mid=draw(2, 2, 3, 3), down=draw(2, IN), alpha=3.0)


def glora(draw: Draw, layer: str) -> Adjoined:
    shape = LAYERS[layer][2]
    return Adjoined(a1=draw(IN, 2), a2=draw(2, IN), b1=draw(OUT, 2), b2=draw(2, *shape[1:]), alpha=3.0)


def turned(draw: Draw, layer: str) -> Rotated:
    return Rotated(numbers=draw(3, 2, 2, scale=0.3), side="out", factor=-1.0, together=True, floor=1e-8)


def bounded(draw: Draw, layer: str) -> Rotated:
    bound, scale = 0.25 * OUT, draw(OUT, 1, about=1.0)
    return Rotated(numbers=draw(3, 2, 2), side="out", factor=-1.0, together=True, floor=1e-8, bound=bound, scale=scale)


def butterfly(draw: Draw, layer: str) -> Butterfly:
    return Butterfly(numbers=draw(1, 3, 2, 2, scale=0.3), side="out", halves=False, together=True, floor=1e-8)


def turned_inputs(draw: Draw, layer: str) -> Unsettled:
    return Unsettled(delta=Rotated(numbers=draw(2, 1, scale=0.3), pointwise=True), transposed=False)


def butterfly_inputs(draw: Draw, layer: str) -> Unsettled:
    made = Butterfly(numbers=draw(1, 2, 2, 2, scale=0.3), scale=draw(OUT, 1, about=1.0), factor=0.5)
    return Unsettled(delta=made, transposed=False)


def near_one(draw: Draw, size: int) -> Ref:
    """Numbers about 1 that are as exact told from 1: multiples of 2⁻⁴."""
    return to_ref((torch.arange(size) / 16 + 0.75).to(draw.dtype))


Make = Callable[[Draw, str], Delta]
WEIGHTS = ("linear", "convolution 1×1", "convolution 3×3")
FUSED = ("fused q, k and v",)
KINDS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "LoRA": (
        low,
        (*WEIGHTS, "embedding", "Conv1D, stored (in, out)", "output head", "experts, one by one", *FUSED, "fused q, k, v and MLP"),
    ),
    "LoRA of q, of k and of v": (slots, FUSED),
    "LoRA of q and of v": (lambda draw, layer: slots(draw, layer, "qv"), FUSED),
    "LoRA of its first rows": (part, ("fused q, k, v and MLP",)),
    "rsLoRA": (lambda draw, layer: low(draw, layer, rslora=True), WEIGHTS[::2]),
    "DoRA, a magnitude for each output": (
        lambda draw, layer: dora(draw, layer, 1 if LAYERS[layer][3] in ("embedding", "transposed") else 0),
        (*WEIGHTS, "embedding", "Conv1D, stored (in, out)", *FUSED),
    ),
    "DoRA, a magnitude for each input": (lambda draw, layer: dora(draw, layer, 1), WEIGHTS[::2]),
    "LoRA of each member": (lambda draw, layer: Stacked(members=tuple(low(draw, "linear") for _ in range(3))), ("stack of experts",)),
    "LoRA of a weight that grows": (lambda draw, layer: Padded(delta=low(draw, layer), size=LAYERS[layer][2]), ("linear",)),
    "LoHa": (loha, WEIGHTS),
    "LoKr": (lokr, WEIGHTS),
    "LoKr of whole factors": (whole_lokr, WEIGHTS[::2]),
    "Tucker": (tucker, ("convolution 3×3",)),
    "GLoRA of LyCORIS": (glora, WEIGHTS),
    "outputs turned (LyCORIS' OFT)": (turned, WEIGHTS),
    "outputs turned, bounded and scaled": (bounded, ("linear",)),
    "outputs turned in turn (LyCORIS' BOFT)": (butterfly, WEIGHTS),
    "inputs turned (peft's OFT)": (turned_inputs, ("linear",)),
    "inputs turned in turn (peft's BOFT)": (butterfly_inputs, ("linear",)),
    "(IA)³ of inputs": (lambda draw, layer: Scaled(l=near_one(draw, IN), axis=1), WEIGHTS[:1]),
    "(IA)³ told from 1": (lambda draw, layer: Scaled(l=near_one(draw, IN), axis=1, offset=1.0), WEIGHTS[:1]),
    "difference": (lambda draw, layer: Full(diff=draw(*LAYERS[layer][2])), (*WEIGHTS, "embedding", "norm", "bias")),
    "replacement": (lambda draw, layer: Replacement(value=draw(*LAYERS[layer][2])), ("linear", "embedding", "norm", "output head")),
}  # fmt: skip
ROWS = [(kind, layer) for kind, (_, layers) in KINDS.items() for layer in layers]


# -- whether two adapters, and two files, are the same


def check_same(one: Adapter, other: Adapter, *, narrow: bool = False) -> None:
    """The same names, kinds, scalings and bytes of tensors, however they are turned or shaped; `narrow` scalings are of a float32 alpha."""
    assert set(one) == set(other)
    for name, delta in one.items():
        found = other[name]
        assert (found.kind, told(found, narrow=narrow)) == (delta.kind, told(delta, narrow=narrow)), name
        assert contents(found) == contents(delta), name


def told(delta: Delta, *, narrow: bool = False) -> dict[str, object]:
    facts = delta.facts()
    if narrow:
        facts["scaling"] = float(torch.tensor(facts["scaling"] * facts["rank"], dtype=torch.float32)) / facts["rank"]
    return {key: value for key, value in facts.items() if key != "alpha"}


def contents(delta: Delta) -> Counter[bytes]:
    """The elements of each tensor, in any order that an orientation gives them."""
    if isinstance(delta, Unsettled | WherePresent):
        return contents(delta.delta)
    if isinstance(delta, Scaled):  # told from 1 or not, the factors are the same numbers
        factors = delta.offset + read_tensor(delta.l, torch.float64).reshape(-1)
        return Counter([factors.numpy().tobytes()])
    return Counter(bytes(sorted(memoryview(bytes(ref.read())))) for ref in delta.refs().values())


def check_alike(one: Container, other: Container) -> None:
    """Byte for byte the same tensors under the same keys."""
    assert set(one.tensors) == set(other.tensors)
    for key, ref in one.tensors.items():
        assert ref.spec == other.tensors[key].spec and bytes(ref.read()) == bytes(other.tensors[key].read()), key
