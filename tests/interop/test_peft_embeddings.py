"""Embeddings and heads under peft, live: adapted on top of what was saved or resized, tied in training, tied in the base alone, scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from loratools import merge
from loratools.deltas.compose import Chain
from loratools.errors import LoratoolsError, UnsupportedError
from loratools.formats import load
from tests.files import read_adapter, read_config, write_adapter
from tests.interop.test_peft_models import GPT, LM, MLM, UNTIE, Case, bert, gpt2, llama, logits, resized


def gemma() -> tf.Gemma3TextConfig:
    """Its embedding multiplies what it looks up by √hidden, whatever is added to it, and its head is tied."""
    return tf.Gemma3TextConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    )


TIED = llama(tie_word_embeddings=True)
TYING = {"ensure_weight_tying": True}
EMBEDDINGS = {"save": {"save_embedding_layers": True}}
EQUAL = {
    "both listed, tied in training": Case(
        LM, TIED, {"target_modules": ["embed_tokens", "lm_head"], **TYING}, changed={"tie_word_embeddings": True}
    ),
    "both by a regular expression, tied in training": Case(
        LM, TIED, {"target_modules": r".*(embed_tokens|lm_head|q_proj)", **TYING}, changed={"tie_word_embeddings": True}
    ),
    "saved by the embedding, tied in training": Case(
        LM, TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], **TYING}, changed={"tie_word_embeddings": True}
    ),
    "saved both, tied in training": Case(
        LM, TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], **TYING},
        changed={"tie_word_embeddings": True},
    ),
    "rslora and patterns, tied in training": Case(
        LM, TIED, {
            "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True, "alpha_pattern": {"q_proj": 5}, "rank_pattern": {"q_proj": 4},
            **TYING,
        },
        changed={"tie_word_embeddings": True},
    ),
    "larger, adapted, tied in training": Case(
        LM, TIED, {"target_modules": ["embed_tokens"], **TYING}, prepare=resized(53),
        changed={"tie_word_embeddings": True, "vocab_size": 53},
    ),
    "smaller, adapted": Case(LM, llama(), {"target_modules": ["embed_tokens", "lm_head"]}, prepare=resized(43), changed={"vocab_size": 43}),
    "larger, adapted beside a saved head": Case(
        LM, llama(), {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, prepare=resized(53), changed={"vocab_size": 53}
    ),
    "larger, the head adapted beside a saved embedding": Case(
        LM, llama(), {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, prepare=resized(53), changed={"vocab_size": 53}
    ),
    "larger, tied, the head alone adapted": Case(
        LM, TIED, {"target_modules": ["lm_head"]}, prepare=resized(53), merge={"untie": True},
        changed={"tie_word_embeddings": False, "vocab_size": 53},
    ),
    "gpt2, adapted and saved": Case(GPT, gpt2(), {"target_modules": ["wte", "c_attn"]}, merge={"untie": True}, **EMBEDDINGS),
    # peft ties only what is called embed_tokens, and warns of others
    "gpt2, not tied in training": Case(GPT, gpt2(), {"target_modules": ["wte", "c_attn"], **TYING}, **UNTIE),
    "BERT, not tied in training": Case(MLM, bert(), {"target_modules": ["word_embeddings", "query"], **TYING}, **UNTIE),
    "a scaled embedding": Case(tf.Gemma3ForCausalLM, gemma(), {"target_modules": ["embed_tokens", "q_proj"]}, **UNTIE),
    "a scaled embedding, dora": Case(tf.Gemma3ForCausalLM, gemma(), {"target_modules": ["embed_tokens"], "use_dora": True}, **UNTIE),
    "a scaled embedding, trained tokens": Case(
        tf.Gemma3ForCausalLM, gemma(), {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2, 11]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_merges_to_the_forward_of_peft(tmp_path: Path, name: str) -> None:
    case = EQUAL[name]
    model = case.adapt(tmp_path)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **case.merge)
    assert receipt["applied"] == receipt["expected"] > 0
    config = read_config(tmp_path / "out")
    assert {key: config[key] for key in case.changed} == case.changed
    merged, info = case.base.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    found, expected = logits(merged.eval()), logits(model)
    base = logits(case.base.from_pretrained(tmp_path / "base").eval())
    assert float((found - expected).norm() / expected.norm()) <= 1e-6  # weights rounded once to float32
    assert base.shape != expected.shape or float((base - expected).norm() / expected.norm()) > 1e-4


def test_what_is_adapted_on_a_saved_embedding_is_a_chain(tmp_path: Path) -> None:
    EQUAL["larger, adapted beside a saved head"].adapt(tmp_path)
    adapter = load(tmp_path / "adapter")
    delta = adapter["model.embed_tokens.weight"]
    assert isinstance(delta, Chain) and delta.first.kind == "replacement" and delta.then.kind == "lora"
    assert adapter["lm_head.weight"].kind == "replacement"


KEY = "base_model.model.model.embed_tokens."
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "the saved embedding smaller than its LoRA": ({"base_layer.weight": lambda t: t[:50]}, r"model\.embed_tokens\.weight: does not fit"),
    "the LoRA of the old vocabulary": ({"lora_embedding_A": lambda t: t[:, :48]}, r"model\.embed_tokens\.weight: does not fit"),
    "the saved embedding of another width": ({"base_layer.weight": lambda t: t[:, :8]}, "does not fit the base's"),
    "half a pair": ({"lora_embedding_B": lambda t: None}, "has no lora_embedding_B beside it"),
    "the saved embedding missing": ({"base_layer.weight": lambda t: None}, r"model\.embed_tokens\.weight: does not fit"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resized_embedding_and_its_lora_fit_each_other(tmp_path: Path, change: str) -> None:
    EQUAL["larger, adapted beside a saved head"].adapt(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    for end, make in CHANGES[change][0].items():
        value = make(tensors.pop(KEY + end))
        tensors |= {} if value is None else {KEY + end: value}
    write_adapter(tmp_path / "other", tensors, config)
    with pytest.raises(LoratoolsError, match=CHANGES[change][1]):
        merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")


def test_a_saved_head_of_another_size_than_the_embedding(tmp_path: Path) -> None:
    EQUAL["larger, adapted beside a saved head"].adapt(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"][:51]
    write_adapter(tmp_path / "other", tensors, config)
    with pytest.raises(LoratoolsError, match="two vocabularies of different size"):
        merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")


def test_a_dora_tied_in_training_is_of_two_axes(tmp_path: Path) -> None:
    """peft ties the factors, not the magnitudes: embedding and head differ, and take --untie."""
    case = Case(LM, TIED, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True, **TYING})
    model = case.adapt(tmp_path)
    with pytest.raises(UnsupportedError, match="each in a way of its own"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", untie=True)
    found = logits(LM.from_pretrained(tmp_path / "out").eval())
    assert torch.allclose(found, logits(model), atol=1e-5)


def test_a_resized_head_that_peft_does_not_save(tmp_path: Path) -> None:
    """Where only the embedding is adapted peft saves that alone, and begins the head anew when it loads: an error says what is missing."""
    case = Case(LM, llama(), {"target_modules": ["embed_tokens", "q_proj"]}, prepare=resized(53))
    case.adapt(tmp_path)
    assert "base_model.model.lm_head.weight" not in read_adapter(tmp_path / "adapter")[0]
    with pytest.raises(LoratoolsError, match=r"lm_head\.weight: the adapter resizes the vocabulary, and does not save this tensor of it"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
