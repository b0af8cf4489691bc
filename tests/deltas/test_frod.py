"""FRoD: a weight in a basis, by plain algebra with an inverse; the same bits for any blocks and threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.frod import FRoD
from loratools.errors import FormatError, ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def parts(width: int, seed: int) -> dict[str, Tensor]:
    count = min(5, width * width)
    places = torch.randperm(width * width, generator=torch.Generator().manual_seed(seed))[:count]
    V = randn(width, width, seed=seed) + 3 * torch.eye(width)
    tensors = {"V": V, "l": randn(width, seed=seed + 1), "values": randn(count, seed=seed + 2)}
    return tensors | {"places": torch.stack([places // width, places % width]), "size": torch.tensor([width, width])}


def made(tensors: dict[str, Tensor]) -> FRoD:
    return FRoD(**{name: to_ref(tensor) for name, tensor in tensors.items()})


def algebra(tensors: dict[str, Tensor], W: Tensor) -> Tensor:
    V = tensors["V"].double()
    coordinates = torch.linalg.solve(V, W.double().T).T
    lengths = coordinates.norm(dim=0)
    U = torch.where(lengths > 1e-12, coordinates / lengths, 0.0)
    S = torch.sparse_coo_tensor(tensors["places"], tensors["values"].double(), V.shape).to_dense()
    return U @ (S + torch.diag(tensors["l"].double())) @ V.T


@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_algebra(out: int, width: int, seed: int) -> None:
    tensors, W = parts(width, seed), randn(out, width, seed=seed + 7)
    expected = algebra(tensors, W)
    # a random V has a condition of up to some thousands here
    assert torch.allclose(applied(made(tensors), W), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_what_it_began_with_is_the_weight_itself() -> None:
    tensors, W = parts(6, 0), randn(9, 6, seed=1)
    lengths = torch.linalg.solve(tensors["V"].double(), W.double().T).T.norm(dim=0)
    start = tensors | {"l": lengths, "values": torch.zeros(5)}
    assert torch.allclose(applied(made(start), W), W.double(), rtol=1e-12, atol=1e-12)
    W[:, :] = 0
    assert torch.equal(applied(made(tensors), W), torch.zeros(9, 6, dtype=torch.float64))  # nothing has no direction


def test_any_blocks_and_threads_give_the_same_bytes() -> None:
    tensors, W = parts(150, 0), randn(300, 150, seed=1)
    assert blocks_agree(made(tensors), W)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(applied(made(tensors), W))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["V", "l", "values", "places", "size"])
def test_what_does_not_meet(name: str) -> None:
    tensors = parts(6, 0)
    for wrong in (torch.cat([tensors[name], tensors[name][:1]]), tensors[name].unsqueeze(0)):
        with pytest.raises(ShapeError, match="the basis and what is trained of it do not meet"):
            made(tensors | {name: wrong})
    delta = made(tensors)
    assert delta.fits(Spec("F32", (9, 6))) and not delta.fits(Spec("F32", (6, 9))) and delta.parameters == 36 + 6 + 5 + 10 + 2
    with pytest.raises(ShapeError, match=r"found \[9, 5\], expected \[out, 6\]"):
        delta.spec(Spec("F32", (9, 5)))


def test_values_that_say_nothing() -> None:
    tensors, W = parts(6, 0), randn(9, 6, seed=1)
    faults = {
        "places are whole numbers": {"places": tensors["places"].float()},
        r"the size of the sparse part is not the basis's: found \[6, 7\], expected \[6, 6\]": {"size": torch.tensor([6, 7])},
        "the sparse part names a place twice": {"places": torch.zeros(2, 5, dtype=torch.int64)},
        "a place outside": {"places": tensors["places"] + 5},
    }
    for text, change in faults.items():
        with pytest.raises(FormatError, match=text):
            applied(made(tensors | change), W)
    with pytest.raises(UnsupportedError, match="as good as singular: found a condition of inf"):
        applied(made(tensors | {"V": torch.ones(6, 6)}), W)
