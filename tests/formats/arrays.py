"""TensorRT-LLM's two arrays read back by its own words for them, for tests: loratools writes them only.

Its docs (advanced/lora.md): of `lora_config`, int32 (1, modules, 3), a row is the module's id, its layer and the rank of its adapter; of
`lora_weights` (1, modules, longest) the row of that number is the "in" matrix (rank, in), then the "out" matrix (out, rank), flattened, and
padding. Ids are those of its `LoraModule` (attn_qkv 0, attn_q 1, …, mlp_h_to_4h 5, mlp_4h_to_h 6, mlp_gate 7).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.formats._pieces import piece_of
from loratools.formats.base import Container
from loratools.formats.writing import write_container
from loratools.tensors import read_tensor

IDS = {"qkv_proj": 0, "q_proj": 1, "k_proj": 2, "v_proj": 3, "o_proj": 4, "gate_proj": 5, "gate_up_proj": 5, "down_proj": 6, "up_proj": 7}


def arrays(folder: Path, dtype: torch.dtype) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], int]]:
    """By (id, layer) the row of weights, and the rank."""
    config = np.load(folder / "model.lora_config.npy")[0]
    weights = np.load(folder / "model.lora_weights.npy")[0]
    assert config.dtype == np.int32 and len(config) == len(weights)
    width = {torch.float32: np.int32, torch.float16: np.int16, torch.bfloat16: np.int16}[dtype]
    rows = torch.from_numpy(weights.view(width)).view(dtype)
    found = {(int(id_), int(layer)): (row, int(rank)) for (id_, layer, rank), row in zip(config, rows, strict=True)}
    return {key: row for key, (row, _) in found.items()}, {key: rank for key, (_, rank) in found.items()}


def check_written(adapter: Adapter, container: Container) -> dict[str, tuple[Tensor, Tensor]]:
    """By name the factors (B, A) that the arrays hold: A byte for byte the adapter's, B its B by the scaling, rounded once."""
    dtype = read_tensor(piece_of(next(iter(adapter.values()))).A).dtype
    with tempfile.TemporaryDirectory() as folder:
        write_container(container, Path(folder) / "arrays")
        rows, ranks = arrays(Path(folder) / "arrays", dtype)
    assert len(rows) == len(adapter)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, delta in adapter.items():
        piece, (*_, layer, _, module, _) = piece_of(delta), name.split(".")
        key = (IDS[module], int(layer))
        A, B = read_tensor(piece.A), read_tensor(piece.B)
        assert ranks[key] == piece.rank
        row = rows[key]
        at, end = A.numel(), A.numel() + B.numel()
        out, half = row[at:end].reshape(B.shape), len(B) // 2
        out = torch.cat((out[half:], out[:half])) if module == "gate_up_proj" else out  # its own order is up above gate
        found[name] = out, row[:at].reshape(A.shape)
        assert torch.equal(found[name][1], A) and not row[end:].any()
        assert torch.equal(found[name][0], (B.double() * (piece.alpha / piece.rank)).to(dtype))
    return found
