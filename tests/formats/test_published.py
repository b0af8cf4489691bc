"""Files that people published, copied unchanged: read as what they are, or refused with their keys named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools import inspect, merge
from loratools.deltas.lowrank import LowRank
from loratools.errors import UnsupportedError
from loratools.formats import load
from tests.files import peft_config, raw, read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

DATA = Path(__file__).parent.parent / "data"
LAYERS = range(20, 24)


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


REFUSED = {
    "cloneofsimo/lora_disney_inpainting.safetensors": "<s1>, <s2>, text_encoder:0:down, … (386 in all)",
    "sam_lora/lora_rank2.safetensors": "w_a_000, w_a_001, w_a_002, … (48 in all)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_its_keys(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "base", {"w.weight": torch.ones(2, 2)})
    for work in (lambda: load(DATA / name), lambda: inspect(DATA / name), lambda: merge(tmp_path / "base", DATA / name, tmp_path / "out")):
        with pytest.raises(UnsupportedError) as caught:
            work()
        assert str(caught.value) == f"{DATA / name}: no format that loratools reads: found {REFUSED[name]}"
    assert not (tmp_path / "out").exists()


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
