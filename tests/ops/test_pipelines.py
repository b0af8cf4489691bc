"""Operations on diffusers pipelines: one receipt, each model by its own config, the others copied byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools import extract, inspect, merge, unmerge, verify
from loratools.errors import AmbiguousError, MatchError, OptionError, UnsupportedError
from tests.files import (
    peft_config,
    read_checkpoint,
    read_config,
    write_adapter,
    write_checkpoint,
)
from tests.ops._bases import CLIP, HEAD, ROOT, UNET, lora, pipeline, same
from tests.ops._lora import checked
from tests.strategies import randn


def test_an_adapter_of_several_models_of_a_pipeline(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"stale")
    names = {"unet.mid.attn.to_q": (8, 8), "text_encoder.text_model.layers.0.q_proj": (8, 8)}
    adapter = lora(tmp_path / "adapter", names)
    receipt = checked(merge(base, adapter, tmp_path / "out"), tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == 2 and receipt["notes"] == []
    assert [row["name"] for row in receipt["left_out"]] == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    assert [row["name"] for row in receipt["tensors"]] == [f"{name}.weight" for name in sorted(names)]
    # each model as it were merged by itself
    for seed, (name, shape) in enumerate(names.items()):
        model, _, module = name.partition(".")
        pair = {"lora_A.weight": randn(2, shape[1], seed=seed), "lora_B.weight": randn(shape[0], 2, seed=seed + 100)}
        tensors = {f"{ROOT}{module}.{key}": tensor for key, tensor in pair.items()}
        alone = write_adapter(tmp_path / f"{model}_adapter", tensors, peft_config(target_modules=[module]))
        merge(base / model, alone, tmp_path / model)
        assert same(tmp_path / "out" / model, tmp_path / model)
    changed = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "loratools.json"}
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and (name := path.relative_to(tmp_path / "out").as_posix()) not in changed:
            assert path.read_bytes() == (base / name).read_bytes()
    report = verify(tmp_path / "out", base=base, adapters=adapter, forward=True)
    assert report["ok"] and report["max_ulp"] == 0 and report["digests"] == report["replayed"] == len(receipt["digests"])
    joined, told = inspect(adapter, base=base), inspect(base)
    assert joined["modules_total"] == 2 and joined["base_parameters"] == told["parameters"]
    assert told["components"]["vae"] == {"tensors": 1, "parameters": 108, "quantization": None} and told["shards"] == 5


def test_verify_finds_what_was_changed_in_a_pipeline(tmp_path: Path) -> None:
    merge(pipeline(tmp_path / "base"), lora(tmp_path / "adapter", {"unet.mid.attn.to_q": (8, 8)}), tmp_path / "out")
    write_checkpoint(tmp_path / "out" / "text_encoder", CLIP | {"text_model.layers.0.q_proj.weight": torch.zeros(8, 8)})
    (tmp_path / "out" / "vae" / "other.safetensors").write_bytes(b"")
    faults = "\n".join(verify(tmp_path / "out")["faults"])
    assert "text_encoder.text_model.layers.0.q_proj.weight: not the bytes that were written" in faults
    assert "text_encoder/model.safetensors: " in faults and "vae/other.safetensors: weights that the receipt does not know" in faults


def test_an_adapter_without_the_models_name(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    receipt = merge(base, lora(tmp_path / "one", {"mid.attn.to_q": (8, 8), "mid.attn.to_k": (8, 8)}), tmp_path / "out")
    assert receipt["notes"] == ["names aligned for the whole adapter: prefix 'unet.' added"] and receipt["applied"] == 2
    # in two models alike: refused, until a name decides
    both = lora(tmp_path / "both", {"text_model.layers.1.q_proj": (8, 8)})
    with pytest.raises(AmbiguousError, match=r"'text_encoder\.' or 'text_encoder_2\.'; give --rename OLD=NEW"):
        merge(base, both, tmp_path / "which")
    receipt = merge(base, both, tmp_path / "which", rename=["text_model=text_encoder_2.text_model"])
    assert [row["name"] for row in receipt["tensors"]] == ["text_encoder_2.text_model.layers.1.q_proj.weight"]
    # in one, and a stray
    stray = lora(tmp_path / "stray", {"mid.attn.to_q": (8, 8), "text_model.layers.9.q_proj": (8, 8)})
    with pytest.raises(MatchError, match=r"unet\.text_model\.layers\.9\.q_proj\.weight: the base has no such weight"):
        merge(base, stray, tmp_path / "not")
    new = lora(tmp_path / "new", {"unet.mid.attn.to_q": (8, 8)}, {"score.weight": torch.ones(2, 2)}, modules_to_save=["score"])
    with pytest.raises(MatchError, match=r"score\.weight: new, and of no model of the pipeline: expected unet\., "):
        merge(base, new, tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_the_models_of_a_pipeline_have_ties_and_dtypes_of_their_own(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    tied = lora(tmp_path / "tied", {}, {f"text_encoder_3.{HEAD}": randn(17, 8, seed=1)}, modules_to_save=["lm_head"], target_modules=["x"])
    with pytest.raises(UnsupportedError, match=r"text_encoder_3: lm_head\.weight: model\.embed_tokens\.weight and lm_head\.weight are one"):
        merge(base, tied, tmp_path / "out")
    assert any(text.startswith("text_encoder_3.lm_head.weight is changed alone") for text in inspect(tied, base=base)["warnings"])
    receipt = merge(base, tied, tmp_path / "out", untie=True, dtype="bfloat16")
    assert receipt["notes"][-1] == "text_encoder_3: untied: lm_head.weight is written beside model.embed_tokens.weight"
    assert sorted(receipt["changed_files"]) == ["text_encoder_2/config.json", "text_encoder_3/config.json"]
    assert read_config(tmp_path / "out" / "text_encoder_2")["torch_dtype"] == "bfloat16"
    assert not read_config(tmp_path / "out" / "text_encoder_3")["tie_word_embeddings"]
    for model in ("unet", "vae", "text_encoder", "text_encoder_3"):
        assert {tensor.dtype for tensor in read_checkpoint(tmp_path / "out" / model).values()} == {torch.bfloat16}
    assert verify(tmp_path / "out", base=base, adapters=tied)["ok"]


def test_what_is_not_done_on_pipelines_is_refused(tmp_path: Path) -> None:
    base, adapter = pipeline(tmp_path / "base"), lora(tmp_path / "adapter", {"unet.mid.attn.to_q": (8, 8)})
    with pytest.raises(OptionError, match=r"--reversible needs a base whose files.*a pipeline of several models"):
        merge(base, adapter, tmp_path / "out", reversible=True)
    with pytest.raises(UnsupportedError, match=r"a pipeline of several models, and an adapter is of one; name the same folder of both"):
        extract(base, base, tmp_path / "out", rank=1)
    merge(base, adapter, tmp_path / "merged")
    unmerge(tmp_path / "merged", tmp_path / "back", adapters=adapter, approximate=True)
    after = read_checkpoint(tmp_path / "back" / "unet")
    assert float((after["mid.attn.to_q.weight"] - UNET["mid.attn.to_q.weight"]).abs().max()) < 1e-5  # a rounding each way


def test_history_and_records_of_a_pipelines_models(tmp_path: Path) -> None:
    """A model that was merged by itself keeps its receipt and record where it does not change; else the receipt is history."""
    base = pipeline(tmp_path / "base")
    for name, module in (("unet", "mid.attn.to_q"), ("text_encoder", "text_model.layers.0.q_proj")):
        adapter = lora(tmp_path / f"{name}_adapter", {module: (8, 8)})
        merge(base / name, adapter, tmp_path / name, reversible=True)
        for path in (tmp_path / name).iterdir():
            path.replace(base / name / path.name)
    receipt = merge(base, lora(tmp_path / "a", {"unet.mid.attn.to_k": (8, 8)}), tmp_path / "out")
    assert [entry["operation"] for entry in receipt["history"]] == ["merge", "merge"]
    assert [row["name"] for row in receipt["left_out"]] == ["unet/unmerge.safetensors"]
    assert (tmp_path / "out" / "text_encoder" / "unmerge.safetensors").is_file()
    assert not (tmp_path / "out" / "unet" / "loratools.json").exists()
    unmerge(tmp_path / "out" / "text_encoder", tmp_path / "back")
    assert same(tmp_path / "back", pipeline(tmp_path / "first") / "text_encoder")
