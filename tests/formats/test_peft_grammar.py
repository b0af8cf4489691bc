"""The keys of a LoRA: every marker, with and without an adapter's name, and what peft never writes."""

from __future__ import annotations

import pytest

from loratools.errors import FormatError
from loratools.formats.peft_grammar import lora_key
from loratools.formats.peft_keys import Key

READ = {
    "a.q.lora_A.weight": Key("a.q", "lora_A"),
    "a.q.lora_A.default.weight": Key("a.q", "lora_A", "default"),
    "a.q.lora_B.bias": Key("a.q", "bias"),
    "lora_A.lora_B.weight": Key("lora_A", "lora_B"),
    "t.lora_embedding_A": Key("t", "lora_embedding_A"),
    "t.lora_embedding_B.mine": Key("t", "lora_embedding_B", "mine"),
    "q.lora_magnitude_vector": Key("q", "lora_magnitude_vector"),
    "q.lora_magnitude_vector.default.weight": Key("q", "lora_magnitude_vector", "default"),
    "q.lora_diag": Key("q", "lora_diag"),
    "q.lora_diag.default": Key("q", "lora_diag", "default"),
    "q.lora_velora_embed": Key("q", "lora_velora_embed"),
    "q.lora_monteclora_sampler.std_prior": Key("q", "lora_monteclora_sampler.std_prior"),
    "q.lora_monteclora_sampler.default.expert_weights": Key("q", "lora_monteclora_sampler.expert_weights", "default"),
    "e.token_adapter.trainable_tokens_delta": Key("e", "trainable_tokens_delta"),
    "e.token_adapter.trainable_tokens_delta.default": Key("e", "trainable_tokens_delta", "default"),
}  # fmt: skip


@pytest.mark.parametrize("path", READ)
def test_what_peft_writes(path: str) -> None:
    assert lora_key(path) == READ[path]


OTHERS = ["q.weight", "q.lora_C.weight", "lora_A.weight", "q.lora_A.a.b.weight", "q.lora_diagonal", "e.trainable_tokens_delta"]


@pytest.mark.parametrize("path", OTHERS)
def test_what_is_none_of_its_tensors(path: str) -> None:
    assert lora_key(path) is None


@pytest.mark.parametrize(
    "path, expected",
    [
        ("q.lora_A", r"lora_A\.weight"),
        ("q.lora_A.bias", r"lora_A\.weight"),
        ("q.lora_B.default", r"lora_B\.weight or lora_B\.bias"),
        ("t.lora_embedding_A.weight", "lora_embedding_A"),
        ("q.lora_magnitude_vector.bias", r"lora_magnitude_vector or lora_magnitude_vector\.weight"),
        ("q.lora_diag.weight", "lora_diag"),
        ("q.lora_monteclora_sampler", r"lora_monteclora_sampler\.std_prior or"),
        ("q.lora_monteclora_sampler.weight", r"lora_monteclora_sampler\.std_prior or"),
        ("e.token_adapter.trainable_tokens_delta.weight", r"token_adapter\.trainable_tokens_delta"),
    ],
)
def test_what_peft_never_writes(path: str, expected: str) -> None:
    with pytest.raises(FormatError, match=f"not a key peft writes: expected {expected}"):
        lora_key(path)
