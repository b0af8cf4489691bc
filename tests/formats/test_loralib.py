"""loralib's state dicts: keys, the forms of its four layers, a real published file; live loralib is in tests/interop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import loratools
from loratools.adapter import Adapter
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, Faults, FormatError, LoratoolsError, NotExpressible, ShapeError
from loratools.formats import FORMATS
from loratools.formats.base import Container, ReadOptions
from loratools.formats.loralib import decode, detect, encode
from loratools.formats.opening import open_container
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.files import raw

ROBERTA = Path(__file__).parent.parent / "data/loralib/roberta_base_lora_mnli.bin"


def container(state: dict[str, Tensor], **metadata: str) -> Container:
    return Container({name: to_ref(tensor) for name, tensor in state.items()}, metadata)


def change(low: LowRank) -> Tensor:
    """ΔW in float64, by the formula of a low-rank change."""
    A, B = read_tensor(low.A, torch.float64), read_tensor(low.B, torch.float64)
    return low.scaling * (B @ A.flatten(1)).view(low.shape())


def pair(out: int, into: int, rank: int, module: str = "x") -> dict[str, Tensor]:
    prefix = f"{module}." if module else ""
    return {f"{prefix}lora_A": torch.randn(rank, into), f"{prefix}lora_B": torch.randn(out, rank)}


def test_linear_and_whole_tensors() -> None:
    state = pair(3, 5, 2) | {"classifier.weight": torch.ones(2, 3), "x.bias": torch.ones(3)}
    adapter = decode(container(state), ReadOptions(alpha=16))
    low = adapter["x.weight"]
    assert isinstance(low, LowRank) and (low.scaling, low.layer) == (8.0, "unknown")
    assert {type(adapter[name]) for name in ("classifier.weight", "x.bias")} == {Replacement}
    assert list(decode(container(pair(3, 5, 2, "")), ReadOptions(alpha=1))) == ["weight"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("x", ReadOptions(alpha=3, embeddings=("x",))), ("model.embed_tokens", ReadOptions(alpha=3)), ("h.wte", ReadOptions(alpha=3))],
)
def test_embeddings_by_name_or_option(name: str, options: ReadOptions) -> None:
    state = pair(4, 9, 2, name)
    low = decode(container(state), options)[f"{name}.weight"]
    A, B = (state[f"{name}.lora_{factor}"].double() for factor in "AB")
    assert isinstance(low, LowRank) and low.layer == "embedding"
    torch.testing.assert_close(change(low), 1.5 * (B @ A).T)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_an_orientation_it_does_not_tell_is_told_by_the_base(shape: tuple[int, int]) -> None:
    """fan_in_fan_out and embeddings under any name: the base's shape decides."""
    adapter = decode(container(pair(4, 9, 2)), ReadOptions(alpha=3)).resolve({"x.weight": Spec("F32", shape)})
    assert adapter["x.weight"].shape() == shape


@given(
    enable=st.lists(st.booleans(), min_size=1, max_size=4).filter(any),
    size=st.integers(1, 3), rank=st.integers(1, 3), into=st.integers(1, 5), transposed=st.booleans(),
)  # fmt: skip
def test_merged_linear(enable: list[bool], size: int, rank: int, into: int, transposed: bool) -> None:
    n = sum(enable)
    state = {"x.lora_A": torch.randn(rank * n, into), "x.lora_B": torch.randn(size * n, rank)}
    options = ReadOptions(alpha=5, enable_lora=tuple(enable), transposed=("x",) if transposed else ())
    low = decode(container(state), options)["x.weight"]
    expected = torch.zeros(len(enable), size, into, dtype=torch.float64)
    for j, slot in enumerate(index for index, flag in enumerate(enable) if flag):
        part = state["x.lora_B"][j * size : (j + 1) * size].double() @ state["x.lora_A"][j * rank : (j + 1) * rank].double()
        expected[slot] = 5 / rank * part
    found = change(low)
    torch.testing.assert_close(found.T if transposed else found, expected.view(-1, into))
    assert low.scaling == 5 / rank


