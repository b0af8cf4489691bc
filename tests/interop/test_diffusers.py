"""diffusers, live: a UNet with the file we write loaded into it gives the outputs of the merged one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loratools import convert, merge
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.formats import load, save
from loratools.tensors import to_ref
from tests.files import write_pipeline
from tests.strategies import randn

diffusers = pytest.importorskip("diffusers")
SETTINGS = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
    "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**SETTINGS).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    x, text = randn(2, 4, 8, 8, seed=1), randn(2, 3, 8, seed=2)
    with torch.no_grad():
        return model(x, 7, encoder_hidden_states=text).sample


def adapted(model: nn.Module, file: Path, prefix: str | None) -> None:
    model.load_lora_adapter(str(file.parent), weight_name=file.name, prefix=prefix, use_safetensors=True, local_files_only=True)


def adapter_of(model: nn.Module, dora: bool) -> Adapter:
    """Changes of attentions and convolutions, of ranks and alphas of their own."""
    deltas: dict[str, Delta] = {}
    for index, (name, weight) in enumerate(model.named_parameters()):
        if not name.endswith(("to_q.weight", "to_out.0.weight", "conv1.weight", "proj_in.weight")):
            continue
        out, width, *kernel = weight.shape
        rank = 1 + index % 3
        A, B = (to_ref(0.3 * randn(*shape, seed=index + i)) for i, shape in enumerate(((rank, width, *kernel), (out, rank))))
        low = LowRank(A=A, B=B, alpha=1.0 + index % 5, layer="conv" if kernel else "linear")
        norms = weight.detach().flatten(1).norm(dim=1).reshape(out, *(1,) * (weight.ndim - 1))
        deltas[f"unet.{name}"] = DoRA(direction=low, magnitude=to_ref(norms * (1 + 0.1 * index % 1))) if dora else low
    assert len(deltas) > 8
    return Adapter(deltas)


# float32 through some twenty layers, of which each sums in an order of its own
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("dora", [False, True])
def test_loaded_by_diffusers_and_merged_by_us(tmp_path: Path, dora: bool, format: str) -> None:
    plain = unet()
    adapter = adapter_of(plain, dora)
    base = write_pipeline(tmp_path / "base", {"unet": (plain.state_dict(), {"_class_name": "UNet2DConditionModel"})})
    save(adapter, tmp_path / "a.safetensors", format=format)
    if format == "kohya":  # by way of flat names, which the base gives their dots back
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="diffusers", base=base)
    written = tmp_path / ("b.safetensors" if format == "kohya" else "a.safetensors")
    assert set(load(written)) == set(adapter)
    theirs = unet()
    before = outputs(theirs)
    adapted(theirs, written, "unet")
    expected = outputs(theirs)
    merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    merged = unet()
    merged.load_state_dict(load_file(next((tmp_path / "out" / "unet").glob("*.safetensors"))))
    torch.testing.assert_close(outputs(merged), expected, **TOLERANCE)
    assert (expected - before).abs().max() > 0.01


def test_a_model_alone_has_no_prefix(tmp_path: Path) -> None:
    adapter = adapter_of(unet(), False)
    save(Adapter({name.removeprefix("unet."): delta for name, delta in adapter.items()}), tmp_path / "a.safetensors", format="diffusers")
    save(adapter, tmp_path / "b.safetensors", format="diffusers")
    found = []
    for name, prefix in (("a", None), ("b", "unet")):
        model = unet()
        adapted(model, tmp_path / f"{name}.safetensors", prefix)
        found.append(outputs(model))
    assert torch.equal(*found) and not torch.allclose(found[0], outputs(unet()), atol=1e-2)
