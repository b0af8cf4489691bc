"""dequantize: which tensors of a quantised checkpoint belong together; what lacks, does not fit, or is of another scheme is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.dequantize import Plain, dequantized, known
from loratools.errors import Faults, FormatError, LoratoolsError, QuantizedError, ShapeError
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.files import four_bit, fp8_blocks
from tests.strategies import randn

X = "model.layers.0.mlp.up_proj"
W = randn(12, 20, seed=1)
NORM = {"model.norm.weight": randn(20, seed=2).bfloat16()}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
BNB = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
COMPRESSED = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
CODES = W.to(torch.float8_e4m3fn)


def blocks(block: tuple[int, int] = (4, 8)) -> dict[str, Tensor]:
    codes, scale = fp8_blocks(W, block)
    return {f"{X}.weight": codes, f"{X}.weight_scale_inv": scale} | NORM


def read(tensors: dict[str, Tensor], config: dict[str, Any], dtype: str | None = None) -> Plain:
    return dequantized({name: to_ref(tensor) for name, tensor in tensors.items()}, config, dtype)


def close(plain: Plain, share: float) -> None:
    """The weight is what was quantised, but for the error of the codes."""
    found = read_tensor(plain.refs[f"{X}.weight"], torch.float64)
    assert found.shape == W.shape and float((found - W).norm() / W.norm()) < share


def test_block_scaled_fp8() -> None:
    plain = read(blocks(), FP8)
    assert list(plain.refs) == [f"{X}.weight", "model.norm.weight"] and plain.computed == [f"{X}.weight"] and plain.left_out == []
    assert plain.refs[f"{X}.weight"].spec == Spec("BF16", (12, 20))
    close(plain, 0.04)


def test_the_block_is_the_configs_or_128() -> None:
    codes, scale = fp8_blocks(W)
    for config in ({}, {"quantization_config": {"quant_method": "fp8"}}, {"text_config": {"quantization_config": {"quant_method": "fp8"}}}):
        close(read({f"{X}.weight": codes, f"{X}.weight_scale_inv": scale}, config), 0.04)
    nested = {"text_config": FP8 | {"torch_dtype": "float16"}}
    plain = read(blocks(), nested)
    close(plain, 0.04)
    assert plain.refs[f"{X}.weight"].spec.dtype == "F16"


@pytest.mark.parametrize(
    ("parts", "config"),
    [
        ({"weight_scale": torch.full((12, 1), 1.0)}, {"quantization_config": {"quant_method": "fbgemm_fp8"}}),
        ({"weight_scale": torch.full((12,), 1.0)}, {"quantization_config": {"quant_method": "fp8"}}),
        ({"weight_scale": torch.tensor(1.0), "input_scale": torch.tensor(0.5)}, {"quantization_config": {"quant_method": "fp8"}}),
        ({"weight_scale": torch.ones(12, 1).bfloat16()}, COMPRESSED),
        ({"scale_weight": torch.tensor([1.0]), "scale_input": torch.tensor([2.0])}, {}),
        ({"weight_scale_inv": torch.tensor(1.0), "activation_scale": torch.tensor(1.0)}, FP8),
    ],
    ids=["rows", "flat rows", "one scale", "compressed-tensors", "ComfyUI", "static"],
)  # fmt: skip
def test_other_scales_of_fp8(parts: dict[str, Tensor], config: dict[str, Any]) -> None:
    plain = read({f"{X}.weight": CODES, **{f"{X}.{name}": tensor for name, tensor in parts.items()}} | NORM, config)
    assert list(plain.refs) == [f"{X}.weight", "model.norm.weight"]
    assert plain.left_out == [f"{X}.{name}" for name in parts if name in ("input_scale", "scale_input", "activation_scale")]
    close(plain, 0.04)


def test_comfyui_marks_its_files_and_leaves_some_weights_unscaled() -> None:
    tensors = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn), "a.weight": CODES, "a.scale_weight": torch.tensor(2.0)}
    plain = read(tensors | {"b.weight": CODES}, {})
    assert list(plain.refs) == ["a.weight", "b.weight"] and plain.left_out == ["scaled_fp8"]
    a, b = (read_tensor(plain.refs[name]) for name in plain.refs)
    assert torch.equal(a, 2 * b) and torch.equal(b, CODES.bfloat16())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("config", [BNB, {}])
def test_bitsandbytes_in_four_bits(kind: str, config: dict[str, Any]) -> None:
    plain = read(four_bit(f"{X}.weight", W, kind=kind, dtype="float16") | NORM, config)
    assert list(plain.refs) == [f"{X}.weight", "model.norm.weight"] and plain.computed == [f"{X}.weight"]
    assert plain.refs[f"{X}.weight"].spec == Spec("F16", (12, 20))
    close(plain, 0.2)


def test_codes_may_be_stored_under_another_dtype() -> None:
    """FSDP wants them as the model's own dtype: bnb_4bit_quant_storage."""
    tensors = four_bit(f"{X}.weight", W, nested=False)
    tensors[f"{X}.weight"] = tensors[f"{X}.weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    close(read(tensors, BNB, "F32"), 0.2)


@pytest.mark.parametrize(("dtype", "stated", "expected"), [
    (None, None, "BF16"), (None, "float16", "F16"), (None, "torch.float32", "F32"), (None, "auto", "BF16"), ("F32", "float16", "F32"),
])  # fmt: skip
def test_the_dtype_of_the_copy(dtype: str | None, stated: str | None, expected: str) -> None:
    assert read(blocks(), FP8 | {"torch_dtype": stated}, dtype).refs[f"{X}.weight"].spec.dtype == expected
    assert read(blocks(), FP8 | {"dtype": stated}, dtype).refs[f"{X}.weight"].spec.dtype == expected


# -- what is refused


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{X}.{name}")


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{X}.{name}": tensor})


def state(**more: Any) -> Callable[[dict[str, Tensor]], object]:
    """The description of the weight with some words changed; None removes one."""

    def edit(tensors: dict[str, Tensor]) -> None:
        name = f"{X}.weight.quant_state.bitsandbytes__nf4"
        table = json.loads(bytes(tensors[name].numpy())) | more
        data = json.dumps({key: value for key, value in table.items() if value is not None}).encode()
        tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    return edit


ODD = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4]}}
LONE = {"quantization_config": {"quant_method": "fp8"}}


