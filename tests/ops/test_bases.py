"""Every operation on bases that are not plain safetensors folders gives what it gives on the same weights as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import extract, inspect, merge, unmerge, verify
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, OptionError, UnsupportedError
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
    write_pipeline,
)
from tests.ops._lora import checked
from tests.strategies import randn

ROOT = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def lora(folder: Path, names: dict[str, tuple[int, int]], extra: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A rank 2 peft adapter of the modules with these shapes, and tensors saved whole."""
    tensors = {f"{ROOT}{name}": tensor for name, tensor in (extra or {}).items()}
    for seed, (name, (rows, columns)) in enumerate(names.items()):
        tensors[f"{ROOT}{name}.lora_A.weight"] = randn(2, columns, seed=seed)
        tensors[f"{ROOT}{name}.lora_B.weight"] = randn(rows, 2, seed=seed + 100)
    return write_adapter(folder, tensors, peft_config(target_modules=sorted(names) or ["none"]) | config)


def llama_lora(folder: Path) -> Path:
    return lora(folder, {f"model.layers.{layer}.self_attn.{name}": (8, 8) for layer in (0, 1) for name in ("q_proj", "o_proj")})


def same(one: Path, other: Path) -> bool:
    a, b = read_checkpoint(one), read_checkpoint(other)
    return {name: raw(tensor) for name, tensor in a.items()} == {name: raw(tensor) for name, tensor in b.items()}


# -- torch's pickles


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


# -- variants


@pytest.mark.parametrize("shards", [1, 2])
def test_a_variant_keeps_its_names(tmp_path: Path, shards: int) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(torch.float16), llama_config(), shards=shards)
    variants = {"model-": "model.fp16-", "model.safetensors.index.json": "model.safetensors.index.fp16.json"}
    variants["model.safetensors"] = "model.fp16.safetensors"
    names = {path.name: path.name for path in base.iterdir()}
    for name in names:
        old = next((old for old in variants if name.startswith(old)), "")
        names[name] = name.replace(old, variants.get(old, ""), 1)
    for name, variant in names.items():
        (base / name).rename(base / variant)
        if variant.endswith(".index.fp16.json"):
            (base / variant).write_text((base / variant).read_text().replace("model-", "model.fp16-"))
    adapter = llama_lora(tmp_path / "adapter")
    receipt = merge(base, adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names.values(), "loratools.json"} and receipt["left_out"] == []
    assert verify(tmp_path / "out", base=base, adapters=adapter)["ok"]
    # beside the plain weights those win, as in transformers; the variant's own path opens it
    write_checkpoint(base, llama_tensors(), llama_config())
    receipt = merge(base, adapter, tmp_path / "plain")
    weights = {name for name in names.values() if name != "config.json"}
    assert {row["name"] for row in receipt["left_out"]} == weights and (tmp_path / "plain" / "model.safetensors").is_file()
    chosen = "model.safetensors.index.fp16.json" if shards > 1 else "model.fp16.safetensors"
    out = tmp_path / ("chosen" if shards > 1 else "chosen.safetensors")
    merge(base / chosen, adapter, out)
    assert same(out, tmp_path / "out")
    with pytest.raises(LoratoolsError, match="is, holds or lies inside the input"):
        merge(base / chosen, adapter, base / "out.safetensors" if shards > 1 else base / chosen, overwrite=True)


# -- pipelines

UNET = {"mid.attn.to_q.weight": randn(8, 8, seed=1), "mid.attn.to_k.weight": randn(8, 8, seed=2), "conv.weight": randn(4, 3, 3, 3, seed=3)}
CLIP = {f"text_model.layers.{layer}.q_proj.weight": randn(8, 8, seed=layer) for layer in (0, 1)}


