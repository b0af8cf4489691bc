"""GLoRA and rotations: older layouts and cores by their algebra, sd-scripts' rotations by its formula, written as they were read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools import merge
from loratools.adapter import Adapter
from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.compose import Chain, Part
from loratools.deltas.rotated import Rotated
from loratools.errors import LoratoolsError, NotExpressible
from loratools.formats import encode, kohya, load
from loratools.tensors import read_tensor, to_ref
from tests.files import read_checkpoint, write_checkpoint
from tests.formats.test_kohya import GLORA, LINEAR, MODULE, OLD_GLORA, W, close, merged
from tests.strategies import randn


def again(folder: Path, tensors: dict[str, Tensor], format: str = "kohya") -> dict[str, Tensor]:
    """What is written of a file that was read."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "again.safetensors")
    return {key: read_tensor(ref) for key, ref in encode(load(folder / "again.safetensors"), format).tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert set(one) == set(other)
    return all(torch.equal(one[key], other[key]) and one[key].shape == other[key].shape for key in one)


def test_the_older_layout_is_the_newer_transposed(tmp_path: Path) -> None:
    a1, a2, b1, b2 = (OLD_GLORA[f"{name}.weight"].double() for name in ("a1", "a2", "b1", "b2"))
    change = LINEAR.double() @ a2 @ a1 + b2 @ b1  # comfy/weight_adapter/glora.py
    found = merged(tmp_path, OLD_GLORA | {"alpha": torch.tensor(3.0)}, LINEAR)
    assert close(found, LINEAR.double() + 1.5 * change)


@pytest.mark.parametrize("older", [True, False])
def test_on_a_square_weight_the_rank_tells_the_layout(tmp_path: Path, older: bool) -> None:
    square, (a1, a2, b1, b2) = randn(4, 4, seed=0), (randn(*shape, seed=i) for i, shape in enumerate([(4, 2), (2, 4), (4, 2), (2, 4)]))
    names = ("a2", "a1", "b2", "b1") if older else ("a1", "a2", "b1", "b2")
    tensors = {f"{name}.weight": tensor for name, tensor in zip(names, (a1, a2, b1, b2), strict=True)}
    expected = square.double() + square.double() @ a1.double() @ a2.double() + b1.double() @ b2.double()
    assert close(merged(tmp_path, tensors, square), expected)


def test_a_core(tmp_path: Path) -> None:
    core = randn(2, 2, 3, 3, seed=7)
    a1, a2, b1, b2 = (GLORA[f"{name}.weight"].double() for name in ("a1", "a2", "b1", "b2"))
    change = torch.einsum("oikl,ij,jc->ockl", W.double(), a1, a2) + torch.einsum("mnkl,om,ni->oikl", core.double(), b1, b2)
    tensors = GLORA | {"bm.weight": core, "alpha": torch.tensor(3.0)}
    assert close(merged(tmp_path, tensors, W), W.double() + 1.5 * change)
    written = again(tmp_path, {f"{MODULE}.{slot}": tensor for slot, tensor in tensors.items()})
    assert written[f"{MODULE}.bm.weight"].shape == (2, 2, 3, 3) and written[f"{MODULE}.b2.weight"].shape == (2, 4, 1, 1)


BLOCKS = randn(3, 2, 2, seed=1) * 0.3
CASES = {
    "GLoRA": GLORA | {"alpha": torch.tensor(3.0)},
    "oft": {"oft_blocks": BLOCKS, "alpha": torch.tensor(0.0)},
    "oft, bounded and scaled": {"oft_blocks": BLOCKS, "alpha": torch.tensor(0.1), "rescale": randn(6, 1, seed=2)},
    "boft": {"oft_blocks": randn(2, 4, 2, 2, seed=3), "alpha": torch.tensor(0.0)},
    "boft, bounded and scaled": {"oft_blocks": randn(2, 4, 2, 2, seed=3), "alpha": torch.tensor(1 / 3), "rescale": randn(8, 1, seed=2)},
}


@pytest.mark.parametrize("name", CASES)
def test_written_as_read(tmp_path: Path, name: str) -> None:
    tensors = {f"{MODULE}.{slot}": tensor for slot, tensor in CASES[name].items()}
    assert same(again(tmp_path, tensors), tensors)


def own(blocks: Tensor, W: Tensor, alpha: float) -> Tensor:
    """sd-scripts' forward, networks/oft.py, in float64."""
    Q = blocks.double() - blocks.double().transpose(1, 2)
    norm = Q.norm()
    Q = Q * ((min(float(norm), alpha * len(W)) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(blocks.shape[1], dtype=torch.float64)
    R = (eye + Q) @ (eye - Q).inverse()
    return torch.einsum("knm,kn...->km...", R, W.double().view(len(blocks), blocks.shape[1], *W.shape[1:])).reshape(W.shape)


@pytest.mark.parametrize("alpha", [1.0, 0.02, 1e-3, 0.0])
@pytest.mark.parametrize("weight", [LINEAR, W], ids=["linear", "conv"])
def test_sd_scripts_own_rotations(tmp_path: Path, weight: Tensor, alpha: float) -> None:
    base = write_checkpoint(tmp_path / "base", {"mid_block.proj_in.weight": weight.double()})
    tensors = {"oft_unet_mid_block_proj_in.oft_blocks": BLOCKS, "oft_unet_mid_block_proj_in.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ss_network_module": "networks.oft"})
    merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")["mid_block.proj_in.weight"]
    torch.testing.assert_close(found, own(BLOCKS, weight, torch.tensor(alpha).double().item()), rtol=1e-10, atol=1e-10)
    assert same(again(tmp_path, tensors), tensors)


def test_a_fused_weight_is_turned_part_by_part(tmp_path: Path) -> None:
    module, weight = "oft_unet_double_blocks_0_img_attn_qkv", randn(12, 5, seed=3)
    blocks = [randn(2, 2, 2, seed=4), randn(2, 4, 4, seed=5)]
    tensors = {f"{module}.oft_blocks.{index}": part for index, part in enumerate(blocks)} | {f"{module}.alpha": torch.tensor(0.03)}
    save_file(tensors, tmp_path / "a.safetensors")
    base = write_checkpoint(tmp_path / "base", {"double_blocks.0.img_attn.qkv.weight": weight.double()})
    merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    expected = torch.cat([own(part, rows, torch.tensor(0.03).item()) for part, rows in zip(blocks, weight.split([4, 8]), strict=True)])
    found = read_checkpoint(tmp_path / "out")["double_blocks.0.img_attn.qkv.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert same(again(tmp_path, tensors), tensors)


NUMBERS = to_ref(BLOCKS)
LYCORIS = {"side": "out", "factor": -1.0, "together": True, "floor": 1e-8}
FLAT = "oft_unet_x.weight"
FAULTS: dict[str, tuple[str, Delta, str]] = {
    "of inputs": ("x.y.weight", Rotated(numbers=NUMBERS), "these files turn a weight's outputs by whole blocks, and this turns its inputs"),
    "the inverse": ("x.y.weight", Rotated(numbers=NUMBERS, **LYCORIS | {"factor": 1.0}), "make rotations of their numbers in another way"),
    "bounded each": ("x.y.weight", Rotated(numbers=NUMBERS, **LYCORIS | {"together": False}, bound=1.0), "in another way"),
    "halves": ("x.y.weight", Butterfly(numbers=to_ref(randn(1, 2, 2, 2, seed=0)), side="out"), "in another way"),
    "unbounded, as sd-scripts' own": (FLAT, Rotated(numbers=NUMBERS, **LYCORIS), "make rotations of their numbers in another way"),
    "no rotation, as sd-scripts' own": (FLAT, Adjoined(**{k[:2]: to_ref(v) for k, v in GLORA.items()}, alpha=1.0), "with one alpha"),
    "a part alone, as sd-scripts' own": (
        FLAT,
        Chain(first=Part(delta=Rotated(numbers=NUMBERS), start=6, stop=12), then=Part(delta=Rotated(numbers=NUMBERS), start=0, stop=6)),
        "sd-scripts' files say rotations of a weight's rows with one alpha, and nothing else",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_said(name: str) -> None:
    tensor, delta, text = FAULTS[name]
    with pytest.raises(NotExpressible) as caught:
        kohya.encode(Adapter({tensor: delta}, flat=tensor == FLAT))
    assert text in str(caught.value) and tensor in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"oft_blocks": torch.zeros(2, 3, 2), "alpha": torch.tensor(1.0)}, "oft_blocks: no blocks of rotations: found [2, 3, 2]"),
        ({"oft_blocks.1": torch.zeros(2, 2, 2), "alpha": torch.tensor(1.0)}, "no kind of change that is known"),
        ({"oft_blocks": torch.zeros(2, 2, 2)}, "has no alpha beside it"),
        ({"oft_blocks": torch.zeros(2, 2, 2), "alpha": torch.tensor(-1.0)}, "alpha: alpha is below 0"),
    ],
)
def test_faults_of_sd_scripts_own(tmp_path: Path, tensors: dict[str, Tensor], text: str) -> None:
    save_file({f"oft_unet_x.{slot}": tensor for slot, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(LoratoolsError) as caught:
        load(tmp_path / "a.safetensors")
    assert text in str(caught.value)


def test_what_comfyui_would_take_for_another_change() -> None:
    core = Adjoined(**{k[:2]: to_ref(v) for k, v in GLORA.items()}, alpha=1.0, bm=to_ref(randn(2, 2, 3, seed=0)))
    cases = {
        "reads no core": core,
        "leaves the rows' factors out": Rotated(numbers=NUMBERS, scale=to_ref(torch.ones(6, 1)), **LYCORIS),
        "bounds a rotation by alpha": Rotated(numbers=NUMBERS, bound=1.0, **LYCORIS),
    }
    for text, delta in cases.items():
        with pytest.raises(NotExpressible, match=rf"x\.y\.weight: ComfyUI .*{text}.*--format kohya"):
            encode(Adapter({"x.y.weight": delta}), "comfyui")
    assert encode(Adapter({"x.y.weight": Rotated(numbers=NUMBERS, **LYCORIS)}), "comfyui").tensors
