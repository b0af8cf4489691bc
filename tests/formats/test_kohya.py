"""kohya's and LyCORIS' files: each kind by its own algebra, merged into a base by its flattened names; every fault named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools import inspect, merge
from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, ShapeError
from loratools.formats import load
from loratools.formats.base import ReadOptions
from loratools.formats.kohya import encode
from loratools.tensors import to_ref
from tests.files import read_checkpoint, write_checkpoint
from tests.formats.keytables import container
from tests.strategies import randn

MODULE = "lora_unet_mid_block_proj_in"
W = randn(6, 4, 3, 3, seed=9)
LINEAR = randn(6, 4, seed=8)


def pair(out: int, into: int, rank: int, *kernel: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(up, down) of a module."""
    return randn(out, rank, *(1,) * len(kernel), seed=seed), randn(rank, into, *kernel, seed=seed + 1)


def merged(folder: Path, tensors: dict[str, Tensor], weight: Tensor, **more: Tensor) -> Tensor:
    """The weight of `mid_block.proj_in` with these tensors of its module merged into it, in float64."""
    base = write_checkpoint(folder / "base", {"mid_block.proj_in.weight": weight.double(), **more})
    save_file({f"{MODULE}.{slot}": tensor for slot, tensor in tensors.items()}, folder / "a.safetensors")
    receipt = merge(base, folder / "a.safetensors", folder / "out")
    assert receipt["applied"] == receipt["expected"] > 0
    return read_checkpoint(folder / "out")["mid_block.proj_in.weight"]


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (torch.tensor(3.0), 1.5), (torch.tensor([3], dtype=torch.int64), 1.5)])
def test_linear_and_its_alpha(tmp_path: Path, alpha: Tensor | None, scale: float) -> None:
    up, down = pair(6, 4, 2)
    tensors = {"lora_up.weight": up, "lora_down.weight": down} | ({} if alpha is None else {"alpha": alpha})
    assert close(merged(tmp_path, tensors, LINEAR), LINEAR.double() + scale * up.double() @ down.double())


def test_convolutions_also_of_kernel_one_on_a_matrix_and_back(tmp_path: Path) -> None:
    up, down = pair(6, 4, 2, 3, 3)
    change = torch.einsum("or,rikl->oikl", up.double()[:, :, 0, 0], down.double())
    assert close(merged(tmp_path / "conv", {"lora_up.weight": up, "lora_down.weight": down}, W), W.double() + change)
    up, down = pair(6, 4, 2, 1, 1)
    flat = up.double()[:, :, 0, 0] @ down.double()[:, :, 0, 0]
    assert close(merged(tmp_path / "matrix", {"lora_up.weight": up, "lora_down.weight": down}, LINEAR), LINEAR.double() + flat)
    up, down = pair(6, 4, 2)
    point = LINEAR[..., None, None]
    found = merged(tmp_path / "point", {"lora_up.weight": up, "lora_down.weight": down}, point)
    assert close(found, point.double() + (up.double() @ down.double())[..., None, None])


def test_a_core_between_the_factors(tmp_path: Path) -> None:
    up, mid, down = randn(6, 2, 1, 1, seed=0), randn(2, 2, 3, 3, seed=1), randn(2, 4, 1, 1, seed=2)
    change = torch.einsum("mnkl,om,ni->oikl", mid.double(), up.double()[:, :, 0, 0], down.double()[:, :, 0, 0])
    tensors = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(1.0)}
    assert close(merged(tmp_path, tensors, W), W.double() + 0.5 * change)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("weight", [LINEAR, W], ids=["linear", "conv"])
def test_magnitudes_on_either_axis(tmp_path: Path, weight: Tensor, axis: str) -> None:
    up, down = pair(6, 4, 2, *weight.shape[2:])
    V = weight.double() + torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())
    axes = tuple(range(1, weight.ndim)) if axis == "out" else (0, *range(2, weight.ndim))
    norms = V.square().sum(axes, keepdim=True).sqrt()
    m = 1 + randn(*norms.shape, seed=5).square()
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": m}
    assert close(merged(tmp_path, tensors, weight), m.double() * V / norms)


