"""codes: fp8 with scales and 4-bit weights as the numbers they stand for, against float64 algebra, bitsandbytes and transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.codes import Coded, FourBit, Scaled
from loratools.errors import NonFiniteError
from loratools.refs import Spec
from loratools.tensors import code_of, to_ref, torch_dtype
from tests.files import four_bit, fp8_blocks, raw
from tests.strategies import randn


def nf4(W: Tensor, dtype: str = "F32", **how: Any) -> tuple[FourBit, Tensor]:
    """The stored weight as a Ref, and what it stands for, computed element by element from the parts."""
    parts = four_bit("w", W, **how)
    state = json.loads(bytes(next(tensor for name, tensor in parts.items() if "quant_state" in name).numpy()))
    size, absmax = state["blocksize"], parts["w.absmax"].double()
    nested = None
    if "nested_absmax" in "".join(parts):
        block, offset = state["nested_blocksize"], state["nested_offset"]
        table, above = parts["w.nested_quant_map"].double(), parts["w.nested_absmax"].double()
        absmax = torch.stack([table[code] * above[i // block] + offset for i, code in enumerate(parts["w.absmax"].long())])
        nested = to_ref(parts["w.nested_quant_map"]), to_ref(parts["w.nested_absmax"]), block, offset
    codes = [code for byte in parts["w"].view(-1).tolist() for code in (byte >> 4, byte & 15)][: W.numel()]
    expected = torch.stack([parts["w.quant_map"].double()[code] * absmax[i // size] for i, code in enumerate(codes)]).view(W.shape)
    ref = FourBit(to_ref(parts["w"]), to_ref(parts["w.quant_map"]), to_ref(parts["w.absmax"]), size, Spec(dtype, tuple(W.shape)), nested)
    return ref, expected


def read_anyhow(ref: Coded, expected: Tensor) -> None:
    """Whole, in blocks of any size, row by row, under another shape and as bytes: always the same bytes."""
    data, step = raw(expected), expected.dtype.itemsize
    assert bytes(ref.read()) == data
    for size in (len(data) // 50 + 1, 1000, 1 << 20):
        assert b"".join(bytes(block) for block in ref.blocks(size)) == data
    rows = ref.spec.matrix[0]
    assert b"".join(bytes(ref.rows(row, row + 1)) for row in range(rows)) == data
    assert bytes(ref.rows(rows // 2, rows)) == data[rows // 2 * ref.spec.row_bytes() :]
    flat = ref.reshape(expected.numel(), 1)
    assert flat.spec.shape == (expected.numel(), 1) and bytes(flat.rows(1, expected.numel() - 1)) == data[step:-step]
    buffer = bytearray(ref.spec.row_bytes())
    ref.readinto(1, 2, memoryview(buffer))
    assert bytes(buffer) == data[ref.spec.row_bytes() : 2 * ref.spec.row_bytes()]
    assert bytes(ref.as_bytes().rows(1, 5)) == data[1:5]


SHAPES = [(4, 64), (7, 5), (3, 3, 5), (2, 130), (70, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(shape: tuple[int, ...], nested: bool, kind: str) -> None:
    """Odd numbers of weights, blocks that end within a row, absmax in 8 bits with an offset, whatever stretch is read."""
    ref, expected = nf4(randn(*shape, seed=1), nested=nested, kind=kind, above=16)
    read_anyhow(ref, expected.float())


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 3, 16, 64]), st.booleans(), st.data())
def test_any_rows_of_any_weight(rows: int, columns: int, size: int, nested: bool, data: st.DataObject) -> None:
    ref, expected = nf4(randn(rows, columns, seed=rows * columns), size=size, nested=nested, above=4)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert bytes(ref.rows(start, stop)) == raw(expected[start:stop].float())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_values_are_rounded_once(dtype: str) -> None:
    """To nearest, as integers of a unit in the last place: torch's own way by float32 rounds twice."""
    ref, expected = nf4(randn(64, 300, seed=2), dtype)
    found = torch.frombuffer(bytearray(ref.read()), dtype=torch_dtype(dtype)).view(64, 300)
    error = (found.double() - expected).abs()
    beside = (torch.nextafter(found, torch.full_like(found, end)).double() for end in (-torch.inf, torch.inf))
    assert all(bool((error <= (value - expected).abs()).all()) for value in beside)


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("codes", FP8)
@pytest.mark.parametrize(
    ("shape", "block"), [((6, 10), (4, 4)), ((130, 140), (128, 128)), ((5, 3), (2, 5)), ((1, 9), (1, 4)), ((8, 8), (3, 1))]
)
def test_blocks_of_fp8(codes: torch.dtype, shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Blocks at the edges are cut off where the shape is no multiple."""
    weight = randn(*shape, seed=1).to(codes)
    scale = randn(-(-shape[0] // block[0]), -(-shape[1] // block[1]), seed=2)
    expected = torch.empty(shape, dtype=torch.float64)
    for i, j in ((i, j) for i in range(shape[0]) for j in range(shape[1])):
        expected[i, j] = float(weight[i, j].double()) * float(scale[i // block[0], j // block[1]])
    ref = Scaled(to_ref(weight), to_ref(scale), Spec("F32", shape), block)
    assert bytes(ref.read()) == raw(expected.float())
    if shape[0] > 1:
        read_anyhow(ref, expected.float())


def test_a_stack_of_matrices_has_a_grid_each() -> None:
    weight, scale = randn(3, 5, 6, seed=1).to(torch.float8_e4m3fn), randn(3, 2, 2, seed=2)
    grids = scale.double().repeat_interleave(4, 1).repeat_interleave(4, 2)
    expected = weight.double() * grids[:, :5, :6]
    read_anyhow(Scaled(to_ref(weight), to_ref(scale), Spec("F32", (3, 5, 6)), (4, 4)), expected.float())


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(0.37), torch.tensor([0.37]), randn(7, 1, seed=3), randn(7, seed=4), randn(7, 1, seed=5).bfloat16()],
    ids=["0-d", "one", "rows", "flat rows", "bfloat16"],
)
def test_one_scale_and_a_scale_for_each_row(scale: Tensor) -> None:
    weight = randn(7, 9, seed=1).to(torch.float8_e4m3fn)
    expected = weight.double() * (scale.double() if scale.numel() == 1 else scale.double().view(7, 1))
    read_anyhow(Scaled(to_ref(weight), to_ref(scale), Spec("F32", (7, 9))), expected.float())


def test_scales_that_are_powers_of_two_alone() -> None:
    """DeepSeek-V3.1's float8_e8m0fnu."""
    weight = randn(8, 8, seed=1).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.25, 2.0**-20], [8.0, 2.0**70]]).to(torch.float8_e8m0fnu)
    expected = weight.double() * scale.float().double().repeat_interleave(4, 0).repeat_interleave(4, 1)
    read_anyhow(Scaled(to_ref(weight), to_ref(scale), Spec("F32", (8, 8)), (4, 4)), expected.float())


