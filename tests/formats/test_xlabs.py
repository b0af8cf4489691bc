"""XLabs' Flux files, against diffusers' own conversion of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from loratools import merge
from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.errors import NotExpressible
from loratools.formats import encode, load
from loratools.tensors import to_ref
from tests.files import raw, read_checkpoint, write_checkpoint
from tests.strategies import randn

DIM, MLP, RANK = 4, 6, 2
SHAPES = {
    "double_blocks.0.processor.qkv_lora1": (3 * DIM, DIM), "double_blocks.0.processor.qkv_lora2": (3 * DIM, DIM),
    "double_blocks.0.processor.proj_lora1": (DIM, DIM), "double_blocks.0.processor.proj_lora2": (DIM, DIM),
    "single_blocks.1.processor.qkv_lora": (3 * DIM, DIM), "single_blocks.1.processor.proj_lora": (DIM, DIM + MLP),
}  # fmt: skip
BASE = {
    "double_blocks.0.img_attn.qkv.weight": (3 * DIM, DIM), "double_blocks.0.txt_attn.qkv.weight": (3 * DIM, DIM),
    "double_blocks.0.img_attn.proj.weight": (DIM, DIM), "double_blocks.0.txt_attn.proj.weight": (DIM, DIM),
    "single_blocks.1.linear1.weight": (3 * DIM + MLP, DIM), "single_blocks.1.linear2.weight": (DIM, DIM + MLP),
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    found = {}
    for seed, (name, (out, into)) in enumerate(SHAPES.items()):
        found |= {f"{name}.down.weight": randn(RANK, into, seed=seed), f"{name}.up.weight": randn(out, RANK, seed=seed + 50)}
    return found


def test_merges_as_diffusers_converts(tmp_path: Path) -> None:
    """diffusers' query, key and value of a stream are the rows of its fused weight; of linear1 its first ones."""
    base = {name: torch.zeros(shape) for name, shape in BASE.items()}
    write_checkpoint(tmp_path / "base", base)
    save_file(tensors(), tmp_path / "lora.safetensors")
    assert merge(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "out")["applied"] == 6
    out = read_checkpoint(tmp_path / "out")
    theirs = _convert_xlabs_flux_lora_to_diffusers(tensors())

    def change(*names: str) -> Tensor:
        pairs = [[theirs[f"transformer.{name}.lora_{side}.weight"].double() for side in "BA"] for name in names]
        return torch.cat([B @ A for B, A in pairs]).float()

    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.1"
    expected = {
        "double_blocks.0.img_attn.qkv.weight": change(*(f"{double}.to_{name}" for name in "qkv")),
        "double_blocks.0.txt_attn.qkv.weight": change(*(f"{double}.add_{name}_proj" for name in "qkv")),
        "double_blocks.0.img_attn.proj.weight": change(f"{double}.to_out.0"),
        "double_blocks.0.txt_attn.proj.weight": change(f"{double}.to_add_out"),
        "single_blocks.1.linear2.weight": change(f"{single}.proj_out"),
    }
    assert {name for name in expected if not torch.equal(out[name], expected[name])} == set()
    linear1 = out["single_blocks.1.linear1.weight"]
    assert torch.equal(linear1[: 3 * DIM], change(*(f"{single}.attn.to_{name}" for name in "qkv")))
    assert not linear1[3 * DIM :].any()


def test_round_trip_keeps_bytes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "lora.safetensors")
    again = encode(load(tmp_path / "lora.safetensors"), "xlabs")
    assert {key: bytes(ref.read()) for key, ref in again.tensors.items()} == {key: raw(tensor) for key, tensor in tensors().items()}


def low(rows: int, into: int, **more: object) -> LowRank:
    B = randn(rows, 2, seed=1)
    B[int(str(more.pop("zero", rows))) :] = 0
    return LowRank(A=to_ref(randn(2, into, seed=0)), B=to_ref(B), alpha=2.0, layer=str(more.get("layer", "linear")))


def test_the_first_rows_of_linear1(tmp_path: Path) -> None:
    """A change of all of its rows that leaves those of its MLP as they are is one of queries, keys and values."""
    name = "single_blocks.1.linear1.weight"
    whole = low(3 * DIM + MLP, DIM, zero=3 * DIM)
    written = encode(Adapter({name: whole}), "xlabs").tensors["single_blocks.1.processor.qkv_lora.up.weight"]
    assert written.spec.shape == (3 * DIM, 2) and bytes(written.read()) == bytes(whole.B.rows(0, 3 * DIM))
    for other, said in (
        (low(3 * DIM + MLP, DIM), r"linear1\.weight: of linear1 these files change .*found 18 rows, expected 12; --format comfyui has all"),
        (low(2 * DIM, DIM), r"linear1\.weight: of linear1 .*found 8 rows, expected 12"),
        (low(3 * DIM, DIM, layer="embedding"), r"these files have no LoRA of a weight that lies as embedding ones do; --format loratools"),
    ):
        with pytest.raises(NotExpressible, match=said):
            encode(Adapter({name: other}), "xlabs")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = "down_blocks.0.fc.lora"
    save_file({f"{path}.down.weight": torch.ones(2, 4), f"{path}.up.weight": torch.ones(4, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(NotExpressible, match="these files change the attention of Flux' blocks alone"):
        encode(load(tmp_path / "x.safetensors"), "xlabs")
