"""peft's multiplicative methods beyond the matrix: what needs its CUDA extension, what is no weight edit; every byte comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import BOFTConfig, OFTConfig, PsoftConfig
from peft.tuners.boft import layer as boft
from torch import Tensor

from loratools import merge, unmerge
from loratools.errors import UnsupportedError
from tests.interop.cases_multiplicative import CASES, scaled_near_one
from tests.interop.methods import Case, near_one
from tests.interop.zoo import TRANSPOSED, difference, merged_outputs, new_base, outputs


def block_diagonals(blocks: Tensor) -> Tensor:
    """What peft's extension computes: (m, count, b, b) as m block-diagonal matrices."""
    return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        (("linear", "square"), {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
        (("linear", "even2"), {"boft_block_size": 6, "boft_n_butterfly_factor": 1}),
        (("linear",), {"boft_block_size": 2, "boft_n_butterfly_factor": 3}),
        (("linear",), {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3}),
    ],
)
def test_butterflies_of_several_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: tuple[str, ...], settings: dict[str, Any]
) -> None:
    """peft makes them where its CUDA extension is; here torch's block_diag stands in for that, and all else is peft's own forward."""
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft, "FastBlockDiag", SimpleNamespace(apply=block_diagonals))
    model = Case(BOFTConfig, layers, settings, scaled_near_one).wrapped(tmp_path)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, expected = ({layer: made[layer] for layer in layers} for made in (merged_outputs(tmp_path / "out"), outputs(model)))
    assert max(difference(found, expected).values()) <= 1e-6  # of float32 weights, which merging rounds once


def test_oft_of_a_kernel_is_no_change_of_its_weight(tmp_path: Path) -> None:
    """peft 0.21.2 adds up overlapping patches of the input: untrained, its rotations the identity, it changes the output beyond telling."""
    case = Case(OFTConfig, ("even2",), {"oft_block_size": 3}, lambda name, tensor, noise: torch.zeros_like(tensor))
    found, before = outputs(case.wrapped(tmp_path))["even2"], outputs(new_base(tmp_path / "unused", torch.float32))["even2"]
    assert float((found - before).norm() / before.norm()) > 1
    with pytest.raises(UnsupportedError, match=r"even2\.weight: .*adds the patches up where they overlap"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def turned_and_scaled(name: str, tensor: Tensor, noise: torch.Generator) -> Tensor:
    """A rotation's numbers, and the vectors about 1 that scale what it is given and gives."""
    return near_one(name, tensor, noise) if "vector" in name else 0.3 * torch.randn(tensor.shape, generator=noise)


def test_psoft_is_another_weight_for_every_choice_of_signs(tmp_path: Path) -> None:
    """The base's singular vectors times −1 are as good, and peft, which computes them anew where it loads, then gives another output."""
    model = Case(PsoftConfig, ("linear",), {"r": 4, "psoft_alpha": 4}, turned_and_scaled).wrapped(tmp_path)
    before, layer = outputs(copy.deepcopy(model))["linear"], model.base_model.model.linear
    A, B = layer._get_psoft_ab_cache_buffers("default")
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    layer._set_psoft_ab_cache_buffers("default", A * signs.unsqueeze(1), B * signs)
    assert torch.allclose((B * signs) @ (A * signs.unsqueeze(1)), B @ A, rtol=1e-5, atol=1e-6)  # the same part of the base
    assert float((outputs(model)["linear"] - before).norm() / before.norm()) > 0.05
    with pytest.raises(UnsupportedError, match="peft's PSOFT"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("ia3")])
def test_every_byte_comes_back(tmp_path: Path, name: str) -> None:
    CASES[name].wrapped(tmp_path)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", reversible=True, transposed=TRANSPOSED)
    unmerge(tmp_path / "out", out=tmp_path / "back", adapters=[tmp_path / "adapter"])
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()
