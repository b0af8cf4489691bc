"""Rows of peft's elementwise methods: GLoRA's kinds of paths, with and without a bias; HiRA's ranks; and PSOFT, which is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import merge
from loratools.errors import FormatError, MatchError, ShapeError, UnsupportedError
from loratools.formats import load
from tests.files import read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

ROOT = "base_model.model.x."
CONFIG: dict[str, Any] = {
    "peft_type": "GLORA", "target_modules": ["x"], "r": 2, "config_A_B": "vector", "config_C": "none", "config_D_E": "none",
}  # fmt: skip


def paths(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{ROOT}glora_{name.replace('_', '.')}": tensor for name, tensor in tensors.items()}


OFF = paths(C_zeros=torch.zeros(4, 1), D_zeros=torch.zeros(3), E_zeros=torch.zeros(3))
VECTORS = paths(A_X=randn(3, 1, seed=0), B_X=randn(3, 1, seed=1))


def test_a_module_without_a_bias(tmp_path: Path) -> None:
    W = randn(3, 4, seed=2)
    adapter = write_adapter(tmp_path / "adapter", VECTORS | OFF, CONFIG)
    merge(write_checkpoint(tmp_path / "base", {"x.weight": W}), adapter, tmp_path / "out")
    expected = W.double() * (1 + randn(3, 1, seed=0).double()) + randn(3, 1, seed=1).double()
    assert torch.allclose(read_checkpoint(tmp_path / "out")["x.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_what_is_for_a_bias_is_not_lost_where_there_is_none(tmp_path: Path) -> None:
    trained = VECTORS | OFF | paths(E_X=torch.ones(3), D_X=torch.ones(3))
    trained = {name: tensor for name, tensor in trained.items() if not name.endswith(("D.zeros", "E.zeros"))}
    adapter = write_adapter(tmp_path / "adapter", trained, CONFIG | {"config_D_E": "vector"})
    with pytest.raises(MatchError, match=r"x\.bias: the base has no such weight"):
        merge(write_checkpoint(tmp_path / "base", {"x.weight": torch.ones(3, 4)}), adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "changes", "text"),
    [
        (VECTORS, {}, r"has no glora_D\.zeros beside it"),
        ({k: v for k, v in (VECTORS | OFF).items() if "C.zeros" not in k}, {}, r"has no glora_C\.zeros beside it"),
        (VECTORS | OFF | paths(A_zeros=torch.zeros(3, 4)), {}, r"glora_A\.zeros: not used by this method's formula"),
        (VECTORS | OFF, {"config_A_B": "lora"}, r"has no glora_A\.Xd beside it"),
        (VECTORS | OFF, {"config_A_B": "constant"}, r"glora_A is no constant: found \[3, 1\], expected \[1\]"),
        (OFF | paths(A_X=torch.ones(1), B_X=torch.ones(1)), {}, r"glora_A is no vector: found \[1\], expected \[out, 1\]"),
        (VECTORS | OFF, {"config_A_B": "full"}, "config_A_B: found 'full', expected lora or vector or constant or none"),
    ],
)
def test_paths_against_the_config(tmp_path: Path, tensors: dict[str, torch.Tensor], changes: dict[str, Any], text: str) -> None:
    with pytest.raises((FormatError, ShapeError), match=text):
        load(write_adapter(tmp_path, tensors, CONFIG | changes))


def test_the_coupling_must_fit_the_weight(tmp_path: Path) -> None:
    tensors = VECTORS | {name: tensor for name, tensor in OFF.items() if "C.zeros" not in name} | paths(C_X=torch.ones(5, 1))
    adapter = write_adapter(tmp_path / "adapter", tensors, CONFIG | {"config_C": "vector"})
    base = write_checkpoint(tmp_path / "base", {"x.weight": torch.ones(3, 4), "x.bias": torch.ones(3)})
    with pytest.raises(ShapeError, match=r"x\.bias: does not fit the weight: found \[5, 1\], expected \[in, r\] for \[3, 4\]"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def hira(folder: Path, rank: int, **changes: Any) -> Any:
    tensors = {f"{ROOT}hira_A": torch.ones(rank, 4), f"{ROOT}hira_B": torch.ones(3, rank)}
    return load(write_adapter(folder, tensors, {"peft_type": "HIRA", "target_modules": ["x"], "r": 4} | changes))["x.weight"]


def test_a_rank_by_pattern_or_not(tmp_path: Path) -> None:
    """peft 0.21.2 makes every module of rank r; should it come to heed its pattern, such files are read too."""
    for rank in (4, 2):
        assert hira(tmp_path / str(rank), rank, rank_pattern={"x": 2}).facts()["rank"] == rank
    with pytest.raises(ShapeError, match="the rank is not the config's: found 3, expected 2"):
        hira(tmp_path / "other", 3, rank_pattern={"x": 2})


@pytest.mark.parametrize(
    ("A", "B", "slots"), [((4, 4, 3), (3, 4), "A B"), ((4, 4, 3), (3, 4, 3), "A B"), ((4, 9), (3, 5), "embedding_A embedding_B")]
)
def test_factors_that_do_not_meet(tmp_path: Path, A: tuple[int, ...], B: tuple[int, ...], slots: str) -> None:
    a, b = slots.split()
    tensors = {f"{ROOT}hira_{a}": torch.ones(A), f"{ROOT}hira_{b}": torch.ones(B)}
    with pytest.raises(ShapeError, match="A and B do not meet"):
        load(write_adapter(tmp_path, tensors, {"peft_type": "HIRA", "target_modules": ["x"], "r": 4}))


def test_psoft_is_refused_with_what_to_do(tmp_path: Path) -> None:
    tensors = {f"{ROOT}psoft_R.weight": torch.ones(6), f"{ROOT}psoft_R.vector_a": torch.ones(4), f"{ROOT}psoft_R.vector_b": torch.ones(4)}
    folder = write_adapter(tmp_path, tensors, {"peft_type": "PSOFT", "target_modules": ["x"], "r": 4})
    with pytest.raises(UnsupportedError, match=r"peft's PSOFT: .*their signs.*does not save; merge it with peft where it was trained"):
        load(folder)