@pytest.mark.parametrize(
    ("edit", "config", "error", "said"),
    [
        (without("weight_scale_inv"), FP8, FormatError, r"up_proj\.weight: its scale is missing: expected .*_scale_inv or .*_scale"),
        (put("weight_scale", torch.ones(12, 1)), FP8, FormatError, r"has several scales: found .*weight_scale_inv, .*weight_scale"),
        (put("weight_scale_inv", torch.ones(3, 2)), FP8, ShapeError, r"found \[3, 2\], expected one .*\[3, 3\] for blocks of 4 × 8"),
        (put("weight_scale_inv", torch.ones(3, 3)), LONE, ShapeError, r"or \[1, 1\] for blocks of 128 × 128"),
        (put("weight_scale_inv", torch.ones(3, 3).byte()), FP8, FormatError, r"is not what it should be: found U8 \[3, 3\]"),
        (without("weight"), FP8, QuantizedError, "cannot be dequantised: found fp8, expected fp8 with scales"),
        (put("other_scale_inv", torch.ones(3, 3)), FP8, FormatError, r"other_scale_inv: belongs to no quantised weight"),
        (put("weight_scale_inv", torch.ones(3, 3)), ODD, FormatError, r"weight_block_size: found \[4\], expected two"),
        (put("qweight", torch.ones(3, 3).int()), FP8, QuantizedError, r"some weights are quantised in another way: found gptq or awq"),
    ],
)  # fmt: skip
def test_faults_of_fp8(edit: Callable[[dict[str, Tensor]], object], config: dict[str, Any], error: type[LoratoolsError], said: str) -> None:
    tensors = blocks()
    edit(tensors)
    with pytest.raises(error, match=said):
        read(tensors, config)


