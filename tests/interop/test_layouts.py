"""Adapters named as in memory on bases named as in older files, and the other way round: transformers then loads peft's own merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from loratools import inspect, merge, unmerge, verify
from loratools.errors import LoratoolsError
from tests.files import read_adapter, read_checkpoint, write_adapter
from tests.interop.moe import worst_expert
from tests.interop.tiny import MODELS, RENAMED, loaded, new, old_names, save

CLOSE = 1e-6  # of each weight: float32, one rounding on each side


def wrap(kind: str, folder: Path, model: nn.Module | None = None, **config: Any) -> PeftModel:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": MODELS[kind][1], "init_lora_weights": False} | config
    model = get_peft_model(model or new(kind), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def renamed(folder: Path, names: dict[str, str]) -> None:
    """The adapter as an older transformers had it written: its modules and targets under the names of older files."""
    tensors, config = read_adapter(folder)
    old: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        module = re.split(r"\.(?=lora_|base_layer)", key.removeprefix("base_model.model."))[0]
        old[key.replace(module, names[f"{module}.weight"].removesuffix(".weight"))] = tensor
    modules = sorted({key.removeprefix("base_model.model.").partition(".lora_")[0] for key in old if ".lora_" in key})
    write_adapter(folder, old, config | {"target_modules": modules})


@pytest.mark.parametrize("kind", RENAMED)
@pytest.mark.parametrize("adapter", ["memory", "file"])
@pytest.mark.parametrize("base", ["memory", "file"])
def test_names_in_memory_and_in_files(tmp_path: Path, kind: str, adapter: str, base: str) -> None:
    model = new(kind)
    names = old_names(model)
    save(model, tmp_path / "base", names if base == "file" else None)
    wrapped = wrap(kind, tmp_path / "adapter")
    if adapter == "file":
        renamed(tmp_path / "adapter", names)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    count = sum("lora_A" in key for key in read_adapter(tmp_path / "adapter")[0])
    assert receipt["expected"] == receipt["applied"] == count == len(receipt["tensors"])
    assert read_checkpoint(tmp_path / "out").keys() == read_checkpoint(tmp_path / "base").keys()
    found, expected = loaded(tmp_path / "out").state_dict(), wrapped.merge_and_unload().state_dict()
    assert worst_expert(found, expected) <= CLOSE
    if adapter == base or kind == "clip_text":  # both names of a CLIP are in the table of its network
        assert receipt["notes"] == []
    else:
        assert len(receipt["notes"]) == 1 and receipt["notes"][0].startswith("names aligned"), receipt["notes"]


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "vit"])
def test_they_are_told_replayed_and_undone(tmp_path: Path, kind: str) -> None:
    save(new(kind), tmp_path / "base", old_names(new(kind)))
    wrap(kind, tmp_path / "adapter")
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", reversible=True)
    said = f"in the base's file (transformers 5.23, {kind})"
    assert said in receipt["notes"][0] and said in " ".join(inspect(tmp_path / "adapter", base=tmp_path / "base")["warnings"])
    report = verify(tmp_path / "out", base=tmp_path / "base", adapters=tmp_path / "adapter")
    assert report["ok"] and report["max_ulp"] == 0
    unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["llava", "vit", "qwen2_vl"])
def test_without_a_config_the_layout_is_the_one_that_fits(tmp_path: Path, kind: str) -> None:
    model = new(kind)
    save(model, tmp_path / "base", old_names(model))
    wrapped = wrap(kind, tmp_path / "adapter")
    config = (tmp_path / "base" / "config.json").read_bytes()
    (tmp_path / "base" / "config.json").unlink()
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "(transformers 5.23, told by the names alone)" in receipt["notes"][-1]
    (tmp_path / "out" / "config.json").write_bytes(config)
    assert worst_expert(loaded(tmp_path / "out").state_dict(), wrapped.merge_and_unload().state_dict()) <= CLOSE


@pytest.mark.parametrize("change", ["missing", "renamed", "of another model"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_layout_makes_no_stray_fit(tmp_path: Path, change: str, with_config: bool) -> None:
    model = new("llava")
    save(model, tmp_path / "base", old_names(model))
    if not with_config:
        (tmp_path / "base" / "config.json").unlink()
    wrap("llava", tmp_path / "adapter")
    tensors, config = read_adapter(tmp_path / "adapter")
    module = next(key.partition(".lora_")[0] for key in tensors if "layers.1" in key)
    pair = [key for key in tensors if key.startswith(module + ".lora_")]
    rest = {key: tensor for key, tensor in tensors.items() if key not in pair}
    edited = {
        "missing": rest,
        "renamed": rest | {key.replace("layers.1", "layers.9"): tensors[key] for key in pair},
        "of another model": {key.replace("layers", "blocks"): tensor for key, tensor in tensors.items()},
    }[change]
    write_adapter(tmp_path / "adapter", edited, config)
    with pytest.raises(LoratoolsError) as caught:
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert ("the adapter's config covers this weight" if change == "missing" else "the base has no such weight") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_strays_can_be_left_out(tmp_path: Path) -> None:
    model = new("llava")
    save(model, tmp_path / "base", old_names(model))
    wrap("llava", tmp_path / "adapter")
    tensors, config = read_adapter(tmp_path / "adapter")
    edited = {key.replace("layers.1", "layers.9"): tensor for key, tensor in tensors.items()}
    write_adapter(tmp_path / "adapter", edited, config)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_unmatched=True)
    assert receipt["applied"] == len({key.partition(".lora_")[0] for key in edited if "layers.9" not in key})
    assert receipt["expected"] == len(edited) // 2
    assert any("not applied, the base has no model.language_model.layers.9" in note for note in receipt["notes"])


def test_the_users_rename_goes_before_the_table(tmp_path: Path) -> None:
    """What it makes of a name is the base's own; the rest of the adapter is aligned as ever."""
    model = new("llava")
    save(model, tmp_path / "base", old_names(model))
    wrap("llava", tmp_path / "adapter")
    one = "model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.1.self_attn.q_proj"
    tensors, config = read_adapter(tmp_path / "adapter")
    edited = {key: tensor for key, tensor in tensors.items() if "language_model.layers.1.self_attn" not in key}
    targets = r".*(layers\.0\.self_attn.q_proj|vision.*q_proj|up_proj|fc1|linear_1)"
    write_adapter(tmp_path / "adapter", edited, config | {"target_modules": targets})
    with pytest.raises(LoratoolsError, match="the adapter's config covers this weight"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=["=".join(one)])
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=["=".join(one)], allow_unmatched=True)
    changed = {row["name"] for row in receipt["tensors"]}
    assert f"{one[1]}.weight" in changed and "language_model.model.layers.0.self_attn.q_proj.weight" not in changed
    assert receipt["expected"] == receipt["applied"] == len(edited) // 2


