"""LoRA on torch's nn.MultiheadAttention, live: peft's forward adds out_proj's change twice, and so does the merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loratools import merge, rescale
from loratools.errors import LoratoolsError, NotExpressible
from loratools.formats import load, save
from tests.files import raw, read_adapter, read_checkpoint, write_adapter, write_checkpoint
from tests.interop.zoo import randomize

WIDTH = 12


class Net(nn.Module):
    """Two attentions, one behind the other, and a layer between that has an out_proj of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, 3, batch_first=True) for _ in range(2))
        self.between = nn.ModuleDict({"out_proj": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.between["out_proj"](block(x, x, x, need_weights=False)[0])
        return x


def adapted(folder: Path, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    net = Net()
    write_checkpoint(folder / "base", net.state_dict())
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["0", "1"]} | config
    model = get_peft_model(net, LoraConfig(**settings))
    randomize(model)
    model.eval().save_pretrained(folder / "adapter")
    return model


@torch.no_grad()
def forward(model: nn.Module) -> Tensor:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found: Tensor = model.double().eval()(x)
    return found


def merged(folder: Path, adapter: Path | None = None) -> Tensor:
    merge(folder / "base", adapter or folder / "adapter", folder / "out", overwrite=True)
    net = Net()
    net.load_state_dict(read_checkpoint(folder / "out"))
    return forward(net)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"blocks.0": 3}, "alpha_pattern": {"1": 5}},
    "with a layer": {"target_modules": ["0", "1", "between.out_proj"]},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "regular expression": {"target_modules": r"blocks\.\d"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merges_to_the_forward_of_peft(tmp_path: Path, name: str) -> None:
    model = adapted(tmp_path, **CONFIGS[name])
    if name == "all biases":  # peft trains in_proj_bias and does not save it: its own reload lacks it too
        net = Net()
        net.load_state_dict(read_checkpoint(tmp_path / "base"))
        model = PeftModel.from_pretrained(net, tmp_path / "adapter")
    assert apart(merged(tmp_path), forward(model)) <= 1e-6  # weights rounded once to float32
    assert [note for note in load(tmp_path / "adapter").notes if "counts twice" in note]
    net = Net()
    net.load_state_dict(read_checkpoint(tmp_path / "base"))
    assert apart(forward(net), forward(model)) > 1e-2


def test_out_proj_counts_twice_in_the_forward_of_peft(tmp_path: Path) -> None:
    """By hand: once more or less is far from what the model computes."""
    model = adapted(tmp_path)
    tensors, _ = read_adapter(tmp_path / "adapter")
    for times, close in ((1, False), (2, True), (3, False)):
        net = Net()
        state = read_checkpoint(tmp_path / "base")
        for index in (0, 1):
            root = f"base_model.model.blocks.{index}"
            for key, name, count in ((root, "in_proj_weight", 1), (f"{root}.base_layer.out_proj", "out_proj.weight", times)):
                state[f"blocks.{index}.{name}"] += count * 1.5 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        net.load_state_dict(state)
        assert (apart(forward(net), forward(model)) < 1e-6) == close


def test_what_is_written_peft_reads_alike(tmp_path: Path) -> None:
    model = adapted(tmp_path, rank_pattern={"blocks.0": 3}, bias="lora_only")
    save(load(tmp_path / "adapter"), tmp_path / "again")
    (theirs, _), (ours, config) = read_adapter(tmp_path / "adapter"), read_adapter(tmp_path / "again")
    assert {key: raw(tensor) for key, tensor in ours.items()} == {key: raw(tensor) for key, tensor in theirs.items()}
    assert config["target_modules"] == ["blocks.0", "blocks.1"] and config["bias"] == "lora_only"
    net = Net()
    net.load_state_dict(read_checkpoint(tmp_path / "base"))
    assert apart(forward(PeftModel.from_pretrained(net, tmp_path / "again")), forward(model)) == 0


def test_half_its_strength(tmp_path: Path) -> None:
    adapted(tmp_path)
    rescale(tmp_path / "adapter", tmp_path / "half", by=0.5)
    net = Net()
    net.load_state_dict(read_checkpoint(tmp_path / "base"))
    half = forward(PeftModel.from_pretrained(net, tmp_path / "half"))
    assert apart(merged(tmp_path, tmp_path / "half"), half) <= 1e-6


def test_a_pair_that_peft_cannot_say(tmp_path: Path) -> None:
    adapted(tmp_path)
    adapter = load(tmp_path / "adapter")
    with pytest.raises(NotExpressible, match=r"blocks\.0\.in_proj_weight: .*alike: found rank 2 and 2, scaling 1.5 and 3"):
        save(adapter.map(lambda name, delta: delta if "in_proj" in name else _doubled(delta)), tmp_path / "other")
    with pytest.raises(NotExpressible, match="found in_proj alone"):
        save(_without(adapter, "blocks.1.out_proj.weight"), tmp_path / "other")


def _doubled(delta: Any) -> Any:
    from dataclasses import replace

    return replace(delta, alpha=delta.alpha * 2)


def _without(adapter: Any, name: str) -> Any:
    from dataclasses import replace

    return replace(adapter, deltas={key: delta for key, delta in adapter.items() if key != name})


CHANGES: dict[str, Callable[[dict[str, Tensor], str], dict[str, Tensor]]] = {
    "deleted": lambda tensors, key: {name: tensor for name, tensor in tensors.items() if name != key},
    "moved": lambda tensors, key: {name.replace("blocks", "heads") if name == key else name: tensor for name, tensor in tensors.items()},
    "a stray": lambda tensors, key: tensors | {key.replace(".weight", ".bias"): torch.zeros(tensors[key].shape[0])},
    "one row more": lambda tensors, key: tensors | {key: torch.cat([tensors[key], tensors[key][:1]])},
    "a column more": lambda tensors, key: tensors | {key: torch.cat([tensors[key], tensors[key][:, :1]], dim=1)},
    "nan": lambda tensors, key: tensors | {key: torch.full_like(tensors[key], float("nan"))},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_tensor_is_an_error(tmp_path: Path, change: str) -> None:
    adapted(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    for key in tensors:
        write_adapter(tmp_path / "other", CHANGES[change](tensors, key), config)
        with pytest.raises(LoratoolsError):
            merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")


def test_a_whole_attention_or_half_of_one_missing(tmp_path: Path) -> None:
    adapted(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    for lacking, words in (
        ("blocks.1.", r"blocks\.1\.in_proj_weight: the adapter's config covers this weight"),
        ("blocks.1.lora", "has no lora_A of its attention's in_proj beside it"),
        ("blocks.1.base_layer", r"blocks\.1\.weight: the base has no such weight"),
    ):
        write_adapter(tmp_path / "other", {key: tensor for key, tensor in tensors.items() if lacking not in key}, config)
        with pytest.raises(LoratoolsError, match=words):
            merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"lora_bias": True}, r"no lora_B\.bias"),
        ({"target_modules": ["0"]}, "does not target"),
        ({"r": 3}, "the rank is not the config's"),
        ({"init_lora_weights": "pissa"}, "peft has no pissa for this kind of layer"),
    ],
)
def test_settings_that_it_does_not_take(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    adapted(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "other", tensors, config | change)
    with pytest.raises(LoratoolsError, match=words):
        merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")


def test_a_bias_that_its_forward_drops(tmp_path: Path) -> None:
    adapted(tmp_path, lora_bias=True)
    with pytest.raises(LoratoolsError, match=r"lora_B\.bias on nn\.MultiheadAttention, whose forward peft gives plain LoRA alone"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
