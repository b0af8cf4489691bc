"""Opening an adapter: which of a folder's files is read, what is told of the others, what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools import inspect, merge
from loratools.errors import AmbiguousError, FormatError
from loratools.formats import load
from loratools.formats.base import WEIGHTS, ReadOptions
from loratools.formats.opening import is_adapter, open_container
from tests.files import peft_config, write_adapter, write_checkpoint
from tests.strategies import randn

PAIR = {"base_model.model.q.lora_A.weight": randn(2, 6, seed=0), "base_model.model.q.lora_B.weight": randn(4, 2, seed=1)}


def folder(path: Path) -> Path:
    return write_adapter(path / "adapter", PAIR, peft_config(target_modules=["q"]))


def test_of_several_files_the_first_is_read_and_the_others_are_told(tmp_path: Path) -> None:
    adapter = folder(tmp_path)
    assert load(adapter).notes == ()
    torch.save({key: 2 * tensor for key, tensor in PAIR.items()}, adapter / "adapter_model.bin")
    save_file({"unet.q.lora_A.weight": randn(2, 6, seed=0)}, adapter / "pytorch_lora_weights.safetensors")
    others = "adapter_model.bin, pytorch_lora_weights.safetensors"
    said = f"read from adapter_model.safetensors, not from {others} beside it: name that file to have it"
    assert load(adapter).notes == (said,)
    assert load(adapter / "adapter_model.bin").notes == ()
    base = write_checkpoint(tmp_path / "base", {"q.weight": randn(4, 6, seed=2)})
    assert said in merge(base, adapter, tmp_path / "merged")["notes"]


def test_what_lies_beside_a_pickles_tensors_is_told(tmp_path: Path) -> None:
    adapter = folder(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"state_dict": PAIR, "epoch": 3, "lora_alpha": torch.tensor(8.0)}, adapter / "adapter_model.bin")
    assert load(adapter).notes == ("left out of adapter_model.bin: epoch, lora_alpha, which lies beside its tensors",)


def test_notes_of_reading_are_there_once_the_base_has_told_the_rest(tmp_path: Path) -> None:
    """torchtune's rows wait for the model's config, and the adapter is made anew then."""
    (tmp_path / "t").mkdir()
    tensors = {f"layers.0.attn.q_proj.lora_{side}.weight": randn(*shape, seed=1) for side, shape in (("a", (2, 8)), ("b", (8, 2)))}
    torch.save({"model": tensors, "seed": 1}, tmp_path / "t" / "adapter_0.pt")
    config = {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 8}
    base = write_checkpoint(tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": randn(8, 8, seed=3)}, config)
    notes = merge(base, tmp_path / "t", tmp_path / "merged", alpha_in=4.0)["notes"]
    assert notes.count("left out of adapter_0.pt: seed, which lies beside its tensors") == 1


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name.endswith((".safetensors", ".bin", ".pt", ".lora"))])
def test_a_folder_of_an_adapters_weights_is_an_adapter_to_inspect(tmp_path: Path, name: str) -> None:
    """With a config beside or without: diffusers', litgpt's and torchtune's folders have none of peft's."""
    tensors = {"lora_unet_q.lora_down.weight": randn(2, 6, seed=0), "lora_unet_q.lora_up.weight": randn(4, 2, seed=1)}
    (save_file if name.endswith(".safetensors") else torch.save)(tensors, tmp_path / name)
    assert is_adapter(tmp_path) and inspect(tmp_path)["format"] == "kohya"
    (tmp_path / "model_index.json").write_text("{}")  # a pipeline may have a LoRA beside it
    assert is_adapter(tmp_path) == name.startswith("adapter_model.")


def test_values_of_rows_that_wait_for_the_base_are_those_of_the_file(tmp_path: Path) -> None:
    A, B = randn(2, 8, seed=0), randn(8, 2, seed=1)
    torch.save({"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B}, tmp_path / "adapter_model.pt")
    (row,) = inspect(tmp_path, spectra=True, alpha_in=4.0)["modules"]
    expected = torch.linalg.svdvals(2 * B.double() @ A.double())[:2]
    assert row["sigma"] == pytest.approx(expected.tolist(), rel=1e-6)
    with pytest.raises(AmbiguousError, match=r"adapter_model\.pt: .*rows of q and k are permuted.*--base"):
        loratools.compare(tmp_path, tmp_path, alpha_in=4.0)


def test_a_file_of_another_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    save_file({"lora_unet_q.lora_down.weight": randn(2, 6, seed=0)}, tmp_path / "mine" / "style.safetensors")
    with pytest.raises(FormatError, match=r"mine: no adapter in it: .*in a file of another name is given by it, style\.safetensors"):
        open_container(tmp_path / "mine")
    (tmp_path / "none").mkdir()
    with pytest.raises(FormatError, match=r"no adapter in it: expected [^;]*$"):
        open_container(tmp_path / "none")


def test_a_config_that_says_something_twice(tmp_path: Path) -> None:
    adapter = folder(tmp_path)
    text = json.dumps(json.loads((adapter / "adapter_config.json").read_text()))
    (adapter / "adapter_config.json").write_text(text[:-1] + ', "lora_alpha": 99}')
    with pytest.raises(FormatError, match=r"adapter_config\.json: not readable as JSON: it names lora_alpha twice"):
        load(adapter, options=ReadOptions())
