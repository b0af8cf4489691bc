"""Whole transformers models under peft: what `save_pretrained` writes in all its ways merges to the same logits, or is refused.

Each case saves a tiny random base, adapts it by peft with random values, saves the adapter, merges from disk, loads the merged
folder with transformers and compares the two forwards in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from loratools import merge
from loratools.errors import LoratoolsError, UnsupportedError
from tests.files import read_config
from tests.interop.zoo import randomize

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
IDS = torch.arange(1, 13).reshape(2, 6)


def llama(**more: Any) -> tf.LlamaConfig:
    given = {"vocab_size": 48, "tie_word_embeddings": False} | more
    return tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **given
    )


def bert() -> tf.BertConfig:
    return tf.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20
    )


def gpt2() -> tf.GPT2Config:
    return tf.GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)


def t5() -> tf.T5Config:
    return tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)


def resized(size: int) -> Callable[[nn.Module], object]:
    return lambda model: model.resize_token_embeddings(size, mean_resizing=False)


@dataclass
class Case:
    """A base, the model of it that is trained (the base's own class if none), peft's settings; what merge is given and says."""

    base: type
    config: Any
    lora: dict[str, Any]
    wrapped: type | None = None
    save: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], object] | None = None
    merge: dict[str, Any] = field(default_factory=dict)
    loaded: type | None = None
    changed: dict[str, Any] = field(default_factory=dict)  # what config.json then says

    def adapt(self, folder: Path) -> nn.Module:
        torch.manual_seed(0)
        base = self.base(self.config).eval()
        with torch.no_grad():
            for parameter in base.parameters():  # biases start at zero, where losing one would not show
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        base.save_pretrained(folder / "base")
        model = (self.wrapped or self.base).from_pretrained(folder / "base").eval()
        if self.prepare:
            self.prepare(model)
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **self.lora))
        randomize(model)
        model.eval().save_pretrained(folder / "adapter", **self.save)
        return model


def logits(model: nn.Module) -> torch.Tensor:
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        return model.double()(**inputs)[0]


LM, SEQ, BARE, GPT, T5, MLM = (
    tf.LlamaForCausalLM, tf.LlamaForSequenceClassification, tf.LlamaModel, tf.GPT2LMHeadModel, tf.T5ForConditionalGeneration,
    tf.BertForMaskedLM,
)  # fmt: skip
BERT_SEQ = tf.BertForSequenceClassification
UNTIE = {"merge": {"untie": True}, "changed": {"tie_word_embeddings": False}}
EMBEDDINGS = {"save": {"save_embedding_layers": True}}
EQUAL = {
    # which modules: lists, names in full, regular expressions, shorthands, layers
    "list": Case(LM, llama(), {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "all-linear": Case(LM, llama(), {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "regex": Case(LM, llama(), {"target_modules": r".*layers\.[12]\..*(q|v)_proj"}),
    "layers": Case(LM, llama(), {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    "layers_pattern": Case(LM, llama(), {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    "layers_pattern at the root": Case(BARE, llama(), {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    "no layers": Case(LM, llama(), {"target_modules": ["q_proj"], "layers_to_transform": []}),
    "exclude": Case(LM, llama(), {"target_modules": "all-linear", "exclude_modules": ["o_proj", "model.layers.1.mlp.up_proj"]}),
    "exclude regex": Case(LM, llama(), {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.1\..*"}),
    "exclude at the root": Case(BARE, llama(), {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "patterns": Case(LM, llama(), {"target_modules": "all-linear", "rank_pattern": {r"1\..*proj": 5}, "alpha_pattern": {"[kv]_proj": 9}}),
    "dora": Case(LM, llama(), {"target_modules": "all-linear", "use_dora": True}),
    # bases with a prefix more or less than the model that was trained
    "prefix added": Case(LM, llama(), {"target_modules": ["q_proj"]}, wrapped=BARE, loaded=BARE),
    "prefix added, regex": Case(LM, llama(), {"target_modules": r"layers\.0\..*proj"}, wrapped=BARE, loaded=BARE),
    "prefix removed": Case(tf.GPT2Model, gpt2(), {"target_modules": ["c_attn", "c_proj"]}, wrapped=GPT),
    "prefix removed, new head": Case(
        tf.GPT2Model, gpt2(), {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"}, wrapped=tf.GPT2ForSequenceClassification
    ),
    # Conv1D, by the model's type
    "gpt2": Case(GPT, gpt2(), {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 dora": Case(GPT, gpt2(), {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "gpt2 all-linear": Case(GPT, gpt2(), {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    # heads and biases
    "new head": Case(LM, llama(), {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, wrapped=SEQ),
    "new head, tied base": Case(LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}, wrapped=SEQ),
    "new head with bias": Case(
        MLM, bert(), {"target_modules": ["query", "dense"], "task_type": "TOKEN_CLS"}, wrapped=tf.BertForTokenClassification
    ),
    "another head's biases": Case(
        MLM, bert(), {"target_modules": ["dense"], "task_type": "TOKEN_CLS", "bias": "all"}, wrapped=tf.BertForTokenClassification
    ),
    "questions": Case(
        tf.BertModel, bert(), {"target_modules": ["query"], "task_type": "QUESTION_ANS"}, wrapped=tf.BertForQuestionAnswering
    ),
    "biases, and the head's twice": Case(BERT_SEQ, bert(), {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "biases of LoRA": Case(BERT_SEQ, bert(), {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "lora_only"}),
    "lora_bias": Case(BERT_SEQ, bert(), {"target_modules": ["query", "classifier"], "lora_bias": True}),
    "T5": Case(T5, t5(), {"target_modules": "all-linear", "bias": "all", "task_type": "SEQ_2_SEQ_LM"}),
    "T5 relative bias": Case(T5, t5(), {"target_modules": ["q", "relative_attention_bias"]}),
    # embeddings that peft saves without being asked
    "embedding": Case(LM, llama(), {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding and head": Case(LM, llama(), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embedding and head, dora": Case(LM, llama(), {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True}),
    "embeddings saved": Case(LM, llama(), {"target_modules": ["q_proj"]}, **EMBEDDINGS),
    "embeddings saved, tied": Case(LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj"]}, **EMBEDDINGS),
    "embeddings saved, BERT": Case(MLM, bert(), {"target_modules": ["query"]}, **EMBEDDINGS),
    "embedding in modules_to_save": Case(LM, llama(), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    # resized vocabularies
    "larger": Case(LM, llama(), {"target_modules": ["q_proj"]}, prepare=resized(53), changed={"vocab_size": 53}),
    "smaller": Case(LM, llama(), {"target_modules": ["q_proj"]}, prepare=resized(43), changed={"vocab_size": 43}),
    "larger, tied": Case(
        LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj"]}, prepare=resized(53), changed={"vocab_size": 53}
    ),
    "larger, gpt2": Case(GPT, gpt2(), {"target_modules": ["c_attn"]}, prepare=resized(44), changed={"vocab_size": 44}),
    "larger, T5": Case(T5, t5(), {"target_modules": ["q"]}, prepare=resized(44), changed={"vocab_size": 44}),
    "larger and adapted": Case(
        LM, llama(), {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, prepare=resized(53), changed={"vocab_size": 53}
    ),
    "larger and saved": Case(
        LM, llama(), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, prepare=resized(53),
        changed={"vocab_size": 53},
    ),
    "larger, adapted and untied": Case(
        LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "embed_tokens"]}, prepare=resized(53),
        merge={"untie": True}, changed={"tie_word_embeddings": False, "vocab_size": 53},
    ),
    # tied embeddings
    "tied in training, saved": Case(
        LM, llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}, changed={"tie_word_embeddings": True},
    ),
    "tied in training, adapted": Case(
        LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        changed={"tie_word_embeddings": True},
    ),
    "tied in training, by the head": Case(
        LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        changed={"tie_word_embeddings": True},
    ),
    "untied embedding": Case(LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "embed_tokens"]}, **UNTIE),
    "untied head": Case(LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "lm_head"]}, **UNTIE),
    "untied both": Case(LM, llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "lm_head"]}, **UNTIE),
    "untied, dora": Case(
        LM, llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}, **UNTIE
    ),
    "untied gpt2": Case(GPT, gpt2(), {"target_modules": ["c_attn", "wte", "wpe"]}, **UNTIE),
    "untied BERT, its bias too": Case(
        MLM, bert(), {"target_modules": ["word_embeddings", "decoder"]}, **UNTIE
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
    merged, info = (case.loaded or case.wrapped or case.base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    found, expected = logits(merged.eval()), logits(model)
    base = logits((case.wrapped or case.base).from_pretrained(tmp_path / "base").eval())
    # half a unit in the last place of float32 in each weight, 6e-8, through a few layers
    assert float((found - expected).norm() / expected.norm()) <= 1e-6
    assert base.shape != expected.shape or float((base - expected).norm() / expected.norm()) > 1e-5


REFUSED = {
    "a tied embedding": (Case(LM, llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}), "--untie"),
    "a tied head": (Case(LM, llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}), "--untie"),
    "two unlike copies": (
        Case(LM, llama(tie_word_embeddings=True), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}), "--untie"
    ),
    "BERT's embedding": (Case(MLM, bert(), {"target_modules": ["word_embeddings"]}), "--untie"),
    "T5's shared embedding, which peft's forward does not read": (
        Case(T5, t5(), {"target_modules": ["q", "shared"]}, merge={"untie": True}), "encoder and decoder"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    case, words = REFUSED[name]
    case.adapt(tmp_path)
    with pytest.raises(UnsupportedError, match=words):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **case.merge)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_pooler_the_base_lacks_is_named(tmp_path: Path) -> None:
    case = Case(MLM, bert(), {"target_modules": ["dense"], "task_type": "SEQ_CLS"}, wrapped=BERT_SEQ)
    case.adapt(tmp_path)
    with pytest.raises(LoratoolsError, match=r"bert\.pooler\.dense\.weight: the base has no such weight"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
