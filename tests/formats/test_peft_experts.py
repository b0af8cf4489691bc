"""peft's `target_parameters`: which keys are whose wrappers, what each may be about, and files that are incomplete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parameters import Choice, OnParameter
from loratools.errors import LoratoolsError
from loratools.formats import load
from loratools.formats.peft_experts import parameter_names
from tests.files import peft_config, write_adapter

M = "model.layers.0.mlp.experts"
BOTH = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def factors(module: str, rows: int = 8) -> dict[str, Tensor]:
    root = f"base_model.model.{module}.lora"
    return {f"{root}_A.weight": torch.ones(rows, 5), f"{root}_B.weight": torch.ones(6, rows)}


def read(folder: Path, *modules: str, tensors: dict[str, Tensor] | None = None, **config: Any) -> Adapter:
    found = {key: tensor for module in modules for key, tensor in factors(module).items()} | (tensors or {})
    return load(write_adapter(folder / "adapter", found, peft_config(target_parameters=BOTH) | config))


def wrapper(adapter: Adapter, name: str) -> OnParameter:
    delta = adapter[name]
    assert isinstance(delta, OnParameter)
    return delta


def test_the_innermost_is_the_first_that_is_registered(tmp_path: Path) -> None:
    found = read(tmp_path, M, f"{M}.base_layer", lora_B_layout="grouped_by_expert", peft_version="0.20.0", use_rslora=True)
    inner, outer = wrapper(found, f"{M}.gate_up_proj"), wrapper(found, f"{M}.down_proj")
    assert (inner.depth, outer.depth, inner.module, outer.module) == (1, 0, M, M)
    assert inner.choices == outer.choices == (Choice(f"{M}.gate_up_proj", 4.0, 2), Choice(f"{M}.down_proj", 4.0, 2))
    assert (inner.packing, inner.version, inner.rslora) == ("grouped_by_expert", "0.20.0", True)
    assert found.parameters == 2 * (40 + 48)


def test_patterns_are_of_the_parameters_full_name(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"down_proj": 7, "experts": 9}, "alpha_pattern": {r"layers\.0.*gate_up_proj": 1.5}}
    found = read(tmp_path, M, target_parameters=BOTH, **patterns)
    assert wrapper(found, f"{M}.gate_up_proj").choices == (Choice(f"{M}.gate_up_proj", 1.5, 2), Choice(f"{M}.down_proj", 4.0, 7))
    assert found.notes == ("adapter_config.json: rank_pattern names experts, and the file has nothing there",)


@pytest.mark.parametrize(
    ("parameters", "target", "module", "names"),
    [
        (["mlp.experts.down_proj"], [], M, ["down_proj"]),
        (["experts.down_proj", "other.gate_up_proj"], None, M, ["down_proj"]),
        ([f"{M}.down_proj"], ["q_proj"], M, ["down_proj"]),
        (["down_proj"], ["q_proj"], M, ["down_proj"]),
        (["down_proj"], "all-linear", M, ["weight", "down_proj"]),
        (["gate.weight"], [], "model.layers.0.mlp.gate", ["weight"]),
    ],
)
def test_which_parameters_a_wrapper_may_be_about(tmp_path: Path, parameters: list[str], target: Any, module: str, names: list[str]) -> None:
    found = read(tmp_path, module, target_parameters=parameters, target_modules=target)
    (delta,) = found.values()
    assert isinstance(delta, OnParameter) and [choice.name for choice in delta.choices] == [f"{module}.{name}" for name in names]


@pytest.mark.parametrize("target", [["q_proj"], ".*q_proj"])
def test_a_module_that_is_targeted_is_a_layer(tmp_path: Path, target: Any) -> None:
    found = read(tmp_path, "layers.0.q_proj", M, target_modules=target, target_parameters=["down_proj"], r=8)
    assert isinstance(found["layers.0.q_proj.weight"], LowRank) and isinstance(found[f"{M}.down_proj"], OnParameter)


@pytest.mark.parametrize("target", [[], None])
def test_parameters_alone_target_no_module(tmp_path: Path, target: Any) -> None:
    with pytest.raises(LoratoolsError, match=r"q_proj\.lora_A\.weight: the config does not target this module"):
        read(tmp_path, "layers.0.q_proj", M, target_modules=target)


A, B = factors(M)


@pytest.mark.parametrize(
    ("modules", "tensors", "config", "message"),
    [
        ([f"{M}.base_layer"], {}, {}, rf"{M}\.lora_A: wraps other adapters of its module, and is not there; the file is incomplete"),
        ([M, f"{M}.base_layer.base_layer"], {}, {}, rf"{M}\.base_layer\.lora_A: wraps other adapters"),
        ([M, f"{M}.base_layer", f"{M}.base_layer.base_layer"], {}, {}, "3 adapters on the parameters of one module: expected at most 2: "),
        ([], {A: torch.ones(8, 5)}, {}, r"experts\.lora_A\.weight: has no lora_B beside it"),
        ([], {B: torch.ones(6, 8)}, {}, r"experts\.lora_B\.weight: has no lora_A beside it"),
        ([], {A: torch.ones(8, 5), B: torch.ones(6, 4)}, {}, r"A and B do not meet: found A \[8, 5\], B \[6, 4\], expected"),
        ([], {A: torch.ones(8, 5, 1), B: torch.ones(6, 8, 1)}, {}, "A and B do not meet"),
        ([], {A: torch.ones(0, 5), B: torch.ones(6, 0)}, {}, "A and B do not meet"),
        ([M], {A.replace("A.weight", "magnitude_vector"): torch.ones(6)}, {}, "no tensor of LoRA on a parameter: expected lora_A"),
        ([M], {A.replace("lora_A.weight", "lora_embedding_A"): torch.ones(6, 1)}, {}, "no tensor of LoRA on a parameter"),
        ([M, f"{M}.base_layer"], {}, {"target_modules": ["experts"]}, "LoRA on a module and on its parameters: peft does not allow both"),
    ],
)  # fmt: skip
def test_an_incomplete_file_is_an_error(
    tmp_path: Path, modules: list[str], tensors: dict[str, Tensor], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoratoolsError, match=message):
        read(tmp_path, *modules, tensors=tensors, **config)


def test_an_adapters_name_behind_the_marker(tmp_path: Path) -> None:
    tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in factors(f"{M}.base_layer").items()}
    found = read(tmp_path, tensors=tensors | {key.replace(".base_layer", ""): tensor for key, tensor in tensors.items()})
    assert set(found) == {f"{M}.gate_up_proj", f"{M}.down_proj"}


def test_the_packing_is_asked_for_where_unsloth_wrote_experts(tmp_path: Path) -> None:
    theirs = {"auto_mapping": {"unsloth_fixed": True}}
    with pytest.raises(LoratoolsError, match="Unsloth wrote it, whose versions pack the experts' B in two ways"):
        read(tmp_path, M, **theirs)
    found = read(tmp_path, "layers.0.q_proj", target_parameters=None, target_modules=["q_proj"], r=8, **theirs)
    assert list(found) == ["layers.0.q_proj.weight"]


def test_notes_on_parameters_that_nothing_is_about(tmp_path: Path) -> None:
    found = read(tmp_path, M, target_parameters=[*BOTH, "router.weight"])
    assert found.notes == ("adapter_config.json: target_parameters names router.weight, and the file has nothing there",)
    assert parameter_names(found) == [f"{M}.gate_up_proj", f"{M}.down_proj"]
