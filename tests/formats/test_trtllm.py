"""TensorRT-LLM's two arrays: hf_lora_convert.py's formulas in float64; that it is never read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import loratools
from loratools.adapter import Adapter
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import NotExpressible, OptionError, UnsupportedError
from loratools.formats.base import Container
from loratools.formats.trtllm import decode, detect
from loratools.tensors import to_ref

LAYER = "model.layers.1."


def low(out: int, into: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, LowRank]:
    torch.manual_seed(seed)
    A, B = torch.randn(2, into, dtype=dtype), torch.randn(out, 2, dtype=dtype)
    return A, B, LowRank(A=to_ref(A), B=to_ref(B), alpha=3.0, layer="linear")


def test_the_arrays(tmp_path: Path) -> None:
    A, B, q = low(6, 4)
    C, D, up = low(8, 4, seed=1)
    E, F, gate = low(8, 4, seed=2)
    adapter = Adapter({f"{LAYER}mlp.up_proj.weight": up, f"{LAYER}mlp.gate_proj.weight": gate, f"{LAYER}self_attn.q_proj.weight": q})
    loratools.save(adapter, tmp_path / "out", format="trtllm")
    weights, config = np.load(tmp_path / "out/model.lora_weights.npy"), np.load(tmp_path / "out/model.lora_config.npy")
    assert config.dtype == np.int32 and config.tolist() == [[[1, 1, 2], [5, 1, 2], [7, 1, 2]]]
    assert weights.shape == (1, 3, 24) and weights.dtype == np.float16
    for row, (a, b) in zip(weights[0], ((A, B), (E, F), (C, D)), strict=True):
        flat = torch.cat((a.flatten(), (b.double() * 1.5).half().flatten()))
        assert row.tolist() == torch.nn.functional.pad(flat, (0, 24 - len(flat))).tolist()


def test_a_fused_gate_and_up_changes_its_halves_and_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    A, B, fused = low(8, 4, torch.bfloat16)
    loratools.save(Adapter({f"{LAYER}mlp.gate_up_proj.weight": fused}), tmp_path / "out", format="trtllm")
    weights = np.load(tmp_path / "out/model.lora_weights.npy")
    assert weights.dtype == np.dtype("V2")
    swapped = (torch.cat((B[4:], B[:4])).double() * 1.5).bfloat16()
    assert weights.tobytes() == torch.cat((A.flatten(), swapped.flatten())).view(torch.int16).numpy().tobytes()


def test_what_it_cannot_say(tmp_path: Path) -> None:
    _, _, q = low(6, 4)
    dora = DoRA(direction=q, magnitude=to_ref(torch.ones(6, 1)))
    with pytest.raises(NotExpressible, match="has no DoRA; convert --kind lora"):
        loratools.save(Adapter({f"{LAYER}self_attn.q_proj.weight": dora}), tmp_path / "out", format="trtllm")
    with pytest.raises(NotExpressible, match="no LoRA on this tensor"):
        loratools.save(Adapter({"lm_head.weight": q}), tmp_path / "out", format="trtllm")
    mixed = {f"{LAYER}self_attn.q_proj.weight": q, f"{LAYER}self_attn.k_proj.weight": low(6, 4, torch.float32)[2]}
    with pytest.raises(NotExpressible, match="one dtype for all"):
        loratools.save(Adapter(mixed), tmp_path / "out", format="trtllm")
    wide = low(6, 4, torch.float64)[2]
    with pytest.raises(NotExpressible, match="one dtype for all: float32, float16 or bfloat16: found F64"):
        loratools.save(Adapter({f"{LAYER}self_attn.q_proj.weight": wide}), tmp_path / "out", format="trtllm")
    whole = Full(diff=to_ref(torch.ones(6, 4)))
    with pytest.raises(NotExpressible, match="no place for a whole-tensor delta, but for LoRA of linear layers; convert --kind lora first"):
        loratools.save(Adapter({f"{LAYER}self_attn.q_proj.weight": whole}), tmp_path / "out", format="trtllm")
    with pytest.raises(NotExpressible, match="no low-rank change to write"):
        loratools.save(Adapter({}), tmp_path / "out", format="trtllm")
    riding = Adapter({f"{LAYER}self_attn.q_proj.weight": q}, passengers={"token": to_ref(torch.ones(2))})
    with pytest.raises(NotExpressible, match="TensorRT-LLM has no place for it"):
        loratools.save(riding, tmp_path / "out", format="trtllm")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="a folder of two arrays"):
        loratools.save(Adapter({f"{LAYER}self_attn.q_proj.weight": q}), tmp_path / "out.npy", format="trtllm")


def test_it_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.lora_weights.npy").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.lora_weights.npy"):
        with pytest.raises(UnsupportedError, match=r"TensorRT-LLM's LoRA, which names no tensors.*; give the adapter it was made of"):
            loratools.load(path)
    assert not detect(Container({}))
    with pytest.raises(UnsupportedError, match="is not read"):
        decode(Container({}))
