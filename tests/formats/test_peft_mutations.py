"""Every single change to a good adapter is an error, or changes the merge exactly as the format says it should; none is silent.

One adapter with all that peft's LoRA holds (matrices, an embedding, a convolution, biases, a saved module) and its DoRA twin,
each tensor of which is deleted, renamed, doubled, resized; each setting of which is flipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import merge
from loratools.errors import LoratoolsError
from tests.files import peft_config, raw, read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

ROOT = "base_model.model."
SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens": (17, 8), "conv": (6, 4, 3), "head": (5, 8), "norm": (8,),
    **{f"layers.{i}.{name}": shape for i in range(2) for name, shape in {"q": (8, 8), "k": (4, 8), "up": (12, 8)}.items()},
}  # fmt: skip
BIASED = [name for name in SHAPES if name not in ("embed_tokens",)]
BASE = {f"{name}.weight": randn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())} | {
    f"{name}.bias": randn(SHAPES[name][0], seed=50 + i) for i, name in enumerate(BIASED)
}


@dataclass
class Good:
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def good(*, dora: bool) -> Good:
    """LoRA on q and up of both layers, the embedding and the convolution; the head saved; biases of LoRA'd modules saved."""
    tensors: dict[str, Tensor] = {}
    adapted = [name for name in SHAPES if name.endswith((".q", ".up", "conv", "embed_tokens"))]
    for index, name in enumerate(adapted):
        shape, key = SHAPES[name], ROOT + name
        if name == "embed_tokens":
            tensors |= {f"{key}.lora_embedding_A": randn(2, 17, seed=index), f"{key}.lora_embedding_B": randn(8, 2, seed=index + 9)}
            tensors[f"{key}.base_layer.weight"] = BASE["embed_tokens.weight"].clone()
        else:
            ones = (1,) * (len(shape) - 2)
            tensors |= {
                f"{key}.lora_A.weight": randn(2, *shape[1:], seed=index),
                f"{key}.lora_B.weight": randn(shape[0], 2, *ones, seed=index + 9),
            }
            tensors[f"{key}.base_layer.bias"] = randn(shape[0], seed=index + 70)
            if not dora:
                tensors[f"{key}.lora_B.bias"] = randn(shape[0], seed=index + 90)
        if dora:
            size = shape[1] if name == "embed_tokens" else shape[0]
            magnitude = 1 + randn(size, seed=index + 30).square()
            tensors[f"{key}.lora_magnitude_vector"] = magnitude.reshape(1, size, 1) if name == "conv" else magnitude
    tensors |= {f"{ROOT}head.weight": randn(5, 8, seed=40), f"{ROOT}head.bias": randn(5, seed=41)}
    config = peft_config(
        target_modules=["q", "up", "conv", "embed_tokens"], modules_to_save=["head"], bias="lora_only", use_dora=dora, lora_bias=not dora,
        rank_pattern={}, alpha_pattern={"conv": 5}, use_rslora=False, fan_in_fan_out=False, init_lora_weights=True, task_type=None,
        layers_to_transform=None, exclude_modules=None, ensure_weight_tying=False,
    )  # fmt: skip
    return Good(tensors, config)


def outcome(folder: Path, case: Good) -> str | dict[str, bytes]:
    """What the merge gives: the bytes of each tensor, or the error's text."""
    write_checkpoint(folder / "base", BASE)
    write_adapter(folder / "adapter", case.tensors, case.config)
    try:
        merge(folder / "base", folder / "adapter", folder / "out")
    except LoratoolsError as error:
        assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]
        return str(error)
    return {name: raw(tensor) for name, tensor in read_checkpoint(folder / "out").items()}


TENSORS: dict[str, Callable[[dict[str, Tensor], str], dict[str, Tensor]]] = {
    "deleted": lambda tensors, key: {name: tensor for name, tensor in tensors.items() if name != key},
    "renamed": lambda tensors, key: {name.replace(".", "x.", 3) if name == key else name: tensor for name, tensor in tensors.items()},
    "of another layer": lambda tensors, key: {
        name.replace("layers.1", "layers.7").replace(ROOT, f"{ROOT}y.", int("layers.1" not in name)) if name == key else name: tensor
        for name, tensor in tensors.items()
    },
    "without the prefix": lambda tensors, key: {
        name.removeprefix(ROOT) if name == key else name: tensor for name, tensor in tensors.items()
    },
    "under two adapters": lambda tensors, key: tensors | {_named(key): tensors[key]},
    "with a stray beside it": lambda tensors, key: tensors | {f"{key}.more": tensors[key]},
    "one row more": lambda tensors, key: tensors | {key: torch.cat([tensors[key], tensors[key][:1]])},
    "one column more": lambda tensors, key: tensors | {key: torch.cat([tensors[key], tensors[key][..., :1]], dim=-1)},
    "flattened": lambda tensors, key: tensors | {key: tensors[key].reshape(-1, 1, 1, 1, 1)},
    "nan": lambda tensors, key: tensors | {key: torch.full_like(tensors[key], float("nan"))},
    "whole numbers": lambda tensors, key: tensors | {key: tensors[key].to(torch.int32)},
}  # fmt: skip


