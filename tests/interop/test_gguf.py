"""GGUF by its own package: what loratools writes, read by GGUFReader, has the names of gguf's tensor map, and llama.cpp's rows and scale.

The permutation of q's and k's rows and the places of experts are said again here, from llama.cpp's `conversion/*.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as t
from gguf import MODEL_ARCH, GGUFReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratools import convert, fit, merge
from loratools.errors import LoratoolsError, NotExpressible
from tests.files import peft_config, read_checkpoint, write_adapter
from tests.interop.zoo import randomize
from tests.strategies import randn

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"tie_word_embeddings": False}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = [*QKVO, "gate_proj", "up_proj", "down_proj"]
ENDS = ["embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Family:
    """A tiny model, its architecture in GGUF, the modules that LoRA is put on, and the side's heads whose rows are interleaved."""

    make: Callable[[], nn.Module]
    arch: MODEL_ARCH
    targets: list[str]
    heads: Mapping[str, int] = field(default_factory=dict)
    turned: bool = False


def _gpt2() -> nn.Module:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))


def _llama() -> nn.Module:
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=False))


FAMILIES = {
    "llama": Family(_llama, MODEL_ARCH.LLAMA, [*DENSE, *ENDS], {"q_proj": 4, "k_proj": 2}),
    "qwen2": Family(lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**QWEN)), MODEL_ARCH.QWEN2, [*DENSE, *ENDS]),
    "gemma": Family(lambda: t.GemmaForCausalLM(t.GemmaConfig(**SIZES)), MODEL_ARCH.GEMMA, DENSE),
    "gpt2": Family(_gpt2, MODEL_ARCH.GPT2, ["c_attn", "c_proj", "c_fc"], turned=True),
}


def base_of(make: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """A random model, saved by transformers."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def wrapped(family: Family, folder: Path, **more: Any) -> None:
    """The model's folder and, beside it, that of a random LoRA which peft saves."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=family.targets, fan_in_fan_out=family.turned, **more)
    model = get_peft_model(base_of(family.make, folder / "base"), config)
    randomize(model)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)


def pairs_of(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module as peft has them: (r, in) and (out, r), an embedding's (r, vocabulary) and (dimension, r)."""
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(file).items()}
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    pairs = {module: (tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]) for module in modules}
    found = [key for key in tensors if key.endswith("lora_embedding_A")]
    return pairs | {key.rpartition(".")[0]: (tensors[key], tensors[key[:-1] + "B"]) for key in found}


