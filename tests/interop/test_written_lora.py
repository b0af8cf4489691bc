"""LoRA on bare parameters, and LoRA that began with a part of the weight, there and back: peft loads what is written as the same model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from loratools import convert, merge
from loratools.errors import LoratoolsError
from loratools.formats import load
from tests.files import read_adapter, read_checkpoint, write_adapter
from tests.formats.matrix import check_same
from tests.interop.moe import MODELS, distance, logits, save, worst_expert, wrap
from tests.interop.test_peft_initial import apart, forward, merged, new, trained

CLOSE = 1e-5  # of ‖output‖ and of ‖weight‖, in float32: both sides round once, peft's sum of ranks too


def loaded(model: Any, folder: Path, *quiet: str) -> PeftModel:
    """The model as peft loads it: every key, and no warning but those named."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = PeftModel.from_pretrained(model, folder).eval()
    quiet = (*quiet, "`is_gradient_checkpointing` is deprecated")  # of transformers
    assert [str(one.message) for one in caught if not any(text in str(one.message) for text in quiet)] == []
    held, stored = get_peft_model_state_dict(found, save_embedding_layers=False), read_adapter(folder)[0]
    assert set(held) == set(stored) and all(torch.equal(held[key], stored[key]) for key in stored)
    return found


def made(folder: Path, kind: str, **config: Any) -> PeftModel:
    base = MODELS[kind].new()
    save(base, folder / "base", on_disk=False)
    return wrap(base, folder / "adapter", **config)


# -- parameters


