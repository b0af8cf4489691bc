"""A base and an adapter that merge, and ways to spoil them, for test_bad_inputs.

A spoiler takes a `Pair` and changes one thing about it; those with arguments are made by a function that takes them.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import llama_config, llama_tensors
from tests.files import peft_config, read_adapter, write_adapter, write_checkpoint

ROOT = "base_model.model.model.layers."
A, B = ROOT + "1.self_attn.q_proj.lora_A.weight", ROOT + "1.self_attn.q_proj.lora_B.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
BASE, FACTORS, CONFIG = "base/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
INDEX, PICKLE = "base/model.safetensors.index.json", "adapter/adapter_model.bin"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@dataclass
class Pair:
    """A base and an adapter on disk, and the command that merges them."""

    folder: Path
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base, self.adapter, self.out = self.folder / "base", self.folder / "adapter", self.folder / "out"
        self.weights, self.factors = self.base / "model.safetensors", self.adapter / "adapter_model.safetensors"
        write_checkpoint(self.base, llama_tensors(), llama_config())
        generator = torch.Generator().manual_seed(1)
        shapes = {"q": (8, 8), "v": (4, 8)}
        tensors = {}
        for layer in (0, 1):
            for name, (rows, columns) in shapes.items():
                root = f"{ROOT}{layer}.self_attn.{name}_proj"
                tensors[f"{root}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
                tensors[f"{root}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
        write_adapter(self.adapter, tensors, peft_config(target_modules=["q_proj", "v_proj"]))

        self.given_base, self.given, self.words = str(self.base), str(self.adapter), list[str]()

    @property
    def command(self) -> list[str]:
        return self.words or ["merge", self.given_base, self.given, "-o", str(self.out), *self.options]

    def config(self, **more: Any) -> None:
        """Set keys of adapter_config.json; `...` removes one."""
        path = self.adapter / "adapter_config.json"
        table = json.loads(path.read_text()) | more
        path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))

    def factor(self, **more: Any) -> None:
        """Replace factors of the second layer's q_proj."""
        self.tensors({ROOT + "1.self_attn.q_proj." + key.replace("__", "."): value for key, value in more.items()})

    def tensors(self, more: dict[str, Any]) -> None:
        """Set tensors of the adapter; `...` removes one."""
        table = read_adapter(self.adapter)[0] | more
        save_file({key: value.contiguous().clone() for key, value in table.items() if value is not ...}, self.factors)

    def weight(self, name: str, value: Tensor | None) -> None:
        table = load_file(self.weights)
        table |= {name: value} if value is not None else {}
        kept = {key: tensor for key, tensor in table.items() if key != name or value is not None}
        save_file(kept, self.weights, metadata={"format": "pt"})

    def header(self, edit: Callable[[dict[str, Any]], object], path: Path | None = None) -> None:
        """Edit a safetensors header as JSON, its length kept true, the data as it is."""
        path = path or self.weights
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + size])
        edit(table)
        text = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    def sharded(self, edit: Callable[[dict[str, Any]], object] = lambda index: None) -> None:
        """The base in two shards, their index edited."""
        self.weights.unlink()
        write_checkpoint(self.base, llama_tensors(), llama_config(), shards=2)
        path = self.base / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index)
        path.write_text(json.dumps(index))

    def base_config(self, **more: Any) -> None:
        (self.base / "config.json").write_text(json.dumps(llama_config(**more)))

    def pickled(self, value: object) -> None:
        """The adapter as adapter_model.bin of whatever object."""
        self.factors.unlink()
        torch.save(value, self.adapter / "adapter_model.bin")

    def pickled_base(self, value: object) -> None:
        """The base as pytorch_model.bin of whatever object."""
        self.weights.unlink()
        torch.save(value, self.base / "pytorch_model.bin")

    def tied(self) -> None:
        self.weight("lm_head.weight", None)
        self.base_config(tie_word_embeddings=True)

    def quantised(self, more: dict[str, Tensor]) -> None:
        save_file({key: tensor.clone() for key, tensor in (load_file(self.weights) | more).items()}, self.weights)

    def write(self, path: str, data: bytes) -> None:
        (self.folder / path).unlink(missing_ok=True)
        (self.folder / path).write_bytes(data)


