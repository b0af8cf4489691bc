"""LoRAs whose factors lie otherwise: peft's QALoRA, live, and the merged layers of peft 0.1 and 0.2, by their forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import linear

from loratools import merge, resize
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError
from loratools.formats import load, save
from tests.files import peft_config, read_adapter, read_checkpoint, write_adapter, write_checkpoint
from tests.interop.zoo import randomize
from tests.strategies import randn

GROUP = 6


def pooled(folder: Path, **config: Any) -> nn.Module:
    """A linear layer (24 → 40) under QALoRA, which peft makes of GPTQ layers: its own variant class on a plain one."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"q": nn.Linear(24, 40)})
    write_checkpoint(folder / "base", net.state_dict())
    settings = LoraConfig(target_modules=["q"], use_qalora=True, qalora_group_size=GROUP, **({"r": 4, "lora_alpha": 6} | config))
    model = get_peft_model(net, settings)
    layer = model.base_model.model["q"]
    QALoraLinearVariant.init(layer, "default", settings)
    layer.lora_variant["default"] = QALoraLinearVariant()
    randomize(model)
    model.eval().save_pretrained(folder / "adapter")
    return layer


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q": 5}, "rank_pattern": {"q": 3}}])
def test_qalora_merges_to_the_forward_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    layer = pooled(tmp_path, **config)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    out, x = read_checkpoint(tmp_path / "out"), randn(5, 24, seed=9).double()
    with torch.no_grad():
        expected = layer.double()(x)
    found = linear(x, out["q.weight"].double(), out["q.bias"].double())
    assert float((found - expected).norm() / expected.norm()) <= 1e-6
    assert not torch.allclose(found, linear(x, layer.base_layer.weight, layer.base_layer.bias), atol=1e-2)


