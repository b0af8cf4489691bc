"""Trained tokens of whole transformers models: tied heads, larger vocabularies, by the peft method of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from peft import TrainableTokensConfig, get_peft_model

from loratools import inspect, merge, unmerge
from loratools.errors import FormatError, MatchError, UnsupportedError
from tests.files import peft_config, raw, read_adapter, read_checkpoint, read_config, write_adapter, write_checkpoint
from tests.interop.test_peft_models import BARE, GPT, IDS, LM, T5, gpt2, llama, logits, resized, t5

INDICES = [5, 2, 11]


def adapted(folder: Path, base: type, config: Any, *, prepare: Any = None, wrapped: type | None = None, **more: Any) -> Any:
    """A model with random new rows for the tokens 5, 2 and 11; base and adapter are saved below the folder."""
    torch.manual_seed(0)
    base(config).save_pretrained(folder / "base")
    model = (wrapped or base).from_pretrained(folder / "base")
    if prepare:
        prepare(model)
    model = get_peft_model(model, TrainableTokensConfig(**{"token_indices": INDICES, **more}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.eval().save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize(
    "base, config, more",
    [
        (LM, llama(), {}),
        (LM, llama(tie_word_embeddings=True), {}),
        (LM, llama(), {"target_modules": ["embed_tokens", "lm_head"]}),
        (LM, llama(tie_word_embeddings=True), {"prepare": resized(53), "token_indices": [50, 2, 11]}),
        (LM, llama(), {"wrapped": BARE}),
        (GPT, gpt2(), {}),
        (T5, t5(), {}),
    ],
    ids=["untied", "tied", "both, untied", "tied and larger", "without the head", "gpt2", "T5"],
)
def test_merges_to_the_forward_of_peft(tmp_path: Path, base: type, config: Any, more: dict[str, Any]) -> None:
    model = adapted(tmp_path, base, config, **more)
    tied = config.tie_word_embeddings
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] > 0
    assert any("stays tied" in note for note in receipt["notes"]) == tied
    loaded = (more.get("wrapped") or base).from_pretrained(tmp_path / "out")
    assert loaded.config.tie_word_embeddings == tied
    found, expected = logits(loaded.eval()), logits(model)
    plain = logits((more.get("wrapped") or base).from_pretrained(tmp_path / "base").eval())
    assert torch.allclose(found, expected, atol=1e-12)  # rows are put in place, not computed
    assert not torch.allclose(found[..., : plain.shape[-1]], plain, atol=1e-2)
    assert set(IDS.flatten().tolist()) & set(INDICES)


def less(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter without the copy of the tied head's, as other methods of peft save it."""
    tensors, config = read_adapter(folder / "adapter")
    tensors = {key: tensor for key, tensor in tensors.items() if "lm_head" not in key}
    write_adapter(folder / "less", tensors, config)
    return tensors


