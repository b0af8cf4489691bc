"""Padded: a weight with zeros behind it, then the change, by plain algebra; through a merge the tensor grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import merge
from loratools.deltas.lowrank import LowRank
from loratools.deltas.padded import Padded
from loratools.errors import LoratoolsError, ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.files import read_checkpoint, write_checkpoint
from tests.strategies import randn

UP, DOWN, W = randn(6, 2, seed=0), randn(2, 7, seed=1), randn(4, 5, seed=2).double()
LOW = LowRank(A=to_ref(DOWN), B=to_ref(UP), alpha=3.0, layer="linear")
ROOT = "diffusion_model.img_in"


@pytest.mark.parametrize("shape", [(4, 5), (6, 5), (4, 7), (6, 7)])
def test_zeros_behind_and_then_the_change(tmp_path: Path, shape: tuple[int, int]) -> None:
    base, W = write_checkpoint(tmp_path / "base", {"img_in.weight": randn(*shape, seed=2).double()}), randn(*shape, seed=2).double()
    tensors = {f"{ROOT}.lora_up.weight": UP, f"{ROOT}.lora_down.weight": DOWN, f"{ROOT}.alpha": torch.tensor(3.0)}
    save_file(tensors | {f"{ROOT}.reshape_weight": torch.tensor([6, 7])}, tmp_path / "a.safetensors")
    receipt = merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    expected = torch.zeros(6, 7, dtype=torch.float64)
    expected[: shape[0], : shape[1]] = W
    expected += 1.5 * UP.double() @ DOWN.double()
    torch.testing.assert_close(read_checkpoint(tmp_path / "out")["img_in.weight"], expected, rtol=1e-12, atol=1e-12)
    assert receipt["applied"] == 1


def test_of_any_other_strength_a_new_shape_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"img_in.weight": W})
    tensors = {f"{ROOT}.lora_up.weight": UP, f"{ROOT}.lora_down.weight": DOWN, f"{ROOT}.reshape_weight": torch.tensor([6, 7])}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoratoolsError, match="strength 1"):
        merge(base, f"{tmp_path / 'a.safetensors'}:0.5", tmp_path / "out")


@pytest.mark.parametrize("shape", [(7, 5), (4, 8), (4, 5, 1), (4,)])
def test_weights_that_do_not_lie_within(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="is to grow to a shape that does not hold it"):
        Padded(delta=LOW, size=(6, 7)).spec(Spec("F32", shape))
    with pytest.raises(ShapeError, match="changes a tensor that the base lacks"):
        Padded(delta=LOW, size=(6, 7)).spec(None)