def permuted(weights: Tensor, heads: int) -> Tensor:
    """`LlamaModel.permute` of llama.cpp's conversion/llama.py, the heads of k given for k."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and fields by the gguf package's own reader; shapes are as numpy has them, the reverse of ggml's."""
    reader = GGUFReader(file)
    for tensor in reader.tensors:
        assert tuple(reversed(tensor.shape.tolist())) == tensor.data.shape
    return (
        {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors},
        {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")},
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_package_reads_names_rows_and_alpha(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    wrapped(family, tmp_path)
    convert(tmp_path / "adapter", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    tensors, fields = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 6.0
    assert fields["general.architecture"] == gguf.MODEL_ARCH_NAMES[family.arch]
    names = gguf.get_tensor_name_map(family.arch, 2)
    expected: dict[str, Tensor] = {}
    for module, (A, B) in pairs_of(tmp_path / "adapter" / "adapter_model.safetensors").items():
        word = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        assert word is not None, module
        heads = family.heads.get(module.rpartition(".")[2])
        embedded = word == "token_embd.weight"  # lora_a (vocabulary, r), lora_b (dimension, r): llama-graph.cpp looks rows up
        expected |= {f"{word}.lora_a": A.T if embedded else A, f"{word}.lora_b": permuted(B, heads) if heads else B}
    assert set(tensors) == set(expected) and len(tensors) == 2 * len(pairs_of(tmp_path / "adapter" / "adapter_model.safetensors"))
    for key, tensor in expected.items():
        assert torch.equal(tensors[key], tensor), key


@pytest.mark.parametrize("name", FAMILIES)
def test_to_gguf_and_back_to_peft(tmp_path: Path, name: str) -> None:
    """The factors that peft saved come back bit for bit, and all three merge to the same file."""
    wrapped(FAMILIES[name], tmp_path)
    convert(tmp_path / "adapter", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    convert(tmp_path / "a.gguf", tmp_path / "back", format="peft", base=tmp_path / "base")
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    merged = []
    for index, source in enumerate(("adapter", "a.gguf", "back")):
        receipt = merge(tmp_path / "base", tmp_path / source, tmp_path / f"out{index}")
        assert receipt["applied"] == receipt["expected"] == len(before) // 2
        merged.append(read_checkpoint(tmp_path / f"out{index}"))
    assert any(not torch.equal(merged[0][key], tensor) for key, tensor in read_checkpoint(tmp_path / "base").items())
    assert all(torch.equal(merged[0][key], other[key]) for other in merged[1:] for key in merged[0])


# -- experts, which GGUF stacks


EXPERTS: dict[str, tuple[Callable[[], nn.Module], MODEL_ARCH, str, tuple[str, str, str], str]] = {
    "mixtral": (
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=1)), MODEL_ARCH.LLAMA,
        "model.layers.{}.block_sparse_moe.experts.{}.{}", ("w1", "w2", "w3"), "layers.{}.feed_forward.experts.{}",
    ),
    "qwen2_moe": (
        lambda: t.Qwen2MoeForCausalLM(
            t.Qwen2MoeConfig(**QWEN, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=12, shared_expert_intermediate_size=12)
        ), MODEL_ARCH.QWEN2MOE,
        "model.layers.{}.mlp.experts.{}.{}", ("gate_proj", "down_proj", "up_proj"), "model.layers.{}.mlp.experts.{}",
    ),
}  # fmt: skip


def expert_adapter(name: str, folder: Path, experts: int = 3) -> dict[str, Tensor]:
    """peft's LoRA of each expert, as it was saved while they were modules of their own; its tensors without their prefix."""
    _, _, path, parts, _ = EXPERTS[name]
    base = read_checkpoint(folder / "base")
    tensors: dict[str, Tensor] = {}
    for block in range(2):
        for expert in range(experts):
            for part in parts:
                module, seed = path.format(block, expert, part), len(tensors)
                out, width = base[f"{module}.weight"].shape
                tensors |= {f"{module}.lora_A.weight": randn(4, width, seed=seed), f"{module}.lora_B.weight": randn(out, 4, seed=seed + 1)}
    config = peft_config(target_modules=rf".*\.experts\.[0-{experts - 1}]\.({'|'.join(parts)})", r=4, lora_alpha=6)
    write_adapter(folder / "adapter", {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, config)
    return tensors


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_stacked(tmp_path: Path, name: str) -> None:
    make, arch, path, parts, merged = EXPERTS[name]
    base_of(make, tmp_path / "base")
    tensors = expert_adapter(name, tmp_path)
    convert(tmp_path / "adapter", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    found, fields = read(tmp_path / "a.gguf")
    names = gguf.get_tensor_name_map(arch, 2)
    assert fields["general.architecture"] == gguf.MODEL_ARCH_NAMES[arch] and len(found) == 2 * 2 * 3
    for block in range(2):
        for part in parts:
            word = names.get_name(f"{merged.format(block, part)}.weight", try_suffixes=(".weight",))
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                stack = torch.stack([tensors[f"{path.format(block, expert, part)}.{theirs}.weight"] for expert in range(3)])
                assert torch.equal(found[f"{word}.{ours}"], stack)
    outs = []
    for index, source in enumerate(("adapter", "a.gguf")):
        receipt = merge(tmp_path / "base", tmp_path / source, tmp_path / f"out{index}")
        assert receipt["applied"] == receipt["expected"]
        outs.append(read_checkpoint(tmp_path / f"out{index}"))
    assert all(torch.equal(outs[0][key], outs[1][key]) for key in outs[0])
    assert any(not torch.equal(outs[0][key], tensor) for key, tensor in read_checkpoint(tmp_path / "base").items())


def test_a_stack_that_lacks_an_expert(tmp_path: Path) -> None:
    base_of(EXPERTS["mixtral"][0], tmp_path / "base")
    expert_adapter("mixtral", tmp_path, experts=2)
    with pytest.raises(LoratoolsError, match="all 3 experts, and the adapter has not one of each: found none of expert 2"):
        convert(tmp_path / "adapter", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")


# -- what peft saves whole beside its LoRA


def test_an_embedding_that_peft_saved_whole(tmp_path: Path) -> None:
    """peft saves a targeted embedding's own weight too unless told not to: GGUF has no place for it, and the error says the way."""
    family = FAMILIES["llama"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])
    model = get_peft_model(base_of(family.make, tmp_path / "base"), config)
    randomize(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(NotExpressible, match=r"saved whole.*fit --for llama\.cpp.*save_embedding_layers=False") as caught:
        convert(tmp_path / "adapter", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    assert "--kind lora" not in str(caught.value)
    fit(tmp_path / "adapter", tmp_path / "fit.gguf", target="llama.cpp", base=tmp_path / "base")
    assert {"token_embd.weight.lora_a", "blk.1.attn_q.weight.lora_b"} <= set(read(tmp_path / "fit.gguf")[0])
    file = tmp_path / "adapter" / "adapter_model.safetensors"  # as save_embedding_layers=False leaves it
    save_file({key: tensor for key, tensor in load_file(file).items() if "lora_" in key}, file)
    convert(tmp_path / "adapter", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    assert set(read(tmp_path / "a.gguf")[0]) == set(read(tmp_path / "fit.gguf")[0])
