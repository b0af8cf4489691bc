"""The tutorials' state dicts: their own classes as the oracle, both scales, the DoRA that is no weight edit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

import loratools
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, Faults, FormatError, LoratoolsError, NotExpressible, ShapeError, UnsupportedError
from loratools.formats import FORMATS
from loratools.formats._scale import exact_alpha
from loratools.formats.base import Container, ReadOptions
from loratools.formats.opening import open_container
from loratools.formats.scratch import decode, detect, encode
from loratools.tensors import to_ref
from tests.files import raw, write_checkpoint

ALPHA = ReadOptions(alpha=8)


class LoRALayer(nn.Module):
    """The tutorial's, written from its description: A ~ randn/√rank, B zero, alpha·(x·A·B)."""

    def __init__(self, into: int, out: int, rank: int, alpha: float, *, newer: bool = False) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(into, rank) / math.sqrt(rank))
        self.B = nn.Parameter(torch.randn(rank, out))  # as trained
        self.scale = alpha / rank if newer else alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    def __init__(self, layer: nn.Linear, rank: int, alpha: float, *, newer: bool = False) -> None:
        super().__init__()
        self.linear, self.lora = layer, LoRALayer(layer.in_features, layer.out_features, rank, alpha, newer=newer)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


class LinearWithDoRAMerged(LinearWithLoRA):
    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer, rank, alpha)
        self.m = nn.Parameter(layer.weight.norm(p=2, dim=0, keepdim=True) * 1.1)

    def forward(self, x: Tensor) -> Tensor:
        V = self.linear.weight + self.lora.scale * (self.lora.A @ self.lora.B).T
        return linear(x, self.m * V / V.norm(p=2, dim=0, keepdim=True), self.linear.bias)