@given(k=st.integers(1, 5), rank=st.integers(1, 3), into=st.integers(1, 4), out=st.integers(1, 4))
def test_conv2d_is_exact_and_comes_back(k: int, rank: int, into: int, out: int) -> None:
    """(B·A) seen in the weight's shape; the bytes of the factors come back."""
    state = {"x.lora_A": torch.randn(rank * k, into * k), "x.lora_B": torch.randn(out * k, rank * k)}
    adapter = decode(container(state), ReadOptions(alpha=7, kernels=(("x", k),)))
    low = adapter["x.conv.weight"]
    assert low.rank == rank * k * k and low.scaling == 7 / rank
    expected = 7 / rank * (state["x.lora_B"].double() @ state["x.lora_A"].double()).view(out, into, k, k)
    torch.testing.assert_close(change(low), expected)
    back = encode(adapter)
    assert {name: bytes(ref.read()) for name, ref in back.tensors.items()} == {name: raw(tensor) for name, tensor in state.items()}
    assert back.metadata == {"loratools.alpha": "7.0"}


def test_the_real_file(tmp_path: Path) -> None:
    """RoBERTa on MNLI, published by loralib's authors: to peft and back without a byte changed."""
    adapter = loratools.load(ROBERTA, options=ReadOptions(alpha=16))
    lows = {name: delta for name, delta in adapter.items() if isinstance(delta, LowRank)}
    assert (adapter.format, len(lows), len(adapter)) == ("loralib", 24, 28)
    assert {(low.rank, low.scaling, low.shape()) for low in lows.values()} == {(8, 2.0, (768, 768))}
    loratools.save(adapter, tmp_path / "peft")
    loratools.save(loratools.load(tmp_path / "peft"), tmp_path / "back.safetensors", format="loralib")
    original = torch.load(ROBERTA, map_location="cpu", weights_only=True)
    found = load_file(tmp_path / "back.safetensors")
    assert {name: raw(tensor) for name, tensor in found.items()} == {name: raw(tensor) for name, tensor in original.items()}
    again = loratools.load(tmp_path / "back.safetensors")
    assert {delta.scaling for delta in again.values() if isinstance(delta, LowRank)} == {2.0}


@pytest.mark.parametrize(
    ("state", "options", "error", "said"),
    [
        (pair(3, 5, 2), ReadOptions(), AmbiguousError, "--alpha-in"),
        ({"x.lora_A": torch.ones(2, 5)} | pair(3, 5, 2, "y"), ReadOptions(alpha=1), FormatError, r"x\.lora_A.*no lora_B"),
        ({"x.lora_A": torch.ones(4, 5), "x.lora_B": torch.ones(6, 2)}, ReadOptions(alpha=1), AmbiguousError, r"x\.lora_A.*--enable-lora"),
        (
            {"x.lora_A": torch.ones(4, 5), "x.lora_B": torch.ones(6, 2)},
            ReadOptions(alpha=1, enable_lora=(True, True, True)), ShapeError, "2 slots.*3 slots",
        ),
        ({"x.lora_A": torch.ones(5, 4), "x.lora_B": torch.ones(6, 2)}, ReadOptions(alpha=1), ShapeError, r"x\.lora_A"),
        ({"x.lora_A": torch.ones(2, 5), "x.lora_B": torch.ones(2, 6)}, ReadOptions(alpha=1), ShapeError, r"x\.lora_A"),
        (pair(3, 5, 2) | {"x.weight": torch.ones(3, 5)}, ReadOptions(alpha=1), AmbiguousError, r"x\.weight.*already merged"),
        (
            pair(6, 6, 2) | {"x.conv.weight": torch.ones(2, 2, 3, 3)},
            ReadOptions(alpha=1, kernels=(("x", 2),)), AmbiguousError, r"x\.conv\.weight.*already merged",
        ),
        (pair(6, 6, 2), ReadOptions(alpha=1, kernels=(("x", 4),)), ShapeError, "kernel 4"),
        (pair(6, 6, 2), ReadOptions(alpha=1, kernels=(("y", 2),)), FormatError, "--conv.*y"),
        (
            {"x.lora_A": torch.ones(2, 5), "y.lora_B": torch.ones(3, 2)} | pair(3, 5, 2, "z"),
            ReadOptions(alpha=1), Faults, r"x\.lora_A(.|\n)*y\.lora_B",
        ),
    ],
)  # fmt: skip
def test_faults(state: dict[str, Tensor], options: ReadOptions, error: type[LoratoolsError], said: str) -> None:
    with pytest.raises(error, match=said):
        decode(container(state), options)


