"""What each format can say of each kind of change on each kind of layer: rows and columns of the matrix in spec/formats/README.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from loratools.adapter import Adapter
from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.compose import Stacked
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
from loratools.errors import Faults, LoratoolsError, NotExpressible
from loratools.formats import FORMATS, Format, encode
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor, to_ref
from tests.strategies import randn

OUT, IN, RANK, MANY = 6, 4, 2, 10


@dataclass(frozen=True)
class Draw:
    """Random tensors of one dtype, each another."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    count: list[int] = field(default_factory=list)

    def __call__(self, *shape: int, scale: float = 1.0, about: float = 0.0) -> Ref:
        self.count.append(1)
        return to_ref((about + scale * randn(*shape, seed=self.seed + len(self.count))).to(self.dtype))


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
}


def low(draw: Draw, layer: str, alpha: float = 3.0, rank: int = RANK, **more: bool) -> LowRank:
    _, _, shape, lies = LAYERS[layer]
    return LowRank(A=draw(rank, *shape[1:]), B=draw(shape[0], rank), alpha=alpha, layer=lies, **more)


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
KINDS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "LoRA": (low, (*WEIGHTS, "embedding", "Conv1D, stored (in, out)")),
    "rsLoRA": (lambda draw, layer: low(draw, layer, rslora=True), WEIGHTS[::2]),
    "DoRA, a magnitude for each output": (
        lambda draw, layer: dora(draw, layer, 1 if LAYERS[layer][3] in ("embedding", "transposed") else 0),
        (*WEIGHTS, "embedding", "Conv1D, stored (in, out)"),
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
    "replacement": (lambda draw, layer: Replacement(value=draw(*LAYERS[layer][2])), ("linear", "embedding", "norm")),
}  # fmt: skip
ROWS = [(kind, layer) for kind, (_, layers) in KINDS.items() for layer in layers]


# -- formats: the paths that modules have in each, where "model.layers.0." is not one


TOLD = ReadOptions(embeddings=("*embed_tokens*",), transposed=("*c_attn*",), scratch_dora="merged")


@dataclass(frozen=True)
class Place:
    """Where a format's modules lie, whether its names are flat, and what a reader has to be told."""

    root: str = "model.layers.0."
    flat: bool = False
    options: ReadOptions = TOLD


PLACES: Mapping[str, Place] = {
    "kohya": Place("lora_unet_mid_block_0_", flat=True), "comfyui": Place("diffusion_model.blocks.0."),
    "diffusers": Place("unet.mid_block.0."),
}  # fmt: skip


def adapter_of(kind: str, layer: str, format: str, draw: Draw | None = None) -> Adapter:
    """One change of one layer, under a name that the format has."""
    place = PLACES.get(format, Place())
    module, leaf, _, _ = LAYERS[layer]
    deltas = {f"{place.root}{module}.{leaf}": KINDS[kind][0](draw or Draw(), layer)}
    if leaf == "bias":
        deltas[f"{place.root}{module}.weight"] = low(draw or Draw(), "linear", alpha=2.0)  # scaling 1, as the bias's
    return Adapter(deltas, flat=place.flat)


def row_of(name: str) -> Format:
    return next(row for row in FORMATS if row.name == name)


def options_of(format: str) -> ReadOptions:
    return PLACES.get(format, Place()).options


def cell(kind: str, layer: str, format: str) -> str:
    """"yes", or "no: " and why, by encoding and decoding; anything else is an error."""
    adapter, row, options = adapter_of(kind, layer, format), row_of(format), options_of(format)
    try:
        written = encode(adapter, format)
    except LoratoolsError as error:
        return f"no: {reason(error)}"
    assert [one.name for one in FORMATS if one.detect(written)] == [format]
    once = row.decode(written, options)
    check_same(adapter, once)
    again = encode(once, format)
    check_same(once, row.decode(again, options))
    check_alike(written, again)
    return "yes"


def reason(error: LoratoolsError) -> str:
    """What is not expressible and the way out; it must name the tensor."""
    first = error.errors[0] if isinstance(error, Faults) else error
    assert isinstance(first, NotExpressible), first
    assert first.tensor and first.remedy, f"names no tensor, or no way: {first}"
    return f"{first.fact}; {first.remedy}"


def check_same(one: Adapter, other: Adapter) -> None:
    """The same names, kinds, scalings and bytes of tensors, however they are turned or shaped."""
    assert set(one) == set(other)
    for name, delta in one.items():
        found = other[name]
        assert (found.kind, told(found)) == (delta.kind, told(delta)), name
        assert contents(found) == contents(delta), name


def told(delta: Delta) -> dict[str, object]:
    return {key: value for key, value in delta.facts().items() if key != "alpha"}


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