def tutorial(kind: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A three-layer perceptron and its adapted form, which shares its weights."""
    torch.manual_seed(123)
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3))
    make = {
        "lora": lambda layer: LinearWithLoRA(layer, 4, 8),
        "newer": lambda layer: LinearWithLoRA(layer, 4, 8, newer=True),
        "dora": lambda layer: LinearWithDoRAMerged(layer, 4, 8),
    }[kind]
    return base, nn.Sequential(*(make(layer) if isinstance(layer, nn.Linear) else layer for layer in base))


@pytest.mark.parametrize("kind", ["lora", "newer", "dora"])
@pytest.mark.parametrize("part", ["whole", "adapter alone"])
def test_merged_is_the_tutorials_forward(kind: str, part: str, tmp_path: Path) -> None:
    base, adapted = tutorial(kind)
    state = {name: tensor for name, tensor in adapted.state_dict().items() if part == "whole" or "linear" not in name}
    torch.save(state, tmp_path / "tutorial.pth")
    write_checkpoint(tmp_path / "base", base.state_dict())
    options = ReadOptions(alpha=8, scale="alpha/r" if kind == "newer" else None)
    adapter = loratools.load(tmp_path / "tutorial.pth", options=options)
    assert adapter.format == "scratch"
    loratools.merge(tmp_path / "base", adapter, tmp_path / "merged")
    x = torch.randn(20, 12)
    expected = adapted(x)
    base.load_state_dict(load_file(tmp_path / "merged/model.safetensors"))  # in place of the weights both share
    # float32 through three layers of at most 16 terms; a small output is the difference of large ones
    assert torch.dist(base(x), expected) <= 1e-5 * expected.norm()


def test_a_file_of_another_base_brings_its_own_weights(tmp_path: Path) -> None:
    """The layers' own weights in the file are what the tutorial's forward uses, whatever the base holds."""
    base, adapted = tutorial("lora")
    torch.save(adapted.state_dict(), tmp_path / "tutorial.pth")
    write_checkpoint(tmp_path / "base", {name: torch.zeros_like(tensor) for name, tensor in base.state_dict().items()})
    loratools.merge(tmp_path / "base", loratools.load(tmp_path / "tutorial.pth", options=ALPHA), tmp_path / "merged")
    x = torch.randn(20, 12)
    expected = adapted(x)
    base.load_state_dict(load_file(tmp_path / "merged/model.safetensors"))
    assert torch.dist(base(x), expected) <= 1e-5 * expected.norm()  # as above


def container(state: dict[str, Tensor], **metadata: str) -> Container:
    return Container({name: to_ref(tensor) for name, tensor in state.items()}, metadata)


def test_keys_and_scale() -> None:
    state = {
        "a.b.lora.A": torch.randn(5, 2),
        "a.b.lora.B": torch.randn(2, 3),
        "norm.scale": torch.ones(3),
        "a.b.linear.bias": torch.ones(3),
    }
    adapter = decode(container(state), ALPHA)
    assert set(adapter) == {"a.b.weight", "a.b.bias", "norm.scale"}
    low = adapter["a.b.weight"]
    assert isinstance(low, LowRank) and (low.shape(), low.rank, low.scaling, low.layer) == ((3, 5), 2, 8.0, "unknown")
    assert "alpha/r" in adapter.notes[0]
    assert decode(container(state), ReadOptions(alpha=8, scale="alpha/r"))["a.b.weight"].scaling == 4.0
    alone = decode(container({"lora.A": state["a.b.lora.A"], "lora.B": state["a.b.lora.B"], "linear.weight": torch.zeros(3, 5)}), ALPHA)
    assert list(alone) == ["weight"] and isinstance(alone["weight"], Chain)


@given(alpha=st.sampled_from([1.0, 8.0, 16.0, 0.5, 32.0, 100.0]), rank=st.integers(1, 1024))
def test_the_scaling_is_alpha_to_the_last_bit(alpha: float, rank: int) -> None:
    assert exact_alpha(alpha, rank) / rank == alpha


A, B = torch.randn(5, 2), torch.randn(2, 3)
PAIR = {"x.lora.A": A, "x.lora.B": B}
SQUARE = {"x.lora.A": A, "x.lora.B": torch.randn(2, 5), "x.m": torch.ones(1, 5)}


@pytest.mark.parametrize(
    ("state", "options", "error", "said"),
    [
        (PAIR, ReadOptions(), AmbiguousError, "--alpha-in"),
        (PAIR, ReadOptions(alpha=1, scale="1/alpha"), FormatError, "scale"),
        (PAIR | {"x.m": torch.ones(1, 3)}, ALPHA, UnsupportedError, r"x\.m.*depends on the input.*no weight edit.*\[1, 5\]"),
        (PAIR | {"x.m": torch.ones(5)}, ALPHA, ShapeError, r"x\.m.*\[5\]"),
        (SQUARE, ALPHA, AmbiguousError, r"x\.m.*--scratch-dora"),
        (SQUARE, ReadOptions(alpha=8, scratch_dora="output"), UnsupportedError, r"x\.m.*no weight edit"),
        ({"x.lora.A": A, "x.lora.B": B.T}, ALPHA, ShapeError, r"x\.lora\.A.*\[3, 2\]"),
        (PAIR | {"y.lora.A": A}, ALPHA, FormatError, r"y\.lora\.A.*no lora\.B"),
        (PAIR | {"x.linear.weight": torch.ones(5, 3)}, ALPHA, ShapeError, r"x\.lora\.A.*\[5, 3\]"),
        (PAIR | {"x.weight": torch.ones(3, 5)}, ALPHA, FormatError, r"x\.weight.*twice"),
        (PAIR | {"y.lora.A": A, "z.lora.B": B}, ALPHA, Faults, r"y\.lora\.A"),
    ],
)
def test_faults(state: dict[str, Tensor], options: ReadOptions, error: type[LoratoolsError], said: str) -> None:
    with pytest.raises(error, match=said):
        decode(container(state), options)


def test_a_square_dora_that_is_said_to_be_merged() -> None:
    delta = decode(container(SQUARE), ReadOptions(alpha=8, scratch_dora="merged"))["x.weight"]
    assert isinstance(delta, DoRA) and delta.axis == "in"


def test_a_base_that_stores_its_weights_transposed(tmp_path: Path) -> None:
    """GPT-2's, of which the tutorial's layers were made by turning them: the base's model tells, also of a square."""
    name, square, other = "transformer.h.0.attn.c_proj", torch.randn(6, 6), torch.randn(6, 18)
    weights = {f"{name}.weight": square, "transformer.h.0.attn.c_attn.weight": other}
    base = write_checkpoint(tmp_path / "base", weights, {"model_type": "gpt2"})
    state = {f"{name}.lora.A": torch.randn(6, 2), f"{name}.lora.B": torch.randn(2, 6)}
    state |= {"transformer.h.0.attn.c_attn.lora.A": torch.randn(6, 2), "transformer.h.0.attn.c_attn.lora.B": torch.randn(2, 18)}
    save_file(state, tmp_path / "a.safetensors")
    loratools.merge(base, tmp_path / "a.safetensors", tmp_path / "out", alpha_in=1.0)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module, weight in ((name, square), ("transformer.h.0.attn.c_attn", other)):
        expected = weight.double() + state[f"{module}.lora.A"].double() @ state[f"{module}.lora.B"].double()  # y = x·(W + A·B)
        assert torch.allclose(merged[f"{module}.weight"].double(), expected, rtol=0, atol=1e-6 * float(expected.norm()))


def test_a_square_dora_that_loratools_wrote_says_which_it_is(tmp_path: Path) -> None:
    given = decode(container(SQUARE), ReadOptions(alpha=8, scratch_dora="merged"))
    loratools.save(given, tmp_path / "again.safetensors", format="scratch")
    found = loratools.load(tmp_path / "again.safetensors")["x.weight"]
    assert isinstance(found, DoRA) and values(found) == values(given["x.weight"])
    tensors = open_container(tmp_path / "again.safetensors").tensors
    with pytest.raises(FormatError, match="scratch_dora: found both, expected merged or output"):
        decode(Container(tensors, {"loratools.scratch_dora": "both", "loratools.alpha": "8"}))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_encode_inverts_decode(kind: str, tmp_path: Path) -> None:
    _, adapted = tutorial(kind)
    state = adapted.state_dict()
    adapter = decode(container(state), ALPHA)
    loratools.save(adapter, tmp_path / "again.safetensors", format="scratch")
    found = load_file(tmp_path / "again.safetensors")
    assert {name: raw(tensor) for name, tensor in found.items()} == {name: raw(tensor) for name, tensor in state.items()}
    adapted.load_state_dict(found)
    again = loratools.load(tmp_path / "again.safetensors")  # alpha is in the metadata
    assert not again.notes or "newer" not in again.notes[0]
    for name, delta in adapter.items():
        assert values(again[name]) == values(delta)


def values(delta: Delta) -> dict[str, bytes]:
    return {key: bytes(ref.read()) for key, ref in delta.refs().items()}


def test_to_peft_and_back(tmp_path: Path) -> None:
    _, adapted = tutorial("lora")
    state = {name: tensor for name, tensor in adapted.state_dict().items() if "linear" not in name}
    adapter = decode(container(state), ALPHA)
    loratools.save(adapter, tmp_path / "peft")
    there = loratools.load(tmp_path / "peft")
    assert {delta.scaling for delta in there.values()} == {8.0}
    back = encode(there)
    assert {name: bytes(ref.read()) for name, ref in back.tensors.items()} == {name: raw(tensor) for name, tensor in state.items()}
    assert back.metadata == {"loratools.alpha": "8.0", "loratools.scale": "alpha"}


def low(**more: object) -> LowRank:
    return LowRank(**({"A": to_ref(torch.ones(2, 5)), "B": to_ref(torch.ones(3, 2)), "alpha": 4.0, "layer": "linear"} | more))


@pytest.mark.parametrize(
    ("deltas", "said"),
    [
        ({"x.weight": low(), "y.weight": low(alpha=8.0)}, r"y\.weight"),
        ({"x.weight": low(layer="embedding")}, "embedding"),
        ({"x.weight": low(A=to_ref(torch.ones(2, 5, 3)), layer="conv")}, "conv"),
        ({"x.weight": DoRA(direction=low(), magnitude=to_ref(torch.ones(3, 1)))}, r"x\.weight.*axis"),
        ({"x.weight": low(), "y.weight": Full(diff=to_ref(torch.ones(3)))}, r"y\.weight.*full"),
        ({"y.weight": Replacement(value=to_ref(torch.ones(3)))}, "no low-rank"),
    ],
)
def test_what_the_tutorial_cannot_say(deltas: dict[str, object], said: str) -> None:
    with pytest.raises(NotExpressible, match=said):
        encode(Adapter(deltas))


def test_its_column_norms_are_not_pefts(tmp_path: Path) -> None:
    _, adapted = tutorial("dora")
    with pytest.raises((NotExpressible, Faults), match="axis"):
        loratools.save(decode(container(adapted.state_dict()), ALPHA), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_detect_claims_its_own_alone(tmp_path: Path) -> None:
    save_file({"q.lora.A": A, "q.lora.B": B}, tmp_path / "tutorial.safetensors")
    found = open_container(tmp_path / "tutorial.safetensors")
    assert [row.name for row in FORMATS if row.detect(found)] == ["scratch"]
    peft = ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"]
    others = (["q.lora_A", "q.lora_B"], peft, ["q.lora.A"], ["q.weight"])
    for keys in others:
        assert not detect(container(dict.fromkeys(keys, A)))


@pytest.mark.parametrize("alpha", ["x", "nan", ""])
def test_metadata_that_is_no_alpha(alpha: str) -> None:
    with pytest.raises(FormatError, match=r"loratools\.alpha"):
        decode(container(PAIR, **{"loratools.alpha": alpha}))
