"""Write PAIR/base and PAIR/tuned: a Llama-shaped checkpoint in bfloat16 shards and a full fine-tune of it, for the benchmarks.

usage: python tests/benchmarks/make_pair.py PAIR [LAYERS]     22 layers, the default, are 1.1 B parameters and 2.2 GB a side

The change of every projection has 64 directions whose singular values fall as k^-0.7, over a floor of noise; norms move a
little, embeddings and head do not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, GROUPED, VOCABULARY = 2048, 5632, 256, 32000
SHARD = 500_000_000
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the files."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        root = f"model.layers.{layer}"
        yield f"{root}.input_layernorm.weight", (HIDDEN,)
        for part, rows in (("q", HIDDEN), ("k", GROUPED), ("v", GROUPED), ("o", HIDDEN)):
            yield f"{root}.self_attn.{part}_proj.weight", (rows, HIDDEN)
        yield f"{root}.post_attention_layernorm.weight", (HIDDEN,)
        for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            yield f"{root}.mlp.{part}_proj.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def made(name: str, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight before and after."""

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    if len(shape) == 1:
        ones = torch.ones(shape)
        return ones.bfloat16(), (ones + 0.01 * random(*shape)).bfloat16()
    base = (random(*shape) / 50).bfloat16()
    if "_proj" not in name:
        return base, base
    rank = min(64, *shape)
    falling = 0.3 / torch.arange(1, rank + 1) ** 0.7
    change = (random(shape[0], rank) * falling) @ random(rank, shape[1]) / (shape[0] * shape[1]) ** 0.5
    return base, (base.float() + change + 2e-5 * random(*shape)).bfloat16()


def sharded(layers: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The names in shards of at most SHARD bytes."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes(layers):
        count = 2 * torch.Size(shape).numel()
        if shards[-1] and size + count > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += count
    return shards


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pair", type=Path)
    parser.add_argument("layers", type=int, nargs="?", default=22)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    folders = [options.pair / side for side in ("base", "tuned")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": options.layers}, indent=2))
    shards, where, total = sharded(options.layers), {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        both = {name: made(name, shape, generator) for name, shape in shard}
        for side, folder in enumerate(folders):
            save_file({name: weights[side] for name, weights in both.items()}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(both, file)
        total += sum(2 * weights[0].numel() for weights in both.values())
    for folder in folders:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    print(f"{total / 1e9:.2f} GB in {len(shards)} shards a side")


if __name__ == "__main__":
    main()