def low(**more: object) -> LowRank:
    return LowRank(**({"A": to_ref(torch.randn(2, 5)), "B": to_ref(torch.randn(3, 2)), "alpha": 4.0, "layer": "linear"} | more))


@pytest.mark.parametrize(
    ("deltas", "said"),
    [
        ({"x.weight": low(), "y.weight": low(alpha=8.0)}, r"y\.weight"),
        ({"x.weight": DoRA(direction=low(), magnitude=to_ref(torch.ones(3, 1)))}, r"x\.weight.*a DoRA"),
        ({"x.weight": low(), "x.bias": Full(diff=to_ref(torch.ones(3)))}, r"x\.bias.*a whole-tensor"),
        ({"x.weight": low(A=to_ref(torch.randn(4, 5, 2, 2)), B=to_ref(torch.randn(3, 4)), layer="conv")}, r"x\.weight.*form"),
        ({"x.weight": low(A=to_ref(torch.randn(2, 5, 3)), layer="conv")}, r"x\.weight.*k²"),
    ],
)
def test_what_loralib_cannot_say(deltas: dict[str, object], said: str) -> None:
    with pytest.raises(NotExpressible, match=said):
        encode(Adapter(deltas))


@pytest.mark.parametrize("layer", ["linear", "embedding", "transposed"])
def test_encode_gives_loralibs_orientation(layer: str) -> None:
    delta = low(layer=layer)
    tensors = encode(Adapter({"x.weight": delta})).tensors
    A, B = (read_tensor(tensors[f"x.lora_{factor}"], torch.float64) for factor in "AB")
    found = 2 * (B @ A)
    torch.testing.assert_close(found if layer == "linear" else found.T, change(delta))


def test_a_pointwise_convolution_on_a_matrix_is_a_linear_layers() -> None:
    """Files spell a kernel of 1 both ways: on a base's matrix the factors are a linear layer's, and are written as such."""
    given = low(A=to_ref(torch.ones(2, 6, 1, 1)), B=to_ref(torch.ones(4, 2)), layer="conv")
    resolved = Adapter({"x.weight": given}).resolve({"x.weight": Spec("F32", (4, 6))})
    written = encode(resolved).tensors
    assert {key: ref.spec.shape for key, ref in written.items()} == {"x.lora_A": (2, 6), "x.lora_B": (4, 2)}


def test_rslora_is_said_by_alpha() -> None:
    found = encode(Adapter({"x.weight": low(alpha=4.0, rslora=True)}))
    assert float(found.metadata["loratools.alpha"]) / 2 == low(alpha=4.0, rslora=True).scaling


def test_detect_claims_its_own_alone() -> None:
    assert [row.name for row in FORMATS if row.detect(open_container(ROBERTA))] == ["loralib"]
    assert not detect(Container(container(pair(3, 5, 2)).tensors, config={"peft_type": "LORA"}))
    for keys in (["q.lora.A", "q.lora.B"], ["q.lora_A.weight", "q.lora_B.weight"], ["q.lora_A"]):
        assert not detect(container(dict.fromkeys(keys, torch.ones(2, 2))))
    parametrised = "q.parametrizations.weight.0"  # minLoRA's, whose scale and orientation are others
    assert not detect(container({f"{parametrised}.lora_A": torch.ones(2, 2), f"{parametrised}.lora_B": torch.ones(2, 2)}))
