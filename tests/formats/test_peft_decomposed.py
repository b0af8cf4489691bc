"""Rows of methods that decompose the base: which shared vector, which shared basis is whose."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from loratools import merge
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, ShapeError, UnsupportedError
from loratools.formats import load
from loratools.formats.peft_decomposed import category
from tests.files import read_adapter, read_checkpoint, write_adapter, write_checkpoint
from tests.interop.cases_banked import CASES

NAMES = ("q_proj", "k_proj", "v_proj")  # registered in this order, sorted in another


class Network(nn.Module):
    """Eleven layers of three linear maps each: more than nine, so that their numbers as words sort in another order again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"self_attn": nn.ModuleDict({name: nn.Linear(8, 12 if name == "q_proj" else 10, bias=False) for name in NAMES})})
            for _ in range(11)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer["self_attn"][name](x) for layer in self.layers for name in NAMES], dim=-1)  # type: ignore[index]


def compared(folder: Path, config: Any) -> tuple[float, int]:
    """How far what is merged is from what peft computes, and how many weights changed."""
    torch.manual_seed(0)
    network = Network()
    write_checkpoint(folder / "base", network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(network, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape)).add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "adapter")
    receipt = merge(folder / "base", folder / "adapter", folder / "out")
    merged = Network()
    merged.load_state_dict(read_checkpoint(folder / "out"))
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        found, expected = merged.double()(x), model.double()(x)
    return float((found - expected).norm() / expected.norm()), receipt["applied"]


@pytest.mark.parametrize("tied", [0.0, 0.3, 0.5, 0.97, 1.0])
def test_every_layer_takes_its_groups_vector(tmp_path: Path, tied: float) -> None:
    config = peft.TinyLoraConfig(r=2, u=3, weight_tying=tied, target_modules=list(NAMES), init_weights="uniform", init_v_bound=1.0)
    assert compared(tmp_path, config) == (pytest.approx(0, abs=1e-5), 33)  # float32 weights


def test_layers_of_one_kind_share_a_basis(tmp_path: Path) -> None:
    config = peft.FrodConfig(target_modules=list(NAMES), sparse_rate=0.1, progressbar=False)
    assert compared(tmp_path, config) == (pytest.approx(0, abs=1e-5), 33)
    assert {name for name in read_adapter(tmp_path / "adapter")[0] if "frod_V" in name} == {
        f"base_model.frod_V.self_attn_{name}" for name in NAMES
    }


def test_bfloat16_projections_still_tell_their_layer(tmp_path: Path) -> None:
    config = peft.TinyLoraConfig(r=2, u=30, target_modules=list(NAMES), init_weights="uniform", init_v_bound=1.0)
    compared(tmp_path, config)
    tensors, stated = read_adapter(tmp_path / "adapter")
    wide = load(tmp_path / "adapter")
    narrow = load(write_adapter(tmp_path / "narrow", {k: v.bfloat16() if "_P" in k else v for k, v in tensors.items()}, stated))
    for name, delta in narrow.items():
        assert bytes(delta.refs()["v"].read()) == bytes(wide[name].refs()["v"].read())


def test_categories_are_those_of_peft() -> None:
    from peft.tuners.frod.model import _category_from_key

    paths = ["x", "h.0.c_fc", "layers.3.self_attn.q_proj", "encoder.layer.0.attention.output.dense", "layer.1.output.dense", "output.dense"]
    assert [category(path) for path in paths] == [_category_from_key(path) for path in paths]


FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], type[LoratoolsError], str]] = {
    "another seed": (
        "tinylora", {}, {"projection_seed": 99}, AmbiguousError,
        "which of the shared vectors is this layer's is told by its projections, and these are no layer's: found projection_seed 99",
    ),
    "projections that are none": (
        "tinylora", {"linear.tinylora_P": torch.ones(5, 3)}, {}, ShapeError, r"no projections: found \[5, 3\], expected \[u, r, r\]"
    ),
    "no projections": (
        "tinylora", {f"{name}.tinylora_P": None for name in ("linear", "square", "table")}, {"save_projection": False}, UnsupportedError,
        "drawn in an order of the layers that only the model tells; load it with peft, set save_projection to true",
    ),
    "projections that peft would drop": (
        "tinylora", {}, {"save_projection": False}, FormatError, "save_projection is false, so peft would drop tinylora_P"
    ),
    "more than all": ("tinylora", {}, {"weight_tying": 1.5}, FormatError, r"weight_tying: found 1.5, expected a number from 0 to 1"),
    "fewer groups": ("tinylora", {}, {"weight_tying": 1.0}, FormatError, r"tinylora_v\.\d: not used by this method's formula"),
    "more groups": ("tinylora, tied in part", {}, {"weight_tying": 0.0}, FormatError, r"the file has no base_model\.tinylora_v\.2"),
    "another rank": ("tinylora", {}, {"r": 2}, ShapeError, "not the config's: found rank 3, 5 projections, expected rank 2, u 5"),
    "another number of projections": ("tinylora", {}, {"u": 6}, ShapeError, "expected rank 3, u 6"),
    "no basis": (
        "frod", {}, {"save_projection": False}, FormatError, r"save_projection is false, so peft would drop frod_V\.linear"
    ),
    "no basis at all": (
        "frod", {f"base_model.frod_{name}.{kind}": None for name in ("V", "s_indices", "s_size") for kind in ("linear", "square")},
        {"save_projection": False}, UnsupportedError, "its basis is not in the file, and a joint decomposition",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_file_does_not_tell_is_an_error(tmp_path: Path, fault: str) -> None:
    case, tensors, config, error, text = FAULTS[fault]
    CASES[case].wrapped(tmp_path)
    held, stated = read_adapter(tmp_path / "adapter")
    more = {name if name.startswith("base_model.") else f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    changed = {name: tensor for name, tensor in {**held, **more}.items() if tensor is not None}
    with pytest.raises(LoratoolsError, match=text) as caught:
        load(write_adapter(tmp_path / "changed", changed, stated | config))
    faults = getattr(caught.value, "errors", [caught.value])
    assert any(isinstance(one, error) for one in faults)


def test_projections_of_several_layers_are_told_apart_or_refused(tmp_path: Path) -> None:
    """A single number, rounded to bfloat16, is not enough for many layers: then it is an error."""
    config = peft.TinyLoraConfig(r=1, u=1, target_modules=list(NAMES), init_weights="uniform", projection_seed=0)
    compared(tmp_path, config)
    tensors, stated = read_adapter(tmp_path / "adapter")
    tensors = {name: torch.zeros_like(tensor).bfloat16() if "_P" in name else tensor for name, tensor in tensors.items()}
    with pytest.raises(LoratoolsError, match="these are no layer's"):
        load(write_adapter(tmp_path / "narrow", tensors, stated))
