"""fit of a mixture of experts: LoRA of peft's flat stacks becomes each expert's, where the base has them one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.errors import LoratoolsError
from tests.files import peft_config, write_adapter, write_checkpoint
from tests.ops._bases import ROOT
from tests.strategies import randn

EXPERTS, HIDDEN, INNER, RANK = 3, 8, 6, 2
MLP, ATTENTION = "model.layers.0.mlp.", "model.layers.0.self_attn."
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN, "moe_intermediate_size": INNER,
    "intermediate_size": 12, "num_experts": EXPERTS, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 4, "vocab_size": 16, "tie_word_embeddings": False,
}  # fmt: skip
STACKS = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint as the Hub has it, expert by expert."""
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    tensors = {
        f"{MLP}experts.{expert}.{word}.weight": randn(*shape, seed=10 * expert + seed)
        for expert in range(EXPERTS)
        for seed, (word, shape) in enumerate(shapes.items())
    }
    tensors |= {f"{ATTENTION}{word}_proj.weight": randn(HIDDEN, HIDDEN, seed=50 + seed) for seed, word in enumerate("qv")}
    tensors |= {"model.embed_tokens.weight": randn(16, HIDDEN, seed=60), "lm_head.weight": randn(16, HIDDEN, seed=61)}
    tensors[f"{MLP}gate.weight"] = randn(EXPERTS, HIDDEN, seed=62)
    return write_checkpoint(tmp_path / "base", tensors, CONFIG)


def adapter(path: Path, words: tuple[str, ...] = tuple(STACKS), **config: object) -> Path:
    """LoRA of the stacks, which peft wraps one in the other, and of the attention."""
    tensors = {}
    for depth, word in enumerate(reversed(words)):
        out, width = STACKS[word]
        place = f"{ROOT}{MLP}experts.{'base_layer.' * depth}"
        tensors[f"{place}lora_A.weight"] = randn(RANK * EXPERTS, width, seed=depth)
        tensors[f"{place}lora_B.weight"] = randn(out, RANK * EXPERTS, seed=depth + 5)
    for seed, word in enumerate("qv"):
        tensors[f"{ROOT}{ATTENTION}{word}_proj.lora_A.weight"] = randn(RANK, HIDDEN, seed=20 + seed)
        tensors[f"{ROOT}{ATTENTION}{word}_proj.lora_B.weight"] = randn(HIDDEN, RANK, seed=30 + seed)
    stated = {"target_parameters": [f"mlp.experts.{word}" for word in words], "peft_version": "0.21.2", "r": RANK, "lora_alpha": 4}
    return write_adapter(path, tensors, peft_config(target_modules=["q_proj", "v_proj"]) | stated | config)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("target", ["vllm", "sglang", "llama.cpp", "mlx"])
def test_with_the_base_each_expert_gets_its_lora(target: str, rslora: bool, tmp_path: Path, base: Path) -> None:
    mine = adapter(tmp_path / "a", use_rslora=rslora)
    assert not loratools.check(mine, target, base=base)["clean"]
    out = tmp_path / ("out.gguf" if target == "llama.cpp" else "out")
    receipt = loratools.fit(mine, out, target, base=base)
    assert loratools.check(out, target)["clean"]
    # scaling 4/2 is a power of two; rsLoRA's 4/√2 is rounded once into a float32 B
    assert max(row["error"] for row in receipt["tensors"]) <= (2.0**-24 if rslora else 0.0)
    if target == "mlx":  # stacks of its own, whose names only its models have
        stack = load_file(out / "adapters.safetensors")[f"{MLP}switch_mlp.gate_proj.lora_a"]
        assert stack.shape == (EXPERTS, RANK, HIDDEN)
        return
    assert loratools.check(out, target, base=base)["clean"]
    one, other = (loratools.merge(base, [path], tmp_path / f"m{i}") and load_file(tmp_path / f"m{i}" / "model.safetensors")
                  for i, path in enumerate((mine, out)))  # fmt: skip
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-6) for name in one)  # a float32 ulp or two of values about 1


@pytest.mark.parametrize(("target", "rule"), [("sglang", "experts"), ("llama.cpp", "experts"), ("mlx", "format")])
def test_without_the_base_it_is_asked_for(target: str, rule: str, tmp_path: Path) -> None:
    mine = adapter(tmp_path / "a")
    assert rule in {row["rule"] for row in loratools.check(mine, target)["findings"]}
    with pytest.raises(LoratoolsError, match="give --base") as caught:
        loratools.fit(mine, tmp_path / ("out.gguf" if target == "llama.cpp" else "out"), target)
    assert "whose experts and shape only the base tells" in str(caught.value)


def test_vllm_takes_both_stacks_or_none_and_says_for_which_models(tmp_path: Path, base: Path) -> None:
    found = loratools.check(adapter(tmp_path / "both"), "vllm")
    assert found["clean"] and "of models that it holds so" in found["notes"][0]
    found = loratools.check(adapter(tmp_path / "one", ("down_proj",)), "vllm")
    assert [(row["rule"], row["found"], row["fit"]) for row in found["findings"]] == [("experts", "without LoRA on gate_up_proj", "write")]
    found = loratools.check(tmp_path / "both", "vllm", base=base)
    assert {row["rule"] for row in found["findings"]} == {"fused_experts"}
    assert found["findings"][0]["unmeasured"] == "the base has it under other names, which are told by themselves"
    assert not any("of models that it holds so" in note for note in found["notes"])


def test_a_model_that_vllm_holds_fused_keeps_its_stacks(tmp_path: Path) -> None:
    tensors = {f"{MLP}experts.{word}": randn(EXPERTS, *shape, seed=seed) for seed, (word, shape) in enumerate(STACKS.items())}
    tensors |= {f"{ATTENTION}{word}_proj.weight": randn(HIDDEN, HIDDEN, seed=50 + seed) for seed, word in enumerate("qv")}
    fused = write_checkpoint(tmp_path / "base", tensors, CONFIG | {"model_type": "qwen3_vl_moe"})
    mine = adapter(tmp_path / "a")
    assert loratools.check(mine, "vllm", base=fused)["clean"]
    loratools.fit(mine, tmp_path / "out", "vllm", base=fused)
    one, other = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("a", "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