def test_a_tied_head_follows_though_the_file_does_not_name_it(tmp_path: Path) -> None:
    model = adapted(tmp_path, LM, llama(tie_word_embeddings=True))
    less(tmp_path)
    receipt = merge(tmp_path / "base", tmp_path / "less", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == 2 and not any("copies" in note for note in receipt["notes"])
    assert torch.allclose(logits(LM.from_pretrained(tmp_path / "out").eval()), logits(model), atol=1e-12)
    assert inspect(tmp_path / "less", base=tmp_path / "base")["warnings"] == []


def test_a_head_that_is_stored_beside_its_embedding_follows(tmp_path: Path) -> None:
    adapted(tmp_path, LM, llama(tie_word_embeddings=True))
    tensors = less(tmp_path)
    held = read_checkpoint(tmp_path / "base")
    held["lm_head.weight"] = held["model.embed_tokens.weight"]
    write_checkpoint(tmp_path / "both", held, read_config(tmp_path / "base"))
    receipt = merge(tmp_path / "both", tmp_path / "less", tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"]) and receipt["applied"] == receipt["expected"] == 2
    assert torch.equal(merged["lm_head.weight"][INDICES], tensors["base_model.model.model.embed_tokens.trainable_tokens_delta"])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_it_is_undone_exactly(tmp_path: Path, strength: float) -> None:
    adapted(tmp_path, LM, llama(tie_word_embeddings=True))
    merge(tmp_path / "base", f"{tmp_path / 'adapter'}:{strength}", tmp_path / "out", reversible=True)
    unmerge(tmp_path / "out", tmp_path / "again")
    base, again = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "again")
    assert base.keys() == again.keys() and all(raw(base[name]) == raw(again[name]) for name in base)
    changed = read_checkpoint(tmp_path / "out")["model.embed_tokens.weight"] != base["model.embed_tokens.weight"]
    assert sorted(INDICES) == changed.any(1).nonzero().flatten().tolist()


def test_rows_beside_another_change_of_the_tied_head(tmp_path: Path) -> None:
    adapted(tmp_path, LM, llama(tie_word_embeddings=True))
    tensors = {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 16), "base_model.model.lm_head.lora_B.weight": torch.ones(48, 2)}
    write_adapter(tmp_path / "lora", tensors, peft_config(target_modules=["lm_head"]))
    less(tmp_path)
    with pytest.raises(UnsupportedError, match="--untie"):
        merge(tmp_path / "base", [tmp_path / "less", tmp_path / "lora"], tmp_path / "out")
    merge(tmp_path / "base", [tmp_path / "less", tmp_path / "lora"], tmp_path / "out", untie=True)
    merged, new = read_checkpoint(tmp_path / "out"), read_adapter(tmp_path / "less")[0]
    expected = merged["model.embed_tokens.weight"] + 4.0  # alpha 4 over rank 2, times two ones
    assert torch.equal(merged["model.embed_tokens.weight"][INDICES], next(iter(new.values())))
    assert torch.allclose(merged["lm_head.weight"], expected, atol=1e-6)
    tensors["base_model.model.lm_head.lora_magnitude_vector"] = torch.ones(48)
    write_adapter(tmp_path / "dora", tensors, peft_config(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(UnsupportedError, match=r"are also those of lm_head\.weight, which is changed in another way"):
        merge(tmp_path / "base", [tmp_path / "less", tmp_path / "dora"], tmp_path / "none", untie=True)


def test_a_copy_that_differs_is_an_error(tmp_path: Path) -> None:
    adapted(tmp_path, LM, llama(tie_word_embeddings=True))
    tensors, config = read_adapter(tmp_path / "adapter")
    tensors["base_model.model.lm_head.trainable_tokens_delta"][0, 0] += 1
    write_adapter(tmp_path / "other", tensors, config)
    with pytest.raises(MatchError, match=r"lm_head\.trainable_tokens_delta: the config does not target this module"):
        merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")


def test_peft_cannot_run_a_tied_head_that_is_targeted_too(tmp_path: Path) -> None:
    """It nests one layer in the other, saves a third copy, and its own forward raises: refused here too."""
    model = adapted(tmp_path, LM, llama(tie_word_embeddings=True), target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(ValueError, match="wraps an unknown layer type"):
        model(IDS)
    with pytest.raises(FormatError, match="the same tensor twice under two spellings"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_peft_drops_the_bias_of_a_head(tmp_path: Path) -> None:
    """Its forward on a linear layer leaves the bias out; what is merged keeps it."""
    head = torch.nn.Sequential(torch.nn.Linear(4, 6))
    write_checkpoint(tmp_path / "base", head.state_dict())
    model = get_peft_model(head, TrainableTokensConfig(token_indices=[1], target_modules=["0"]))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, x = read_checkpoint(tmp_path / "out"), torch.randn(2, 4)
    assert torch.allclose(model(x), x @ merged["0.weight"].T, atol=1e-6)
    assert torch.equal(merged["0.bias"], read_checkpoint(tmp_path / "base")["0.bias"])
