"""Tiny models that trainers' own programs adapt, and what their adapters are held against: transformers' logits of what loratools merged.

The models are a few kilobytes each and lie in tests/data/trained with the adapters that each program trained and saved on them, and the
logits that it then had itself. tests/data/make_trained.py makes all of them again; how, tests/data/README.md tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from loratools import merge
from tests.interop.zoo import randomize

DATA = Path(__file__).parent.parent / "data" / "trained"
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
NEOX = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")
BASES = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, head_dim=4)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),  # biases of q, k and v
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=8)),  # heads · size is not hidden_size
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZES, head_dim=4, num_local_experts=3, num_experts_per_tok=2)),
    "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES | {"tie_word_embeddings": True, "num_hidden_layers": 1}, head_dim=4)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**SIZES | {"tie_word_embeddings": True, "num_hidden_layers": 1}, head_dim=8)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**SIZES)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**{key: SIZES[key] for key in NEOX}, num_attention_heads=2)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}
TOKENS = torch.tensor([[1, 5, 9, 30, 7, 12, 3, 21], [1, 17, 4, 4, 26, 11, 8, 19]])
STEP = 0.05  # of Adam: every weight of a factor moves by about as much, so that two steps show in the logits


def make_base(kind: str, folder: Path) -> None:
    """A random model in float32 as transformers saves it, with the words for its rotations that older programs look for."""
    torch.manual_seed(0)
    model = BASES[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.2 * torch.randn(parameter.shape))
    (model.transformer if kind == "gpt2" else model).save_pretrained(folder)  # as the gpt2 of OpenAI was saved
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {key: config["rope_parameters"][key] for key in ("rope_theta",) if "rope_parameters" in config}
    config |= {"n_ctx": 64} if kind == "gpt2" else {}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def hugging_face(folder: Path) -> Any:
    """The model in float64, so that a comparison has the program's own rounding alone."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plain).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found.double()


def merged_logits(base: Path, adapter: Path, out: Path, **options: Any) -> Tensor:
    """What transformers computes with the base that loratools merged an adapter into; every delta must have met its tensor."""
    receipt = merge(base, adapter, out, dtype="float64", **options)
    assert receipt["applied"] == receipt["expected"] > 0
    return logits_of(hugging_face(out))


def assert_same(found: Tensor, expected: Tensor, plain: Tensor, atol: float = 1e-4) -> None:
    """Logits of two programs in float32.

    A dozen layers with sums of at most 32 products round some hundred times at 6e-8 of values up to about 10: 1e-4 is far above that, and
    the change that the adapter makes must be far above it in turn, else a test would pass without the adapter.
    """
    assert found.shape == expected.shape
    changed = (expected - plain).abs()
    assert changed.max() > 0.1 and changed.mean() > 0.01, "the adapter hardly changes the model"
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def peft_adapter(base: Path, folder: Path, *, targets: list[str], **more: Any) -> Tensor:
    """A random peft adapter of a base, and peft's logits with it; its factors are in float32 as it saves them."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"} | more)
    with patch("peft.tuners.lora.torchao.is_torchao_available", return_value=False):  # peft refuses the torchao that torchtune needs
        model = get_peft_model(t.AutoModelForCausalLM.from_pretrained(base), config)
        randomize(model)
        model.save_pretrained(folder, save_embedding_layers=False)
        return logits_of(PeftModel.from_pretrained(hugging_face(base), folder).double().eval())


def cases(program: str) -> list[str]:
    """The adapters that a program saved, as BASE-CASE."""
    return sorted(file.name.removesuffix(".npy") for file in (DATA / program).glob("*.npy"))


def recorded(program: str, case: str) -> tuple[Path, Path, Tensor]:
    """(base, adapter, the program's own logits) of one of them."""
    base = DATA / "bases" / case.partition("-")[0]
    return base, DATA / program / case, torch.from_numpy(np.load(DATA / program / f"{case}.npy")).double()


def steps() -> Iterator[Tensor]:
    """Two batches to train on."""
    yield TOKENS
    yield TOKENS.flip(0).roll(3, dims=1)
