"""Trained tokens beside a LoRA (`trainable_token_indices`), live: whole models, tied heads, larger vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from loratools import inspect, merge, resize, unmerge
from loratools.errors import LoratoolsError
from loratools.formats import load, save
from tests.files import raw, read_adapter, read_checkpoint, read_config, write_adapter
from tests.interop.test_peft_models import GPT, LM, T5, gpt2, llama, logits, resized, t5
from tests.interop.zoo import randomize

INDICES = [5, 2, 11]
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapted(folder: Path, base: type, config: Any, *, prepare: Any = None, save: dict[str, Any] | None = None, **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    base(config).save_pretrained(folder / "base")
    model = base.from_pretrained(folder / "base")
    if prepare:
        prepare(model)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "trainable_token_indices": INDICES} | lora
    model = get_peft_model(model, LoraConfig(**settings))
    randomize(model)
    model.eval().save_pretrained(folder / "adapter", **(save or {}))
    return model


TIED, UNTIE = llama(tie_word_embeddings=True), {"untie": True}
CASES: dict[str, tuple[type, Any, dict[str, Any], dict[str, Any]]] = {
    "a list": (LM, llama(), {}, {}),
    "a table": (LM, llama(), {"trainable_token_indices": {"embed_tokens": [7, 1, 2], "lm_head": [3, 5]}}, {}),
    "the head alone": (LM, llama(), {"trainable_token_indices": {"lm_head": [3, 5, 2]}}, {}),
    "LoRA on the head": (LM, llama(), {"target_modules": ["q_proj", "lm_head"]}, {}),
    "all-linear": (LM, llama(), {"target_modules": "all-linear"}, {}),
    "saved head": (LM, llama(), {"modules_to_save": ["lm_head"]}, {}),
    "tied": (LM, TIED, {}, {}),
    "tied, one table for both": (LM, TIED, {"trainable_token_indices": {"embed_tokens": INDICES, "lm_head": INDICES}}, {}),
    "tied, two tables": (LM, TIED, {"trainable_token_indices": {"embed_tokens": INDICES, "lm_head": [3]}}, UNTIE),
    "tied, the head alone": (LM, TIED, {"trainable_token_indices": {"lm_head": [3, 2]}}, UNTIE),
    "larger": (LM, llama(), {"trainable_token_indices": [50, 2, 11], "prepare": resized(53)}, {}),
    "larger, tied": (LM, TIED, {"trainable_token_indices": [50, 2, 11], "prepare": resized(53)}, {}),
    "larger, tied, a table": (LM, TIED, {"trainable_token_indices": {"embed_tokens": [50, 2, 11]}, "prepare": resized(53)}, {}),
    "embeddings saved": (LM, llama(), {"save": {"save_embedding_layers": True}}, {}),
    "ensure_weight_tying": (LM, TIED, {"ensure_weight_tying": True}, {}),
    "tied, LoRA on the head": (LM, TIED, {"target_modules": ["q_proj", "lm_head"]}, UNTIE),
    "gpt2": (GPT, gpt2(), {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": INDICES}}, {}),
    "gpt2, a list": (GPT, gpt2(), {"target_modules": ["c_attn"]}, {}),
    "T5": (T5, t5(), {"target_modules": ["q"]}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_merges_to_the_forward_of_peft(tmp_path: Path, name: str) -> None:
    base, config, lora, options = CASES[name]
    model = adapted(tmp_path, base, config, **lora)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    assert receipt["applied"] == receipt["expected"] > 0
    merged, info = base.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert merged.config.tie_word_embeddings == (config.tie_word_embeddings and not options)
    found, expected = logits(merged.eval()), logits(model)
    assert float((found - expected).norm() / expected.norm()) <= 1e-6  # weights rounded once to float32
    plain = logits(base.from_pretrained(tmp_path / "base").eval())
    assert plain.shape != expected.shape or float((plain - expected).norm() / expected.norm()) > 1e-3
    embedding = merged.get_input_embeddings().weight
    tensors, _ = read_adapter(tmp_path / "adapter")
    for key, rows in tensors.items():  # in place to the last bit, whatever the LoRA adds elsewhere
        if "trainable_tokens_delta" in key and "lm_head" not in key:
            stated = lora.get("trainable_token_indices", INDICES)
            indices = stated if isinstance(stated, list) else next(value for end, value in stated.items() if f".{end}." in key)
            assert torch.equal(embedding[indices].float(), rows)


@pytest.mark.parametrize("name", ["a table", "tied", "larger, tied", "saved head"])
def test_what_is_written_peft_reads_alike(tmp_path: Path, name: str) -> None:
    base, config, lora, _ = CASES[name]
    model = adapted(tmp_path, base, config, **lora)
    adapter = load(tmp_path / "adapter")
    save(adapter, tmp_path / "again")
    again = base.from_pretrained(tmp_path / "base")
    if prepare := lora.get("prepare"):
        prepare(again)
    found, expected = logits(PeftModel.from_pretrained(again, tmp_path / "again").eval()), logits(model)
    assert torch.allclose(found, expected, atol=1e-12)
    read, written = (read_adapter(tmp_path / name)[0] for name in ("adapter", "again"))
    assert all(raw(written[key]) == raw(read[key]) for key in written) and {key for key in read if "lora_" in key} <= written.keys()


def test_resize_keeps_the_rows(tmp_path: Path) -> None:
    adapted(tmp_path, LM, llama())
    resize(tmp_path / "adapter", tmp_path / "less", rank=1)
    (before, _), (after, config) = read_adapter(tmp_path / "adapter"), read_adapter(tmp_path / "less")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert raw(before[key]) == raw(after[key]) and after[Q].shape[0] == 1
    assert config["trainable_token_indices"] == {"model.embed_tokens": INDICES}


def test_undone_exactly_and_inspected(tmp_path: Path) -> None:
    adapted(tmp_path, LM, TIED)
    kinds = inspect(tmp_path / "adapter", base=tmp_path / "base")["kinds"]
    assert kinds == {"lora": 3, "rows": 1}
    merge(tmp_path / "base", f"{tmp_path / 'adapter'}:0.5", tmp_path / "out", reversible=True)
    unmerge(tmp_path / "out", tmp_path / "undone")
    base, undone = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "undone")
    assert all(raw(base[name]) == raw(undone[name]) for name in base) and read_config(tmp_path / "undone") == read_config(tmp_path / "base")


KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


def spoilt(tmp_path: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    """The error of a merge of these tensors under another config."""
    stated = read_adapter(tmp_path / "adapter")[1]
    write_adapter(tmp_path / "other", tensors, stated | config)
    with pytest.raises(LoratoolsError) as caught:
        merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")
    return str(caught.value)


def test_changes_of_the_tensor(tmp_path: Path) -> None:
    adapted(tmp_path, LM, llama())
    tensors, _ = read_adapter(tmp_path / "adapter")
    rest = {key: tensor for key, tensor in tensors.items() if key != KEY}
    assert "the file has no trained tokens" in spoilt(tmp_path, rest)
    assert "neither a tensor of the method" in spoilt(tmp_path, rest | {f"{KEY}s": tensors[KEY]})
    other = KEY.replace("embed_tokens", "other")
    assert "model.other.weight: the base has no such weight" in spoilt(tmp_path, rest | {other: tensors[KEY]})
    assert "not a row for each index" in spoilt(tmp_path, rest | {KEY: tensors[KEY][:2]})
    assert "rows of another length" in spoilt(tmp_path, rest | {KEY: tensors[KEY][:, :3]})
    assert "not a key peft writes" in spoilt(tmp_path, tensors | {f"{KEY}.weight": tensors[KEY]})
    assert "under two spellings" in spoilt(tmp_path, tensors | {f"{KEY}.default": tensors[KEY]})
    assert "finite" in spoilt(tmp_path, rest | {KEY: torch.full_like(tensors[KEY], float("nan"))})
    lora = {KEY.replace("token_adapter.trainable_tokens_delta", f"lora_embedding_{side}"): torch.ones(2, 2) for side in "AB"}
    found = spoilt(tmp_path, tensors | lora, target_modules=["q_proj", "embed_tokens"])
    assert "trained tokens and a LoRA on one module" in found
    assert torch.equal(tensors[KEY], read_adapter(tmp_path / "adapter")[0][KEY])


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "trained tokens that the config does not ask for"),
        ([], "trained tokens that the config does not ask for"),
        ([5, 2], "not a row for each index"),
        ([5, 2, 48], "a row that the weight does not have: found 48, expected below 48"),
        ([5, 2, 2], "a row stands twice, with different values: found index 2"),
        ([5, 2, -1], r"trainable_token_indices: found \[5, 2, -1\], expected a list of whole numbers from 0 up"),
        ([5, 2, 1.0], "trainable_token_indices: found"),
        ("all", "trainable_token_indices: found 'all'"),
        ({"embed_tokens": "5"}, "trainable_token_indices of embed_tokens: found '5'"),
        ({"lm_head": [5, 2, 11]}, "does not ask for: peft would drop them in silence: expected trainable_token_indices of lm_head"),
        ({"embed_tokens": [5, 2, 11], "lm_head": [1]}, "trainable_token_indices names lm_head, and the file has no trained tokens of it"),
        ({"embed_tokens": [5, 2, 11], "tokens": [5, 2, 11]}, "names this module twice: found embed_tokens, tokens"),
    ],
    ids=str,
)
def test_changes_of_the_setting(tmp_path: Path, value: Any, words: str) -> None:
    import re

    adapted(tmp_path, LM, llama())
    assert re.search(words, spoilt(tmp_path, read_adapter(tmp_path / "adapter")[0], trainable_token_indices=value))


def test_another_order_is_another_adapter(tmp_path: Path) -> None:
    adapted(tmp_path, LM, llama())
    tensors, config = read_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "other", tensors, config | {"trainable_token_indices": [2, 11, 5]})
    for name in ("adapter", "other"):
        merge(tmp_path / "base", tmp_path / name, tmp_path / f"out-{name}")
    ours, theirs = (read_checkpoint(tmp_path / f"out-{name}")["model.embed_tokens.weight"] for name in ("adapter", "other"))
    assert torch.equal(ours[[5, 2, 11]], theirs[[2, 11, 5]]) and not torch.equal(ours[2], theirs[2])


def test_a_copy_of_the_tied_head_that_differs(tmp_path: Path) -> None:
    base, config, lora, _ = CASES["larger, tied, a table"]
    adapted(tmp_path, base, config, **lora)
    tensors, _ = read_adapter(tmp_path / "adapter")
    assert any(f"copies under the names of tied modules: {HEAD}" in note for note in load(tmp_path / "adapter").notes)
    tensors[HEAD][0, 0] += 1
    assert f"{HEAD}: trained tokens that the config does not ask for" in spoilt(tmp_path, tensors)