def _named(key: str) -> str:
    """The key in a second spelling."""
    head, _, leaf = key.rpartition(".")
    return f"{key}.other" if leaf.startswith("lora_") else f"{head}.other.{leaf}"


KEYS = {dora: list(good(dora=dora).tensors) for dora in (False, True)}


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_change_of_a_tensor_is_an_error(tmp_path: Path, dora: bool, change: str) -> None:
    silent = []
    for number, key in enumerate(KEYS[dora]):
        case = good(dora=dora)
        case.tensors = TENSORS[change](case.tensors, key)
        found = outcome(tmp_path / str(number), case)
        if not isinstance(found, str):
            silent.append(key)
    # a saved embedding may be absent, as peft saves it only for some names, and take other rows only if its LoRA does
    allowed = {f"{ROOT}embed_tokens.base_layer.weight"} if change == "deleted" else set()
    assert set(silent) <= allowed, silent


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_whole_module_missing_is_an_error(tmp_path: Path, dora: bool) -> None:
    for number, module in enumerate(sorted({key.partition(".lora_")[0] for key in KEYS[dora] if ".lora_" in key})):
        case = good(dora=dora)
        case.tensors = {key: tensor for key, tensor in case.tensors.items() if not key.startswith(module + ".")}
        found = outcome(tmp_path / str(number), case)
        assert isinstance(found, str) and module.removeprefix(ROOT) in found, module


# setting: its new value, and the tensors whose bytes must change with it (None: it must be an error)
ROUNDS = [name for name in BASE if name.endswith((".q.weight", ".up.weight"))]
ADAPTED = ["embed_tokens.weight", "conv.weight", *ROUNDS]
SETTINGS: list[tuple[dict[str, Any], list[str] | None]] = [
    ({"lora_alpha": 4.5}, [name for name in ADAPTED if name != "conv.weight"]),
    ({"alpha_pattern": {"conv": 6}}, ["conv.weight"]),
    ({"alpha_pattern": {}}, ["conv.weight"]),
    ({"alpha_pattern": {"conv": 5, "q": 9}}, [name for name in ADAPTED if ".q." in name]),
    ({"alpha_pattern": {"conv": 5, r"layers\.0.*": 9}}, [name for name in ADAPTED if "layers.0" in name]),
    ({"use_rslora": True}, ADAPTED),
    ({"r": 3}, None), ({"rank_pattern": {"up": 3}}, None), ({"rank_pattern": {"up": 2}}, []),
    ({"use_dora": "flip"}, None), ({"lora_bias": "flip"}, None), ({"bias": "none"}, None), ({"bias": "all"}, []),
    ({"modules_to_save": None}, None), ({"modules_to_save": ["head", "norm"]}, None), ({"modules_to_save": ["head", "k"]}, None),
    ({"target_modules": ["q", "up", "conv"]}, None), ({"target_modules": ["up", "conv", "embed_tokens"]}, None),
    ({"target_modules": r".*(q|up)|conv|embed_tokens"}, []), ({"target_modules": "layers.*"}, None),
    ({"exclude_modules": ["conv"]}, None), ({"exclude_modules": ["k"]}, []), ({"layers_to_transform": [0]}, None),
    ({"fan_in_fan_out": True}, None), ({"init_lora_weights": "pissa"}, None), ({"init_lora_weights": False}, []),
    ({"peft_type": "LOHA"}, None), ({"use_qalora": True}, None), ({"a_new_setting": 1}, None), ({"lora_alpha": None}, None),
    ({"lora_dropout": 0.5}, []), ({"peft_version": "9.9"}, []),
]  # fmt: skip


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[str(change) for change, _ in SETTINGS])
def test_every_change_of_a_setting(tmp_path: Path, dora: bool, number: int) -> None:
    change, changed = copy.deepcopy(SETTINGS[number])
    case, before = good(dora=dora), outcome(tmp_path / "before", good(dora=dora))
    case.config |= {name: not case.config[name] if value == "flip" else value for name, value in change.items()}
    after = outcome(tmp_path / "after", case)
    assert isinstance(before, Mapping)
    if changed is None:
        assert isinstance(after, str)
        return
    assert isinstance(after, Mapping), after
    moved = {name for name in before if before[name] != after[name]}
    expected = set(changed)
    if not dora:  # the bias of lora_B is scaled like its product
        expected |= {name.replace(".weight", ".bias") for name in changed if name != "embed_tokens.weight"}
    assert moved == expected