def pipeline(folder: Path) -> Path:
    models = {
        "unet": (UNET, {"_class_name": "UNet2DConditionModel"}),
        "vae": ({"conv.weight": randn(4, 3, 3, 3, seed=9)}, {"_class_name": "AutoencoderKL"}),
        "text_encoder": (CLIP, {"model_type": "clip_text_model"}),
        "text_encoder_2": (CLIP | {"text_projection.weight": randn(4, 8, seed=5)}, {"model_type": "clip", "torch_dtype": "float32"}),
        "text_encoder_3": (llama_tensors(head=False), llama_config(tie_word_embeddings=True)),
    }
    return write_pipeline(folder, models)


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


# -- names


def test_a_base_saved_without_its_head(tmp_path: Path) -> None:
    """GPT-2 on the Hub has `h.0…`, an adapter of GPT2LMHeadModel `transformer.h.0…` and its head `lm_head`; and the other way round."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11, n_positions=6, architectures=["GPT2LMHeadModel"]))
    model.save_pretrained(tmp_path / "base")
    config = {**read_config(tmp_path / "base"), "architectures": ["GPT2LMHeadModel"]}
    write_checkpoint(tmp_path / "base", read_checkpoint(tmp_path / "base"), config)
    W = read_checkpoint(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", {"transformer.h.0.attn.c_proj": (8, 8), "lm_head": (11, 8)}, fan_in_fan_out=True)
    receipt = merge(tmp_path / "base", adapter, tmp_path / "out", untie=True)
    assert receipt["applied"] == 2
    assert "names aligned for the whole adapter: prefix 'transformer.' removed; as they are: lm_head.weight" in receipt["notes"]
    found = read_checkpoint(tmp_path / "out")
    tensors, _ = read_adapter(adapter)
    for name, old, turned in (("h.0.attn.c_proj", W["h.0.attn.c_proj.weight"], True), ("lm_head", W["wte.weight"], False)):
        A, B = (next(tensor.double() for key, tensor in tensors.items() if f"{name}.lora_{part}" in key) for part in "AB")
        delta = 2 * (B @ A)  # alpha 4 / rank 2
        assert torch.equal(found[f"{name}.weight"], (old.double() + (delta.T if turned else delta)).float())


def test_an_old_bert(tmp_path: Path) -> None:
    """`LayerNorm.gamma` and `beta` in a pickle, as Google's BERT was converted; the adapter says `weight` and `bias`."""
    base = {
        "bert.encoder.layer.0.output.dense.weight": randn(8, 8, seed=0), "bert.encoder.layer.0.output.dense.bias": randn(8, seed=1),
        "bert.encoder.layer.0.output.LayerNorm.gamma": randn(8, seed=2), "bert.encoder.layer.0.output.LayerNorm.beta": randn(8, seed=3),
    }  # fmt: skip
    write_pickled(tmp_path / "base", base, {"model_type": "bert"})
    saved = {"encoder.layer.0.output.LayerNorm.weight": torch.ones(8), "encoder.layer.0.output.LayerNorm.bias": torch.zeros(8)}
    adapter = lora(tmp_path / "adapter", {"encoder.layer.0.output.dense": (8, 8)}, saved, modules_to_save=["LayerNorm"])
    receipt = merge(tmp_path / "base", adapter, tmp_path / "out")
    aligned, spelt = (note for note in receipt["notes"] if "align" in note or "spells" in note)
    assert aligned == "names aligned for the whole adapter: prefix 'bert.' added"
    assert spelt.startswith("names as the base spells them: encoder.layer.0.output.LayerNorm.") and spelt.endswith(", and 1 more alike")
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == base.keys() and receipt["applied"] == receipt["expected"] == 3
    assert torch.equal(found["bert.encoder.layer.0.output.LayerNorm.gamma"], torch.ones(8))
    assert torch.equal(found["bert.encoder.layer.0.output.LayerNorm.beta"], torch.zeros(8))
    assert verify(tmp_path / "out", base=tmp_path / "base", adapters=adapter)["ok"]