@pytest.mark.parametrize(
    ("edit", "error", "said"),
    [
        (without("weight.absmax"), FormatError, r"a part of it is missing: expected .*weight\.absmax"),
        (without("weight.quant_map"), FormatError, r"a part of it is missing: expected .*weight\.quant_map"),
        (without("weight.nested_absmax"), FormatError, r"a part of it is missing: expected .*weight\.nested_absmax"),
        (put("weight.quant_map", torch.ones(15)), FormatError, r"quant_map is not what it should be: found F32 \[15\], expected 16"),
        (put("weight.absmax", torch.ones(4)), FormatError, r"absmax is not what it should be: found F32 \[4\], expected 4 U8"),
        (put("weight.absmax", torch.ones(3).byte()), FormatError, r"absmax is not what it should be: found U8 \[3\], expected 4 U8"),
        (put("weight", torch.ones(119, 1).byte()), FormatError, r"its codes: found 119 bytes, expected 120 bytes for \[12, 20\]"),
        (without("weight"), FormatError, "does not hold its codes: expected 120 bytes"),
        (state(shape=None), FormatError, "not bitsandbytes' description of a weight"),
        (state(blocksize=0), FormatError, "not bitsandbytes' description"),
        (state(nested_offset=None), FormatError, "not bitsandbytes' description"),
        (put("weight.quant_state.bitsandbytes__nf4", torch.zeros(3).byte()), FormatError, "not bitsandbytes' description"),
        (put("other.absmax", torch.ones(2)), FormatError, r"other\.absmax: belongs to no quantised weight"),
        (put("SCB", torch.ones(12)), QuantizedError, "some weights are quantised in another way: found bitsandbytes int8"),
    ],
)
def test_faults_of_four_bits(edit: Callable[[dict[str, Tensor]], object], error: type[LoratoolsError], said: str) -> None:
    tensors = four_bit(f"{X}.weight", W)
    edit(tensors)
    with pytest.raises(LoratoolsError, match=said) as caught:
        read(tensors, BNB)
    assert isinstance(caught.value, error | Faults)


def test_all_faults_are_told() -> None:
    tensors = blocks() | {"a.weight": CODES, "b.weight_scale_inv": torch.ones(3, 3)}
    with pytest.raises(Faults) as caught:
        read(tensors, FP8)
    assert [error.tensor for error in caught.value.errors] == ["a.weight", "b.weight_scale_inv"]


OTHERS = "gptq awq hqq quanto torchao aqlm eetq higgs mxfp4 bitnet spqr vptq compressed-tensors modelopt quark auto-round mxfp8 nvfp4 gguf"


@pytest.mark.parametrize("method", OTHERS.split())
def test_every_other_scheme_is_refused_by_its_name(method: str) -> None:
    """Whatever its tensors look like."""
    config = {"quantization_config": {"quant_method": method}}
    for tensors in (blocks(), four_bit(f"{X}.weight", W), dict(NORM)):
        assert not known({name: to_ref(tensor).spec for name, tensor in tensors.items()}, config)
        with pytest.raises(QuantizedError, match=f"cannot be dequantised: found {method}"):
            read(tensors, config)


def test_bitsandbytes_in_eight_bits_is_refused() -> None:
    tensors = {f"{X}.weight": W.to(torch.int8), f"{X}.SCB": torch.ones(12), f"{X}.weight_format": torch.tensor(0)}
    for config, found in ((BNB, "bitsandbytes"), ({}, "bitsandbytes int8")):
        with pytest.raises(QuantizedError, match=f"cannot be dequantised: found {found}"):
            read(tensors, config)