def test_qalora_is_a_lora_of_the_same_rank(tmp_path: Path) -> None:
    """Converted by writing it again, and resized: the same product, every column of A standing for a group's."""
    pooled(tmp_path)
    save(load(tmp_path / "adapter"), tmp_path / "again")
    tensors, config = read_adapter(tmp_path / "again")
    assert tensors["base_model.model.q.lora_A.weight"].shape == (4, 24) and "use_qalora" not in config
    receipt = resize(tmp_path / "adapter", tmp_path / "less", max_error=1e-6)
    assert receipt["tensors"][0]["rank"] == 4
    for other in ("again", "less"):
        merge(tmp_path / "base", tmp_path / other, tmp_path / f"out-{other}")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    expected = read_checkpoint(tmp_path / "out")["q.weight"]
    assert torch.equal(read_checkpoint(tmp_path / "out-again")["q.weight"], expected)
    assert torch.allclose(read_checkpoint(tmp_path / "out-less")["q.weight"], expected, atol=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_qalora": False}, r"does not fit the base's weight: found \[40, 4\], expected \[40, 24\]"),
        ({"qalora_group_size": 4}, r"found \[40, 16\], expected \[40, 24\]"),
        ({"qalora_group_size": None}, "qalora_group_size: found None"),
        ({"qalora_group_size": 0}, "qalora_group_size: found 0"),
        ({"r": 2}, "the rank is not the config's"),
        ({"lora_bias": True}, "peft's forward leaves the bias out"),
        ({"use_dora": True}, "two variants of LoRA"),
    ],
)
def test_settings_of_qalora(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    pooled(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "other", tensors, config | change)
    with pytest.raises(LoratoolsError, match=words):
        merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")


def test_qalora_on_a_layer_that_peft_does_not_pool(tmp_path: Path) -> None:
    """The setting on a layer that is not GPTQ's is without effect in peft: its factors do not fit, and are not taken for pooled."""
    write_checkpoint(tmp_path / "base", {"q.weight": randn(40, 24, seed=1)})
    tensors = {"base_model.model.q.lora_A.weight": randn(2, 24, seed=2), "base_model.model.q.lora_B.weight": randn(40, 2, seed=3)}
    write_adapter(tmp_path / "adapter", tensors, peft_config(target_modules=["q"], use_qalora=True, qalora_group_size=2))
    with pytest.raises(LoratoolsError, match=r"found \[40, 48\], expected \[40, 24\]"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


# -- peft 0.1 and 0.2


class Merged(nn.Module):
    """The forward of a merged layer: lora_B is a convolution of two groups whatever the slots, its outputs go to those that are on."""

    def __init__(self, into: int, out: int, rank: int, alpha: float, enabled: tuple[bool, ...]) -> None:
        super().__init__()
        count = sum(enabled)
        self.base, self.enabled, self.scaling = nn.Linear(into, out), enabled, alpha / rank
        self.lora_A = nn.Linear(into, rank * count, bias=False)
        self.lora_B = nn.Conv1d(rank * count, out // len(enabled) * count, 1, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found = self.lora_B(self.lora_A(x).T[None])[0].T
        result: Tensor = self.base(x)
        slots = iter(found.chunk(sum(self.enabled), dim=1))
        change = [next(slots) if flag else x.new_zeros(len(x), result.shape[1] // len(self.enabled)) for flag in self.enabled]
        return result + self.scaling * torch.cat(change, dim=1)


def old_config(enabled: tuple[bool, ...], **more: Any) -> dict[str, Any]:
    """An adapter_config.json as peft 0.2 wrote it."""
    return {
        "base_model_name_or_path": "bigscience/bloom", "bias": "none", "enable_lora": list(enabled), "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": 3, "lora_dropout": 0.1, "merge_weights": False, "modules_to_save": None,
        "peft_type": "LORA", "r": 4, "target_modules": ["qkv"], "task_type": "CAUSAL_LM",
    } | more  # fmt: skip


def old(folder: Path, enabled: tuple[bool, ...], *, transposed: bool = False, **config: Any) -> Merged:
    torch.manual_seed(0)
    layer = Merged(10, 36, 4, 3.0, enabled)
    randomize(layer)
    with torch.no_grad():
        layer.base.weight.normal_()
    W = layer.base.weight.T if transposed else layer.base.weight
    write_checkpoint(folder / "base", {"qkv.weight": W, "qkv.bias": layer.base.bias})
    tensors = {f"base_model.model.qkv.{name}.weight": getattr(layer, name).weight for name in ("lora_A", "lora_B")}
    write_adapter(folder / "adapter", tensors, old_config(enabled, fan_in_fan_out=transposed, **config))
    return layer


ENABLED = [(True, False, True), (True, True, True), (False, True, False), (True, True), (True,), (False, True, True, False)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_merged_layers_of_old_versions(tmp_path: Path, enabled: tuple[bool, ...], transposed: bool) -> None:
    layer = old(tmp_path, enabled, transposed=transposed)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    out, x = read_checkpoint(tmp_path / "out"), randn(5, 10, seed=9).double()
    with torch.no_grad():
        expected = layer.double()(x)
    W = out["qkv.weight"].double().T if transposed else out["qkv.weight"].double()
    found = linear(x, W, out["qkv.bias"].double())
    assert float((found - expected).norm() / expected.norm()) <= 1e-6
    size = 36 // len(enabled)
    for slot, flag in enumerate(enabled):
        part = slice(slot * size, (slot + 1) * size)
        assert torch.equal(W[part], layer.base.weight[part]) != flag


def test_two_slots_are_as_loralib_has_them(tmp_path: Path) -> None:
    """Of two slots each has rows of A of its own: the common case, where the layer's groups are the slots."""
    layer = old(tmp_path, (True, False, True))
    adapter = load(tmp_path / "adapter")
    delta = adapter["qkv.weight"]
    assert isinstance(delta, LowRank) and (delta.rank, delta.scaling) == (8, 0.75)
    B, A = delta.product()
    low_A, low_B = layer.lora_A.weight.double(), layer.lora_B.weight.double()[..., 0]
    expected = torch.cat([low_B[:12] @ low_A[:4], torch.zeros(12, 10), low_B[12:] @ low_A[4:]]) * 0.75
    assert torch.allclose(B @ A, expected.detach(), atol=1e-12)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"enable_lora": [True, True, False]}, None),
        ({"enable_lora": [True, False, True, True]}, "not the factors of a merged layer"),
        ({"enable_lora": [True, True]}, r"does not fit the base's weight: found \[24, 10\], expected \[36, 10\]"),
        ({"enable_lora": [False, False]}, "enable_lora: found"),
        ({"enable_lora": "1,0,1"}, "enable_lora: found"),
        ({"enable_lora": None}, "not a LoRA pair"),
        ({"r": 8}, "the rank is not the config's: found 4, expected 8"),
        ({"use_rslora": True}, "peft 0.1 and 0.2, which have no such setting: found use_rslora True"),
        ({"rank_pattern": {"qkv": 4}}, "found rank_pattern"),
        ({"merge_weights": "yes"}, "merge_weights: found 'yes'"),
        ({"merge_weights": True}, None),
        ({"lora_alpha": 5}, None),
        ({"fan_in_fan_out": True}, None),
    ],
    ids=str,
)
def test_settings_of_old_versions(tmp_path: Path, change: dict[str, Any], words: str | None) -> None:
    """Another value is another adapter, as the layer's forward says, or an error; where the weights were merged matters to no file."""
    old(tmp_path, (True, False, True))
    tensors, config = read_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "other", tensors, config | change)
    if words is not None:
        with pytest.raises(LoratoolsError, match=words):
            merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")
        return
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "before")
    merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")
    same = torch.equal(read_checkpoint(tmp_path / "before")["qkv.weight"], read_checkpoint(tmp_path / "out")["qkv.weight"])
    assert same == (next(iter(change)) in ("merge_weights", "fan_in_fan_out"))  # shapes tell how a weight lies


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_tensors_of_old_versions(tmp_path: Path, factor: str) -> None:
    old(tmp_path, (True, False, True))
    tensors, config = read_adapter(tmp_path / "adapter")
    key = f"base_model.model.qkv.{factor}.weight"
    value = tensors[key]
    for changed in (None, value[1:], value[..., :1, 0] if value.ndim == 3 else value[None], torch.cat([value, value[:1]])):
        more = {name: tensor for name, tensor in tensors.items() if name != key} | ({} if changed is None else {key: changed})
        write_adapter(tmp_path / "other", more, config)
        with pytest.raises(LoratoolsError, match="lora_A"):
            merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")