def test_loha_full_norms_and_biases(tmp_path: Path) -> None:
    w = {f"hada_w{i}_{side}": randn(*shape, seed=i) for i in (1, 2) for side, shape in (("a", (6, 2)), ("b", (2, 36)))}
    change = (w["hada_w1_a"].double() @ w["hada_w1_b"].double()) * (w["hada_w2_a"].double() @ w["hada_w2_b"].double())
    found = merged(tmp_path / "loha", w | {"alpha": torch.tensor(3.0)}, W)
    assert close(found, W.double() + 1.5 * change.view(W.shape))
    bias = {"mid_block.proj_in.bias": randn(6, seed=3).double()}
    diff = {"diff": randn(*W.shape, seed=4), "diff_b": randn(6, seed=5)}
    assert close(merged(tmp_path / "full", diff, W, **bias), W.double() + diff["diff"].double())
    assert close(read_checkpoint(tmp_path / "full/out")["mid_block.proj_in.bias"], bias["mid_block.proj_in.bias"] + diff["diff_b"].double())
    norms = {"w_norm": randn(6, seed=6), "b_norm": randn(6, seed=7)}
    scale = randn(6, seed=1)
    assert close(merged(tmp_path / "norm", norms, scale, **bias), scale.double() + norms["w_norm"].double())


@pytest.mark.parametrize("on_input", [True, False])
def test_ia3_is_told_from_one(tmp_path: Path, on_input: bool) -> None:
    """LyCORIS multiplies by 1 + l where peft multiplies by l."""
    factors = randn(4 if on_input else 6, seed=3)
    l = 1 + (factors.double()[None] if on_input else factors.double()[:, None])  # noqa: E741
    assert close(merged(tmp_path, {"weight": factors, "on_input": torch.tensor(on_input)}, LINEAR), LINEAR.double() * l)


@pytest.mark.parametrize("alpha", [7.0, 0.0, None])
def test_two_whole_kronecker_factors_have_no_scale(tmp_path: Path, alpha: float | None) -> None:
    w1, w2 = randn(2, 4, seed=0), randn(3, 1, seed=1)
    tensors = {"lokr_w1": w1, "lokr_w2": w2} | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    assert close(merged(tmp_path, tensors, LINEAR), LINEAR.double() + torch.kron(w1.double(), w2.double()))


