"""A quantised checkpoint as plain weights: which tensors belong together, checked before one is read.

Known are fp8 with scales and bitsandbytes' 4 bits (`codes`). Every tensor is a weight, belongs to one, is said to be left out
(scales of activations, which plain weights have none of), or is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.codes import Coded, FourBit, Scaled
from loratools.errors import FormatError, LoratoolsError, QuantizedError, ShapeError, raise_all
from loratools.quantized import method, scheme
from loratools.refs import FLOATS, Ref, Spec
from loratools.tensors import dtype_code

_STATE = ".quant_state.bitsandbytes__"
_METHODS = ("fp8", "fbgemm_fp8")
_BLOCK = (128, 128)  # DeepSeek's; config.json may say another
_ACTIVATIONS = (".input_scale", ".activation_scale", ".scale_input", ".input_scale_ub", ".k_scale", ".v_scale")
_MARK = "scaled_fp8"  # ComfyUI's, an empty tensor whose dtype is the weights'
_PARTS = ("_scale_inv", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".scale_weight")


@dataclass
class Plain:
    """The weights of a quantised checkpoint, read as plain ones: `refs` by name in file order; `computed` names are no copies."""

    refs: dict[str, Ref] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def known(specs: Mapping[str, Spec], config: Mapping[str, Any]) -> bool:
    """Whether it is quantised in a way that can be read as plain weights, as far as names and config tell."""
    stated = method(config)
    four = any(_STATE in name for name in specs)
    eight = any(_is_fp8(spec) for spec in specs.values())
    return (four and stated in (None, "bitsandbytes")) or (eight and (stated in (None, *_METHODS) or _plain_float(config)))


def dequantized(stored: Mapping[str, Ref], config: Mapping[str, Any], dtype: str | None = None) -> Plain:
    """The plain weights that `stored` stands for, in `dtype`, else in the one its config or its quantiser names, else bfloat16.

    Raises QuantizedError, naming it, for any other scheme, and all together FormatError and ShapeError for parts that lack,
    do not fit, or belong to no weight.
    """
    specs = {name: ref.spec for name, ref in stored.items()}
    if not known(specs, config):
        raise QuantizedError("cannot be dequantised", found=scheme(specs, config), expected="fp8 with scales, or bitsandbytes nf4 or fp4")
    faults: list[LoratoolsError] = []
    found: dict[str, tuple[Coded, list[str]]] = {}
    unsound: list[str] = []  # what their names begin with: their parts are no strays
    for name in stored:
        weight = name.partition(_STATE)[0]
        try:
            if _STATE in name:
                found[weight] = _four_bit(stored, name, weight, dtype)
            elif _is_fp8(specs[name]) and name != _MARK:
                found[name] = _scaled(stored, name, config, dtype)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
            unsound.append(weight.removesuffix("weight"))
    made = Plain(computed=[name for name in stored if name in found])
    faults += _sort({name: ref for name, ref in stored.items() if not name.startswith(tuple(unsound))}, found, made)
    raise_all(faults)
    return made


def _sort(stored: Mapping[str, Ref], found: Mapping[str, tuple[Coded, list[str]]], made: Plain) -> Iterator[LoratoolsError]:
    """Every tensor to its place; yields errors for those that have none."""
    others: dict[str, Spec] = {}
    used = {part for _, parts in found.values() for part in parts}
    for name, ref in stored.items():
        if name in found:
            made.refs[name] = found[name][0]
        elif name == _MARK or (name.endswith(_ACTIVATIONS) and ref.spec.numel == 1):
            made.left_out.append(name)
        elif name.endswith(_PARTS) and name not in used:
            yield FormatError("belongs to no quantised weight", tensor=name)
        elif name not in used:
            made.refs[name], others[name] = ref, ref.spec
    other = scheme(others, {})
    if other:
        yield QuantizedError("some weights are quantised in another way", found=other)


def _is_fp8(spec: Spec) -> bool:
    return spec.dtype in ("F8_E4M3", "F8_E5M2")


def _plain_float(config: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors says that it only scaled."""
    parts = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    stated = [part["quantization_config"] for part in parts if isinstance(part.get("quantization_config"), Mapping)]
    return any(found.get("quant_method") == "compressed-tensors" and found.get("format") == "float-quantized" for found in stated)