class Evil:
    """Unpickling it makes a folder; nothing may unpickle it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code-in-the-pickle-ran",)


def entry(name: str, **more: Any) -> Callable[[Pair], None]:
    return lambda pair: pair.header(lambda table: table[name].update(more))


def rewire(name: str, shard: str) -> Callable[[Pair], None]:
    return lambda pair: pair.sharded(lambda index: index["weight_map"].update({name: shard}))


def behind_the_index(**more: Tensor) -> Callable[[Pair], None]:
    """Two shards, and tensors more in the second than the index knows."""

    def spoil(pair: Pair) -> None:
        pair.sharded()
        save_file(load_file(pair.base / SECOND) | more, pair.base / SECOND)

    return spoil


def grouped_convolution(pair: Pair) -> None:
    """A convolution in place of q_proj, and a LoRA of two groups on it: its second factor is half as wide."""
    pair.weight(Q, torch.randn(8, 8, 3))
    pair.factor(lora_A__weight=torch.randn(2, 8, 3), lora_B__weight=torch.randn(8, 1, 1))


def move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def two_models(pair: Pair) -> None:
    move(pair.weights, pair.base / "one.safetensors")
    (pair.base / "two.safetensors").write_bytes((pair.base / "one.safetensors").read_bytes())


def adapter_in_the_bases_place(pair: Pair) -> None:
    pair.weights.unlink()
    write_adapter(pair.base, {A: torch.ones(2, 8)}, peft_config())


def pipeline(pair: Pair) -> None:
    move(pair.weights, pair.base / "unet" / "diffusion_pytorch_model.safetensors")
    pair.write("base/model_index.json", b"{}")


def another_model(pair: Pair) -> None:
    pair.weights.unlink()
    write_checkpoint(pair.base, llama_tensors(hidden=16), llama_config())


def only_strangers(pair: Pair) -> None:
    """Every module of the adapter under a name the base does not have."""
    table = read_adapter(pair.adapter)[0]
    pair.tensors(dict.fromkeys(table, ...) | {key.replace("self_attn", "attention"): value for key, value in table.items()})


def swapped(pair: Pair) -> None:
    pair.factor(lora_A__weight=torch.ones(8, 2), lora_B__weight=torch.ones(2, 8))


def rank_nought(pair: Pair) -> None:
    pair.config(r=...)
    pair.factor(lora_A__weight=torch.ones(0, 8), lora_B__weight=torch.ones(8, 0))


def one_stray_pair(pair: Pair) -> None:
    pair.tensors({A.replace("layers.1", "layers.7"): torch.ones(2, 8), B.replace("layers.1", "layers.7"): torch.ones(8, 2)})


def other_embedding(pair: Pair) -> None:
    pair.config(modules_to_save=["embed_tokens"])
    pair.tensors({"base_model.model.model.embed_tokens.weight": torch.ones(17, 9)})


def two_in_one_file(pair: Pair) -> None:
    pair.tensors({A: ..., B: ..., A.replace("A.w", "A.one.w"): torch.ones(2, 8), B.replace("B.w", "B.two.w"): torch.ones(8, 2)})


def magnitude(*shape: int) -> Callable[[Pair], None]:
    def spoil(pair: Pair) -> None:
        pair.config(use_dora=True)
        for module in {key.partition(".lora_")[0] for key in read_adapter(pair.adapter)[0]}:
            pair.tensors({f"{module}.lora_magnitude_vector": torch.ones(8 if "q_proj" in module else 4)})
        pair.factor(lora_magnitude_vector=torch.ones(shape))

    return spoil


def tied_head(pair: Pair) -> None:
    pair.tied()
    pair.config(modules_to_save=["lm_head"])
    pair.tensors({"base_model.model.lm_head.weight": torch.ones(17, 8)})


def old_pickle(pair: Pair) -> None:
    pair.factors.unlink()
    pair.write(PICKLE, pickle.dumps(Evil(), protocol=2))


def cut_pickle(pair: Pair) -> None:
    pair.pickled({A: torch.ones(2, 8)})
    cut(PICKLE, 300)(pair)


def no_pickle(pair: Pair) -> None:
    pair.factors.unlink()
    pair.write(PICKLE, b"hello")


def out(path: str, *more: str) -> Callable[[Pair], None]:
    """Ask for another OUT, relative to the folder that holds the inputs."""

    def spoil(pair: Pair) -> None:
        pair.out = pair.folder / path
        pair.options += more

    return spoil


def adapter_as(suffix: str) -> Callable[[Pair], None]:
    def spoil(pair: Pair) -> None:
        pair.given = f"{pair.adapter}{suffix}"

    return spoil


def instead(**paths: str) -> Callable[[Pair], None]:
    """Give another path as base or adapter."""

    def spoil(pair: Pair) -> None:
        for name, path in paths.items():
            setattr(pair, {"base": "given_base", "adapter": "given"}[name], str(pair.folder / path))

    return spoil


def words(*text: str) -> Callable[[Pair], None]:
    """Another command altogether; {} is the folder that holds the inputs."""

    def spoil(pair: Pair) -> None:
        pair.words = [word.replace("{}", str(pair.folder)) for word in text]

    return spoil


def then(*spoils: Callable[[Pair], object]) -> Callable[[Pair], None]:
    def spoil(pair: Pair) -> None:
        for each in spoils:
            each(pair)

    return spoil


def tuned(edit: Callable[[dict[str, Tensor]], object], *more: str) -> Callable[[Pair], None]:
    """extract from the base and a tuned copy of it, edited."""

    def spoil(pair: Pair) -> None:
        tensors = {name: tensor + 1 for name, tensor in llama_tensors().items()}
        edit(tensors)
        write_checkpoint(pair.folder / "tuned", tensors, llama_config())
        pair.words = ["extract", str(pair.base), str(pair.folder / "tuned"), "-o", str(pair.out), *(more or ("--rank", "2"))]

    return spoil


def cut(path: str, length: int) -> Callable[[Pair], None]:
    return lambda pair: pair.write(path, (pair.folder / path).read_bytes()[:length])


def put(path: str, data: bytes) -> Callable[[Pair], None]:
    return lambda pair: pair.write(path, data)


def config(**more: Any) -> Callable[[Pair], None]:
    return lambda pair: pair.config(**more)


def factor(**more: Any) -> Callable[[Pair], None]:
    return lambda pair: pair.factor(**more)


def tensor(name: str, value: Any) -> Callable[[Pair], None]:
    return lambda pair: pair.tensors({name: value})


def weight(name: str, value: Tensor) -> Callable[[Pair], None]:
    return lambda pair: pair.weight(name, value)


def base_config(**more: Any) -> Callable[[Pair], None]:
    return lambda pair: pair.base_config(**more)


def moved(source: str, target: str) -> Callable[[Pair], None]:
    return lambda pair: move(pair.folder / source, pair.folder / target)


def quantised(more: dict[str, Tensor]) -> Callable[[Pair], None]:
    return lambda pair: pair.quantised(more)


def option(*more: str) -> Callable[[Pair], None]:
    return lambda pair: pair.options.extend(more)
