"""Files that people published, copied unchanged: read as what they are, or refused with their keys named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools import convert, inspect, merge
from loratools.deltas.lowrank import LowRank
from loratools.errors import UnsupportedError
from loratools.formats import load
from tests.files import peft_config, raw, read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

DATA = Path(__file__).parent.parent / "data"
LAYERS = range(20, 24)
HALF = {"rtol": 2**-11, "atol": 2**-24}  # half a unit of float16, and its least number


def test_mlx_reads_its_own_scale_and_not_the_alpha_beside_it() -> None:
    """Its config says scale 10 and alpha 16 at rank 8; mlx multiplies by the scale."""
    adapter = load(DATA / "mlx")
    assert set(adapter) == {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in LAYERS for name in "qv"}
    assert {(delta.rank, delta.scaling, delta.shape()) for delta in adapter.values() if isinstance(delta, LowRank)} == {
        (8, 10.0, (896, 896)), (8, 10.0, (128, 896)),
    }  # fmt: skip
    assert adapter.parameters == 4 * 8 * (896 + 896 + 896 + 128)


def test_mlx_merges_by_its_own_formula(tmp_path: Path) -> None:
    tensors = load_file(DATA / "mlx/adapters.safetensors")
    shapes = {"q": (896, 896), "v": (128, 896)}
    base = {f"model.layers.{i}.self_attn.{name}_proj.weight": randn(*shapes[name], seed=i) for i in LAYERS for name in "qv"}
    write_checkpoint(tmp_path / "base", base)
    merge(tmp_path / "base", DATA / "mlx", tmp_path / "out")
    out = read_checkpoint(tmp_path / "out")
    for name, W in base.items():
        a, b = (tensors[name.removesuffix("weight") + f"lora_{side}"].double() for side in "ab")
        assert torch.equal(out[name], (W.double() + 10.0 * (a @ b).T).float()), name


def test_a_stable_diffusion_of_counted_modules_has_their_names(tmp_path: Path) -> None:
    """All 144 modules of the UNet and 48 of the text encoder fit Stable Diffusion 1 in the order of diffusers at that time."""
    adapter = load(DATA / "cloneofsimo/lora_disney_inpainting.safetensors")
    assert len(adapter) == 192 and list(adapter.passengers) == ["<s1>", "<s2>"]
    assert {(delta.rank, delta.scaling) for delta in adapter.values() if isinstance(delta, LowRank)} == {(1, 1.0)}
    assert list(adapter)[48 + 4] == "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    assert list(adapter)[-1] == "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"
    told = inspect(DATA / "cloneofsimo/lora_disney_inpainting.safetensors")
    assert (told["format"], told["modules_total"]) == ("cloneofsimo", 192)
    assert "2 tensors change no weight: <s1>, <s2>" in told["warnings"]
    tensors = load_file(DATA / "cloneofsimo/lora_disney_inpainting.safetensors")
    convert(DATA / "cloneofsimo/lora_disney_inpainting.safetensors", tmp_path / "kohya.safetensors", format="kohya")
    written = load_file(tmp_path / "kohya.safetensors")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
    assert raw(written[f"{name}.lora_up.weight"]) == raw(tensors["unet:4:up"]) and raw(written["<s1>"]) == raw(tensors["<s1>"])


def test_counted_modules_merge_onto_a_text_encoder(tmp_path: Path) -> None:
    """The UNet's 144 are left out by name, as this base is the text encoder alone; k, v, q, out is CLIPAttention's own order."""
    tensors = load_file(DATA / "cloneofsimo/lora_disney_inpainting.safetensors")
    words = ("k_proj", "v_proj", "q_proj", "out_proj")
    names = [f"text_model.encoder.layers.{layer}.self_attn.{word}.weight" for layer in range(12) for word in words]
    W = torch.zeros(768, 768, dtype=torch.float16)
    write_checkpoint(tmp_path / "base", dict.fromkeys(names, W))
    receipt = merge(tmp_path / "base", DATA / "cloneofsimo/lora_disney_inpainting.safetensors", tmp_path / "out", allow_unmatched=True)
    assert (receipt["applied"], receipt["expected"]) == (48, 192)
    assert [row["name"] for row in receipt["left_out"]][-2:] == ["<s1>", "<s2>"]
    out = read_checkpoint(tmp_path / "out")
    for index in (0, 1, 17, 47):
        up, down = (tensors[f"text_encoder:{index}:{side}"].double() for side in ("up", "down"))
        assert torch.allclose(out[names[index]].double(), up @ down, **HALF), index


def test_counted_blocks_merge_onto_an_image_encoder(tmp_path: Path) -> None:
    tensors = load_file(DATA / "sam_lora/lora_rank2.safetensors")
    W = torch.zeros(2304, 768, dtype=torch.float16)
    names = [f"image_encoder.blocks.{block}.attn.qkv.weight" for block in range(12)]
    write_checkpoint(tmp_path / "base", dict.fromkeys(names, W))
    assert merge(tmp_path / "base", DATA / "sam_lora/lora_rank2.safetensors", tmp_path / "out")["applied"] == 12
    out = read_checkpoint(tmp_path / "out")
    for block in (0, 5, 11):
        expected = W.double()
        for index, rows in ((2 * block, slice(0, 768)), (2 * block + 1, slice(1536, 2304))):
            expected[rows] += tensors[f"w_b_{index:03}"].double() @ tensors[f"w_a_{index:03}"].double()
        assert torch.allclose(out[names[block]].double(), expected, **HALF), block
    assert inspect(DATA / "sam_lora/lora_rank2.safetensors")["modules_total"] == 12
    convert(DATA / "sam_lora/lora_rank2.safetensors", tmp_path / "peft", format="peft", base=tmp_path / "base")
    assert load(tmp_path / "peft").keys() == set(names)


def test_a_network_with_counters_is_a_checkpoint(tmp_path: Path) -> None:
    path = DATA / "burn_mnist/mnist.safetensors"
    told = inspect(path, values=True)
    assert {name: told[name] for name in ("format", "tensors", "parameters", "bytes", "dtypes", "warnings")} == {
        "format": "checkpoint", "tensors": 20, "parameters": 376_940, "bytes": 1_509_296, "dtypes": {"F32": 18, "I64": 2}, "warnings": [],
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="no format that loratools reads"):
        load(path)


def test_an_adapter_on_it_leaves_the_counters_as_they_are(tmp_path: Path) -> None:
    """LoRA on a convolution and a linear layer; the other eighteen tensors, whole numbers among them, keep their bytes."""
    shapes = {"conv2.lora_A": (2, 8, 3, 3), "conv2.lora_B": (16, 2, 1, 1), "fc2.lora_A": (2, 32), "fc2.lora_B": (10, 2)}
    tensors = {f"base_model.model.{name}.weight": randn(*shape, seed=len(name) + shape[0]) for name, shape in shapes.items()}
    write_adapter(tmp_path / "adapter", tensors, peft_config(target_modules=["conv2", "fc2"]))
    receipt = merge(DATA / "burn_mnist/mnist.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    before, after = load_file(DATA / "burn_mnist/mnist.safetensors"), load_file(tmp_path / "out.safetensors")
    assert receipt["applied"] == 2 and list(before) == list(after)
    assert {name for name in before if raw(before[name]) != raw(after[name])} == {"conv2.weight", "fc2.weight"}
    A, B = (tensors[f"base_model.model.conv2.lora_{side}.weight"].double() for side in "AB")
    expected = before["conv2.weight"].double() + 2 * (B.flatten(1) @ A.flatten(1)).reshape(16, 8, 3, 3)
    assert torch.equal(after["conv2.weight"], expected.float())