def test_a_flattened_suffix_and_passengers(tmp_path: Path) -> None:
    up, down = pair(6, 4, 2)
    tensors = {f"{MODULE}_lora_up.weight": up, f"{MODULE}_lora_down.weight": down, "bundle_emb.style.clip_l": randn(2, 8, seed=0)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load(tmp_path / "a.safetensors")
    assert list(adapter) == [f"{MODULE}.weight"] and list(adapter.passengers) == ["bundle_emb.style.clip_l"]
    assert "1 tensors change no weight: bundle_emb.style.clip_l" in inspect(tmp_path / "a.safetensors")["warnings"]


def test_a_published_file_of_doras() -> None:
    from loratools.formats.kohya import decode

    adapter = decode(container("flux_dora_onetrainer_format"))
    assert len(adapter) == 506 and {delta.kind for delta in adapter.values()} == {"dora"} and adapter.flat


UP, DOWN = pair(6, 4, 2)
PAIR = {"lora_up.weight": UP, "lora_down.weight": DOWN}
GLORA = {"a1.weight": randn(4, 2, seed=0), "a2.weight": randn(2, 4, seed=1), "b1.weight": UP, "b2.weight": DOWN}
OLD_GLORA = {"a1.weight": randn(2, 4, seed=0), "a2.weight": randn(4, 2, seed=1), "b1.weight": DOWN, "b2.weight": UP}
FAULTS: dict[str, tuple[dict[str, Tensor], type[LoratoolsError], str]] = {
    "no up": ({"lora_down.weight": DOWN}, FormatError, "lora_down.weight: has no lora_up.weight beside it"),
    "an up alone": ({"lora_up.weight": UP}, FormatError, "lora_up.weight: has no lora_down.weight beside it"),
    "ranks that differ": (PAIR | {"lora_up.weight": UP[:, :1]}, ShapeError, "A and B do not meet"),
    "a kernel on up": (PAIR | {"lora_up.weight": randn(6, 2, 3, 3, seed=0)}, ShapeError, "lora_up.weight: not a matrix"),
    "two kinds": (PAIR | {"diff": LINEAR}, FormatError, "of several kinds at once: found lora_down.weight, diff"),
    "a stray": (PAIR | {"mystery": UP}, FormatError, "mystery: no tensor of this family"),
    "alpha 0": (PAIR | {"alpha": torch.tensor(0.0)}, AmbiguousError, "alpha: alpha is 0, which kohya reads as the rank"),
    "alpha of two": (PAIR | {"alpha": torch.ones(2)}, FormatError, "alpha is not one number"),
    "a tensor of another kind": (PAIR | {"on_input": torch.tensor(True)}, FormatError, "of several kinds"),
    "blocks of no rotation": ({"oft_blocks": torch.zeros(2, 3, 2)}, ShapeError, "oft_blocks: no blocks of rotations: found [2, 3, 2]"),
    "half a product": ({"lokr_w1": UP, "lokr_w2_a": UP}, ShapeError, "w2 is neither whole nor a product of two"),
    "a whole and a product": ({"lokr_w1": UP, "lokr_w1_a": UP}, FormatError, "of several kinds at once: found lokr_w1, lokr_w1_a"),
    "two wholes and a core": ({"lokr_w1": UP, "lokr_w2": UP, "lokr_t2": UP}, ShapeError, "w2 is neither whole nor a product of two"),
    "GLoRA of both layouts": (dict.fromkeys(GLORA, randn(4, 4, seed=0)), AmbiguousError, "whether it is GLoRA of the older layout"),
    "GLoRA of the older layout with a kernel": (
        OLD_GLORA | {"b1.weight": randn(2, 4, 3, seed=0)}, ShapeError, "b1.weight: not a matrix: found [2, 4, 3]",
    ),
    "GLoRA with a core that does not meet": (GLORA | {"bm.weight": UP}, ShapeError, "the factors do not meet"),
    "a shape of no axes": (PAIR | {"reshape_weight": torch.tensor(3)}, FormatError, "reshape_weight is no short vector of whole numbers"),
    "a shape of nothing": (PAIR | {"reshape_weight": torch.tensor([0, 3])}, FormatError, "reshape_weight has a number below 1"),
    "GLoRA without a2": ({"a1.weight": UP}, FormatError, "has no a2.weight beside it"),
    "one its kind does not use": (PAIR | {"rescale": UP}, FormatError, "rescale: not used by this kind of change"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_tensor(tmp_path: Path, name: str) -> None:
    tensors, error, text = FAULTS[name]
    save_file({f"{MODULE}.{slot}": tensor.clone() for slot, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(error) as caught:
        load(tmp_path / "a.safetensors")
    assert text in str(caught.value) and "a.safetensors" in str(caught.value)


def test_an_alpha_of_zero_is_the_users_to_tell(tmp_path: Path) -> None:
    save_file({f"{MODULE}.{slot}": tensor for slot, tensor in {**PAIR, "alpha": torch.tensor(0.0)}.items()}, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors", options=ReadOptions(alpha=4))[f"{MODULE}.weight"].facts()["scaling"] == 2.0


def test_a_flat_magnitude_of_a_square_is_told_by_the_bases_norms(tmp_path: Path) -> None:
    """A vector as long as both sides: along the axis whose norms it fits, and an error with both readings where it fits neither."""
    up, down, square = *pair(4, 4, 2), randn(4, 4, seed=7) * torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None]
    V = square.double() + up.double() @ down.double()
    rows, columns = V.norm(dim=1), V.norm(dim=0)
    for number, (m, expected) in enumerate(((rows * 1.01, 1.01 * V), (columns * 0.99, 0.99 * V))):
        tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": m}
        assert close(merged(tmp_path / str(number), tensors, square), expected)
    with pytest.raises(AmbiguousError) as caught:
        merged(tmp_path / "neither", {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": torch.ones(4)}, torch.eye(4))
    assert "mid_block.proj_in.weight" in str(caught.value)


def test_modules_that_the_base_lacks(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"mid_block.proj_in.weight": LINEAR})
    other = {f"lora_unet_other.{slot}": tensor.clone() for slot, tensor in PAIR.items()}
    save_file({f"{MODULE}.{slot}": tensor for slot, tensor in PAIR.items()} | other, tmp_path / "a.safetensors")
    with pytest.raises(MatchError, match=r"lora_unet_other\.weight: the base has no such weight"):
        merge(base, tmp_path / "a.safetensors", tmp_path / "out")


def test_a_text_encoder_alone_is_no_unet() -> None:
    low = LowRank(A=to_ref(torch.ones(2, 4)), B=to_ref(torch.ones(4, 2)), alpha=2.0)
    assert [key.partition(".")[0] for key in encode(Adapter({"text_model.encoder.layers.0.mlp.fc1.weight": low})).tensors] == [
        "lora_te_text_model_encoder_layers_0_mlp_fc1"
    ] * 3
    assert next(iter(encode(Adapter({"mid_block.proj_in.weight": low})).tensors)).startswith("lora_unet_mid_block_proj_in.")
