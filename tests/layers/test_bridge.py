"""A model's layers as an Adapter and back; the law that layers and deltas, derived apart, do the same to a weight."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import loratools
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain, Part
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, MatchError, OptionError, ShapeError, UnsupportedError
from loratools.layers import LoRALayer, adapter_from, attach, freeze, inject, layer_for, layer_of, plain_layer
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.files import raw
from tests.layers.cases import KINDS, changed, dense, inputs, layer, plain, plain_output


def by_delta(delta: Delta, W: Tensor) -> Tensor:
    """W′ as the delta computes it, in float64."""
    base = Spec("F64", tuple(W.shape))
    matrix = W.double().reshape(delta.matrix(base))
    rows = delta.bind(base, lambda count: blocks(matrix, count))
    return torch.cat([rows(part, W).clone() for part, W in blocks(matrix, 3)]).view(W.shape)


def blocks(matrix: Tensor, count: int) -> list[tuple[slice, Tensor]]:
    starts = range(0, len(matrix), count)
    return [(slice(start, min(start + count, len(matrix))), matrix[start : start + count].clone()) for start in starts]


@pytest.mark.parametrize(("method", "name"), KINDS)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_and_its_delta_agree(method: str, name: str, rslora: bool, dtype: torch.dtype) -> None:
    """The change of the output by the layer's own forward against that by the delta's W′ in the plain layer."""
    torch.manual_seed(0)
    made = changed(layer(method, name, dtype=dtype, rslora=rslora)).double()  # the factors hold values of `dtype`
    x, W = inputs(name, dtype=torch.float64), made.weight.detach()
    merged = by_delta(made.delta(), W)
    assert torch.dist(merged, dense(made)) <= 1e-12 * merged.norm()  # the delta's products carry 2⁻⁴⁴ of a row
    expected = plain_output(made, name, merged, x)
    # the layer sums at most 36 products in float64, in another order than the plain layer
    assert torch.dist(made(x), expected) <= 36 * 2**-52 * 16 * expected.norm() + 1e-12 * expected.norm()


@pytest.mark.parametrize(("method", "name"), [kind for kind in KINDS if "grouped" not in kind[1]])
def test_layer_of_a_bare_weight(method: str, name: str) -> None:
    torch.manual_seed(0)
    made = changed(layer(method, name))
    delta = made.delta()
    again = layer_of(made.weight.detach(), delta)
    if isinstance(again, nn.modules.conv._ConvNd):
        x = torch.randn(2, again.in_channels, *(6,) * (made.weight.dim() - 2))
        kind = "conv"
    else:
        x, kind = inputs(name), "embedding" if name.startswith("embedding") else "linear"
    W = dense(made)
    W = W.T if again.kind == "transposed" else W
    expected = plain_layer(W.contiguous(), kind)(x.double() if x.is_floating_point() else x)
    assert torch.dist(again(x), expected) <= 16 * 2**-23 * expected.norm()
    assert values(again.delta()) == values(delta)


def values(delta: Delta) -> dict[str, bytes]:
    return {name: bytes(ref.read()) for name, ref in delta.refs().items()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.square = nn.Embedding(8, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.conv, self.head = nn.Conv1d(1, 2, 3), nn.Linear(8, 2)

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.conv(self.square(self.fc(self.embed(indices))).unsqueeze(1)).flatten(1))


def trained(dora: bool = False, bias: str = "none") -> Net:
    torch.manual_seed(0)
    model = Net()
    inject(model, ["embed", "fc", "square"], rank=2, alpha=3, dora=dora, dropout=0.05)
    if not dora:
        inject(model, "conv", rank=1, alpha=1)
    freeze(model, bias=bias, train=["head"])
    for module in model.modules():
        if isinstance(module, LoRALayer):
            changed(module)
    with torch.no_grad():
        model.head.weight.add_(1)
    return model


INDICES = torch.arange(8)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_through_a_file_and_back(dora: bool, bias: str, tmp_path: Path) -> None:
    model = trained(dora, bias)
    expected = model.eval()(INDICES)
    adapter = adapter_from(model)
    assert set(adapter) >= {"embed.weight", "fc.weight", "square.weight", "head.weight", "head.bias"}
    assert ("fc.bias" in adapter) == (bias != "none") and ("conv.bias" in adapter) == (bias == "all" or (bias == "lora_only" and not dora))
    loratools.save(adapter, tmp_path / "adapter")
    torch.manual_seed(0)
    fresh = Net()
    changed_names = attach(fresh, loratools.load(tmp_path / "adapter"))
    assert set(changed_names) == set(adapter)
    assert raw(fresh(INDICES)) == raw(expected)


def test_an_unknown_orientation_is_told_by_the_module() -> None:
    """Square weights of files that do not say: an embedding's factors lie the other way round, a Conv1D's too."""
    A, B = (torch.randn(1, 6), torch.randn(6, 1))
    low = LowRank(A=to_ref(A), B=to_ref(B), alpha=1)
    for base in (plain("linear"), plain("Conv1D")):
        weight = torch.zeros(6, 6)
        base.weight = nn.Parameter(weight)
        if hasattr(base, "in_features"):
            base.in_features = 6
        model = nn.ModuleDict({"layer": base})
        attach(model, Adapter({"layer.weight": low}))
        torch.testing.assert_close(model["layer"](torch.eye(6)) - base.bias, (B @ A).T)  # x·(BA)ᵀ for both
    model = nn.ModuleDict({"layer": nn.Embedding.from_pretrained(torch.zeros(6, 6))})
    attach(model, Adapter({"layer.weight": low}))
    torch.testing.assert_close(model["layer"](torch.arange(6)), (B @ A).T)


def test_whole_tensors_and_bias_differences_are_written() -> None:
    model = Net()
    before = model.fc.bias.detach().clone()
    diff, value = torch.randn(6), torch.randn(8, 8)
    low = LowRank(A=to_ref(torch.randn(2, 8)), B=to_ref(torch.randn(8, 2)), alpha=1, layer="embedding")
    adapter = Adapter(
        {"fc.bias": Full(diff=to_ref(diff), scale=0.5), "embed.weight": Chain(first=Replacement(value=to_ref(value)), then=low)}
    )
    attach(model, adapter)
    torch.testing.assert_close(model.fc.bias.detach(), before + 0.5 * diff)
    assert raw(model.embed.weight) == raw(value) and model.embed.rank == 2


def low(out: int, into: int) -> LowRank:
    return LowRank(A=to_ref(torch.randn(1, into)), B=to_ref(torch.randn(out, 1)), alpha=1)


DIRECTED = DoRA(direction=Full(diff=to_ref(torch.zeros(6, 6))), magnitude=to_ref(torch.ones(6, 1)))


@pytest.mark.parametrize(
    ("deltas", "error", "said"),
    [
        ({"fcc.weight": low(6, 8)}, MatchError, "fcc.weight"),
        ({"fc.weight": low(6, 8), "square.weight": low(5, 6)}, ShapeError, "square.weight"),
        ({"fc.weight": low(6, 8), "square.weight": Part(delta=low(3, 6), start=0, stop=3)}, UnsupportedError, "square.weight"),
        ({"fc.weight": low(6, 8), "new.weight": Replacement(value=to_ref(torch.zeros(2)))}, ShapeError, "new.weight"),
        ({"fc.weight": low(6, 8), "embed.weight": Replacement(value=to_ref(torch.zeros(9, 8)))}, ShapeError, "embed.weight"),
        ({"fc.weight": low(6, 8), "square.weight": DIRECTED}, UnsupportedError, "square.weight"),
    ],
)
def test_faults_are_named_and_the_model_is_untouched(deltas: dict[str, Delta], error: type[LoratoolsError], said: str) -> None:
    model = Net()
    before = {name: raw(value) for name, value in model.state_dict().items()}
    with pytest.raises(error, match=said):
        attach(model, Adapter(deltas))
    assert {name: raw(value) for name, value in model.state_dict().items()} == before
    assert not any(isinstance(module, LoRALayer) for module in model.modules())


def test_nothing_to_tell() -> None:
    with pytest.raises(OptionError, match="no low-rank layer"):
        model = Net()
        freeze_all(model)
        adapter_from(model)


def freeze_all(model: nn.Module) -> None:
    for parameter in itertools.chain(model.parameters()):
        parameter.requires_grad_(False)


def test_a_merged_model_tells_the_same() -> None:
    model = trained()
    expected = {name: values(delta) for name, delta in adapter_from(model).items()}
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.merge()
    assert {name: values(delta) for name, delta in adapter_from(model).items()} == expected


@given(
    seed=st.integers(0, 10**6), out=st.integers(1, 24), into=st.integers(1, 24), rank=st.integers(1, 16), alpha=st.floats(-8, 8),
    rslora=st.booleans(), dora=st.sampled_from([None, "out", "in"]), turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_the_change_of_the_output_is_the_change_of_the_weight(
    seed: int, out: int, into: int, rank: int, alpha: float, rslora: bool, dora: str | None, turned: bool, dtype: torch.dtype
) -> None:
    """For random layers in their own dtype: y′ − y by the layer against x·(W′ − W) by the delta, in float64."""
    torch.manual_seed(seed)
    base = nn.Linear(into, out, bias=False, dtype=dtype)
    x = torch.randn(5, into, dtype=dtype)
    before, W = base(x).double(), base.weight.detach().double()
    made = layer_for(base, dora=dora is not None, axis=dora or "out", fan_in_fan_out=turned, rank=rank, alpha=alpha, rslora=rslora)
    changed(made)
    stored = made.weight.detach().double()
    assume(dora is None or well_conditioned(made))
    merged = by_delta(made.delta(), stored)
    expected = x.double() @ (merged.T if turned else merged).T - x.double() @ W.T
    # a sum of n products is off by n·u of the product of the norms, each of the few results between by u of its own size
    u = torch.finfo(dtype).eps / 2
    parts = x.double().norm() * (W.norm() + abs(made.scaling) * made.lora_A.double().norm() * made.lora_B.double().norm())
    bound = (into + rank + 8) * u * parts * (1.0 if dora is None else largest_gain(made))
    assert torch.dist(made(x).double() - before, expected) <= bound


def norms_of(made: LoRALayer) -> tuple[Tensor, Tensor]:
    """‖V‖ for each magnitude of a DoRA layer, and the size of what it is the sum of."""
    B, A = (factor.detach().double() for factor in (made.lora_B, made.lora_A))
    W, change = made.matrix().detach().double(), made.scaling * (B @ A)
    dim = 1 if made.axis == "out" else 0
    return (W + change).norm(dim=dim), W.norm(dim=dim) + change.norm(dim=dim)


def well_conditioned(made: LoRALayer) -> bool:
    """Where V nearly cancels its norm, and so every output, is as uncertain as the dtype leaves it."""
    norms, parts = norms_of(made)
    return bool((norms >= 0.1 * parts).all())


def largest_gain(made: LoRALayer) -> float:
    return max(1.0, float((made.magnitude.detach().double() / norms_of(made)[0]).abs().max()))