def _stated(config: Mapping[str, Any], key: str) -> Any:
    """A value of the config, or of the model's config within it."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, Mapping) else None)


def _copy_dtype(stated: Any) -> str:
    """The dtype that a quantiser or a config names, if it is one that weights are copied in."""
    text = str(stated).removeprefix("torch.")
    return dtype_code(text) if text in ("float64", "float32", "float16", "bfloat16") else "BF16"


def _of(stored: Mapping[str, Ref], name: str, dtypes: tuple[str, ...], count: int | None = None) -> Ref:
    """A part of a weight by its name; FormatError where it is missing, or no tensor of that kind."""
    ref = stored.get(name)
    if ref is None:
        raise FormatError("a part of it is missing", expected=name)
    if ref.spec.dtype not in dtypes or (count is not None and ref.spec.numel != count):
        raise FormatError(f"{name} is not what it should be", found=ref.spec, expected=f"{count or 'values of'} {' or '.join(dtypes)}")
    return ref


# -- fp8


def _scaled(stored: Mapping[str, Ref], name: str, config: Mapping[str, Any], dtype: str | None) -> tuple[Coded, list[str]]:
    weight = stored[name]
    spec = Spec(dtype or _copy_dtype(_stated(config, "torch_dtype") or _stated(config, "dtype")), weight.spec.shape)
    places = (f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}scale_weight")
    held = [place for place in dict.fromkeys(places) if place in stored and place != name]
    if len(held) > 1:
        raise FormatError("has several scales", found=", ".join(held))
    if not held:
        if method(config) is not None:
            raise FormatError("its scale is missing", expected=" or ".join(places[:2]))
        return Scaled(weight, None, spec), []
    scale = _of(stored, held[0], (*FLOATS, "F8_E8M0"))
    return Scaled(weight, scale, spec, _block_of(weight.spec.shape, scale.spec.shape, held[0], config)), held


def _block_of(weight: tuple[int, ...], scale: tuple[int, ...], name: str, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (rows, columns) of a block, or None where the whole weight or each row has a scale."""
    rows = weight[:-1]
    count = 1
    for size in scale:
        count *= size
    if count == 1 or scale == (*rows, 1) or (scale == rows and len(rows) == 1 and not name.endswith("_inv")):
        return None
    height, width = _stated_block(config)
    grid = (*weight[:-2], -(-weight[-2] // height), -(-weight[-1] // width)) if len(weight) > 1 else ()
    if scale != grid:
        raise ShapeError(
            f"{name} does not fit it", found=list(scale),
            expected=f"one scale, {[*rows, 1]} for rows, or {list(grid)} for blocks of {height} × {width}",
        )  # fmt: skip
    return height, width


def _stated_block(config: Mapping[str, Any]) -> tuple[int, int]:
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        found = part.get("quantization_config")
        size = found.get("weight_block_size") if isinstance(found, Mapping) else None
        if isinstance(size, list) and len(size) == 2 and all(type(item) is int and item > 0 for item in size):
            return size[0], size[1]
        if size is not None:
            raise FormatError("config.json: weight_block_size", found=json.dumps(size), expected="two natural numbers")
    return _BLOCK


# -- bitsandbytes


def _four_bit(stored: Mapping[str, Ref], name: str, weight: str, dtype: str | None) -> tuple[Coded, list[str]]:
    state = _state(stored[name])
    shape, size = tuple(state["shape"]), state["blocksize"]
    spec = Spec(dtype or _copy_dtype(state.get("dtype")), shape)
    packed = stored.get(weight)
    if packed is None or packed.spec.nbytes != -(-spec.numel // 2):
        found = None if packed is None else f"{packed.spec.nbytes} bytes"
        raise FormatError(f"{weight} does not hold its codes", found=found, expected=f"{-(-spec.numel // 2)} bytes for {list(shape)}")
    blocks, parts = -(-spec.numel // size), ["absmax", "quant_map"]
    table = _of(stored, f"{weight}.quant_map", FLOATS, 16)
    if "nested_blocksize" not in state:
        made = FourBit(packed, table, _of(stored, f"{weight}.absmax", FLOATS, blocks), size, spec)
    else:
        parts += ["nested_absmax", "nested_quant_map"]
        codes = _of(stored, f"{weight}.nested_quant_map", FLOATS, 256)
        above = _of(stored, f"{weight}.nested_absmax", FLOATS, -(-blocks // state["nested_blocksize"]))
        nested = codes, above, state["nested_blocksize"], float(state["nested_offset"])
        made = FourBit(packed, table, _of(stored, f"{weight}.absmax", ("U8",), blocks), size, spec, nested)
    return made, [name, *(f"{weight}.{part}" for part in parts)]


def _state(ref: Ref) -> dict[str, Any]:
    """bitsandbytes' own description of a weight, JSON in a tensor of bytes."""
    try:
        state = json.loads(bytes(ref.read()))
        naturals = [*state["shape"], state["blocksize"]]
        if "nested_blocksize" in state:
            naturals.append(state["nested_blocksize"])
            float(state["nested_offset"])
        if all(type(value) is int and value > 0 for value in naturals):
            return dict(state)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise FormatError("not bitsandbytes' description of a weight", expected="JSON with shape, blocksize and, if nested, nested_offset")