def test_what_transformers_cuts_out_of_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    """nomic_bert's files hold queries, keys and values as one; in memory they are three."""
    model = new("nomic_bert")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    assert any("Wqkv" in name for name in read_checkpoint(tmp_path / "base"))
    wrap("nomic_bert", tmp_path / "adapter")
    message = r"layers\.1\.self_attn\.q_proj\.weight: transformers converts this tensor .* found \S*attn\.Wqkv\.weight, by Chunk; merge"
    with pytest.raises(LoratoolsError, match=message):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_unmatched=True)
    assert 0 < receipt["applied"] < receipt["expected"] and "Wqkv" not in str(receipt["tensors"])


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_that_files_hold_both_ways_round(tmp_path: Path, square: bool, turned: bool) -> None:
    """qwen3_vl_moe's own files are (experts, in, out), and transformers turns them by their sizes alone: squares stay as they are."""
    model = new("qwen3_vl_moe", width=16 if square else 12)
    save(model, tmp_path / "base")
    tensors = read_checkpoint(tmp_path / "base")
    for name, tensor in tensors.items():
        if turned and tensor.ndim == 3 and ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = wrap("qwen3_vl_moe", tmp_path / "adapter", model=model, target_parameters=targets)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")
    for name, expected in wrapped.merge_and_unload().state_dict().items():
        same = found[name].transpose(1, 2) if turned and expected.ndim == 3 and ".experts." in name else found[name]
        assert worst_expert({name: same}, {name: expected}) <= CLOSE
    if not square:
        assert worst_expert(loaded(tmp_path / "out").state_dict(), wrapped.merge_and_unload().state_dict()) <= CLOSE
        return
    alone = wrap("qwen3_vl_moe", tmp_path / "alone", model=new("qwen3_vl_moe", width=16), target_parameters=targets[1:])
    del alone
    with pytest.raises(LoratoolsError, match=r"down_proj: a stack of squares, and nothing tells which of its axes A reads"):
        merge(tmp_path / "base", tmp_path / "alone", tmp_path / "none")
