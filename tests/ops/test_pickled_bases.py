"""Every operation on what torch pickled gives what it gives on the same weights as safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools import extract, inspect, merge, unmerge, verify
from loratools.errors import FormatError, OptionError, UnsupportedError
from tests.files import (
    llama_config,
    llama_tensors,
    peft_config,
    raw,
    read_adapter,
    read_checkpoint,
    read_config,
    write_adapter,
    write_checkpoint,
    write_pickled,
)
from tests.ops._bases import EMBEDDING, HEAD, llama_lora, lora, same
from tests.ops._lora import checked
from tests.strategies import randn


@pytest.mark.parametrize("shards", [1, 2])
def test_operations_on_pickles(tmp_path: Path, shards: int) -> None:
    tensors = llama_tensors(torch.bfloat16)
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].T.contiguous().T
    plain = write_checkpoint(tmp_path / "plain", tensors, llama_config())
    base = write_pickled(tmp_path / "base", tensors, llama_config(), shards=shards)
    adapter = llama_lora(tmp_path / "adapter")
    receipt = checked(merge(base, adapter, tmp_path / "out"), tmp_path / "out")
    merge(plain, adapter, tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")
    assert receipt["applied"] == receipt["expected"] == 4 and len(receipt["digests"]) == len(tensors)
    assert receipt["inputs"][0]["header_sha256"] is None
    assert receipt["inputs"][0]["bytes"] == sum(path.stat().st_size for path in base.glob("*.bin"))
    assert [note.startswith("written as safetensors: ") for note in receipt["notes"]] == [True] * shards
    assert receipt["changed_files"] == ["model.safetensors.index.json"] * (shards > 1)
    report = verify(tmp_path / "out", base=base, adapters=adapter, forward=True)
    assert report["ok"] and (report["digests"], report["replayed"], report["max_ulp"]) == (len(tensors), len(tensors), 0)
    tuned, results = write_pickled(tmp_path / "tuned", read_checkpoint(tmp_path / "out")), []
    for one, other in ((plain, tmp_path / "out"), (base, tmp_path / "out"), (plain, tuned)):
        extract(one, other, tmp_path / "extracted", rank=2, overwrite=True)
        results.append({name: raw(tensor) for name, tensor in read_adapter(tmp_path / "extracted")[0].items()})
    assert len(results[0]) == 8 and results[0] == results[1] == results[2]
    report = inspect(base)
    assert (report["format"], report["shards"], report["tensors"], report["warnings"]) == ("checkpoint", shards, len(tensors), [])
    unmerge(tmp_path / "out", tmp_path / "back", adapters=adapter, approximate=True)
    assert read_checkpoint(tmp_path / "back").keys() == tensors.keys()


def test_a_merge_onto_a_pickle_cannot_be_recorded(tmp_path: Path) -> None:
    base, adapter = write_pickled(tmp_path / "base", llama_tensors(), llama_config()), llama_lora(tmp_path / "adapter")
    with pytest.raises(OptionError, match=r"--reversible needs a base whose files.*pytorch_model\.bin, which is written as safetensors"):
        merge(base, adapter, tmp_path / "out", reversible=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError, match="no record to undo a merge by"):
        unmerge(base, tmp_path / "out")


def test_a_single_file_of_torch(tmp_path: Path) -> None:
    torch.save({"state_dict": llama_tensors(), "epoch": 3}, tmp_path / "base.ckpt")
    adapter = llama_lora(tmp_path / "adapter")
    with pytest.raises(OptionError, match=r"OUT with the ending \.safetensors"):
        merge(tmp_path / "base.ckpt", adapter, tmp_path / "out.ckpt")
    receipt = checked(merge(tmp_path / "base.ckpt", adapter, tmp_path / "out.safetensors"), tmp_path / "out.safetensors")
    assert "not weights, left out of base.ckpt: epoch" in receipt["notes"]
    merge(write_checkpoint(tmp_path / "plain", llama_tensors()), adapter, tmp_path / "expected")
    assert same(tmp_path / "out.safetensors", tmp_path / "expected")
    assert verify(tmp_path / "out.safetensors", base=tmp_path / "base.ckpt", adapters=adapter)["ok"]
    report = inspect(tmp_path / "base.ckpt")
    assert report["format"] == "checkpoint" and report["warnings"] == ["not weights, left out of base.ckpt: epoch"]


def test_an_adapter_in_a_pickle_by_its_file_is_an_adapter(tmp_path: Path) -> None:
    tensors, _ = read_adapter(llama_lora(tmp_path / "adapter"))
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    assert inspect(tmp_path / "adapter" / "adapter_model.bin")["format"] == "peft"
    torch.save(tensors, tmp_path / "strange.pt")
    with pytest.raises(FormatError, match=r"strange\.pt"):
        inspect(tmp_path / "strange.pt")


@pytest.mark.parametrize("target", [EMBEDDING, HEAD])
def test_a_tied_head_of_a_pickle(tmp_path: Path, target: str) -> None:
    """As of a safetensors folder that lacks the head: one of the two takes --untie."""
    tensors = llama_tensors()
    tensors[HEAD] = tensors[EMBEDDING]
    base = write_pickled(tmp_path / "base", tensors, llama_config(tie_word_embeddings=True))
    adapter = lora(tmp_path / "adapter", {}, {target: randn(17, 8, seed=3)}, modules_to_save=[target.split(".")[-2]], target_modules=["x"])
    with pytest.raises(UnsupportedError, match="are one tensor in this model"):
        merge(base, adapter, tmp_path / "out")
    receipt = merge(base, adapter, tmp_path / "out", untie=True)
    found = read_checkpoint(tmp_path / "out")
    assert torch.equal(found[target], randn(17, 8, seed=3)) and receipt["changed_files"] == ["config.json"]
    assert torch.equal(found[EMBEDDING if target == HEAD else HEAD], tensors[EMBEDDING])
    assert not read_config(tmp_path / "out")["tie_word_embeddings"]
    assert verify(tmp_path / "out", base=base, adapters=adapter)["ok"]


def test_names_of_one_tensor_are_changed_alike_or_made_their_own(tmp_path: Path) -> None:
    W, names = randn(8, 8, seed=0), ["encoder.proj", "decoder.proj"]
    base = write_pickled(tmp_path / "base", {f"{name}.weight": W for name in names} | {"out.weight": randn(8, 8, seed=1)})
    one = lora(tmp_path / "one", {"encoder.proj": (8, 8)}, target_modules=["encoder.proj"])
    with pytest.raises(UnsupportedError, match=r"under the names encoder\.proj\.weight, decoder\.proj\.weight, and the adapter"):
        merge(base, one, tmp_path / "out")
    merge(base, one, tmp_path / "own", untie=True)
    found = read_checkpoint(tmp_path / "own")
    assert torch.equal(found["decoder.proj.weight"], W) and not torch.equal(found["encoder.proj.weight"], W)
    tensors, _ = read_adapter(one)
    tensors |= {key.replace("encoder", "decoder"): tensor for key, tensor in tensors.items()}
    both = write_adapter(tmp_path / "both", tensors, peft_config(target_modules=["proj"]))
    merge(base, both, tmp_path / "alike")
    found = read_checkpoint(tmp_path / "alike")
    assert raw(found["encoder.proj.weight"]) == raw(found["decoder.proj.weight"]) and not torch.equal(found["encoder.proj.weight"], W)
    merge(base, lora(tmp_path / "out_", {"out": (8, 8)}), tmp_path / "other")  # nothing that is shared


def test_transformers_loads_what_was_a_pickle(tmp_path: Path) -> None:
    """GPT-2 as it lies on the Hub: a pickle whose head is the embedding, and transposed weights, squares among them."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11, n_positions=6)).eval()
    model.config.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    adapter = lora(tmp_path / "adapter", {"transformer.h.0.attn.c_proj": (8, 8)}, fan_in_fan_out=True)
    receipt = merge(tmp_path / "base", adapter, tmp_path / "out")
    assert "left out, as it is tied to transformer.wte.weight: lm_head.weight" in receipt["notes"]
    merged, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    tensors, _ = read_adapter(adapter)
    A, B = (next(tensor for key, tensor in tensors.items() if f"lora_{part}" in key).double() for part in "AB")
    W = model.transformer.h[0].attn.c_proj.weight.detach()
    expected = (W.double() + 2 * (B @ A).T).float()  # alpha 4 / rank 2
    assert torch.equal(merged.transformer.h[0].attn.c_proj.weight, expected)
    assert torch.equal(merged.lm_head.weight, model.transformer.wte.weight)
