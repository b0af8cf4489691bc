"""TensorRT-LLM's LoRA, which is only written: `model.lora_weights.npy` and `model.lora_config.npy`, as `hf_lora_convert.py` writes them.

    lora_weights (1, modules, longest)   of each module A (r, in) and scaling·B (out, r) one after the other, filled up with zeros
    lora_config  (1, modules, 3)         int32: the module's number, its layer, its rank

Neither has names or shapes, so that nothing tells in from out: reading them is refused. Read from TensorRT-LLM's
`examples/hf_lora_convert.py` and `tensorrt_llm/lora_manager.py`; spec/formats/trtllm.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from blake3 import blake3

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.errors import LoratoolsError, NotExpressible, OptionError, UnsupportedError, raise_all
from loratools.formats._pieces import Piece, piece_of
from loratools.formats._refused import nothing, passengers
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref

NAME = "trtllm"
WEIGHTS, CONFIG = "model.lora_weights.npy", "model.lora_config.npy"
_KEY = re.compile(r".*\blayers\.(?P<layer>\d+)\.(?P<module>(?:self_attn|mlp)\.\w+)\.weight")
# numbers of LoraManager.LORA_MODULE_IDS: gate and up are the other way round than their names say
MODULES = {
    "self_attn.qkv_proj": 0, "self_attn.q_proj": 1, "self_attn.k_proj": 2, "self_attn.v_proj": 3, "self_attn.o_proj": 4,
    "self_attn.dense": 4, "mlp.gate_proj": 5, "mlp.gate_up_proj": 5, "mlp.c_fc": 5, "mlp.down_proj": 6, "mlp.c_proj": 6, "mlp.up_proj": 7,
}  # fmt: skip
_DESCR = {"F32": "<f4", "F16": "<f2", "BF16": "|V2"}  # numpy has no bfloat16: TensorRT-LLM keeps its bits in cells of two bytes


def detect(container: Container) -> bool:
    """Never: it is not read."""
    return False


def decode(container: Container, options: ReadOptions | None = None) -> NoReturn:
    """Raises UnsupportedError: the file has neither names nor shapes."""
    fact = "TensorRT-LLM's LoRA has neither names nor shapes, and is not read"
    raise UnsupportedError(fact, file=container.path, remedy="give the adapter it was made of")


def encode(adapter: Adapter) -> Container:
    """The adapter as hf_lora_convert.py makes it of peft's, each module under its own scaling, which is multiplied into B.

    Raises NotExpressible for other kinds than LoRA of a layer's attention and MLP, for DoRA, and for factors of several dtypes.
    """
    faults = passengers(adapter, "TensorRT-LLM has")
    rows: list[tuple[int, int, Piece, bool]] = []
    dtypes: dict[str, str] = {}
    for name, delta in adapter.items():
        try:
            rows.append(_row(name, delta))
            dtypes |= {ref.spec.dtype: name for ref in (rows[-1][2].B, rows[-1][2].A)}
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    if not rows:
        raise nothing(adapter.path)
    codes = sorted(dtypes)
    if len(codes) > 1 or codes[0] not in _DESCR:
        fact, remedy = "TensorRT-LLM has one dtype for all: float32, float16 or bfloat16", "resize --rank R --dtype float16 gives it one"
        name = next((dtypes[code] for code in codes if code not in _DESCR), dtypes[codes[0]])
        raise NotExpressible(fact, file=adapter.path, tensor=name, found=", ".join(codes), remedy=remedy)
    rows.sort(key=lambda row: (row[1], row[0]))
    tensors: dict[str, Ref] = {}
    for module, layer, piece, _ in rows:
        tensors |= {f"{layer}.{module}.in": piece.A, f"{layer}.{module}.out": piece.B}
    return Container(tensors, name=WEIGHTS, writer=lambda container, folder: _write(rows, codes[0], folder))


def _row(name: str, delta: Delta) -> tuple[int, int, Piece, bool]:
    match = _KEY.fullmatch(name)
    number = MODULES.get(match["module"]) if match else None
    if match is None or number is None:
        expected = ", ".join(f"layers.N.{module}" for module in MODULES)
        remedy = "--format peft has LoRA on any; convert --base gives it the names of transformers"
        raise NotExpressible("TensorRT-LLM's converter has no LoRA on this tensor", expected=expected, remedy=remedy)
    piece = piece_of(delta, "hf_lora_convert.py has no DoRA")
    return number, int(match["layer"]), piece, match["module"] == "mlp.gate_up_proj"


def _write(rows: list[tuple[int, int, Piece, bool]], code: str, folder: Path) -> dict[str, str]:
    """Both arrays, one module in memory at a time."""
    import numpy as np

    if folder.suffix:
        raise OptionError("this format is a folder of two arrays", found=folder.name, expected="OUT without an ending")
    folder.mkdir(exist_ok=True)
    longest = max(piece.A.spec.numel + piece.B.spec.numel for _, _, piece, _ in rows)
    width = {"F32": 4, "F16": 2, "BF16": 2}[code]
    digests: dict[str, str] = {}
    with (folder / WEIGHTS).open("xb") as stream:
        header = {"descr": _DESCR[code], "fortran_order": False, "shape": (1, len(rows), longest)}
        np.lib.format.write_array_header_1_0(stream, header)
        for number, layer, piece, swapped in rows:
            data = bytes(piece.A.read()), _scaled(piece, code, swapped=swapped)
            for part, name in zip(data, ("in", "out"), strict=True):
                stream.write(part)
                digests[f"{layer}.{number}.{name}"] = blake3(part).hexdigest()
            stream.write(bytes(longest * width - len(data[0]) - len(data[1])))
    config = np.array([[(number, layer, piece.rank) for number, layer, piece, _ in rows]], dtype="<i4")
    np.save(folder / CONFIG, config)
    return digests


def _scaled(piece: Piece, code: str, *, swapped: bool) -> bytes:
    """scaling·B in float64, rounded once; of a fused gate and up the halves change places."""
    import torch

    from loratools.compress import rounded
    from loratools.tensors import read_tensor

    B = read_tensor(piece.B, torch.float64) * (piece.alpha / piece.rank)
    half = B.shape[0] // 2
    return bytes(rounded(torch.cat((B[half:], B[:half])) if swapped else B, code).read())
