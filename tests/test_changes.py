"""Changes: sᵢ·(applyᵢ(W) − W) of every kind against dense algebra, apart, and the same bits for any size of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.changes import Changes
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain, Part
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.errors import UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.ops._lora import dense, low

SHAPE = (20, 7)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W = randn(*SHAPE, seed=9).float()
LOW, OTHER = low(SHAPE, 3, 0), low(SHAPE, 2, 1, rslora=True)
MAGNITUDES = {"out": randn(20, 1, seed=3).abs(), "in": randn(1, 7, seed=3).abs()}


def dora(axis: str) -> Tensor:
    V = W.double() + dense(LOW)
    return MAGNITUDES[axis] * V / V.norm(dim=1 if axis == "out" else 0, keepdim=True)


KINDS: dict[str, tuple[Delta, Tensor]] = {
    "lora": (LOW, W.double() + dense(LOW)),
    "full": (Full(diff=to_ref(randn(*SHAPE, seed=4)), scale=0.5), W.double() + 0.5 * randn(*SHAPE, seed=4)),
    "dora out": (DoRA(direction=LOW, magnitude=to_ref(MAGNITUDES["out"])), dora("out")),
    "dora in": (DoRA(direction=LOW, magnitude=to_ref(MAGNITUDES["in"])), dora("in")),
    "replacement": (Replacement(value=to_ref(randn(*SHAPE, seed=5))), randn(*SHAPE, seed=5)),
    "chain": (Chain(first=Replacement(value=to_ref(randn(*SHAPE, seed=5))), then=LOW), randn(*SHAPE, seed=5) + dense(LOW)),
    "part": (Part(delta=low((5, 7), 2, 6), start=3, stop=8), W.double() + torch.cat([0 * W[:3], dense(low((5, 7), 2, 6)), 0 * W[8:]])),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 21, 50, 1 << 18])
def test_each_is_its_own_change(kind: str, block: int) -> None:
    delta, changed = KINDS[kind]
    found = Changes([(delta, -0.7), (OTHER, 2.0)], Spec("F32", SHAPE), to_ref(W), block=block)
    one, other = (torch.cat([blocks[index].clone() for blocks in map(found, found.parts())]) for index in (0, 1))
    assert torch.allclose(one, -0.7 * (changed - W.double()), atol=1e-13)
    assert torch.allclose(other, 2.0 * dense(OTHER), atol=1e-13)
    assert torch.equal(torch.cat([rows.clone() for rows in found.one(0)]), one)
    whole = Changes([(delta, -0.7)], Spec("F32", SHAPE), to_ref(W))
    assert torch.equal(torch.cat([rows.clone() for rows in whole.one(0)]), one)


def test_a_convolution_is_a_matrix() -> None:
    conv = low((8, 4, 3, 3), 3, 0, layer="conv")
    found = Changes([(conv, 1.0)], Spec("BF16", (8, 4, 3, 3)), None)
    assert (found.rows, found.columns) == (8, 36)
    assert torch.allclose(torch.cat([rows.clone() for rows in found.one(0)]), dense(conv), atol=1e-13)


def test_what_needs_the_weight_says_so() -> None:
    with pytest.raises(UnsupportedError, match="what a DoRA delta changes depends on the base; give --base"):
        Changes([(KINDS["dora out"][0], 1.0)], Spec("F32", SHAPE), None)
    grown = Replacement(value=to_ref(torch.zeros(21, 7)))
    with pytest.raises(UnsupportedError, match=r"another shape: found \[21, 7\], expected \[20, 7\]"):
        Changes([(grown, 1.0)], Spec("F32", SHAPE), to_ref(W))
