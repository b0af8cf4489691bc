"""VB-LoRA: mixtures of vectors, from logits and from the weights that peft stores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.vblora import VBLoRA, largest, stored
from loratools.errors import AmbiguousError, FormatError, NonFiniteError, ShapeError
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds

COUNT, LENGTH = 6, 3


def logits(out: int, width: int, rank: int, seed: int) -> dict[str, Tensor]:
    """For a weight of (out·LENGTH, width·LENGTH)."""
    shapes = {"vectors": (COUNT, LENGTH), "logits_a": (rank, width, COUNT), "logits_b": (out, rank, COUNT)}
    return {name: randn(*shape, seed=seed + place) for place, (name, shape) in enumerate(shapes.items())}


def as_peft_stores(tensors: dict[str, Tensor], topk: int) -> dict[str, Tensor]:
    found = {"vectors": tensors["vectors"]}
    for side in "ab":
        values, places = tensors[f"logits_{side}"].double().topk(topk)
        found[f"places_{side}"] = places.to(torch.uint8)
        found[f"weights_{side}"] = values.softmax(-1)[..., :-1].contiguous()
    return found


def made(tensors: dict[str, Tensor], topk: int) -> VBLoRA:
    return VBLoRA(topk=topk, **{name: to_ref(tensor) for name, tensor in tensors.items()})


def algebra(tensors: dict[str, Tensor], topk: int) -> Tensor:
    vectors = tensors["vectors"].double()

    def side(name: str) -> Tensor:
        values, places = tensors[name].double().topk(topk)
        return torch.einsum("pqk,pqkl->pql", values.softmax(-1), vectors[places])

    A, B = side("logits_a"), side("logits_b")
    return torch.einsum("orl,ric->olic", B, A).reshape(B.shape[0] * LENGTH, -1)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, COUNT), seeds)
def test_algebra_of_both_forms(out: int, width: int, rank: int, topk: int, seed: int) -> None:
    tensors, W = logits(out, width, rank, seed), randn(out * LENGTH, width * LENGTH, seed=seed + 5)
    expected = W.double() + algebra(tensors, topk)
    for delta in (made(tensors, topk), made(as_peft_stores(tensors, topk), topk)):
        assert torch.allclose(applied(delta, W), expected, rtol=1e-12, atol=1e-12)


def test_any_blocks_give_the_same_bytes_and_facts() -> None:
    tensors = logits(4, 3, 2, 0)
    for delta in (made(tensors, 2), made(as_peft_stores(tensors, 2), 2)):
        assert blocks_agree(delta, randn(12, 9, seed=1))
        assert delta.shape() == (12, 9) and delta.facts() == {"rank": 2}
        assert delta.reproducible == ("logits_a" not in delta.refs())
        B, A = delta.product()
        assert delta.norm() == pytest.approx(float((B @ A).norm()), rel=1e-9)


@pytest.mark.parametrize("name", ["vectors", "logits_a", "logits_b", "places_a", "places_b", "weights_a", "weights_b"])
def test_what_does_not_meet(name: str) -> None:
    tensors = logits(4, 3, 2, 0)
    tensors = tensors if name.startswith("logits") else as_peft_stores(tensors, 3)
    for wrong in (tensors[name].unsqueeze(0), torch.cat([tensors[name], tensors[name][..., :1]], dim=-1)):
        if name != "vectors" or wrong.ndim == 3:
            with pytest.raises(ShapeError, match="the mixtures and their vectors do not meet"):
                made(tensors | {name: wrong}, 3)
    with pytest.raises(ShapeError, match="do not meet"):
        made(tensors, COUNT + 1)


def test_places_are_whole_numbers() -> None:
    tensors = as_peft_stores(logits(4, 3, 2, 0), 2)
    with pytest.raises(FormatError, match="whole numbers"):
        made(tensors | {"places_b": tensors["places_b"].float()}, 2)
    with pytest.raises(FormatError, match="a place outside"):
        made(tensors | {"places_b": tensors["places_b"] + COUNT}, 2).product()


def test_a_tie_for_the_last_place_is_an_error() -> None:
    assert largest(torch.tensor([[2.0, 2.0, 1.0]]), 2).weights.tolist() == [[0.5, 0.5]]
    with pytest.raises(AmbiguousError, match=r"two logits tie for place 2 of a mixture: found 1 such mixtures; .*save_only_topk_weights"):
        largest(torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, 0.0]]), 2)
    rest = largest(torch.tensor([[2.0, -torch.inf, -torch.inf]]), 2)  # what peft makes of stored weights: any of them has none
    assert rest.weights.tolist() == [[1.0, 0.0]]
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="a logit is inf or nan"):
            largest(torch.tensor([[2.0, wrong]]), 1)


def test_weights_that_no_softmax_has() -> None:
    places = torch.zeros(1, 3, dtype=torch.int64)
    assert stored(torch.tensor([[0.5, 0.25]]), places).weights.tolist() == [[0.5, 0.25, 0.25]]
    assert stored(torch.empty(1, 0), places).weights.tolist() == [[1.0]]
    for wrong in ([[0.8, 0.4]], [[-0.1, 0.4]], [[torch.nan, 0.4]]):
        with pytest.raises(FormatError, match="weights that no softmax has"):
            stored(torch.tensor(wrong), places)