def test_codes_without_a_scale_are_themselves() -> None:
    weight = randn(4, 4, seed=1).to(torch.float8_e5m2)
    read_anyhow(Scaled(to_ref(weight), None, Spec("BF16", (4, 4))), weight.bfloat16())


def test_what_does_not_fit_the_dtype_is_refused() -> None:
    weight = torch.full((2, 2), 448.0).to(torch.float8_e4m3fn)
    ref = Scaled(to_ref(weight), to_ref(torch.tensor(200.0)), Spec("F16", (2, 2)))
    with pytest.raises(NonFiniteError, match="would not be finite in float16: found 89600; give a wider --dtype"):
        ref.read()
    Scaled(to_ref(weight), to_ref(torch.tensor(200.0)), Spec("BF16", (2, 2))).read()
    with pytest.raises(NonFiniteError, match="found nan"):
        Scaled(to_ref(torch.full((1, 1), torch.nan).to(torch.float8_e4m3fn)), None, Spec("F32", (1, 1))).read()


# -- other implementations


@pytest.mark.parametrize("shape", [(64, 128), (33, 17), (300, 64)])  # with others its kernel for CPUs (0.50.2) takes a row for whole blocks
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes(shape: tuple[int, int], kind: str, nested: bool) -> None:
    """It computes in float32, so a weight may lie a unit of that off, and round to a neighbour where it lay near a tie."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, state = bnb.quantize_4bit(randn(*shape, seed=7), quant_type=kind, compress_statistics=nested, blocksize=64)
    told = {name: to_ref(tensor) for name, tensor in state.as_dict(packed=True).items()}
    above = (told["nested_quant_map"], told["nested_absmax"], 256, float(state.offset)) if nested else None
    ref = FourBit(to_ref(packed), told["quant_map"], told["absmax"], 64, Spec("F32", shape), above)
    found = torch.frombuffer(bytearray(ref.read()), dtype=torch.float32).view(shape)
    torch.testing.assert_close(found, bnb.dequantize_4bit(packed, state), rtol=4 * 2.0**-24, atol=1e-30)  # three roundings of float32
    state.dtype = torch.bfloat16
    ref.spec = Spec("BF16", shape)
    narrow = torch.frombuffer(bytearray(ref.read()), dtype=torch.bfloat16).view(shape)
    assert float((narrow == bnb.dequantize_4bit(packed, state)).float().mean()) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_fp8(dtype: torch.dtype) -> None:
    """Its own dequantisation multiplies in float32, which rounds the product of 4 and 24 bits once: the same for float32."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes, scale = fp8_blocks(randn(256, 384, seed=3))
    expected = module.Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=dtype)
    code = code_of(dtype)
    assert code is not None
    ref = Scaled(to_ref(codes), to_ref(scale), Spec(code, (256, 384)), (128, 128))
    found = torch.frombuffer(bytearray(ref.read()), dtype=dtype).view(256, 384)
    same = float((found == expected).float().mean())
    assert same == 1 if dtype == torch.float32 else same > 0.999  # bfloat16 by way of float32 rounds twice