SETTINGS: dict[str, dict[str, Any]] = {
    "two beside queries": {"names": (), "target_modules": ["q_proj"]},
    "one": {"names": ("down_proj",)},
    "patterns": {"names": (), "rank_pattern": {"down_proj": 2}, "alpha_pattern": {r".*\.gate_up_proj": 4}},
    "rslora": {"names": (), "use_rslora": True, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_experts_there_and_back(tmp_path: Path, kind: str, setting: str) -> None:
    more = dict(SETTINGS[setting])
    wrapped = made(tmp_path, kind, target_parameters=MODELS[kind].targets(*more.pop("names")), **more)
    expected = logits(wrapped)
    convert(tmp_path / "adapter", tmp_path / "alone", format="peft")
    convert(tmp_path / "adapter", tmp_path / "own.safetensors", format="loratools", base=tmp_path / "base")
    convert(tmp_path / "adapter", tmp_path / "based", format="peft", base=tmp_path / "base")
    convert(tmp_path / "own.safetensors", tmp_path / "back", format="peft", base=tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    bits = (tmp_path / "merged" / "model.safetensors").read_bytes()
    first = read_adapter(tmp_path / "adapter")[0]
    for name in ("alone", "based", "back"):
        again = read_adapter(tmp_path / name)[0]
        assert set(again) == set(first) and all(torch.equal(again[key], first[key]) for key in first)
        check_same(load(tmp_path / "adapter"), load(tmp_path / name))
        merge(tmp_path / "base", tmp_path / name, tmp_path / f"merged-{name}")
        assert (tmp_path / f"merged-{name}" / "model.safetensors").read_bytes() == bits
    again = loaded(MODELS[kind].new(), tmp_path / "based", "keys did not match any targeted module")  # peft looks for modules alone
    assert distance(logits(again), expected) == 0


def test_matrices_and_a_router(tmp_path: Path) -> None:
    names = ["gate_up_proj", "down_proj_bias", "down_proj", "gate_up_proj_bias"]
    wrapped = made(tmp_path, "gpt_oss", target_parameters=[*MODELS["gpt_oss"].targets(*names), "router.weight"])
    convert(tmp_path / "adapter", tmp_path / "back", format="peft", base=tmp_path / "base")
    first, again = (read_adapter(tmp_path / name)[0] for name in ("adapter", "back"))
    assert set(again) == set(first) and all(torch.equal(again[key], first[key]) for key in first)
    assert distance(logits(loaded(MODELS["gpt_oss"].new(), tmp_path / "back")), logits(wrapped)) == 0


@pytest.mark.parametrize("width", [12, 16], ids=["", "squares"])
def test_files_of_older_versions_are_written_for_the_new_one(tmp_path: Path, width: int) -> None:
    """peft 0.18 had A read the other axis; the same experts as peft 0.21 holds them are merged by it to what loratools makes of the old."""
    kind = "mixtral"
    base = MODELS[kind].new(intermediate_size=width)
    save(base, tmp_path / "base", on_disk=False)
    wrapped = wrap(base, tmp_path / "new", target_parameters=MODELS[kind].targets("down_proj"))
    old = {}
    for key, tensor in read_adapter(tmp_path / "new")[0].items():  # what 0.18 would have made of other factors
        rank = 3
        other = "lora_B" if "lora_A" in key else "lora_A"
        shape = (4, rank, -1) if "lora_A" in key else (-1, rank, 4)
        turned = tensor.reshape(shape).permute(2, 1, 0).contiguous()
        old[key.replace("lora_A" if "lora_A" in key else "lora_B", other)] = turned.flatten(0, 1) if "lora_B" in key else turned.flatten(1)
    config = read_adapter(tmp_path / "new")[1]
    write_adapter(tmp_path / "old", old, config | {"peft_version": "0.18.0"})
    convert(tmp_path / "old", tmp_path / "back", format="peft", base=tmp_path / "base")
    first, again = (read_adapter(tmp_path / name)[0] for name in ("new", "back"))
    assert set(again) == set(first) and all(torch.equal(again[key], first[key]) for key in first)
    assert read_adapter(tmp_path / "back")[1]["peft_version"] == "0.21.2"
    merge(tmp_path / "base", tmp_path / "old", tmp_path / "merged")
    assert worst_expert(read_checkpoint(tmp_path / "merged"), wrapped.merge_and_unload().state_dict()) <= CLOSE
    with pytest.raises(LoratoolsError, match=r"down_proj: which axis of a stack A reads depends on peft's version") as caught:
        convert(tmp_path / "old", tmp_path / "own.safetensors", format="loratools", base=tmp_path / "base")
        (tmp_path / "own.safetensors").write_bytes(
            (tmp_path / "own.safetensors").read_bytes().replace(b'\\"peft_version\\":\\"0.18.0\\"', b'\\"peft_version\\":\\"0.07.0\\"')
        )
        convert(tmp_path / "own.safetensors", tmp_path / "blind", format="peft")
    assert "give convert --base BASE, with its config.json" in str(caught.value)


# -- a part of the weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("conv1d", [False, True], ids=["", "conv1d"])
@pytest.mark.parametrize(("init", "more"), [("pissa", {}), ("olora", {}), ("pissa", {"use_dora": True}), ("olora", {"use_rslora": True})])
def test_moved_parts_there_and_back(tmp_path: Path, init: str, more: dict[str, Any], conv1d: bool) -> None:
    if conv1d and init == "olora":
        pytest.skip("which peft does not do right")
    turned = {"conv1d": True, "fan_in_fan_out": True, "target_modules": ["up"]} if conv1d else {}
    model = trained(tmp_path, init, **more, **turned)
    expected = forward(model)
    for name, based in (("alone", {}), ("based", {"base": tmp_path / "base"})):
        convert(tmp_path / "adapter", tmp_path / name, format="peft", **based)
        first, again = (read_adapter(tmp_path / folder)[0] for folder in ("adapter", name))
        assert set(again) == set(first) and all(torch.equal(again[key], first[key]) for key in first)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["init_lora_weights"] == init
        check_same(load(tmp_path / "adapter"), load(tmp_path / name))
        found = forward(PeftModel.from_pretrained(new(conv1d=conv1d), tmp_path / name))
        assert apart(found, expected) == 0
        merge(tmp_path / "base", tmp_path / name, tmp_path / "out", overwrite=True)
        assert apart(merged(tmp_path, conv1d=conv1d), expected) < 1e-5  # of float32, in which peft decomposes
